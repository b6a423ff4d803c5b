"""The rivals: every grid against small NumPy loops, and what their publications say of them."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY, TOKENS
from tolerances import BATCHED_FLOAT, FAKE_AGAINST_INTEGER, FLOAT64_LOOP, REORDERED

from ouromamba_jax.baselines import BASELINES, KSQConfig, PTQ4VMConfig, QMambaLikeConfig, RTNConfig, quantize_baseline
from ouromamba_jax.baselines.base import EDGES, step_sizes, walk_scan
from ouromamba_jax.baselines.ksq_grids import (
    cosine,
    find_clusters,
    interval,
    kmeans,
    levels_of,
    output_scale,
    round_to,
)
from ouromamba_jax.baselines.ksq_vmm import KSQScan, RoundedLinear, RoundedModule
from ouromamba_jax.baselines.ksq_vmm import calibrate_scan as calibrate_ksq
from ouromamba_jax.baselines.ptq4vm import (
    AsymmetricLinear,
    FakeAsymmetricLinear,
    centred_levels,
    find_parameters,
    learn,
    smoothing,
    stage_loss,
)
from ouromamba_jax.baselines.qmamba_like import (
    QMambaLikeScan,
    calibrate_scan,
    round_long_tail,
    search_group_scales,
    token_groups,
)
from ouromamba_jax.evaluate import predict
from ouromamba_jax.models import create_model, list_models
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.qtensor import max_level
from ouromamba_jax.quantize import QuantConfig, QuantLinear, QuantRule, QuantSelectiveScan, quantize
from ouromamba_jax.quantize.calibrate import capture
from ouromamba_jax.quantize.modules import ActQuantizer, Levels, iter_sites, set_module
from ouromamba_jax.report import sqnr_db

SCAN = "blocks.0.mixer.scan"
QUICK = {"ptq4vm": dict(epochs=6)}


def heavy_tailed(key: int, shape: tuple[int, ...]) -> jax.Array:
    rng = np.random.default_rng(key)
    values = rng.standard_normal(shape) + 0.3 * np.clip(rng.standard_t(1.5, shape), -20, 20)
    return jnp.asarray(values, jnp.float32)


def images(key: int = 0, count: int = 6) -> jax.Array:
    return heavy_tailed(key, (count, 12, 16, 3))


@cache
def float_model() -> nnx.Module:
    """A tiny Vim in which no parameter has the regular values of its initialisation."""
    model = create_model("vim_micro", rngs=nnx.Rngs(5), **TINY)
    for i, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model))):
        noise = np.random.default_rng(100 + i).standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(np.asarray(leaf[...]) + 0.2 * noise, jnp.float32))
    return model


@cache
def baseline(name: str, bits: int = 4):
    return quantize_baseline(
        float_model(), images(), name, weight_bits=bits, act_bits=bits, float_dtype="float32", **QUICK.get(name, {})
    )


@cache
def logits_of(name: str, bits: int = 4) -> np.ndarray:
    """Of the test images; "float" is the model itself."""
    return predict(float_model() if name == "float" else baseline(name, bits)[0], images(1))


@cache
def captured_block():
    """(the block, its input, its output, what entered its sites, their settings)."""
    model = float_model()
    block, x = model.blocks[0], model.stem(images())
    configs = {path: QuantConfig(detection="none", outlier_bits=8) for path, _ in iter_sites(block) if path[-1] != "z"}
    return block, x, *capture(block, x, configs, 6), configs


def scan_operands() -> tuple[SelectiveScan, list[jax.Array]]:
    block, _, _, captured, _ = captured_block()
    return block.mixer.scan, [captured["mixer.scan"][name] for name in ("u", "delta", "B", "C")]


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def bits_of(model: nnx.Module) -> dict[tuple, bytes]:
    return {path: np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def in_numpy(scan: SelectiveScan, operands: list[jax.Array]) -> list[np.ndarray]:
    """(u, delta after softplus, A (G, E, N), B, C) in float64."""
    u, delta, B, C = (np.asarray(x, np.float64) for x in operands)
    bias = np.asarray(scan.dt_bias[...], np.float64).reshape(u.shape[2:])
    A = -np.exp(np.asarray(scan.A_log[...], np.float64)).reshape(*u.shape[2:], -1)
    return [u, np.log1p(np.exp(delta + bias)), A, B, C]


# --- all of them


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_quantises_a_model(name):
    before = bits_of(float_model())
    low, report = baseline(name)
    assert bits_of(float_model()) == before
    assert np.isfinite(logits_of(name)).all()
    assert 3 < sqnr_db(logits_of("float"), logits_of(name)) < 30
    modules = modules_of(low)
    linears = {path for path, site in iter_sites(float_model()) if isinstance(site, nnx.Linear)}
    if name == "ptq4vm":
        linears = {path for path in linears if path.startswith("blocks")}
    matmuls = {s.path: s for s in report.sites if s.kind == "matmul"}
    assert matmuls.keys() == linears
    for path, site in matmuls.items():
        expected = 8 if path.startswith(("stem", "head")) else 4
        assert (site.weight_bits, site.act_bits, site.outlier_rate) == (expected, expected, 0)
        assert modules[path].levels.dtype == jnp.int8
        assert modules[path].levels.bits == expected
        used = np.asarray(modules[path].levels[...], np.int32)
        assert -(2 ** (expected - 1)) <= used.min() < 0 < used.max() <= max_level(expected)
        assert np.isfinite(site.sqnr_db)
        assert site.sqnr_db > 5, path
    assert report.tuning.keys() == ({"blocks.0"} if name == "ptq4vm" else set())
    assert "SQNR" in str(report)


@pytest.mark.parametrize("name", BASELINES)
def test_batch_mates_change_nothing(name):
    low, x, expected = baseline(name)[0], images(1), logits_of(name)
    order = np.array([4, 0, 5, 1, 3, 2])
    np.testing.assert_allclose(predict(low, x[order]), expected[order], rtol=0, atol=BATCHED_FLOAT)
    spoiled = predict(low, x.at[0].set(jnp.nan))
    np.testing.assert_allclose(spoiled[1:], expected[1:], rtol=0, atol=BATCHED_FLOAT)
    assert np.isnan(spoiled[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
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
        (lambda: quantize_baseline(float_model(), images()[0], "rtn_token", weight_bits=4, act_bits=4), "images must"),
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
    y, last, states = walk_scan(u, step_sizes(scan, delta), A, B, C, collect=lambda h: h)
    y = y + D.reshape(1, 1, 2, 40) * u
    for ours, theirs in ((y, expected.y), (last, expected.h_last), (states, expected.states)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=REORDERED * float(jnp.abs(theirs).max()))


# --- round to nearest


def test_rtn_per_token_is_quantize_without_outliers_search_and_tuning():
    """Bit for bit, once the inputs of `quantize` have the scales of their ranges, which RTN's have."""
    config = QuantConfig(
        detection="none", scale_search="max", tune_epochs=0, rules=EDGES, float_dtype="float32", weight_bits=4
    )
    low, report = quantize(float_model(), images(), config)
    ours, our_report = baseline("rtn_token")
    assert nnx.graphdef(ours) == nnx.graphdef(low)
    theirs = modules_of(low)
    for path, module in modules_of(ours).items():
        if isinstance(module, ActQuantizer):
            assert theirs[path].scale.shape == module.scale.shape
            assert (theirs[path].scale[...] <= 1.000001 * module.scale[...]).all()
            theirs[path].scale.set_value(module.scale[...])
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
    x = np.asarray(captured["mixer.in_proj"]["act"])
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


