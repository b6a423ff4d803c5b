"""MambaVision on the golden model: the official numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import MAMBAVISION_BLOCK, MAMBAVISION_SCAN, PARITY

from ouromamba_jax import from_torch, implicit_attention
from ouromamba_jax.models import AttentionTrace

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "mambavision_a"
MAMBAVISION_A = dict(
    img_size=64, dim=10, in_dim=8, depths=(1, 1, 2, 2), window_size=(8, 8, 4, 2), num_heads=(1, 2, 4, 8),
    mlp_ratio=2, num_classes=10,
)  # fmt: skip


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def as_map(x: np.ndarray) -> np.ndarray:
    """A published map (B, C, H, W), or a single square window (B, L, C) per image, as (B, H, W, C)."""
    side = int(x.shape[1] ** 0.5)
    return channels_last(x) if x.ndim == 4 else x.reshape(len(x), side, side, -1)


def as_tokens(x: np.ndarray) -> np.ndarray:
    return channels_last(x).reshape(len(x), -1, x.shape[1])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def observed(golden) -> tuple:
    """What every stage makes of the golden images, then (logits, trace); one compilation."""

    def observe(state, x):
        model = nnx.merge(graphdef, state)
        y, maps = x, []
        for _, stage in model.stages:
            maps.append(y := stage(y))
        return maps, model.trace(x, collect=lambda h: h)

    graphdef, state = nnx.split(from_torch("mambavision_t", GOLDEN / "model.safetensors", **MAMBAVISION_A))
    return jax.jit(observe)(state, jnp.asarray(channels_last(golden["input"])))


def test_mambavision_computes_the_official_numbers(golden, observed):
    stem, *maps, logits = observed[0]
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=PARITY)
    np.testing.assert_allclose(stem, channels_last(golden["patch_embed"]), rtol=0, atol=PARITY)
    assert len(maps) == 6
    for i, x in enumerate(maps):  # the first scan is in block 2
        np.testing.assert_allclose(x, as_map(golden[f"block_{i}"]), atol=PARITY if i < 2 else MAMBAVISION_BLOCK, rtol=0)


def test_the_trace_shows_the_official_numbers(golden, observed):
    _, (logits, trace) = observed
    close = dict(rtol=0, atol=PARITY)
    np.testing.assert_allclose(logits, golden["logits"], **close)
    np.testing.assert_allclose(trace.features, golden["features"], **close)
    np.testing.assert_allclose(trace.tokens, as_tokens(golden["patch_embed"]), **close)
    np.testing.assert_allclose(trace.layers[0].mixer_in, trace.tokens, **close)
    update = as_tokens(golden["block_0"]) - as_tokens(golden["patch_embed"])
    np.testing.assert_allclose(trace.layers[0].mixer_out, update, **close)
    assert [len(layer.scans) for layer in trace.layers] == [0, 0, 1, 0, 1, 0]
    assert [isinstance(layer, AttentionTrace) for layer in trace.layers] == [False, False, False, True, False, True]
    layer = trace.layers[2]
    np.testing.assert_allclose(layer.mixer_in, golden["mixer0_in"], **close)
    np.testing.assert_allclose(layer.mixer_out, golden["mixer0_out"], rtol=0, atol=MAMBAVISION_BLOCK)
    (scan,) = layer.scans
    for field, name in dict(u="x", delta="delta", A="A", B="B", C="C", y="y", states="h").items():
        expected = golden[f"mixer0_dir0_{name}"]
        atol = max(PARITY, MAMBAVISION_SCAN * np.abs(expected).max())
        np.testing.assert_allclose(getattr(scan, field), expected, rtol=0, atol=atol)
    assert jax.eval_shape(implicit_attention, layer).shape == (2, 16, 16)
