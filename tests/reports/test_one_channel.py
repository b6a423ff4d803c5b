"""One channel in place of three: summed weights, gray pictures, and every step from the checkpoint to low bits."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import mambavision_reference
import numpy as np
import pytest
import vim_reference
import vit_reference
import vssm_reference
from linear_model import LinearConfig, LinearModel
from PIL import Image
from safetensors.numpy import save_file
from tiny_models import FAMILIES, random_model

import ouromamba_jax as om
from ouromamba_jax.cli.main import main
from ouromamba_jax.convert import ConversionError, from_torch, matching_models
from ouromamba_jax.data import load_images, to_pixels
from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.evaluation.bench import random_images
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.evaluation.stand_in import quantised_stand_in
from ouromamba_jax.gen.prior import noise
from ouromamba_jax.models import model_config
from ouromamba_jax.report.figures import image_grid

FIRST = {
    "vim": "patch_embed.proj.weight",
    "vmamba": "patch_embed.0.weight",
    "mambavision": "patch_embed.conv_down.0.weight",
    "vit": "patch_embed.proj.weight",
}
GRAY = Preprocessing(mean=(0.25,), std=(0.5,), crop_pct=1.0)


def weights(family: str) -> dict[str, np.ndarray]:
    """A checkpoint of the tiny model of a family, by the published names, for three channels."""
    rng, patches = np.random.default_rng(0), dict(patch=4, patches=12, dim=20, depth=1)
    if family == "vim":
        return vim_reference.random_weights(rng, states=3, classes=7, **patches)
    if family == "vit":
        return vit_reference.random_weights(rng, heads=2, hidden=80, classes=7, **patches)
    if family == "vmamba":
        return vssm_reference.random_weights(
            rng, dims=(20,), depths=(1,), ratio=1.0, states=1, mlp_ratio=4.0, classes=7
        )
    return mambavision_reference.random_weights(
        rng, dim=12, in_dim=8, depths=(1, 2), mlp_ratio=4.0, classes=7, layer_scale=True, conv_levels=1
    )


def converted(family: str, tensors=None, **options):
    return from_torch(f"{family}_micro", weights(family) if tensors is None else tensors, **FAMILIES[family], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_channel_gets_the_logits_of_three_equal_ones(family, tmp_path):
    """Whether the weights were summed when they were converted, or when the model was loaded."""
    colour = converted(family)
    gray = converted(family, in_channels=1)
    assert gray.config.in_channels == 1
    x = random_images(gray, 2)
    assert x.shape[-1] == 1
    expected = jax.jit(colour)(jnp.repeat(x, 3, axis=-1))
    np.testing.assert_allclose(jax.jit(gray)(x), expected, rtol=0, atol=1e-5)
    om.save(tmp_path / "colour", colour)
    loaded = om.load(tmp_path / "colour", in_channels=1)
    assert loaded.config == gray.config
    first = (m.stem.proj if hasattr(m.stem, "proj") else m.stem.first.proj for m in (loaded, gray))
    kernels = [layer.kernel[...] for layer in first]
    np.testing.assert_allclose(*kernels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_channel_in_the_checkpoint_names_the_field(family):
    name, tensors = f"{family}_micro", weights(family)
    tensors[FIRST[family]] = tensors[FIRST[family]][:, :1]
    message = f"the checkpoint has in_channels=1 where {name} has in_channels=3: pass in_channels=1 (--set on the"
    with pytest.raises(ConversionError, match=re.escape(message)):
        converted(family, tensors)
    assert matching_models(tensors)[0][1]["in_channels"] == 1
    gray = converted(family, tensors, in_channels=1)
    if family != "mambavision":  # whose kernels hold a BatchNorm
        kernel = gray.stem.first.proj.kernel if family == "vmamba" else gray.stem.proj.kernel
        np.testing.assert_array_equal(kernel[...].T, tensors[FIRST[family]].reshape(len(kernel[0]), -1))
    tensors[FIRST[family]] = np.zeros((*tensors[FIRST[family]].shape[:1], 4, 1, 1), np.float32)
    for channels in (1, 3):
        with pytest.raises(ConversionError, match=f"takes images of 4 channels and {name} of {channels}: train it on"):
            converted(family, tensors, in_channels=channels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("in_chans", 1, "has no config field in_chans; channels are in_channels here, 1 or 3."),
        ("channels", 1, "has no config field channels; channels are in_channels here, 1 or 3."),
        ("in_channels", 2, "in_channels is 2, but it must be one of 1, 3; change it."),
        ("in_channels", True, "in_channels is True, but it must be one of 1, 3; change it."),
    ],
)
def test_one_channel_by_another_name_or_number(family, field, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        model_config(f"{family}_micro", **{field: value})


def test_one_channel_has_the_average_mean_and_std_unless_they_are_given(tmp_path):
    config = model_config("vim_micro", in_channels=1, mean=(0.1, 0.2, 0.6), std=(0.2, 0.3, 0.4))
    np.testing.assert_allclose((*config.preprocessing.mean, *config.preprocessing.std), (0.3, 0.3), rtol=1e-12)
    model = random_model("vim_micro", depth=1, in_channels=np.int64(1), mean=(0.4,))
    assert (model.config.preprocessing.mean, model.config.preprocessing.std) == ((0.4,), (0.5,))
    om.save(tmp_path / "a", model)
    assert om.load(tmp_path / "a").config == model.config
    with pytest.raises(ValueError, match="both have one number per channel"):
        model_config("vim_micro", in_channels=1, mean=(0.1, 0.2, 0.6))


def test_one_channel_is_not_what_older_checkpoints_have(tmp_path):
    om.save(tmp_path / "a", random_model("vim_micro", depth=1))
    path = tmp_path / "a" / "config.json"
    description = json.loads(path.read_text())
    assert description["config"].pop("in_channels") == 3
    path.write_text(json.dumps(description))
    assert om.load(tmp_path / "a").config.in_channels == 3


def test_one_channel_of_pictures(tmp_path):
    """Pillow's mode L; what is gray already stays as it is, also where the pixels have an axis for it."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    (tmp_path / "p").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "p" / f"{i}.png")
    expected = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in pixels])[..., None]
    np.savez(tmp_path / "gray.npz", images=expected)
    for source in ("p", "gray.npz"):
        images = load_images(tmp_path / source, "test", 8, GRAY).images
        np.testing.assert_allclose(images, (expected / 255 - 0.25) / 0.5, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(to_pixels(images, GRAY), expected)
    np.savez(tmp_path / "floats.npz", images=images)
    np.testing.assert_array_equal(load_images(tmp_path / "floats.npz", "test", 8, GRAY).images, images)
    with pytest.raises(ValueError, match=r"are 8x8x1, but the model takes 8x8x3; .* another img_size or in_channels\."):
        load_images(tmp_path / "floats.npz", "test", 8, GRAY.for_channels(3))
    in_colour = load_images(tmp_path / "gray.npz", "test", 8, GRAY.for_channels(3)).images
    np.testing.assert_array_equal(in_colour, np.repeat(images, 3, axis=-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        (lambda x: x[..., 0], "gray pictures have one channel, images[..., None]."),
        (lambda x: x[0], "one image is a batch of its own, images[None]."),
        (lambda x: jnp.moveaxis(x, -1, 1), "channels come last, jnp.moveaxis(images, 1, -1)."),
        (lambda x: jnp.repeat(x, 3, axis=-1), "colours are for a model with in_channels=3, and load_images makes them"),
    ],
)
def test_one_channel_and_images_of_another_shape(family, change, way_out):
    model = random_model(f"{family}_micro", in_channels=1)
    with pytest.raises(ValueError, match=re.escape(way_out)):
        jax.eval_shape(model, change(random_images(model, 2)))


def test_one_channel_of_feature_maps_and_traces():
    model = random_model("vim_micro", depth=1, in_channels=1)
    images = jax.ShapeDtypeStruct((2, 40, 32, 1), jnp.float32)
    assert [x.shape for x in jax.eval_shape(model.features, images)] == [(2, 10, 8, 64)]
    logits, _ = jax.eval_shape(model.trace, random_images(model, 2))
    assert logits.shape == (2, 10)


def test_one_channel_of_noise_has_no_colours_of_its_own():
    key = jax.random.key(0)
    plain, other = (noise(key, (64, 8, 8, 1), om.GenConfig(scales=1, chroma=chroma)) for chroma in (0.2, 1.0))
    np.testing.assert_array_equal(plain, other)
    assert abs(float(plain.std()) - 1) < 0.05, "cells are pixels: unit noise, as without chroma"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_channel_of_quantised_stems(family):
    model = random_model(f"{family}_micro", **FAMILIES[family], in_channels=1)
    low = quantised_stand_in(model, om.QuantConfig.preset("w8a8"))
    first = low.stem.proj if family in ("vim", "vit") else low.stem.first.proj
    assert first.weight.shape == (16 if family in ("vim", "vit") else 9, first.weight.shape[1])
    assert jax.eval_shape(low, random_images(model, 2)).shape == (2, 7)


def test_one_channel_of_generated_images(tmp_path):
    """Black to white at most, and a figure without colours."""
    config = LinearConfig(in_channels=1, preprocessing=Preprocessing(mean=(0.25,), std=(0.5,)))
    settings = om.GenConfig(num_images=2, iterations=2, contrastive=0.0, jitter=0.0)
    images = om.generate_images(LinearModel(config=config), settings, jax.random.key(0)).images
    assert images.shape == (2, 4, 4, 1)
    assert -0.5 <= float(images.min()) < float(images.max()) <= 1.5
    image_grid(tmp_path / "a.png", to_pixels(images, config.preprocessing))
    with Image.open(tmp_path / "a.png") as figure:
        drawn = np.asarray(figure.convert("RGB"))
    assert (drawn == drawn[..., :1]).all()
    assert len(np.unique(drawn)) > 10


def convert(tmp_path) -> str:
    """The folder of a Vim of one channel that the command converted."""
    save_file(weights("vim"), tmp_path / "a.safetensors")
    fields = {**FAMILIES["vim"], "img_size": "12,16", "in_channels": 1}
    options = [part for field, value in fields.items() for part in ("--set", f"{field}={value}")]
    folder = str(tmp_path / "gray")
    assert main(["convert", "vim_micro", str(tmp_path / "a.safetensors"), folder, *options]) == 0
    return folder


def test_one_channel_from_the_command(tmp_path, capsys):
    assert main(["inspect", convert(tmp_path)]) == 0
    assert "in_channels=1" in capsys.readouterr().out
    tensors = weights("vim")
    tensors[FIRST["vim"]] = tensors[FIRST["vim"]][:, :1]
    save_file(tensors, tmp_path / "b.safetensors")
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 0
    assert "--set in_channels=1" in capsys.readouterr().out


@pytest.mark.slow
def test_one_channel_from_the_checkpoint_to_low_bits(tmp_path):
    """convert, generate, quantize and export, as the command runs them."""
    gray, made, low, program = convert(tmp_path), *(str(tmp_path / name) for name in ("i.npz", "low", "p.stablehlo"))
    assert main(["generate", gray, made, "--num-images", "2", "--iterations", "2"]) == 0
    assert main(["quantize", gray, low, "--images", made, "--bits", "w8a8"]) == 0
    preprocessing = om.load(low).config.preprocessing
    images = load_images(made, "test", (12, 16), preprocessing).images
    assert images.shape == (2, 12, 16, 1)
    logits, exact = (predict(om.load(folder), images) for folder in (low, gray))
    assert sqnr_db(exact, logits) > 25
    assert main(["export", low, program]) == 0
    exported = jax.export.deserialize(bytearray(Path(program).read_bytes()))
    np.testing.assert_allclose(exported.call(images), logits, rtol=0, atol=1e-4)
