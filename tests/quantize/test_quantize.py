"""`quantize`: what it makes of a model, what it reports, and what it refuses."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from quantising import bits_of, calibrated, float_model, images, linears_of, module_at, quantised
from tiny_models import TOKENS

from ouromamba_jax import QuantConfig, QuantReport, QuantRule, load, pure, quantize, save
from ouromamba_jax.data import to_pixels
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.split_calibration import calibrate
from ouromamba_jax.quantize import OPERANDS, QuantLinear
from ouromamba_jax.quantize.floats import FloatSites, store_floats
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.sites import iter_sites, named_modules, resolve_sites
from ouromamba_jax.quantize.stages import replace_sites


def test_the_report_accounts_for_everything():
    model = float_model()
    low, report = quantised("w4a4", tune_epochs=2)
    by_path = {site.path: site for site in report.sites}
    assert len(by_path) == len(report.sites)
    linears = linears_of(model)
    scans = [path for path, site in iter_sites(model) if isinstance(site, SelectiveScan)]
    assert {p for p, s in by_path.items() if s.kind == "matmul"} == set(linears)
    assert {p for p, s in by_path.items() if s.kind != "matmul"} == {
        f"{p}.{k}" for p in scans for k in ("delta", "B", "C", "A", "D")
    }
    for path, site in by_path.items():
        edge = path.startswith(("stem", "head"))
        bits = (8, 8, 16) if edge else (4, 4, 8)
        if site.kind == "matmul":
            assert (site.weight_bits, site.act_bits, site.outlier_bits) == bits
        assert 0 <= site.outlier_rate < 0.5
        assert np.isfinite(site.sqnr_db)
        assert site.sqnr_db > (30 if edge else 5), path
        assert site.mean_bits == bits[1] + site.outlier_rate * (bits[2] - bits[1])
    matmuls = [by_path[path] for path in linears]
    assert 0 < report.outlier_rate < 0.5
    assert report.outlier_rate == pytest.approx(np.mean([site.outlier_rate for site in matmuls]))
    assert report.mean_bits == pytest.approx(np.mean([site.mean_bits for site in matmuls]))
    modules = dict(named_modules(low))
    assert all(isinstance(modules[path], QuantLinear) for path in linears)
    floats = {
        ".".join(map(str, p)): leaf for p, leaf in nnx.to_flat_state(nnx.state(low)) if isinstance(leaf, nnx.Param)
    }
    assert {path: count for path, count, _ in report.kept_float} == {path: leaf.size for path, leaf in floats.items()}
    assert {leaf.dtype for leaf in floats.values()} == {jnp.dtype(jnp.float16)}
    assert {reason for _, _, reason in report.kept_float} == {"not a matmul"}
    assert report.float_operands == tuple(
        (f"blocks.0.mixer.{name}", "the operand list leaves it out") for name in ("scan.u", "scan.y", "scan.h", "z")
    )
    assert report.tuning.keys() == {"stem", "blocks.0", "head"}
    assert all(len(losses) == 2 for losses in report.tuning.values())
    text = str(report)
    assert all(path in text for path in (*by_path, *floats, *(path for path, _ in report.float_operands)))


def test_quantising_is_deterministic_and_leaves_the_model_alone():
    model = float_model()
    before, graph = bits_of(model), nnx.graphdef(model)
    low, report = quantised("w4a4", tune_epochs=2)
    again, report_again = quantize(model, images(), QuantConfig.preset("w4a4", tune_epochs=2))
    assert bits_of(low) == bits_of(again)
    assert report == report_again
    assert bits_of(model) == before
    assert nnx.graphdef(model) == graph
    other = quantize(model, images(3), QuantConfig.preset("w4a4", tune_epochs=2))[0]
    assert bits_of(other) != bits_of(low)


@pytest.mark.slow
def test_more_bits_less_noise():
    """Site by site in the mean, and for the logits, by 5 dB at least."""
    sites, means, logits, x = [], [], [], images()
    for preset in ("w8a8", "w6a6", "w4a4"):
        low, report = quantised(preset, tune_epochs=2 if preset == "w4a4" else 0)
        means.append(report.mean_sqnr_db)
        sites.append(np.mean([s.sqnr_db for s in report.sites if s.path.startswith("blocks")]))
        fn, state = pure(low)
        logits.append(sqnr_db(float_model()(x), jax.jit(fn)(state, x)))
    for values, margin in ((sites, 5), (means, 0), (logits, 5)):
        assert all(better > worse + margin for better, worse in itertools.pairwise(values)), values
    assert min(sites[0] - sites[-1], logits[0] - logits[-1]) > 10
    assert min(logits[0] - 28, logits[-1] - 5) > 0


def test_sites_with_a_second_byte_are_reported_and_survive_saving(tmp_path):
    """Outliers of 5 bits reach so little that calibration shifts them at some sites and not at others."""
    low, report = quantised("w4a4", tune_epochs=0, outlier_bits=5)
    matmuls = {site.path: site.second_byte for site in report.sites if site.kind == "matmul"}
    assert {True, False} <= set(matmuls.values())
    x = images(1)
    for path, second_byte in matmuls.items():
        act = module_at(low, path).act
        assert second_byte == (act.shift is not None)
        assert path.startswith(("stem", "head")) or not second_byte or int(act.shift[...].max()) > 0
    save(tmp_path / "model", low)
    again = load(tmp_path / "model")
    assert bits_of(again) == bits_of(low)
    assert nnx.graphdef(again) == nnx.graphdef(low)
    (fn, state), (fn_again, state_again) = pure(low), pure(again)
    logits = jax.jit(fn)(state, x)
    assert bool(jnp.isfinite(logits).all())
    np.testing.assert_array_equal(jax.jit(fn_again)(state_again, x), logits)
    assert "yes" in str(report)


def test_weights_alone():
    """Activations stay float: products of floats with rounded weights, and scans as they were."""
    low, report = quantize(float_model(), images(), QuantConfig(act_bits=None, tune_epochs=0, float_dtype="float32"))
    linears = linears_of(float_model())
    assert {site.path for site in report.sites} == linears.keys()
    assert {(s.kind, s.weight_bits, s.act_bits, s.outlier_bits, s.mean_bits) for s in report.sites} == {
        ("matmul", 4, None, None, None)
    }
    assert report.outlier_rate == 0
    assert np.isnan(report.mean_bits)
    for path, linear in linears.items():
        module = module_at(low, path)
        assert module.act is None
        x = normal(1, (2, 5, linear.kernel.shape[0]))  # of any number of tokens
        expected = x @ module.weight.dequantize() + (0 if linear.bias is None else linear.bias[...][None, None])
        np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-5)
    assert type(low.blocks[0].mixer.scan) is SelectiveScan
    reasons = {path: reason for path, _, reason in report.kept_float} | dict(report.float_operands)
    names = ("scan.A_log", "scan.D", "scan.dt_bias", "scan.u", "scan.delta", "scan.B", "scan.C", "scan.h", "z")
    assert {reasons[f"blocks.0.mixer.{name}"] for name in names} == {"only the weights of linear layers are quantised"}
    assert 15 < report.mean_sqnr_db < 40


def test_skipped_sites_stay_float_and_are_listed():
    rules = (QuantRule(r"out_proj|\.scan$", skip=True), QuantRule(r"x_proj", weight_bits=5, act_bits=6, outlier_bits=8))
    low, report = quantised("w8a8", tune_epochs=0, rules=rules)
    mixer = low.blocks[0].mixer
    assert type(mixer.out_proj) is nnx.Linear
    assert type(mixer.scan) is SelectiveScan
    exact = float_model().blocks[0].mixer
    np.testing.assert_array_equal(mixer.out_proj.kernel[...], exact.out_proj.kernel[...].astype(jnp.float16))
    kept = {path: reason for path, _, reason in report.kept_float}
    for name in ("out_proj.kernel", "scan.A_log", "scan.D"):
        assert kept[f"blocks.0.mixer.{name}"] == f"the rule {rules[0].pattern!r} leaves it out"
    assert kept["blocks.0.norm.scale"] == "not a matmul"
    reasons = dict(report.float_operands)
    assert {reasons[f"blocks.0.mixer.scan.{k}"] for k in ("u", "delta")} == {kept["blocks.0.mixer.scan.D"]}
    paths = {site.path: site for site in report.sites}
    assert not [p for p in paths if "out_proj" in p or ".scan." in p]
    site = paths["blocks.0.mixer.directions.1.x_proj"]
    assert (site.weight_bits, site.act_bits, site.outlier_bits) == (5, 6, 8)
    assert paths["blocks.0.mixer.in_proj"].weight_bits == 8


def test_operands_that_the_list_leaves_out_stay_float_and_are_listed():
    """Those of a scan that is quantised in part: A and D with their parameters, activations by name."""
    model = nnx.clone(float_model())
    config = QuantConfig(operands=("delta", "A"), scale_search="max", float_dtype="float32")
    specs, found, _ = calibrated(model, images(1), config)
    modules = made(model, specs, found)
    low = replace_sites(model, modules)
    sites = {path: (path, site) for path, site in iter_sites(model)}
    left_out = "the operand list leaves it out"
    why = FloatSites(sites, modules, config)
    kept = {path: reason for path, _, reason in store_floats(low, jnp.dtype("float32"), why, "")}
    assert {path for path, reason in kept.items() if reason == left_out} == {"blocks.0.mixer.scan.D"}
    assert kept["blocks.0.mixer.scan.dt_bias"] == "not a matmul"
    names = [(f"blocks.0.mixer.{name}", left_out) for name in ("scan.u", "scan.B", "scan.C", "scan.y", "scan.h", "z")]
    assert sorted(why.activations()) == sorted(names)
    skipping = dataclasses.replace(config, operands=OPERANDS, rules=(QuantRule(r"\.z$", skip=True),))
    assert list(FloatSites(sites, modules, skipping).activations()) == [
        ("blocks.0.mixer.z", r"the rule '\\.z$' leaves it out")
    ]


def made(model, specs, found):
    sites = {path: module_at(model, path) for path in specs}
    return {path: kind_of(site).make(site, specs[path], found[path]) for path, site in sites.items()}


def test_measured_rates_do_not_depend_on_the_batches():
    """Six images in batches of four: the last batch counts for its two."""
    stage, x = float_model().stem, images(1)
    specs, found, seen = calibrated(stage, x, QuantConfig(scale_search="max"))
    low = replace_sites(stage, made(stage, specs, found))
    batches = [seen], [jax.tree.map(lambda x, part=part: x[part], seen) for part in (slice(4), slice(4, None))]
    whole, parts = ([s.outlier_rate for s in measure(stage, low, specs, batch)] for batch in batches)
    assert min(whole) > 0
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


def test_a_report_without_matmuls():
    report = QuantReport((), (), {})
    assert report.outlier_rate == 0.0
    assert np.isnan(report.mean_sqnr_db)
    assert np.isnan(report.mean_bits)


VARIANTS = (
    dict(operands=OPERANDS),
    dict(detection="static"),
    dict(detection="none"),
    dict(weight_group=2, rules=(QuantRule("stem|head", skip=True),)),
    dict(scale_search="max", tune_epochs=0),
    dict(act_bits=None),
)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_runs(fields, tmp_path):
    low, report = quantize(float_model(), images(), QuantConfig.preset("w4a4", **{"tune_epochs": 1, **fields}))
    fn, state = pure(low)
    logits = jax.jit(fn)(state, images(9))
    assert bool(jnp.isfinite(logits).all())
    named = {site.path.removeprefix("blocks.0.mixer.scan.") for site in report.sites}
    asked = set(fields.get("operands", ("delta", "B", "C", "A", "D"))) if "act_bits" not in fields else set()
    assert asked - {"z", "q", "k", "v", "probs"} <= named  # a Vim has no attention
    assert ("blocks.0.mixer.z" in named) == ("z" in asked)
    save(tmp_path / "model", low)
    assert bits_of(load(tmp_path / "model")) == bits_of(low)


def test_activations_that_are_not_finite_name_their_site():
    model = nnx.clone(float_model())
    model.blocks[0].norm.scale.set_value(model.blocks[0].norm.scale[...].at[3].set(3e38))  # times more than 1.2
    with pytest.raises(ValueError, match=r"^blocks\.0\.mixer\.\S+ cannot be calibrated: .* hold NaN or infinity"):
        quantize(model, images(), QuantConfig.preset("w4a4", scale_search="max", tune_epochs=0))
    for value in (jnp.nan, -jnp.inf):
        with pytest.raises(ValueError, match="check the images and the float model"):
            calibrate(jnp.ones((1, 3, 4)).at[0, 1, 2].set(value), QuantConfig().splitting)


def test_a_rule_for_an_operand_that_is_not_quantised():
    with pytest.raises(ValueError, match=r"no quantised site .*, such as blocks\.0\.mixer\.z, has act_bits; change"):
        resolve_sites(float_model(), QuantConfig.preset("w4a4", rules=(QuantRule(r"mixer\.z$", act_bits=8),)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((QuantRule("no_such_layer", skip=True),), "the rule 'no_such_layer' matches no site"),
        (
            (QuantRule(r"blocks\.0", act_bits=8), QuantRule(r"blocks\.7\.", act_bits=8)),
            r"'blocks\\\\.7\\\\.' matches no site",
        ),
    ],
)
def test_a_rule_that_matches_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        quantize(float_model(), images(), QuantConfig.preset("w4a4", rules=rules))


def test_weight_groups_by_layer():
    """A group must divide a layer's inputs; a rule gives a layer other groups, or none."""
    model = float_model()
    message = r'weight_group 5 does not divide the 48 inputs of stem\.proj; .* QuantRule\(r"\\\.proj\$", '
    with pytest.raises(ValueError, match=message):
        resolve_sites(model, QuantConfig(weight_group=5))
    others = QuantRule("stem|head|x_proj|dt_proj", weight_group=0)
    rules = (others, QuantRule("in_proj", weight_group=4), QuantRule("out_proj", weight_bits=3))
    found = resolve_sites(model, QuantConfig(weight_group=5, rules=rules))
    assert found["blocks.0.mixer.in_proj"].weight_group == 4
    assert found["blocks.0.mixer.out_proj"].weight_group == 5
    assert {c.weight_group for path, c in found.items() if not re.search("in_proj|out|scan", path)} == {None}
    excepted = QuantRule(r"\.dt_proj$", weight_group=0)  # what the message says
    found = resolve_sites(model, QuantConfig(weight_group=2, rules=(excepted,)))
    assert {path for path, c in found.items() if c.weight_group is None} == {p for p in found if p.endswith(".dt_proj")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.at[3, 2, 1, 0].set(jnp.nan), "images hold values that are not finite"),
        (lambda x: x.at[3, 2, 1, 0].set(-jnp.inf), "images hold values that are not finite"),
        (lambda x: x[0], r"images have shape .*one image is a batch"),
        (lambda x: x[:0], "there are no images to calibrate with"),
        (lambda x: x[:, :8], "images have shape"),
        (lambda x: jnp.asarray(to_pixels(x, float_model().config.preprocessing)), "images are uint8.*load_images"),
        (lambda x: 255 * jnp.clip(x, 0, 1), "images are 0 to 255, but.*load_images"),
    ],
    ids=["nan", "inf", "rank", "none", "size", "uint8", "pixels"],
)
def test_wrong_images(spoil, message):
    with pytest.raises(ValueError, match=message):
        quantize(float_model(), spoil(images()), QuantConfig.preset("w4a4"))


