"""Every message that docs/troubleshooting.md quotes is made here, by a small example of its section."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layered_model import IMAGES, Model, Stage, linear
from PIL import Image
from quantising import bits_of, float_model, images, module_at
from safetensors.numpy import save_file
from tiny_models import TINY, quantised, random_model
from torch_file_writer import Call, Name, contiguous, write

import ouromamba_jax as om
from ouromamba_jax.checkpoint import save
from ouromamba_jax.convert import load_tensors
from ouromamba_jax.data import load_images
from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.ops import cpu_miscompile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VIM = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 28364512\n"
FAST = dict(scale_search="max", detection="none", tune_epochs=0)

EXAMPLES: dict[str, list[Callable[[Path], object]]] = {}
"""By the first words of a heading, what makes each of its messages in turn."""


def example(heading: str):
    def add(make):
        EXAMPLES.setdefault(heading, []).append(make)
        return make

    return add


@cache
def published(manifest: str) -> dict[str, np.ndarray]:
    """Tensors of a published file's names, shapes and types."""
    text = (ROOT / "tests" / "golden" / "manifests" / f"{manifest}.json").read_text()
    tensors = json.loads(text)["state_dict"].items()
    return {key: np.broadcast_to(np.asarray(0.01, dtype), shape) for key, (shape, dtype) in tensors}


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@example("size mismatch for pos_embed: [1, 730")
def _(folder):
    return om.from_torch("vim_tiny", published(VIM.replace("patch16", "patch16_stride8")))


@example("size mismatch for pos_embed at")
def _(folder):
    return om.from_torch("vim_tiny", published(VIM), img_size=512)


@example("Error(s) in loading state_dict")
def _(folder):
    return om.from_torch("vmamba_tiny_s1l8", published("vssm1_small_0229s"))


@example("incompatible keys of an old VMamba")
def _(folder):
    first = {"in_proj": (384, 96), "out_proj": (96, 192)}
    tensors = {f"layers.0.blocks.0.self_attention.{name}.weight": np.zeros(shape) for name, shape in first.items()}
    return om.from_torch("vmamba_tiny_s1l8", tensors)


@example("keys start with teacher")
def _(folder):
    tensors = {f"{who}.backbone.head.bias": np.zeros(10) for who in ("teacher", "student")}
    return om.from_torch("vim_tiny", tensors)


@example("size mismatch for head.weight")
def _(folder):
    head = {"head.weight": np.zeros((3, 192), np.float32), "head.bias": np.zeros(3, np.float32)}
    return om.from_torch("vim_tiny", published(VIM) | head)


@example("MambaVision at another resolution")
def _(folder):
    return om.from_torch("mambavision_t", published("mamba_vision_T"), img_size=384)


@example("invalid load key")
def _(folder):
    (folder / "file.pth").write_text(LFS)
    return om.from_torch("vim_tiny", folder / "file.pth")


@example("Error while deserializing header")
def _(folder):
    (folder / "file.safetensors").write_text(LFS)
    return om.from_torch("vim_tiny", folder / "file.safetensors")


@example("PytorchStreamReader failed")
def _(folder):
    weights = np.zeros(3000, np.float32)
    return om.from_torch("vim_tiny", cut(write(folder / "file.pth", {"x": contiguous("0", weights)}, {"0": weights})))


@example("Weights only load failed")
def _(folder):
    whole = Call(Name("models_mamba", "VisionMamba"), (), {"training": False}, b"\x81")
    return om.from_torch("vim_tiny", write(folder / "file.pth", whole, {}))


@example("Weights only load failed")
def _(folder):
    weights = np.zeros(3, np.float32)
    tree = {"model": {"x": contiguous("0", weights)}, "args": Call(Name("os", "system"), ("true",))}
    return om.from_torch("vim_tiny", write(folder / "file.pth", tree, {"0": weights}))


