"""The quantiser: the integer path against its trainable stand-in, the tuning, the report, and what is refused."""

import dataclasses
import itertools
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import heavy_tailed, normal
from flax import nnx
from tiny_models import TINY, TOKENS
from tolerances import FAKE_AGAINST_INTEGER, FAKE_AGAINST_INTEGER_16

from ouromamba_jax.checkpoint import load, save
from ouromamba_jax.data import to_pixels
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models import create_model, pure
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.qtensor import max_level
from ouromamba_jax.quantize import (
    OPERANDS,
    QuantConfig,
    QuantLinear,
    QuantReport,
    QuantRule,
    QuantSelectiveScan,
    quantize,
)
from ouromamba_jax.quantize.calibrate import capture
from ouromamba_jax.quantize.config import ACTIVATION_OPERANDS
from ouromamba_jax.quantize.fake import install_fakes
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.modules import SiteSpec
from ouromamba_jax.quantize.rounding import scan_parameter
from ouromamba_jax.quantize.run import quantized_modules
from ouromamba_jax.quantize.sites import iter_sites, named_modules, resolve_sites, set_module
from ouromamba_jax.quantize.stages import float_operands, replace_sites, store_floats
from ouromamba_jax.quantize.tune import stage_loss, tune_scales, update_of

EXACT = dict(float_dtype="float32")
IMAGES = 6


def images(key: int = 0, count: int = IMAGES) -> jax.Array:
    return heavy_tailed(key, (count, 12, 16, 3))


@cache
def float_model(depth: int = 1) -> nnx.Module:
    """A tiny Vim in which no parameter has the regular values of its initialisation (A = -1 .. -N, D = 1, bias 0)."""
    model = create_model("vim_micro", rngs=nnx.Rngs(5), **{**TINY, "depth": depth})
    for i, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model))):
        leaf.set_value(leaf[...] + 0.2 * normal(100 + i, leaf.shape))
    return model


@cache
def quantised(name: str, **fields):
    return quantize(float_model(), images(), QuantConfig.preset(name, **fields))