def test_a_quantised_model_is_not_quantised_again():
    low = quantised("w4a4", tune_epochs=2)[0]
    with pytest.raises(ValueError, match="already quantised"):
        quantize(low, images(), QuantConfig.preset("w8a8"))


def test_another_token_count_is_refused():
    low = quantised("w4a4", tune_epochs=2)[0]
    mixer = low.blocks[0].mixer
    for tokens in (TOKENS - 1, TOKENS + 1, 1):
        x = normal(0, (2, tokens, 20))
        with pytest.raises(
            ValueError, match=f"calibrated at {TOKENS} tokens per sample and got {tokens}; quantise it again"
        ):
            mixer.in_proj(x)
    with pytest.raises(ValueError, match="images have shape"):
        low(normal(0, (2, 16, 16, 3)))


def test_quantise_refuses_a_stage_with_a_hidden_product():
    model = nnx.clone(float_model())

    class Head(nnx.Module):
        def __init__(self, head):
            self.head, self.mix = head, nnx.Param(jnp.eye(7))

        def __call__(self, x):
            return self.head(x) @ self.mix[...]

    model.head = Head(model.head)
    with pytest.raises(ValueError, match=r"head has 1 matrix products outside"):
        quantize(model, images(), QuantConfig.preset("w4a4", tune_epochs=0))