# --- PTQ4VM


def ranges_in_numpy(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) per token: both ends shrink towards each other; the best range is widened to hold 0."""
    top = 2**bits - 1
    scales, zeros = [], []
    for values in np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64):
        best = np.inf
        for i in range(1, 101):
            a = i / 100
            low = values.min() * (1 - a) + values.max() * a
            high = values.min() * a + values.max() * (1 - a)
            s = max((high - low) / top, 1e-8)
            z = -np.round(low / s)
            error = np.mean(np.abs(values - (np.clip(np.round(values / s) + z, 0, top) - z) * s) ** 2.4)
            if error < best:
                best, ends = error, (low, high)
        s = max((max(ends[1], 0) - min(ends[0], 0)) / top, 1e-8)
        scales.append(s)
        zeros.append(np.clip(-np.round(min(ends[0], 0) / s), 0, top))
    return np.array(scales), np.array(zeros)


@pytest.mark.parametrize("offset", [-30.0, 0.3, 30.0])
def test_ptq4vm_parameters(offset):
    """Smoothing factors, and a scale and a zero point among the levels for every token."""
    x = heavy_tailed(0, (3, 5, 12)) + offset
    kernel = 0.3 * heavy_tailed(1, (12, 4))
    params, zero = find_parameters(x, kernel, 4, 4, 0.65)
    smooth = np.abs(x).max((0, 1)) ** 0.65 / np.abs(kernel).max(1) ** 0.35
    np.testing.assert_allclose(params["smooth"], smooth, rtol=1e-5)
    scale, expected_zero = ranges_in_numpy(np.asarray(x) / np.asarray(params["smooth"]), 4)
    np.testing.assert_allclose(params["act"], scale, rtol=1e-5)
    np.testing.assert_array_equal(zero, expected_zero)
    assert params["act"].shape == zero.shape == (5,)
    assert params["weight"].shape == (1, 4)
    assert {-30.0: 15, 30.0: 0}.get(offset, zero[0]) == zero[0]
    step = np.asarray(params["act"])[:, None] * np.asarray(params["smooth"])
    levels = np.round(np.clip(np.asarray(x) / step + expected_zero[:, None], 0, 15) - expected_zero[:, None])
    np.testing.assert_array_equal(centred_levels(x, params, zero, 4), levels)


def test_smoothing_changes_nothing_in_float():
    model, x = nnx.clone(float_model()), images(1)
    exact = model(x)

    class Smoothed(nnx.Module):
        def __init__(self, linear, factors):
            self.linear, self.factors = linear, nnx.Variable(factors)
            linear.kernel.set_value(linear.kernel[...] * factors[:, None])

        def __call__(self, x):
            return self.linear(x / self.factors[...].reshape((1,) * (x.ndim - 1) + (-1,)))

    _, _, _, captured, _ = captured_block()
    block = model.blocks[0]
    for path, site in list(iter_sites(block)):
        if isinstance(site, nnx.Linear):
            factors = smoothing(captured[path]["act"], site.kernel[...], 0.5)
            assert float(jnp.abs(jnp.log(factors)).max()) > 0.3, path
            set_module(block, path, Smoothed(site, factors))
    np.testing.assert_allclose(model(x), exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (8, 8), (3, 6)])
@pytest.mark.parametrize("offset", [-4.0, 0.2])
def test_ptq4vm_integers_are_its_stand_in(weight_bits, act_bits, offset):
    linear = nnx.Linear(33, 9, rngs=nnx.Rngs(1))
    linear.bias.set_value(heavy_tailed(5, (9,)))
    params, zero = find_parameters(heavy_tailed(2, (4, 6, 33)) + offset, linear.kernel[...], weight_bits, act_bits, 0.5)
    params["act"] = 0.7 * params["act"]  # some clip
    x = 1.5 * heavy_tailed(3, (5, 6, 33)) + offset
    integer = AsymmetricLinear(linear, params, zero, weight_bits, act_bits)
    fake = FakeAsymmetricLinear(linear, params, zero, weight_bits, act_bits)(x)
    largest = float(jnp.abs(fake).max())
    np.testing.assert_allclose(integer(x), fake, rtol=0, atol=FAKE_AGAINST_INTEGER * largest)
    # And both are the product of rounded values.
    levels = np.asarray(centred_levels(x, params, zero, act_bits), np.float64)
    assert levels.min() == -float(zero.max()) or levels.max() == 2**act_bits - 1 - float(zero.min())
    rows = levels * np.asarray(params["act"])[:, None]
    product = rows @ np.asarray(integer.weight.dequantize(), np.float64) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(fake, product, rtol=0, atol=FAKE_AGAINST_INTEGER * largest)
    assert np.isnan(integer(x.at[1, 2, 0].set(jnp.inf))[1, 2]).all()


def test_joint_learning_lowers_its_loss_and_moves_every_parameter():
    block, x, out, captured, _ = captured_block()
    linears = {path: site for path, site in iter_sites(block) if isinstance(site, nnx.Linear)}
    bits = dict.fromkeys(linears, (4, 4))
    found = {p: find_parameters(captured[p]["act"], s.kernel[...], 4, 4, 0.5) for p, s in linears.items()}
    params, zeros = {p: f for p, (f, _) in found.items()}, {p: z for p, (_, z) in found.items()}
    config = PTQ4VMConfig(epochs=6)
    learned, losses = learn(block, bits, params, zeros, x, out - x, config)
    assert len(losses) == 7
    assert min(losses[1:]) < 0.97 * losses[0]
    graphdef, state = nnx.split(block)
    loss = jax.jit(lambda p: stage_loss(p, graphdef, tuple(bits.items()), state, zeros, x, out - x))
    measured = [float(loss(p)) for p in (params, learned)]
    np.testing.assert_allclose(measured, [losses[0], min(losses)], rtol=1e-3)
    best = int(np.argmin(losses))
    for path, own in params.items():
        for name, before in own.items():
            moved = np.abs(np.asarray(learned[path][name]) - np.asarray(before))
            rate = 1e-2 if name == "smooth" else 5e-4
            assert np.mean(moved > 0.01 * rate) > 0.95, (path, name)
            assert moved.max() < 1.5 * rate * best, (path, name)  # AdamW moves by its rate at most, or nearly so
    again, _ = learn(block, bits, params, zeros, x, out - x, config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), learned, again))


def test_ptq4vm_leaves_all_but_the_linear_layers_of_blocks_alone():
    exact, low = modules_of(float_model()), modules_of(baseline("ptq4vm")[0])
    assert {p for p in exact if type(low[p]) is not type(exact[p])} == {
        p for p, m in exact.items() if isinstance(m, nnx.Linear) and p.startswith("blocks")
    }
    for path, module in low.items():
        if isinstance(module, AsymmetricLinear):
            assert module.act_scale.shape == module.zero.shape == (TOKENS,)
            assert module.smooth.shape == module.levels.shape[:1]
            assert module.weight_scale.shape == (1, module.levels.shape[1])
            assert ((module.zero[...] >= 0) & (module.zero[...] <= 15)).all()
            assert (module.zero[...] == jnp.round(module.zero[...])).all()
        elif path in exact and not path:
            assert module is not exact[path]
    assert type(low[SCAN]) is SelectiveScan


# --- kSQ-VMM


def test_ksq_levels_and_intervals():
    """Signed levels -8 .. 7 of 4 bits; the scale that covers a range is max / 7.5."""
    x = heavy_tailed(0, (4, 5, 6))
    scale = interval(jnp.abs(x).max(), 4)
    np.testing.assert_allclose(scale, np.abs(x).max() / 7.5, rtol=1e-6)
    levels = levels_of(x, jnp.broadcast_to(0.3 * scale, x.shape), 4)
    expected = [min(max(round(float(v) / float(0.3 * scale)), -8), 7) for v in np.asarray(x).ravel()]
    np.testing.assert_array_equal(np.asarray(levels).ravel(), expected)
    assert (levels.min(), levels.max()) == (-8, 7)


def test_kmeans():
    rng = np.random.default_rng(0)
    centres = np.repeat([0.1, 1.0, 3.0, 9.0], 20)
    values = rng.permutation(centres * (1 + 0.05 * rng.standard_normal(80)))
    for seed in range(3):
        member = kmeans(values, 4, seed=seed)
        means = [values[member == c].mean() for c in range(member.max() + 1)]
        assert means == sorted(means)
        nearest = np.argmin(np.abs(values[:, None] - np.array(means)[None]), axis=1)
        np.testing.assert_array_equal(member, nearest)  # what Lloyd's algorithm ends at
    np.testing.assert_array_equal(kmeans(np.array([5.0, 1.0, 5.0]), 4), [1, 0, 1])
    np.testing.assert_array_equal(kmeans(values, 4), kmeans(values, 4))


@pytest.mark.parametrize(("axis", "shape"), [("tensor", (1, 1)), ("channel", (1, 24)), ("token", (9, 1))])
def test_cluster_scales(axis, shape):
    sizes = jnp.exp(jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32))
    x = heavy_tailed(0, (3, 9, 24)) * sizes[None]
    scales = {pow2: output_scale(x, axis, k=4, bits=4, pow2=pow2) for pow2 in (False, True)}
    member = find_clusters(x, axis, 4)
    assert member.shape == scales[False].shape == shape
    count = 1 if axis == "tensor" else 4
    for scale in scales.values():
        np.testing.assert_array_equal(
            [len(np.unique(np.asarray(scale)[member == c])) for c in range(count)], [1] * count
        )
    smallest = np.asarray(scales[True])[member == 0][0]
    powers = np.log2(np.asarray(scales[True]) / smallest)
    np.testing.assert_allclose(powers, np.round(powers), atol=1e-5)
    assert smallest == np.asarray(scales[False])[member == 0][0]
    free = np.log2(np.asarray(scales[False]) / smallest)
    np.testing.assert_array_equal(np.round(powers), np.round(free))
    if axis != "tensor":
        assert np.abs(free - np.round(free)).max() > 0.05
        assert len(np.unique(np.round(powers))) > 1

    def similarity(scale):
        return float(jnp.mean(cosine(x, round_to(x, scale, 4))))

    # The search ended at a scale that no other candidate for the last cluster beats.
    last = member == count - 1
    widest = interval(jnp.max(jnp.where(last[None], jnp.abs(x), 0.0)), 4)
    tried = [similarity(jnp.where(last, widest * (0.01 + i * 0.0119), scales[False])) for i in range(0, 100, 7)]
    assert similarity(scales[False]) >= max(tried) - 1e-6
    assert similarity(scales[False]) > similarity(jnp.full(shape, interval(jnp.abs(x).max(), 4)))


def test_ksq_scales_sit_where_the_paper_puts_them():
    low = baseline("ksq_vmm")[0]
    mixer = low.blocks[0].mixer
    shapes = {path: m.out_scale.shape for path, m in modules_of(low).items() if isinstance(m, RoundedLinear)}
    assert {p: s for p, s in shapes.items() if s != (1, 1)} == {"blocks.0.mixer.out_proj": (TOKENS, 1)}
    assert all(m.weight_scale.shape == (1, 1) for m in modules_of(low).values() if isinstance(m, RoundedLinear))
    rounded = {path: m.out_scale.shape for path, m in modules_of(low).items() if isinstance(m, RoundedModule)}
    convs = {f"blocks.0.mixer.directions.{g}.conv": (1, 40) for g in range(2)}
    assert rounded == {**convs, "blocks.0.norm": (1, 1), "head.norm": (1, 1)}
    scan = mixer.scan
    assert isinstance(scan, KSQScan)
    assert scan.u_scale.shape == scan.delta_scale.shape == (2, 1, 40)
    assert scan.y_scale.shape == (2, TOKENS, 1)
    assert scan.state_scale.shape == (2, TOKENS)
    shared = (mixer.out_proj.out_scale[...], *scan.y_scale[...], *(d.conv.out_scale[...] for d in mixer.directions))
    counts = [len(np.unique(scale)) for scale in shared]
    assert max(counts) > 1
    assert max(counts) <= 4
    for scale in shared:
        powers = np.log2(np.asarray(scale) / np.asarray(scale).min())
        np.testing.assert_allclose(powers, np.round(powers), atol=1e-5)
    for g, direction in enumerate(mixer.directions):  # one rounding of silu's output, for both of its readers
        np.testing.assert_array_equal(direction.x_proj.in_scale[...], scan.u_scale[...][g])
        assert direction.dt_proj.in_scale is None
        # Weights of the convolution: 8 bits over their range, for all channels at once.
        kernel = np.asarray(float_model().blocks[0].mixer.directions[g].conv.kernel[...])
        step = np.abs(kernel).max() / 127.5
        expected = step * np.clip(np.round(kernel / step), -128, 127)
        np.testing.assert_allclose(direction.conv.inner.kernel[...], expected, rtol=0, atol=1e-6)


def factors_in_numpy(h: np.ndarray) -> list[np.ndarray]:
    """r_C, r_L, r_D of one direction's states (B, L, E, N)."""
    mean = np.abs(h).mean(0)
    reps = [mean.mean((0, 2)), mean.mean((1, 2)), mean.mean((0, 1))]
    spread = [rep.std() for rep in reps]
    return [rep ** (s / sum(spread)) + 1e-15 for rep, s in zip(reps, spread, strict=True)]


