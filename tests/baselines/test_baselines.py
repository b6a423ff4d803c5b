"""The rivals as a whole: what they quantise, report and refuse; and round to nearest."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import (
    FAMILIES,
    QUICK,
    SCAN,
    baseline,
    bits_of,
    captured_block,
    float_model,
    images,
    logits_of,
    modules_of,
    scan_operands,
)
from draws import heavy_tailed
from flax import nnx
from tiny_models import TOKENS
from tolerances import BATCHED_FLOAT, REORDERED

from ouromamba_jax.baselines import BASELINES, KSQConfig, PTQ4VMConfig, QMambaLikeConfig, RTNConfig, quantize_baseline
from ouromamba_jax.baselines.base import EDGES
from ouromamba_jax.baselines.released import ReleasedLinear, ReleasedScan
from ouromamba_jax.baselines.scans import walk_scan
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models import create_model, list_models
from ouromamba_jax.ops.qtensor import max_level
from ouromamba_jax.quantize import QuantConfig, QuantLinear, QuantRule, QuantSelectiveScan, quantize
from ouromamba_jax.quantize.sites import iter_sites

INDEPENDENT = [name for name in BASELINES if name != "released"]
"""Rivals whose results do not depend on the batch."""


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_quantises_a_model(name):
    before = bits_of(float_model())
    low, report = baseline(name)
    assert bits_of(float_model()) == before
    assert np.isfinite(logits_of(name)).all()
    assert 3 < sqnr_db(logits_of("float"), logits_of(name)) < 30
    modules = modules_of(low)
    linears = {path for path, site in iter_sites(float_model()) if isinstance(site, nnx.Linear)}
    if name in ("ptq4vm", "released"):
        linears = {path for path in linears if path.startswith("blocks")}
    matmuls = {s.path: s for s in report.sites if s.kind == "matmul"}
    assert matmuls.keys() == linears
    for path, site in matmuls.items():
        expected = 8 if path.startswith(("stem", "head")) else 4
        assert (site.weight_bits, site.act_bits) == (expected, expected)
        assert site.outlier_rate == 0 or (name == "released" and site.outlier_rate < 0.2)
        assert modules[path].levels.dtype == jnp.int8
        assert modules[path].levels.bits == expected
        used = np.asarray(modules[path].levels[...], np.int32)
        assert -(2 ** (expected - 1)) <= used.min() < 0 < used.max() <= max_level(expected)
        assert np.isfinite(site.sqnr_db)
        assert site.sqnr_db > 5, path
    assert report.tuning.keys() == ({"blocks.0"} if name == "ptq4vm" else set())
    assert "SQNR" in str(report)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_batch_mates_change_nothing(name):
    low, x, expected = baseline(name)[0], images(1), logits_of(name)
    order = np.array([4, 0, 5, 1, 3, 2])
    np.testing.assert_allclose(predict(low, x[order]), expected[order], rtol=0, atol=BATCHED_FLOAT)
    spoiled = predict(low, x.at[0].set(jnp.nan))
    np.testing.assert_allclose(spoiled[1:], expected[1:], rtol=0, atol=BATCHED_FLOAT)
    assert np.isnan(spoiled[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ptq4vm", "qmamba_like", "ksq_vmm", "released"])
def test_reported_noise_is_that_of_the_site(name):
    """Every site by itself, none taken for another."""
    block, _, _, captured, _ = captured_block()
    sites, low = dict(iter_sites(block)), modules_of(baseline(name)[0].blocks[0])
    reported = {site.path: site.sqnr_db for site in baseline(name)[1].sites}
    for path in ("mixer.in_proj", "mixer.directions.0.x_proj", "mixer.directions.1.x_proj"):
        x = captured[path]["input"]
        expected = sqnr_db(np.asarray(sites[path](x)), np.asarray(low[path](x)))
        np.testing.assert_allclose(reported[f"blocks.0.{path}"], expected, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_size_of_a_batch_changes_nothing(name):
    for part in (slice(2, 4), slice(5, 6), slice(0, 3)):
        logits = predict(baseline(name)[0], images(1)[part])
        np.testing.assert_allclose(logits, logits_of(name)[part], rtol=0, atol=BATCHED_FLOAT)


@pytest.mark.parametrize("name", BASELINES)
def test_another_input_size_or_a_second_time_is_refused(name):
    low = baseline(name)[0]
    with pytest.raises(ValueError, match="already quantised"):
        quantize_baseline(low, images(), name, weight_bits=8, act_bits=8)
    if name != "ksq_vmm":  # one scale for the whole output
        with pytest.raises(ValueError, match=f"calibrated at {TOKENS} tokens per sample and got 5; quantise it again"):
            low.blocks[0].mixer.in_proj(heavy_tailed(0, (2, 5, 20)))
    if name != "ptq4vm":
        scan, operands = scan_operands()
        with pytest.raises(ValueError, match=f"calibrated at {TOKENS} tokens per sample and got 5; quantise it again"):
            low.blocks[0].mixer.scan(*(x[:, :5] for x in operands))
        assert isinstance(low.blocks[0].mixer.scan, type(scan))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(weight_bits=1), "weight_bits must be 2 to 8, not 1"),
        (dict(weight_bits=16), "weight_bits must be 2 to 8, not 16"),
        (dict(act_bits=256), r"act_bits must lie in 2..8, not 256 \(bits"),
        (dict(rules=(QuantRule("no_such_layer", skip=True),)), "'no_such_layer' matches no site"),
    ],
)
def test_wrong_settings_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        quantize_baseline(float_model(), images(), name, **{"weight_bits": 4, "act_bits": 4, **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTNConfig(granularity="row"), "granularity must be 'token' or 'tensor', not 'row'"),
        (lambda: PTQ4VMConfig(alpha=1.5), "alpha must lie in 0..1, not 1.5"),
        (lambda: PTQ4VMConfig(epochs=-1), "epochs must be at least 0"),
        (lambda: PTQ4VMConfig(smooth_learning_rate=0), "must be positive"),
        (lambda: KSQConfig(k=0), "k must be at least 1 cluster, not 0"),
        (lambda: QMambaLikeConfig(groups=0), "groups must be at least 1, not 0"),
        (lambda: quantize_baseline(float_model(), images(), "gptq", weight_bits=4, act_bits=4), "no baseline 'gptq'"),
        (
            lambda: quantize_baseline(float_model(), images()[0], "rtn_token", weight_bits=4, act_bits=4),
            "images have shape",
        ),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_published_settings():
    """Bits, learning rates, epochs and factors as published; names that do not claim more than is known."""
    vim, vmamba = PTQ4VMConfig(), PTQ4VMConfig.vmamba(weight_bits=6)
    assert (vim.alpha, vim.epochs, vim.scale_learning_rate, vim.smooth_learning_rate) == (0.5, 100, 5e-4, 1e-2)
    assert (vmamba.alpha, vmamba.epochs, vmamba.train_batch, vmamba.weight_bits) == (0.65, 50, 32, 6)
    assert vmamba.scale_learning_rate == vmamba.smooth_learning_rate == 1e-4
    assert (KSQConfig().weight_bits, KSQConfig().act_bits, KSQConfig().k) == (8, 8, 4)
    assert BASELINES["qmamba_like"].title == "QMamba-like"
    assert all(len(b.title) > 2 and b.config(weight_bits=5, act_bits=6).act_bits == 6 for b in BASELINES.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BASELINES)
def test_a_family_gets_the_settings_published_for_it(name, family, monkeypatch):
    only_config = dataclasses.replace(BASELINES[name], run=lambda model, images, config, progress: (config, None))
    monkeypatch.setitem(BASELINES, name, only_config)
    fields = dict(weight_bits=5, act_bits=6, batch_size=3)
    config, _ = quantize_baseline(float_model(family), images(), name, **fields)
    own = PTQ4VMConfig.vmamba if (name, family) == ("ptq4vm", "vmamba") else BASELINES[name].config
    assert config == own(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_more_bits_less_noise(name):
    exact = logits_of("float")
    assert sqnr_db(exact, logits_of(name, 8)) > sqnr_db(exact, logits_of(name)) + 5
    assert baseline(name, 8)[1].mean_sqnr_db > baseline(name)[1].mean_sqnr_db + 5


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_family(name):
    """A pyramid with four scan directions, one state, maps between its blocks and downsampling inside them."""
    assert "vmamba_micro" in list_models()
    fields = dict(img_size=16, dims=8, depths=(1, 1), mlp_ratio=2.0, num_classes=5)
    model = create_model("vmamba_micro", rngs=nnx.Rngs(0), **fields)
    x = heavy_tailed(3, (4, 16, 16, 3))
    low, report = quantize_baseline(model, x, name, weight_bits=8, act_bits=8, **QUICK.get(name, {}))
    assert sqnr_db(np.asarray(model(x)), np.asarray(low(x))) > 10
    named = {site.path for site in report.sites}
    assert "blocks.1.mlp.fc1" in named
    assert ("blocks.1.downsample.proj" in named) == (name != "ptq4vm")


def test_walking_a_scan_is_the_scan():
    scan, (u, delta, B, C) = scan_operands()
    _, _, A, _, _, D = scan.operands(u, delta, B, C)
    expected = scan(u, delta, B, C, collect=lambda h: h)
    y, last, states = walk_scan(u, scan.step_sizes(delta), A, B, C, collect=lambda h: h)
    y = y + D.reshape(1, 1, 2, 40) * u
    for ours, theirs in ((y, expected.y), (last, expected.h_last), (states, expected.states)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=REORDERED * float(jnp.abs(theirs).max()))


# --- the published code


def test_released_quantises_blocks_and_finds_outliers():
    low, report = baseline("released")
    modules = modules_of(low)
    assert isinstance(modules[SCAN], ReleasedScan)
    assert {p for p, m in modules.items() if isinstance(m, ReleasedLinear)} == {
        p for p, m in iter_sites(float_model()) if isinstance(m, nnx.Linear) and p.startswith("blocks")
    }
    assert {site.outlier_bits for site in report.sites} == {8}
    assert max(site.outlier_rate for site in report.sites) > 0.01


# --- round to nearest


def test_rtn_per_token_is_quantize_without_outliers_search_and_tuning():
    """Bit for bit."""
    config = QuantConfig(
        detection="none",
        scale_search="max",
        weight_rounding="nearest",
        tune_epochs=0,
        rules=EDGES,
        float_dtype="float32",
        weight_bits=4,
    )
    low, report = quantize(float_model(), images(), config)
    ours, our_report = baseline("rtn_token")
    assert nnx.graphdef(ours) == nnx.graphdef(low)
    assert bits_of(ours) == bits_of(low)
    facts = [[getattr(s, name) for name in ("path", "kind", "weight_bits", "act_bits")] for s in report.sites]
    assert [
        [getattr(s, name) for name in ("path", "kind", "weight_bits", "act_bits")] for s in our_report.sites
    ] == facts
    assert our_report.kept_float == report.kept_float


def test_rtn_per_tensor_has_one_scale_of_the_whole_range():
    tokens, tensor = modules_of(baseline("rtn_token")[0]), modules_of(baseline("rtn_tensor")[0])
    _, _, _, captured, _ = captured_block()
    differ = 0
    for path, module in tensor.items():
        if isinstance(module, QuantLinear):
            scale, own = np.asarray(module.act.scale[...]), np.asarray(tokens[path].act.scale[...])
            assert scale.shape == own.shape
            assert (scale == own.max()).all()
            differ += (own != own.max()).any()
            np.testing.assert_array_equal(module.levels[...], tokens[path].levels[...])
    assert differ == 5  # stem, in_proj, two x_proj, out_proj; so few channels or tokens as the others have share one
    x = np.asarray(captured["mixer.in_proj"]["input"])
    np.testing.assert_allclose(tensor["blocks.0.mixer.in_proj"].act.scale[...], np.abs(x).max() / 7, rtol=1e-6)
    np.testing.assert_allclose(
        tokens["blocks.0.mixer.in_proj"].act.scale[...], np.abs(x).max(axis=(0, 2)) / 7, rtol=1e-6
    )
    scan = tensor[SCAN]
    assert isinstance(scan, QuantSelectiveScan)
    assert set(scan.act) == {"delta", "B", "C"}
    delta = np.asarray(captured["mixer.scan"]["delta"])
    for g in range(2):
        np.testing.assert_allclose(scan.act["delta"][g].scale[...], np.abs(delta[:, :, g]).max() / 7, rtol=1e-6)
    assert any("tensor" in site.granularity for site in baseline("rtn_tensor")[1].sites)
