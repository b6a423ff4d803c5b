"""Vim against its float64 reference, on configurations that nobody recorded, from both kinds of files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tolerances import PARITY
from torch_file_writer import contiguous, write
from vim_reference import forward, random_weights

from ouromamba_jax.convert import from_torch, load_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
# (height, width), patch, stride, (rows, columns) of patches, embed_dim, depth, d_state, d_conv, expand
UNSEEN = {
    # Patches share three rows and columns, and leave four pixels below and two to the right.
    "overlapping patches": ((32, 35), 8, 5, (5, 6), 20, 2, 5, 4, 2),
    "deep and wide": ((12, 20), 4, 4, (3, 5), 40, 4, 3, 4, 2),
    # A row of three patches of 16 pixels, the official stride; the class token stands second of four.
    "published states, one row": ((20, 50), 16, 16, (1, 3), 17, 3, 16, 4, 2),
    # Fewer tokens than the convolution has taps; the class token comes first.
    "one patch, other mixers": ((7, 9), 6, 4, (1, 1), 33, 2, 1, 3, 3),
}


def test_the_reference_computes_the_official_numbers():
    golden = np.load(GOLDEN / "golden.npz")
    logits, updates, scans = forward(load_tensors(GOLDEN / "model.safetensors"), golden["input"], stride=8)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=PARITY)
    for i, update in enumerate(updates):
        np.testing.assert_allclose(update, golden[f"block_{i}"], rtol=0, atol=PARITY)
    for k in range(2):
        np.testing.assert_allclose(scans[0][k], golden[f"mixer0_dir{k}_y"], rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", UNSEEN)
def test_what_the_golden_does_not_show(case, tmp_path):
    """Overlapping patches, images that are not square, other widths, depths, states and convolutions."""
    size, patch, stride, grid, dim, depth, states, taps, expand = UNSEEN[case]
    rng = np.random.default_rng(len(case))
    weights = random_weights(
        rng, patch=patch, patches=grid[0] * grid[1], dim=dim, depth=depth, states=states, classes=7, taps=taps,
        expand=expand,
    )  # fmt: skip
    images = rng.standard_normal((2, 3, *size)).astype(np.float32)
    expected, updates, scans = forward(weights, images, stride=stride)
    fields = dict(img_size=size, patch_size=patch, stride=stride, embed_dim=dim, depth=depth, d_state=states)
    fields |= dict(d_conv=taps, expand=expand, num_classes=7)

    views = {key: contiguous(str(i), value) for i, (key, value) in enumerate(weights.items())}
    storages = {view.key: weights[key] for key, view in views.items()}
    save_file(weights, tmp_path / "model.safetensors")
    files = write(tmp_path / "model.pth", {"model": views, "epoch": 299}, storages), tmp_path / "model.safetensors"
    models = [from_torch("vim_tiny", file, **fields) for file in files]
    assert models[0].config.grid == grid
    graphdef, _ = nnx.split(models[0])
    trace = jax.jit(lambda state, x: nnx.merge(graphdef, state).trace(x))
    for model in models:
        logits, found = trace(nnx.state(model), jnp.asarray(images.transpose(0, 2, 3, 1)))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=PARITY)
        for layer, update, ys in zip(found.layers, updates, scans, strict=True):
            np.testing.assert_allclose(layer.mixer_out, update, rtol=0, atol=PARITY)
            for scan, y in zip(layer.scans, ys, strict=True):
                np.testing.assert_allclose(scan.y, y, rtol=0, atol=PARITY * max(1.0, np.abs(y).max()))