@pytest.mark.parametrize("rounded", [False, True])
def test_the_reparameterised_hidden_state(rounded):
    """The recurrence on h' = h / (r_C r_L r_D) gives the float y; rounded at every step, what `KSQScan` computes."""
    scan, operands = scan_operands()
    u, delta, A, B, C = in_numpy(scan, operands)
    low = calibrate_ksq(scan, *operands, config=KSQConfig(act_bits=8))
    states = np.asarray(scan(*operands, collect=lambda h: h).states, np.float64).reshape(6, TOKENS, 2, 40, 3)
    # The other roundings of the scan belong to the operands here.
    wide = dict(u=(u, low.u_scale), delta=(delta, low.delta_scale))
    if rounded:
        for name, (x, scale) in wide.items():
            s = np.asarray(scale[...], np.float64)[:, 0][None, None]
            wide[name] = s * np.clip(np.round(x / s), -128, 127), scale
        (u, _), (delta, _) = wide["u"], wide["delta"]
    y = np.zeros(u.shape)
    for g in range(2):
        r_C, r_L, r_D = factors_in_numpy(states[:, :, g])
        np.testing.assert_allclose(low.channel_factor[...][g], r_C, rtol=1e-4)
        np.testing.assert_allclose(low.state_factor[...][g], r_D, rtol=1e-4)
        h = np.zeros((6, 40, 3))
        for t in range(TOKENS):
            before = 1.0 if t == 0 else r_L[t - 1]
            decay = np.exp(delta[:, t, g, :, None] * A[g]) * before / r_L[t]
            add = (delta * u)[:, t, g, :, None] * B[:, t, g, None] / (r_C[:, None] * r_L[t] * r_D)
            h = decay * h + add
            if rounded:
                s = float(low.state_scale[...][g, t]) / r_L[t]
                h = s * np.clip(np.round(h / s), -128, 127)
            y[:, t, g] = r_C * (h * (C[:, t, g] * r_D * r_L[t])[:, None]).sum(-1)
    D = np.asarray(scan.D[...], np.float64).reshape(2, 40)
    if not rounded:
        expected = np.asarray(scan(*operands).y)
        np.testing.assert_allclose(y + D * u, expected, rtol=0, atol=FLOAT64_LOOP * np.abs(expected).max())
        return
    s = np.asarray(low.y_scale[...], np.float64).transpose(1, 0, 2)[None]
    expected = s * np.clip(np.round(y / s), -128, 127) + D * u
    ours = np.asarray(low(*operands).y)
    step = s.max()
    differing = np.abs(ours - expected) > 1e-3 * step
    assert differing.mean() < 0.005  # a tie that float32 decides differently moves one level
    assert np.abs(ours - expected).max() < 1.5 * step
    assert sqnr_db(np.asarray(scan(*operands).y), ours) > 10