def bits_of(model: nnx.Module) -> dict[tuple, bytes]:
    return {path: np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def with_plain_scales(module: nnx.Module, x: jax.Array, config: QuantConfig):
    """(specs, scales, fixed) of every site in `module`: from ranges alone, so that tokens overflow."""
    rng = np.random.default_rng(0)
    configs = {
        path: resolved
        for path, site in iter_sites(module)
        if (resolved := config.resolve(path)) is not None and (not path.endswith("z") or "z" in resolved.operands)
    }
    seen = capture(module, x, configs, len(x))[1]
    sites, specs, scales, fixed = dict(iter_sites(module)), {}, {}, {}

    def activation(x, config):
        """A scale for 0.6 of the token's range, and thresholds or a channel list at random."""
        found = {}
        if config.detection == "static":
            found["channels"] = jnp.asarray(rng.random(x.shape[-1]) < 0.2)
        if config.threshold == "offline":
            found["theta"] = jnp.asarray(rng.uniform(1.0, 2.0, x.shape[1]), jnp.float32)
        return jnp.abs(x).max(axis=(0, 2)) * 0.6 / max_level(config.act_bits), found

    for path, c in configs.items():
        site, inputs = sites[path], seen[path]
        if isinstance(site, SelectiveScan):
            specs[path] = SiteSpec(c, tokens=TOKENS, channels=40)
            parts = {
                k: [activation(inputs[k][:, :, g], c) for g in range(2)] for k in ACTIVATION_OPERANDS if k in c.operands
            }
            scales[path] = {k: jnp.stack([s for s, _ in v]) for k, v in parts.items()}
            fixed[path] = {k: [f for _, f in v] for k, v in parts.items()}
            for k in set("AD") & set(c.operands):
                scales[path][k] = (
                    jnp.abs(scan_parameter(site, k)).reshape(2, 40, -1).max(axis=1) * 0.9 / max_level(c.act_bits)
                )
            if "h" in c.operands:
                scales[path]["h"] = jnp.max(inputs["h"], axis=0).T * 0.9 / 127
            continue
        specs[path] = SiteSpec(c, tokens=inputs["act"].shape[1], channels=inputs["act"].shape[2])
        scale, found = activation(inputs["act"], c)
        scales[path], fixed[path] = {"act": scale}, {"act": found}
        if isinstance(site, nnx.Linear):
            groups = 1 if c.weight_group is None else site.kernel.shape[0] // c.weight_group
            columns = jnp.abs(site.kernel[...]).reshape(groups, -1, site.kernel.shape[1])
            scales[path]["weight"] = columns.max(axis=1) * 0.9 / max_level(c.weight_bits)
    return specs, scales, fixed, seen


AGREEMENT = [
    ("w4a4", {}),
    ("w8a8", {}),
    *(
        pytest.param(name, fields, marks=pytest.mark.slow)
        for name, fields in (
            ("w4a8", {}),
            ("w6a6", {}),
            ("w4a4", dict(rules=())),
            ("w6a6", dict(outlier_scale="free")),
            ("w4a4", dict(detection="static")),
            ("w4a4", dict(detection="none")),
            ("w8a8", dict(detection="none")),
            ("w4a4", dict(threshold="offline")),
            ("w4a4", dict(outlier_scale="free", spec="released")),
            ("w4a4", dict(operands=OPERANDS)),
            ("w4a4", dict(weight_group=2, rules=())),
            ("w4a4", dict(operands=())),
            ("w4a4", dict(rules=(QuantRule("x_proj|scan", skip=True),))),
        )
    ),
]


class Beside:
    """A quantised site that also notes what its trainable stand-in makes of the same inputs."""

    def __init__(self, site, fake, path: str, pairs: dict[str, tuple[jax.Array, jax.Array]]):
        self.site, self.fake, self.path, self.pairs = site, fake, path, pairs

    def __call__(self, *inputs):
        y = self.site(*inputs)
        if not isinstance(self.site, QuantSelectiveScan):
            self.pairs[self.path] = self.fake(*inputs), y
            return y
        self.pairs[self.path] = self.fake(*inputs).y, y.y
        operands = zip(self.fake.operands(*inputs), self.site.operands(*inputs), strict=True)
        self.pairs |= {f"{self.path} {k}": v for k, v in zip(("u", "delta", *"ABCD"), operands, strict=True)}
        return y


@pytest.mark.parametrize(("name", "fields"), AGREEMENT)
def test_fake_and_integer_paths_agree(name, fields):
    """With the same scales the trainable stand-ins compute what the quantised model computes.

    Every site, on what enters it in the quantised model; and the logits of at least two images. A rounding by which two
    sites differ may carry an entry at the next one across the edge of a level: in one image of ten, by the kind of CPU.
    """
    config = dataclasses.replace(QuantConfig.preset(name), **EXACT, **fields)
    model, x = float_model(), images(1)
    specs, scales, fixed, _ = with_plain_scales(model, x, config)
    low = replace_sites(model, quantized_modules(model, specs, scales, fixed))
    (graphdef, state), (low_graphdef, low_state) = nnx.split(model), nnx.split(low)

    @jax.jit
    def both(state, low_state, scales, x):
        fake, real = install_fakes(nnx.merge(graphdef, state), specs, scales, fixed), nnx.merge(low_graphdef, low_state)
        pairs = {}
        for path in specs:
            set_module(real, path, Beside(_module(real, path), _module(fake, path), path, pairs))
        return fake(x), real(x), pairs

    fake, real, pairs = both(state, low_state, scales, x)
    assert len(pairs) >= len(specs)
    bits = {spec.config.outlier_bits for spec in specs.values()}
    limit = FAKE_AGAINST_INTEGER_16 if 16 in bits else FAKE_AGAINST_INTEGER
    for path, (one, other) in pairs.items():
        assert float(jnp.abs(one - other).max()) <= limit * float(jnp.abs(one).max()), path
        assert float(jnp.std(one)) > 0, path
    difference, quantisation = (np.sort(jnp.abs(fake - other).max(axis=1)) for other in (real, model(x)))
    assert difference[1] <= limit * float(jnp.abs(fake).max())
    assert difference[-1] < 0.5 * quantisation[0]
    assert quantisation[0] > 1e-3


def _module(model, path: str):
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


@cache
def stage_problem(name: str, operands: tuple[str, ...], detection: str):
    """(stage, specs, scales, fixed, x, target) of a stage of the tiny Vim."""
    model, x = float_model(), images(1)
    for stage_name, stage in model.stages:
        out = stage(x)
        if stage_name == name:
            edges = name in ("stem", "head")
            config = QuantConfig(operands=operands, detection=detection, act_bits=8 if edges else 4, **EXACT)
            specs, scales, fixed, _ = with_plain_scales(stage, x, config)
            return stage, specs, scales, fixed, x, update_of(out, x)
        x = out
    raise KeyError(name)


@partial(jax.jit, static_argnums=(0, 1))
def gradients(graphdef, specs, state, scales, fixed, thetas, x, target):
    return jax.grad(stage_loss, argnums=5)(graphdef, specs, state, scales, fixed, thetas, x, target)


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("stem", ()),
        ("blocks.0", ("delta", "B", "C", "A", "D")),
        pytest.param("blocks.0", OPERANDS, marks=pytest.mark.slow),
        ("head", ()),
    ],
)
def test_every_scale_receives_gradient(name, operands):
    """Every entry of every scale: tokens, output channels, directions, states; none is left as it was found."""
    stage, specs, scales, fixed, x, target = stage_problem(name, operands, "dynamic")
    graphdef, state = nnx.split(stage)
    thetas = jax.tree.map(jnp.zeros_like, scales)
    grads = gradients(graphdef, tuple(specs.items()), state, scales, fixed, thetas, x, target)
    assert jax.tree.structure(grads) == jax.tree.structure(scales)
    for path, group in grads.items():
        for kind, value in group.items():
            assert value.shape == scales[path][kind].shape
            assert bool(jnp.isfinite(value).all()), (path, kind)
            assert bool((value != 0).all()), (path, kind, np.argwhere(np.asarray(value) == 0))


