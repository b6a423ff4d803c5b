"""Heads that were replaced, made anew or left out, and models that were changed in other ways: saved or refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from ouromamba_jax import load, save
from ouromamba_jax.checkpoint import CheckpointError
from ouromamba_jax.cli.main import main
from ouromamba_jax.convert import from_torch, load_tensors
from ouromamba_jax.models import create_model

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
MODELS = {
    "vim": ("vim_tiny", dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3)),
    "vmamba": ("vmamba_tiny_s1l8", dict(img_size=64, dims=8, depths=(1, 1, 2, 1))),
    "mambavision": (
        "mambavision_t",
        dict(
            img_size=64, dim=10, in_dim=8, depths=(1, 1, 2, 2), window_size=(8, 8, 4, 2), num_heads=(1, 2, 4, 8),
            mlp_ratio=2.0,
        ),
    ),
    "vit": ("vit_tiny", dict(img_size=32, patch_size=8, embed_dim=48, depth=3)),
}  # fmt: skip
TINY = dict(img_size=16, embed_dim=16, depth=1, d_state=3, num_classes=5)


def weights(family: str) -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / f"{family}_a" / "model.safetensors")


@pytest.fixture
def model() -> nnx.Module:
    return create_model("vim_micro", **TINY)


@pytest.mark.parametrize("family", MODELS)
def test_heads_fresh_and_absent(family):
    """The features are the checkpoint's in either case."""
    name, fields = MODELS[family]
    fresh = from_torch(name, weights(family), num_classes=3, head="fresh", **fields)
    assert fresh.head.proj.kernel.shape[1] == fresh.config.num_classes == 3
    assert 0.01 < np.std(fresh.head.proj.kernel[...]) < 0.03
    without = from_torch(name, weights(family), num_classes=0, **fields)
    assert without.head.proj is None
    same = jax.tree.map(np.array_equal, nnx.state(without.blocks), nnx.state(fresh.blocks))
    assert jax.tree.all(same)


def test_heads_absent_give_the_published_features():
    golden = np.load(GOLDEN / "vim_a" / "golden.npz")
    name, fields = MODELS["vim"]
    model = from_torch(name, weights("vim"), num_classes=0, **fields)
    features = jax.jit(model)(jnp.asarray(golden["input"]).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(features, golden["features"], rtol=0, atol=1e-5)


def test_heads_absent_are_saved_and_loaded(tmp_path):
    model = create_model("vim_micro", **{**TINY, "num_classes": 0})
    save(tmp_path / "a", model)
    again = load(tmp_path / "a")
    assert again.head.proj is None
    assert jax.eval_shape(again, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)).shape == (2, 16)


def test_heads_fresh_need_classes():
    for options in (dict(head="fresh", num_classes=0), dict(head="new")):
        with pytest.raises(ValueError, match='"fresh" with num_classes from 1'):
            from_torch("vim_tiny", {}, **options)


def test_heads_fresh_from_the_command(tmp_path):
    save_file(weights("vim"), tmp_path / "a.safetensors")
    fields = [f"{key}={value}" for key, value in MODELS["vim"][1].items()]
    options = [part for field in (*fields, "num_classes=3") for part in ("--set", field)]
    assert (
        main(["convert", "vim_tiny", str(tmp_path / "a.safetensors"), str(tmp_path / "b"), *options, "--fresh-head"])
        == 0
    )
    assert load(tmp_path / "b").config.num_classes == 3


def test_heads_replaced_are_saved_with_their_classes(model, tmp_path):
    model.head.proj = nnx.Linear(16, 3, rngs=nnx.Rngs(1))
    save(tmp_path / "a", model)
    again = load(tmp_path / "a")
    assert again.config == dataclasses.replace(model.config, num_classes=3)
    np.testing.assert_array_equal(again.head.proj.kernel[...], model.head.proj.kernel[...])


def test_heads_aside_a_home_folder_is_a_path(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/a", model)
    assert load("~/a").config == load(tmp_path / "a").config == model.config


class Scaled(nnx.Linear):
    """A layer with the parameters of another and an arithmetic of its own."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.head, "proj", Scaled(16, 5, rngs=nnx.Rngs(1))), "head.proj is a Scaled, not a Linear"),
        (lambda m: setattr(m.head, "proj", nnx.Linear(16, 3, use_bias=False, rngs=nnx.Rngs(1))), "head.proj.bias is"),
        (lambda m: setattr(m.head, "proj", nnx.List([nnx.Linear(16, 5, rngs=nnx.Rngs(1))])), "head.proj is a List"),
        (lambda m: setattr(m, "config", dataclasses.replace(m.config, depth=2)), "blocks.1"),
        (lambda m: setattr(m.stem, "positions", None), "stem.positions is missing"),
        (lambda m: setattr(m.head, "scale", nnx.Param(jnp.ones(3))), "head.scale is not part"),
        (lambda m: m.head.proj.bias.set_value(jnp.zeros(5, jnp.int32)), "head.proj.bias is int32[5], not float32[5]"),
    ],
)
def test_heads_and_changes_that_could_not_be_loaded_are_refused_when_saved(model, tmp_path, change, says):
    change(model)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "new" / "a", model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
