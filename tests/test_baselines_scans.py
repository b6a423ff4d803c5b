"""kSQ-VMM and the QMamba-like rival: their grids and scans against NumPy loops."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import (
    SCAN,
    baseline,
    float_model,
    heavy_tailed,
    in_numpy,
    modules_of,
    scan_operands,
)
from flax import nnx
from tiny_models import TOKENS
from tolerances import FLOAT64_LOOP

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
from ouromamba_jax.baselines.qmamba_like import (
    QMambaLikeScan,
    calibrate_scan,
    round_long_tail,
    search_group_scales,
    token_groups,
)
from ouromamba_jax.metrics import sqnr_db
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.modules import Levels
from ouromamba_jax.quantize.sites import iter_sites


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
    low = calibrate_ksq(scan, *operands, k=4, bits=8)
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