def test_tuning_lowers_the_loss_and_moves_every_scale():
    stage, specs, scales, fixed, x, target = stage_problem("blocks.0", ("delta", "B", "C", "A", "D"), "dynamic")
    config = QuantConfig(tune_epochs=25, batch_size=len(x), tune_learning_rate=0.03)
    tuned, losses = tune_scales(stage, specs, scales, fixed, x, target, config)
    assert len(losses) == 25
    assert losses[-1] < 0.8 * losses[0], losses
    for path, group in tuned.items():
        for kind, value in group.items():
            assert bool((value != scales[path][kind]).all()), (path, kind)
            assert bool((value > 0).all()), (path, kind)
    again = tune_scales(stage, specs, scales, fixed, x, target, config)
    assert again[1] == losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again[0], tuned))


def test_the_report_accounts_for_everything():
    model = float_model()
    low, report = quantised("w4a4", tune_epochs=2)
    by_path = {site.path: site for site in report.sites}
    assert len(by_path) == len(report.sites)
    linears = {path: site for path, site in iter_sites(model) if isinstance(site, nnx.Linear)}
    scans = [path for path, site in iter_sites(model) if isinstance(site, SelectiveScan)]
    assert {p for p, s in by_path.items() if s.kind == "matmul"} == set(linears)
    assert {p for p, s in by_path.items() if s.kind != "matmul"} == {
        f"{p}.{k}" for p in scans for k in ("delta", "B", "C", "A", "D")
    }
    for path, site in by_path.items():
        edge = path.startswith(("stem", "head"))
        expected = (8, 8, 16) if edge else (4, 4, 8)
        if site.kind == "matmul":
            assert (site.weight_bits, site.act_bits, site.outlier_bits) == expected
        assert 0 <= site.outlier_rate < 0.5
        assert np.isfinite(site.sqnr_db)
        assert site.sqnr_db > (30 if edge else 5), path
    assert 0 < report.outlier_rate < 0.5
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


def test_a_real_quantised_model_survives_saving(tmp_path):
    low = quantised("w4a4", tune_epochs=2)[0]
    save(tmp_path / "model", low)
    again = load(tmp_path / "model")
    assert bits_of(again) == bits_of(low)
    assert nnx.graphdef(again) == nnx.graphdef(low)


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
        assert kept[f"blocks.0.mixer.{name}"] == "a rule leaves it out"
    assert set(report.float_operands) >= {(f"blocks.0.mixer.scan.{k}", "a rule leaves it out") for k in ("u", "delta")}
    paths = {site.path: site for site in report.sites}
    assert not [p for p in paths if "out_proj" in p or ".scan." in p]
    site = paths["blocks.0.mixer.directions.1.x_proj"]
    assert (site.weight_bits, site.act_bits, site.outlier_bits) == (5, 6, 8)
    assert paths["blocks.0.mixer.in_proj"].weight_bits == 8


def test_operands_that_the_list_leaves_out_stay_float_and_are_listed():
    """Those of a scan that is quantised in part: A and D with their parameters, activations by name."""
    model, config = float_model(), QuantConfig(operands=("delta", "A"), **EXACT)
    specs, scales, fixed, _ = with_plain_scales(model, images(1), config)
    low = replace_sites(model, quantized_modules(model, specs, scales, fixed))
    configs = {path: spec.config for path, spec in specs.items()}
    left_out = "the operand list leaves it out"
    kept = {path: reason for path, _, reason in store_floats(low, jnp.dtype("float32"), configs, "")}
    assert {path for path, reason in kept.items() if reason == left_out} == {"blocks.0.mixer.scan.D"}
    assert kept["blocks.0.mixer.scan.dt_bias"] == "not a matmul"
    found = [(f"blocks.0.mixer.{name}", left_out) for name in ("scan.u", "scan.B", "scan.C", "scan.y", "scan.h", "z")]
    assert float_operands(low, config, "") == found
    skipping = dataclasses.replace(config, operands=OPERANDS, rules=(QuantRule(r"\.z$", skip=True),))
    assert float_operands(low, skipping, "") == [("blocks.0.mixer.z", "a rule leaves it out")]


