"""What is saved is what computes: edits of a config, casts and values that are not finite are refused by name."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import FAMILIES, natural_model, quantised

from ouromamba_jax import QuantConfig, load, save
from ouromamba_jax.checkpoint import CheckpointError
from ouromamba_jax.quantize.activation import Calibrated

MICRO = {family: f"{family}_micro" for family in FAMILIES}
W4A4 = QuantConfig.preset("w4a4")


def refused(folder, model) -> str:
    with pytest.raises(CheckpointError) as caught:
        save(folder / "a", model)
    assert not any(folder.iterdir())
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("family", "edit", "says"),
    [
        ("vim", dict(class_token="first"), "a layer has class_token='middle', not 'first'; set model.config to"),
        ("vim", dict(halve_directions=False), "halve_directions=True, not False"),
        ("vim", dict(img_size=(16, 12)), "img_size=(12, 16), not (16, 12)"),
        ("mambavision", dict(window_size=(4, 8)), "blocks.1.window is 4, not 8"),
        ("mambavision", dict(num_heads=(1, 3)), "heads is 2, not 3"),
        ("mambavision", dict(img_size=(40, 56)), "stem.size is (40, 52), not (40, 56)"),
        ("vit", dict(norm_eps=1e-5), "blocks.0.norm1.eps is 1e-06, not 1e-05"),
        ("vit", dict(pool_include_prefix=True), "pool_include_prefix=False, not True"),
        ("vit", dict(num_heads=4), "heads is 2, not 4"),
    ],
)
def test_saved_config_is_the_one_that_computes(tmp_path, family, edit, says):
    low = says.startswith(("a layer", "blocks.1"))
    model = quantised(W4A4, family) if low else natural_model(MICRO[family], **FAMILIES[family])
    model.config = replace(model.config, **edit)
    assert says in refused(tmp_path, model)


def test_saved_settings_of_a_layer_are_the_config_s(tmp_path):
    model = natural_model(MICRO["vim"], **FAMILIES["vim"])
    model.blocks[0].norm.eps = 1e-3
    assert "blocks.0.norm.eps is 0.001, not 1e-05; set model.config" in refused(tmp_path, model)
    model.blocks[0].norm.eps = 1e-5
    model.blocks[0].mixer.in_proj.dtype = jnp.bfloat16
    assert "blocks.0.mixer.in_proj.dtype is 'bfloat16', not 'float32'" in refused(tmp_path, model)
    low = quantised(W4A4)
    act = low.blocks[0].mixer.in_proj.act
    act.config = replace(act.config, n_refresh=3)
    assert "a layer has n_refresh=3, not 10" in refused(tmp_path, low)


@pytest.mark.parametrize(("family", "low"), [("vim", False), *((family, True) for family in FAMILIES)])
def test_saved_edits_that_change_no_logit_are_kept(tmp_path, family, low):
    """How pictures are prepared, how training drops and stores: none is what a loaded model computes with."""
    model = quantised(W4A4, family) if low else natural_model(MICRO[family], **FAMILIES[family])
    model.config = replace(model.config, preprocessing=replace(model.config.preprocessing, crop_pct=0.5))
    model.drop_path, model.remat = 0.1, True
    save(tmp_path / "a", model)
    again = load(tmp_path / "a")
    assert again.config == model.config
    save(tmp_path / "b", again)


def scales_of(model) -> dict[str, nnx.Variable]:
    leaves = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf for path, leaf in leaves if isinstance(leaf, Calibrated)}


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_saved_values_are_finite(tmp_path, value):
    low = quantised(W4A4)
    name, leaf = next((name, leaf) for name, leaf in scales_of(low).items() if name.endswith("in_proj.act.scale"))
    leaf.set_value(leaf.get_value() * value)
    assert f"{name} of the model holds NaN or infinity, so it is not saved" in refused(tmp_path, low)
    low = natural_model(MICRO["vim"], **FAMILIES["vim"])
    low.head.proj.bias[...] = low.head.proj.bias[...].at[3].set(value)
    assert refused(tmp_path, low).startswith("head.proj.bias of the model holds NaN or infinity")


def test_saved_values_that_are_not_finite_are_not_loaded(tmp_path, monkeypatch):
    low = quantised(W4A4)
    name, leaf = next(iter(scales_of(low).items()))
    leaf.set_value(leaf.get_value().at[0].set(jnp.nan))
    with monkeypatch.context() as patch:
        patch.setattr("ouromamba_jax.checkpoint._not_finite", lambda arrays: None)
        save(tmp_path / "a", low)
    with pytest.raises(CheckpointError, match=rf"^{name} of .*/a holds NaN or infinity: save a model of whole weights"):
        load(tmp_path / "a")


def test_saved_casts_are_named_with_the_type_they_should_have(tmp_path):
    low = quantised(W4A4)
    floats = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    nnx.update(low, jax.tree.map(floats, nnx.state(low)))
    message = refused(tmp_path, low)  # it computes the same, but would take other files
    assert "blocks.0.mixer.in_proj.act.theta is float32, not bfloat16; " in message
    assert message.endswith(" more; quantise or load it again, and cast only its nnx.Param leaves.")
    low = quantised(W4A4)
    low.head.proj.levels.set_value(low.head.proj.levels.get_value().astype(jnp.float32))
    assert ": head.proj.levels is float32, not int8; quantise or load it again" in refused(tmp_path, low)
    low = quantised(W4A4)
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(low, nnx.Param))
    nnx.update(low, parameters)
    save(tmp_path / "a", low)
    kept = nnx.state(load(tmp_path / "a"), nnx.Param)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, parameters))