# --- QMamba-like


@pytest.mark.parametrize(("tokens", "groups"), [(13, 4), (16, 8), (3, 8), (1, 8), (65, 8)])
def test_temporal_groups(tokens, groups):
    member = token_groups(tokens, groups)
    sizes = np.bincount(member)
    assert (np.diff(member) >= 0).all()
    assert len(sizes) == min(groups, tokens)
    assert sizes.max() - sizes.min() <= 1
    if tokens != 13:
        return
    x = heavy_tailed(0, (3, tokens, 5))
    scale = np.asarray(search_group_scales(x, 4, groups))
    assert scale.shape == (tokens,)
    for g in range(len(sizes)):
        values = np.asarray(x[:, member == g], np.float64)
        tried = np.abs(values).max() * np.arange(1, 101) / 100 / 7
        errors = [np.mean(np.abs(values - s * np.clip(np.round(values / s), -7, 7)) ** 2.4) for s in tried]
        np.testing.assert_allclose(scale[member == g], tried[np.argmin(errors)], rtol=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_long_tailed_grid(bits):
    """2^bits levels, 1 among them, spaced evenly in log(1 - a): dense near 1, sparse towards 0."""
    largest, octaves = 0.93, 7.0
    count = 2**bits - 2
    levels = np.sort(np.append(1 - largest * 2.0 ** (-octaves * np.arange(count + 1) / count), 1.0))
    a = np.linspace(0, 1, 20001, dtype=np.float32)[1:]
    rounded = np.asarray(round_long_tail(jnp.asarray(a), jnp.full(a.shape, largest), jnp.full(a.shape, octaves), bits))
    np.testing.assert_allclose(np.unique(np.round(rounded, 6)), levels, atol=2e-6)
    assert len(levels) == 2**bits
    gaps = np.diff(levels)[:-1]  # the last one leads to 1 itself
    assert (np.diff(gaps) < 0).all()
    assert (np.diff(rounded) >= -1e-6).all()
    for value, got in zip(a[::997], rounded[::997], strict=True):
        distance = (1 - float(value)) / largest
        if distance < 0.5 * 2**-octaves:
            expected = 1.0
        else:
            k = min(max(round(-np.log2(distance) * count / octaves), 0), count)
            expected = 1 - largest * 2.0 ** (-octaves * k / count)
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_the_qmamba_like_scan():
    """exp(delta A) on its grid and h on its groups' grids, against a loop."""
    scan, operands = scan_operands()
    low = calibrate_scan(scan, *operands, bits=6, groups=4)
    assert isinstance(low, QMambaLikeScan)
    assert low.state_scale.shape == (2, TOKENS)
    member = token_groups(TOKENS, 4)
    scales, largest, octaves = (np.asarray(v[...], np.float64) for v in (low.state_scale, low.largest, low.octaves))
    for g in range(2):
        assert [len(np.unique(scales[g][member == i])) for i in range(4)] == [1] * 4
        assert len(np.unique(scales[g])) == 4
    u, delta, A, B, C = in_numpy(scan, operands)
    decays = np.exp(delta[..., None] * A[None, None])
    np.testing.assert_allclose(largest, (1 - decays).max(axis=(0, 1, 3, 4)), rtol=1e-5)
    y = np.zeros(u.shape)
    for g in range(2):
        h = np.zeros((6, 40, 3))
        for t in range(TOKENS):
            distance = np.clip((1 - decays[:, t, g]) / largest[g], 0, 1)
            k = np.clip(np.round(-np.log2(distance) * 62 / octaves[g]), 0, 62)
            rounded = 1 - np.where(distance < 0.5 * 2 ** -octaves[g], 0, largest[g] * 2 ** (-octaves[g] * k / 62))
            h = rounded * h + (delta * u)[:, t, g, :, None] * B[:, t, g, None]
            h = scales[g, t] * np.clip(np.round(h / scales[g, t]), -31, 31)
            y[:, t, g] = (h * C[:, t, g, None]).sum(-1)
    y += np.asarray(scan.D[...], np.float64).reshape(2, 40) * u
    ours = np.asarray(low(*operands).y)
    # A tie that float32 decides differently moves one state by one level, and those after it less and less.
    assert sqnr_db(y, ours) > 45
    assert np.mean(np.abs(ours - y) > 1e-4 * np.abs(y).max()) < 0.02
    assert 10 < sqnr_db(np.asarray(scan(*operands).y), ours) < 45


def test_the_long_tail_beats_a_uniform_grid_on_decays():
    """The idea of the method: at 4 bits, with decays near 1, a uniform grid costs more."""
    spread = np.random.default_rng(0).standard_normal(4000) * 1.5 - 4.5
    decay = jnp.asarray(np.exp(-np.exp(spread)), jnp.float32)
    largest = float((1 - decay).max())
    tails = [
        round_long_tail(decay, jnp.full(decay.shape, largest), jnp.full(decay.shape, octaves), 4)
        for octaves in (4.0, 6.0, 8.0)
    ]
    uniform = jnp.round(decay * 15) / 15
    signal = np.log(np.asarray(decay, np.float64))

    def error(a):
        return np.mean(np.abs(np.log(np.maximum(np.asarray(a, np.float64), 1e-3)) - signal))

    assert min(map(error, tails)) < 0.5 * error(uniform)


def test_only_the_scan_and_the_products_change():
    low, report = baseline("qmamba_like")
    modules = modules_of(low)
    assert isinstance(modules[SCAN], QMambaLikeScan)
    assert {p for p, m in modules.items() if isinstance(m, QuantLinear)} == {
        p for p, m in iter_sites(float_model()) if isinstance(m, nnx.Linear)
    }
    assert not [leaf for path, leaf in nnx.to_flat_state(nnx.state(modules[SCAN])) if isinstance(leaf, Levels)]
    assert re.search(r"8 groups", next(s.granularity for s in report.sites if s.path == SCAN))