def test_measured_rates_do_not_depend_on_the_batches():
    """Six images in batches of four: the last batch counts for its two."""
    stage, x = float_model().stem, images(1)
    specs, scales, fixed, seen = with_plain_scales(stage, x, QuantConfig(outlier_bits=4, **EXACT))
    low = replace_sites(stage, quantized_modules(stage, specs, scales, fixed))
    whole, parts = (list(measure(stage, low, specs, seen, len(x), size)) for size in (6, 4))
    for name in ("outlier_rate", "shifted_rows"):
        values = [[getattr(site, name) for site in sites] for sites in (whole, parts)]
        assert min(values[0]) > 0, name
        np.testing.assert_allclose(*values, rtol=1e-6, err_msg=name)


def test_a_report_without_matmuls():
    report = QuantReport((), (), {})
    assert report.outlier_rate == 0.0
    assert np.isnan(report.mean_sqnr_db)


VARIANTS = (
    dict(operands=OPERANDS, tune_epochs=1),
    dict(spec="released", outlier_scale="free", tune_epochs=1),
    dict(detection="static", tune_epochs=1),
    dict(detection="none", tune_epochs=1),
    dict(threshold="offline", tune_epochs=1),
    dict(detection="static", threshold="offline"),
    dict(detection="none", threshold="offline"),
    dict(weight_group=2, rules=(QuantRule("stem|head", skip=True),)),
    dict(scale_search="max", tune_epochs=0),
)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_runs(fields, tmp_path):
    low, report = quantize(float_model(), images(), QuantConfig.preset("w4a4", **{"tune_epochs": 1, **fields}))
    fn, state = pure(low)
    logits = jax.jit(fn)(state, images(9))
    assert bool(jnp.isfinite(logits).all())
    named = {site.path.removeprefix("blocks.0.mixer.scan.") for site in report.sites}
    expected = set(fields.get("operands", ("delta", "B", "C", "A", "D"))) - {
        "z",
        "q",
        "k",
        "v",
        "probs",
    }  # a Vim has no attention
    assert expected <= named
    assert ("blocks.0.mixer.z" in named) == ("z" in fields.get("operands", ()))
    save(tmp_path / "model", low)
    assert bits_of(load(tmp_path / "model")) == bits_of(low)


def test_a_rule_for_an_operand_that_is_not_quantised():
    with pytest.raises(ValueError, match="matches no site"):
        quantize(float_model(), images(), QuantConfig.preset("w4a4", rules=(QuantRule(r"mixer\.z$", act_bits=8),)))


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
    message = r'weight_group 5 does not divide the 2 inputs of blocks\.0\.\S+dt_proj; .* QuantRule\(r"\\\.dt_proj\$", '
    with pytest.raises(ValueError, match=message):
        resolve_sites(model, QuantConfig(weight_group=5))
    rules = (QuantRule("in_proj", weight_group=4), QuantRule("out_proj", weight_bits=3), QuantRule(".", weight_group=0))
    found = resolve_sites(model, QuantConfig(weight_group=5, rules=rules))
    assert found["blocks.0.mixer.in_proj"].weight_group == 4
    assert found["blocks.0.mixer.out_proj"].weight_group == 5
    assert {c.weight_group for path, c in found.items() if not re.search("in_proj|out", path)} == {None}
    excepted = QuantRule(r"\.dt_proj$", weight_group=0)  # what the message says
    found = resolve_sites(model, QuantConfig(weight_group=2, rules=(excepted,)))
    assert {path for path, c in found.items() if c.weight_group is None} == {p for p in found if p.endswith(".dt_proj")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.at[3, 2, 1, 0].set(jnp.nan), "images hold values that are not finite"),
        (lambda x: x.at[3, 2, 1, 0].set(-jnp.inf), "images hold values that are not finite"),
        (lambda x: x[0], r"must be of shape \(N, H, W, 3\)"),
        (lambda x: x[:0], r"must be of shape \(N, H, W, 3\) with N > 0"),
        (lambda x: x[:, :8], "images have shape"),
        (lambda x: jnp.asarray(to_pixels(x, float_model().config.preprocessing)), "images are uint8.*load_images"),
        (lambda x: 255 * jnp.clip(x, 0, 1), "images reach 255, but.*load_images"),
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
