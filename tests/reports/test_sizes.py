"""Models at another input size: positions resized as torch does, when converted and when loaded."""

import jax
import numpy as np
import pytest
from flax import nnx
from positions_reference import bicubic
from tolerances import INTERPOLATION

from ouromamba_jax import load, save
from ouromamba_jax.checkpoint import CheckpointError
from ouromamba_jax.cli.main import main
from ouromamba_jax.models import create_model
from ouromamba_jax.models.positions import resize_grid

TINY = dict(img_size=16, embed_dim=16, depth=1, d_state=3, num_classes=5)
PLACES = {"middle": ([8], [17]), "first": ([0], [0]), "ends": ([0, 17], [0, 36]), "none": ([], [])}


def test_sizes_recorded_values_of_cubic_resizing():
    """4 x 4 to 8 x 8, values that ONNX publishes for its Resize operator: cubic, a = -0.75, half-pixel centres."""
    rows = [0.47265625, 1.66015625, 3.56640625, 6.08203125, 7.70703125, 10.22265625]
    first = [0.47265625, 0.76953125, 1.24609375, 1.875, 2.28125, 2.91015625, 3.38671875, 3.68359375]
    resized = resize_grid(np.arange(1.0, 17.0).reshape(4, 4, 1), (8, 8))[..., 0]
    np.testing.assert_allclose(resized[0], first, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resized[:6, 0], rows, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resized, 17 - resized[::-1, ::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("token", PLACES)
def test_sizes_of_a_loaded_model(tmp_path, token):
    model = create_model("vim_micro", class_token=token, **TINY)
    save(tmp_path / "a", model)
    larger = load(tmp_path / "a", img_size=(20, 28))
    assert larger.config.grid == (5, 7)
    before, after = PLACES[token]
    old, new = (np.asarray(m.stem.positions[...]) for m in (model, larger))
    np.testing.assert_array_equal(new[after], old[before])
    grid = np.delete(old, before, axis=0).reshape(4, 4, 16)
    found = np.delete(new, after, axis=0).reshape(5, 7, 16)
    np.testing.assert_allclose(found, bicubic(grid, (5, 7)), rtol=0, atol=INTERPOLATION)
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(model.blocks), nnx.state(larger.blocks)))
    assert jax.eval_shape(larger, jax.ShapeDtypeStruct((2, 20, 28, 3), np.float32)).shape == (2, 5)
    same = load(tmp_path / "a", img_size=16)
    np.testing.assert_array_equal(same.stem.positions[...], old)


def test_sizes_of_a_loaded_model_from_the_command(tmp_path, capsys):
    save(tmp_path / "a", create_model("vim_micro", **TINY))
    convert = ["convert", "vim_micro", str(tmp_path / "a"), str(tmp_path / "b"), "--set", "img_size=24"]
    assert main(convert) == 0
    changed, expected = load(tmp_path / "b"), load(tmp_path / "a", img_size=24)
    assert changed.config == expected.config
    np.testing.assert_array_equal(changed.stem.positions[...], expected.stem.positions[...])
    assert main(["convert", "vmamba_micro", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert main([*convert[:3], str(tmp_path / "c"), "--entry", "model"]) == 1
    errors = capsys.readouterr().err
    assert "holds a vim model" in errors
    assert "leave out --entry" in errors


def test_sizes_that_parameters_or_windows_do_not_follow_are_refused(tmp_path):
    save(tmp_path / "a", create_model("vim_micro", **TINY))
    with pytest.raises(CheckpointError, match=r"do not fit the changed config: head\.proj\.bias is float32\[5\], not"):
        load(tmp_path / "a", num_classes=7)
    with pytest.raises(ValueError, match="has no config field image_size"):
        load(tmp_path / "a", image_size=7)
    fields = dict(img_size=32, dim=8, in_dim=4, depths=(1, 2), window_size=(4, 4), num_heads=(1, 2), num_classes=3)
    save(tmp_path / "b", create_model("mambavision_micro", **fields))
    with pytest.raises(ValueError, match="set window_size"):
        load(tmp_path / "b", img_size=64)
    assert load(tmp_path / "b", img_size=64, window_size=(4, 8)).config.grids == ((16, 16), (8, 8))
