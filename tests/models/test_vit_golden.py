"""ViT and DeiT III on the golden models: the official numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import INTERPOLATION, PARITY

from ouromamba_jax import from_torch, load, save

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


def fields(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())["kwargs"]


@pytest.mark.parametrize(("name", "base"), [("vit_a", "deit_tiny"), ("deit3_a", "deit3_small")])
def test_the_official_numbers(name, base):
    golden = dict(np.load(GOLDEN / name / "golden.npz"))
    model = from_torch(base, GOLDEN / name / "checkpoint.pth", **fields(name))
    graphdef, state = nnx.split(model)

    def observe(state, x):
        model = nnx.merge(graphdef, state)
        y, outputs = x, []
        for _, stage in model.stages:
            outputs.append(y := stage(y))
        return outputs, model.trace(x)

    images = jnp.asarray(golden["input"].transpose(0, 2, 3, 1))
    (tokens, *blocks, logits), (traced, trace) = jax.jit(observe)(state, images)
    found = dict(tokens_in=tokens, logits=logits, features=trace.features)
    found |= {f"block_{i}": block for i, block in enumerate(blocks)}
    first = trace.layers[0]
    found |= dict(attn0_in=first.mixer_in, attn0_out=first.mixer_out, attn0_probs=first.attention)
    assert len(blocks) == model.config.depth
    for key, value in found.items():
        atol = PARITY * max(1.0, np.abs(golden[key]).max())
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=atol, err_msg=key)
    np.testing.assert_allclose(traced, golden["logits"], rtol=0, atol=PARITY)
    np.testing.assert_allclose(trace.tokens, golden["tokens_in"], rtol=0, atol=PARITY)
    order = first.order
    assert (order.height, order.width, order.length) == (4, 4, 17)
    np.testing.assert_array_equal(order.to_image(first.mixer_out), first.mixer_out[:, 1:])


def test_positions_are_resized_as_recorded(tmp_path):
    """When converted, and when a converted model is loaded at another size."""
    golden, shape = np.load(GOLDEN / "vit_a" / "golden.npz"), fields("vit_a")
    save(tmp_path / "a", from_torch("vit_tiny", GOLDEN / "vit_a" / "model.safetensors", **shape))
    for height, width in ((6, 5), (3, 2)):
        size = (8 * height, 8 * width)
        options = {**shape, "img_size": size, "interpolate_positions": True}
        converted = from_torch("vit_tiny", GOLDEN / "vit_a" / "checkpoint.pth", **options)
        for model in (converted, load(tmp_path / "a", img_size=size)):
            expected = golden[f"pos_embed_{height}x{width}"][0]
            np.testing.assert_allclose(model.stem.positions[...], expected, rtol=0, atol=INTERPOLATION)
            assert model.config.grid == (height, width)
