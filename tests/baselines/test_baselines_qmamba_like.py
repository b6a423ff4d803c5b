"""The QMamba-like rival: its groups, its long-tailed grid and its scan against NumPy loops."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import SCAN, baseline, float_model, in_numpy, modules_of, scan_operands
from draws import heavy_tailed
from flax import nnx
from tiers import slow
from tiny_models import TOKENS

from ouromamba_jax.baselines.qmamba_like import (
    QMambaLikeScan,
    calibrate_scan,
    round_long_tail,
    search_group_scales,
    token_groups,
)
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.activation import Levels
from ouromamba_jax.quantize.sites import iter_sites


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


@pytest.mark.parametrize("bits", [4, *slow(3, 6)])
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


@pytest.mark.slow
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


@pytest.mark.slow
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
