"""Implicit attention and the patched hidden state against recorded values, plain loops and the scan itself."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from ouromamba_jax.models import LayerTrace, ScanOrder, ScanTrace
from ouromamba_jax.ops.attention import (
    implicit_attention,
    neighbourhood_mask,
    patched_readout,
    scan_attention,
    token_weights,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "state_fusion" / "fusion_grid6.npz"

ORDERS = [
    ScanOrder(3, 4, class_index=6),
    ScanOrder(3, 4, class_index=6, reverse=True),
    ScanOrder(3, 4, transpose=True),
    ScanOrder(3, 4, transpose=True, reverse=True),
]


def make_scan(order, *, seed=0, delta_scale=0.3):
    """A random scan trace whose states and outputs come from a float64 loop."""
    rng = np.random.default_rng(seed)
    batch, length, channels, d_state = 2, order.length, 5, 3
    u = rng.normal(size=(batch, length, channels))
    delta = delta_scale * rng.uniform(0.1, 2.0, size=(batch, length, channels))
    A = -rng.uniform(0.5, 4.0, size=(channels, d_state))
    B, C = rng.normal(size=(2, batch, length, d_state))
    D = rng.normal(size=channels)
    h, states = np.zeros((batch, channels, d_state)), []
    for t in range(length):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        states.append(h)
    states = np.stack(states, axis=1)
    y = np.einsum("blen,bln->ble", states, C) + D * u
    arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "y": y, "states": states}
    return ScanTrace(**{k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}, order=order)


def naive_sum(x, grid, neighbourhood, padding):
    """The window sum as a loop over tokens and offsets; x (M, ...)."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        row, column = divmod(t, grid[1])
        for dr in range(-(neighbourhood // 2), neighbourhood // 2 + 1):
            for dc in range(-(neighbourhood // 2), neighbourhood // 2 + 1):
                r, c = row + dr, column + dc
                if padding == "replicate":
                    r, c = min(max(r, 0), grid[0] - 1), min(max(c, 0), grid[1] - 1)
                elif not (0 <= r < grid[0] and 0 <= c < grid[1]):
                    continue
                out[t] += x[r * grid[1] + c]
    return out


def patched_state(h, w, grid, neighbourhood, padding="clip"):
    """The patched state in image order, as that loop; h (B, M, E, N), w (B, M)."""
    weighted = np.moveaxis(np.asarray(h) * np.asarray(w)[:, :, None, None], 1, 0)
    return np.moveaxis(naive_sum(weighted, grid, neighbourhood, padding), 0, 1)


def test_the_loop_gives_the_recorded_fusion():
    golden = np.load(GOLDEN)
    h = np.moveaxis(golden["h"], 3, 1)  # (B, D, N, L) -> (B, L, D, N)
    fused = patched_state(h, golden["delta_norm"], (6, 6), 3, padding="replicate")
    expected = np.moveaxis(golden["h_fused"], 3, 1)
    assert np.max(np.abs(fused - expected)) <= tolerances.ATTENTION_ROUNDING * np.max(np.abs(expected))


@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
def test_neighbourhood_mask_is_the_clipped_window(neighbourhood):
    expected = naive_sum(np.eye(12), (3, 4), neighbourhood, "clip")
    np.testing.assert_array_equal(neighbourhood_mask((3, 4), neighbourhood), expected.astype(bool))


@pytest.mark.parametrize("neighbourhood", [0, 2, -3])
def test_even_windows_are_refused(neighbourhood):
    with pytest.raises(ValueError, match="odd side"):
        neighbourhood_mask((3, 4), neighbourhood)


def test_token_weights():
    scan = make_scan(ORDERS[0])
    np.testing.assert_allclose(token_weights(scan.delta), np.mean(scan.delta, axis=2), rtol=1e-6)
    np.testing.assert_array_equal(token_weights(scan.delta, weighting="uniform"), np.ones((2, 13)))


@pytest.mark.parametrize("order", ORDERS)
def test_attention_reproduces_the_scan(order):
    scan = make_scan(order)
    alpha = scan_attention(scan, per_channel=True)
    y = jnp.einsum("betj,bje->bte", alpha, scan.u) + scan.D[None, None] * scan.u
    assert np.max(np.abs(y - scan.y)) <= tolerances.ATTENTION_ROUNDING * np.max(np.abs(scan.y))
    assert np.all(np.triu(np.asarray(alpha), 1) == 0)


@pytest.mark.parametrize("weighting", ["delta", "uniform"])
@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_patched_attention_equals_the_readout_of_the_patched_state(order, neighbourhood, weighting):
    scan = make_scan(order)
    options = {"neighbourhood": neighbourhood, "weighting": weighting}
    alpha = scan_attention(scan, per_channel=True, **options)
    attended = order.to_image(jnp.einsum("betj,bje->bte", alpha, scan.u))
    readout = patched_readout(scan, **options)
    h, C = order.to_image(scan.states), order.to_image(scan.C)
    weights = order.to_image(token_weights(scan.delta, weighting=weighting))
    looped = np.einsum("btn,bten->bte", C, patched_state(h, weights, (order.height, order.width), neighbourhood))
    assert np.max(np.abs(readout - looped)) <= tolerances.ATTENTION_ROUNDING * np.max(np.abs(looped))
    assert np.max(np.abs(attended - readout)) <= tolerances.ATTENTION_ROUNDING * np.max(np.abs(readout))


@pytest.mark.parametrize("neighbourhood", [None, 3])
def test_the_channel_mean_is_the_mean_of_the_channels(neighbourhood):
    layer = SimpleNamespace(scans=(make_scan(ORDERS[0]), make_scan(ORDERS[1], seed=1)))
    mean = implicit_attention(layer, neighbourhood=neighbourhood)
    channels = implicit_attention(layer, neighbourhood=neighbourhood, per_channel=True)
    assert mean.shape == (2, 12, 12)
    assert channels.shape == (2, 5, 12, 12)
    assert np.max(np.abs(mean - jnp.mean(channels, axis=1))) <= tolerances.ATTENTION_ROUNDING * np.max(np.abs(mean))


def test_the_patched_form_is_not_causal_and_leaves_the_class_token_out():
    scan = make_scan(ORDERS[0])
    alpha = np.asarray(scan_attention(scan, neighbourhood=3))
    assert np.all(alpha[:, 6] == 0)  # no row for the class token
    assert np.all(alpha[:, 0, 1] != 0)  # token 0 sees token 1 through its neighbours' states
    assert np.all(alpha[:, 0, 8:] == 0)  # but nothing after its last neighbour, image token 5


def test_directions_are_merged_in_image_order():
    """A forward scan and the same scan of the same image from its end give maps that mirror each other."""
    order = ScanOrder(3, 4)
    forward = make_scan(order)
    flip = lambda x: jnp.flip(x, axis=1)  # noqa: E731
    backward = ScanTrace(
        u=flip(forward.u),
        delta=flip(forward.delta),
        A=forward.A,
        B=flip(forward.B),
        C=flip(forward.C),
        D=forward.D,
        y=forward.y,
        states=None,
        order=ScanOrder(3, 4, reverse=True),
    )
    both = np.asarray(implicit_attention(LayerTrace(scans=(forward, backward), mixer_in=None, mixer_out=None)))
    alone = np.asarray(scan_attention(forward))
    reverse = np.asarray(scan_attention(backward))[:, ::-1, ::-1]
    np.testing.assert_allclose(both, (alone + reverse) / 2, rtol=1e-6)
    assert np.all(both != 0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_large_steps_neither_overflow_nor_poison_the_gradient(per_channel):
    scan = make_scan(ORDERS[0], delta_scale=500.0)

    def total(delta):
        trace = SimpleNamespace(**{**vars(scan), "delta": delta})
        return jnp.sum(scan_attention(trace, neighbourhood=3, per_channel=per_channel) ** 2)

    value, gradient = jax.value_and_grad(total)(scan.delta)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def test_what_cannot_be_computed_is_said():
    with pytest.raises(ValueError, match="no hidden states"):
        patched_readout(SimpleNamespace(**{**vars(make_scan(ORDERS[0])), "states": None}))
    with pytest.raises(ValueError, match="no selective scan"):
        implicit_attention(SimpleNamespace(scans=()))