@example("lower accuracy than published")
def _(folder):
    save_file({"cls_token": np.zeros((1, 1, 192), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    return om.from_torch("deit_tiny", folder)


@example("NCHW and NHWC")
def _(folder):
    return om.load("vim_micro")(jnp.zeros((2, 3, 32, 32)))


@example("random predictions")
def _(folder):
    return om.quantize(float_model(), jnp.linspace(0, 255, 12 * 16 * 3).reshape(1, 12, 16, 3), om.QuantConfig())


@example("accuracy 0.1 %")
def _(folder):
    for name in ("cat", "dog", "eel"):
        picture(folder / name / "1.png")
    return load_images(folder, "val", 8, HALF, classes=10, labelled=True)


@example("Couldn't find any class folder")
def _(folder):
    picture(folder / "ILSVRC2012_val_00000001.JPEG")
    return load_images(folder, "val", 8, HALF, classes=1000, labelled=True)


@example("OSError: image file is truncated")
def _(folder):
    file = picture(folder / "1.jpg")
    file.write_bytes(file.read_bytes()[:-50])
    return load_images(folder, "val", 8, HALF)


@example("generate images from a model")
def _(folder):
    model = random_model("vim_micro", **{**TINY, "num_classes": 0})
    return om.generate_images(model, om.GenConfig(num_images=1, iterations=1), jax.random.key(0))


@example("NaN in float16")
def _(folder):
    model = random_model("vim_micro", dtype=jnp.float16, **TINY)
    kernel = model.stem.proj.kernel
    kernel[...] = kernel[...] * 1e5
    return om.quantize(model, images(), om.QuantConfig(**FAST))


@example("NaN in the calibration images")
def _(folder):
    return om.quantize(float_model(), images().at[2, 0, 0, 0].set(jnp.nan), om.QuantConfig())


@example("weight tying")
def _(folder):
    tied = Stage(lambda self, x: self.a(x) @ self.a.kernel[...].T, a=linear())
    return om.quantize(Model(tied), IMAGES, om.QuantConfig())


@example("a quantised model at another")
def _(folder):
    save(folder / "low", quantised(om.QuantConfig()))
    return om.load(folder / "low", img_size=24)


@example("a quantised model at another")
def _(folder):
    layer = module_at(quantised(om.QuantConfig()), "blocks.0.mixer.in_proj")
    return layer(jnp.zeros((1, 12, 20)))


@example("the rule matches no site")
def _(folder):
    return om.quantize(float_model(), images(), om.QuantConfig(rules=(om.QuantRule("blocks.7", skip=True),)))


@example("already quantised")
def _(folder):
    return om.quantize(quantised(om.QuantConfig()), images(), om.QuantConfig())


@example("saving a model whose weights")
def _(folder):
    model = random_model("vim_micro", **TINY)
    model.head.proj.bias[...] = model.head.proj.bias[...] * jnp.nan
    save(folder / "model", model)


@example("saving a model that was changed")
def _(folder):
    model = random_model("vim_micro", **TINY)
    model.config = replace(model.config, class_token="first")
    save(folder / "model", model)


@example("casting a quantised model")
def _(folder):
    model = quantised(om.QuantConfig())
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state))
    save(folder / "model", model)


@example("wrong results and gradients")
def _(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_miscompile, "is_miscompiled", lambda: True)
        cpu_miscompile.warn_if_miscompiled.__wrapped__()


@example("cannot export")
def _(folder):
    (folder / "model.stablehlo").touch()
    om.export(folder / "model.stablehlo", float_model())


def quoted() -> dict[str, list[str]]:
    """The messages of the page by heading; sections about what works quote none."""
    sections = re.split(r"^###? (.+)\n", PAGE, flags=re.MULTILINE)[1:]
    found = {
        heading: re.findall(r"^```text\n(.+)\n```$", body, flags=re.MULTILINE)
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
    }
    return {heading: messages for heading, messages in found.items() if messages}


def said(make: Callable[[Path], object], folder: Path) -> str:
    """The error or the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make(folder)
        except (ValueError, OSError) as error:
            return str(error)
    assert caught, "nothing was said"
    return str(caught[0].message)


CASES = [
    pytest.param(make, message, id=f"{heading}-{i}")
    for heading, messages in quoted().items()
    for i, message in enumerate(messages)
    for make in next((makes for start, makes in EXAMPLES.items() if heading.startswith(start)), [])[i : i + 1]
]


def test_every_message_of_the_page_has_its_example():
    assert len(CASES) == sum(map(len, quoted().values())) == sum(map(len, EXAMPLES.values())) > 24


@pytest.mark.parametrize(("make", "message"), CASES)
def test_troubleshooting_quotes_what_is_said(make, message, tmp_path):
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, said(make, tmp_path), re.DOTALL), said(make, tmp_path)


# --- What the page says works.


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_numbers_beside_the_weights_do_no_harm(module, tmp_path):
    weights = np.arange(3, dtype=np.float32)
    number = Call(Name(module, "scalar"), (Call(Name("numpy", "dtype"), ("f8", False, True)), "abcdefgh"))
    path = write(tmp_path / "x.pth", {"model": {"x": contiguous("0", weights)}, "best_acc": number}, {"0": weights})
    np.testing.assert_array_equal(load_tensors(path)["x"], weights)


def test_what_macos_leaves_in_folders_is_no_picture(tmp_path):
    picture(tmp_path / "cat" / "1.jpg")
    (tmp_path / "cat" / "._1.jpg").write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert load_images(tmp_path, "val", 8, HALF).images.shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_calibration_hardly_depends_on_its_batches():
    first, second = (
        om.quantize(float_model(), images(), om.QuantConfig(batch_size=size, tune_epochs=0, scale_search="max"))[0]
        for size in (1, 6)
    )
    assert bits_of(first).keys() == bits_of(second).keys()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-6)


def test_a_web_page_is_no_checkpoint(tmp_path):
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"file{suffix}").write_text("<!DOCTYPE html><title>Virus scan warning</title>")
        with pytest.raises(ValueError, match="it is a web page, not the file; download the file that the page links"):
            om.from_torch("vim_tiny", tmp_path / f"file{suffix}")


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro", "mambavision_micro"])
@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        (lambda x: jnp.moveaxis(x, -1, 1), "channels come last, jnp.moveaxis(images, 1, -1)."),
        (lambda x: x[0], "one image is a batch of its own, images[None]."),
        (
            lambda x: x[..., :1],
            "a gray picture is one of three equal channels, jnp.repeat(images, 3, axis=-1), or is for a model with "
            "in_channels=1.",
        ),
        (lambda x: x[..., :2], "resize them or build the model with another img_size."),
    ],
)
def test_images_of_another_shape_are_refused_with_the_way_out(name, change, way_out):
    model = om.load(name)
    size = model.config.img_size
    with pytest.raises(ValueError, match=re.escape(way_out)):
        jax.eval_shape(model, change(jnp.zeros((2, size, size, 3))))
