"""kSQ-VMM: its grids and its scan against NumPy loops; on every family, what it searches and how wide it is."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import (
    FAMILIES,
    baseline,
    float_model,
    images,
    in_numpy,
    modules_of,
    scan_operands,
)
from draws import heavy_tailed
from flax import nnx
from tiers import slow
from tiny_models import TOKENS
from tolerances import FLOAT64_LOOP

from ouromamba_jax.baselines import quantize_baseline
from ouromamba_jax.baselines.base import EDGES
from ouromamba_jax.baselines.ksq_grids import (
    cosine,
    find_clusters,
    interval,
    kmeans,
    levels_of,
    output_scale,
    round_to,
)
from ouromamba_jax.baselines.ksq_linear import RoundedLinear, RoundedModule
from ouromamba_jax.baselines.ksq_scan import KSQScan, calibrate_scan
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models.layers import RMSNorm
from ouromamba_jax.quantize import QuantRule
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


@pytest.mark.parametrize(("axis", "shape"), [("channel", (1, 24)), *slow(("tensor", (1, 1)), ("token", (9, 1)))])
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


@pytest.mark.parametrize("rounded", [True, *slow(False)])
def test_the_reparameterised_hidden_state(rounded):
    """The recurrence on h' = h / (r_C r_L r_D) gives the float y; rounded at every step, what `KSQScan` computes."""
    scan, operands = scan_operands()
    u, delta, A, B, C = in_numpy(scan, operands)
    low = calibrate_scan(scan, *operands, k=4, bits=8)
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


# --- every family

PATCHES = {
    "vim": {"stem.proj"},
    "vmamba": {"stem.first.proj", "stem.second.proj", "blocks.1.downsample.proj"},
    "mambavision": {"stem.first.proj", "stem.second.proj", "blocks.1.downsample.proj"},
}
"""The convolutions that make patches."""


@cache
def low(family: str, **fields) -> nnx.Module:
    x = images(count=3) if family == "vim" else heavy_tailed(3, (3, 16, 16, 3))
    return quantize_baseline(float_model(family), x, "ksq_vmm", weight_bits=4, act_bits=4, **fields)[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_weights_of_patch_convolutions_take_their_range(family):
    """A search never ends at the range itself, which is none of its candidates."""
    modules, by_range = modules_of(low(family)), set()
    linears = {path: site for path, site in iter_sites(float_model(family)) if isinstance(site, nnx.Linear)}
    for path, linear in linears.items():
        module = modules[path]
        assert isinstance(module, RoundedLinear)
        covering = interval(jnp.max(jnp.abs(linear.kernel[...])), module.levels.bits)
        if module.weight_scale[...] == covering:
            by_range.add(path)
    assert "head.proj" in linears
    assert by_range == PATCHES[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_convolutions_of_stem_and_head_have_8_bits(family):
    """As their linear layers have. What is rounded there needs more levels than 4 bits have."""
    model = low(family)
    bits = {path: module.bits for path, module in modules_of(model).items() if isinstance(module, RoundedModule)}
    assert bits == {path: 8 if path.startswith(("stem.", "head.")) else 4 for path in bits}
    assert {path.split(".")[0] for path in bits} == {"blocks", "head"} | ({"stem"} if family == "vmamba" else set())
    norm = model.head.norm
    y = norm(heavy_tailed(5, (6, norm.inner.scale.shape[0])))
    levels = np.asarray(y / norm.out_scale[...])
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert 8 < np.abs(levels).max() <= 128


@pytest.mark.slow
def test_rules_reach_what_is_no_site():
    rules = (
        *EDGES,
        QuantRule(r"^blocks\.0\.", act_bits=6),
        QuantRule("x_proj", act_bits=5),
        QuantRule(r"^head\.", skip=True),
    )
    model = low("vim", rules=rules)
    assert type(model.head.norm) is RMSNorm
    assert type(model.head.proj) is nnx.Linear
    block = model.blocks[0]
    assert isinstance(block.mixer.scan, KSQScan)
    assert block.norm.bits == block.mixer.directions[0].conv.bits == block.mixer.scan.bits == 6
    for linear, bits in ((block.mixer.out_proj, (4, 6)), (model.stem.proj, (8, 8))):
        assert (linear.grids.weight_bits, linear.grids.act_bits) == bits
    # silu's output is rounded once, as the scan's u, whatever its other reader rounds to.
    assert block.mixer.directions[0].x_proj.in_bits == 6
    assert block.mixer.directions[0].x_proj.grids.act_bits == 5
