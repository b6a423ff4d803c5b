"""VMamba on the golden model: the official numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import PARITY, VMAMBA_SCAN

from ouromamba_jax import from_torch

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vmamba_a"


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def as_tokens(x: np.ndarray) -> np.ndarray:
    return channels_last(x).reshape(len(x), -1, x.shape[1])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="module")
def observed(golden) -> tuple:
    """What every stage makes of the golden images, then (logits, trace); one compilation."""
    fields = dict(img_size=64, dims=8, depths=(1, 1, 2, 1), num_classes=10)
    graphdef, state = nnx.split(from_torch("vmamba_tiny_s1l8", GOLDEN / "model.safetensors", **fields))

    def observe(state, x):
        model = nnx.merge(graphdef, state)
        y, maps = x, []
        for _, stage in model.stages:
            maps.append(y := stage(y))
        return maps, model.trace(x, collect=lambda h: h)

    return jax.jit(observe)(state, jnp.asarray(channels_last(golden["input"])))


def test_vmamba_computes_the_official_numbers(golden, observed):
    _, *maps, logits = observed[0]
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=PARITY)
    assert len(maps) == 5
    for i, x in enumerate(maps):
        np.testing.assert_allclose(x, channels_last(golden[f"block_{i}"]), rtol=0, atol=PARITY)


def test_the_trace_shows_the_official_numbers(golden, observed):
    _, (logits, trace) = observed
    close = dict(rtol=0, atol=PARITY)
    np.testing.assert_allclose(logits, golden["logits"], **close)
    np.testing.assert_allclose(trace.features, golden["features"], **close)
    np.testing.assert_allclose(trace.tokens, as_tokens(golden["patch_embed"]), **close)
    assert [len(layer.scans) for layer in trace.layers] == [4] * 5
    layer = trace.layers[0]
    np.testing.assert_allclose(layer.mixer_in, as_tokens(golden["mixer0_in"]), **close)
    np.testing.assert_allclose(layer.mixer_out, as_tokens(golden["mixer0_out"]), **close)
    merged = sum(np.asarray(scan.order.to_image(scan.y)) for scan in layer.scans)
    expected = as_tokens(golden["mixer0_merged"])
    np.testing.assert_allclose(merged, expected, rtol=0, atol=VMAMBA_SCAN * np.abs(expected).max())
    for k, scan in enumerate(layer.scans):
        np.testing.assert_allclose(scan.order.to_image(scan.u), as_tokens(golden["mixer0_x2d"]), **close)
        for field, name in dict(u="x", delta="delta", A="A", B="B", C="C", states="h").items():
            np.testing.assert_allclose(getattr(scan, field), golden[f"mixer0_dir{k}_{name}"], **close)
        expected = golden[f"mixer0_dir{k}_y"]
        np.testing.assert_allclose(scan.y, expected, rtol=0, atol=VMAMBA_SCAN * np.abs(expected).max())
