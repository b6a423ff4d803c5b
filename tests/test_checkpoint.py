"""Native checkpoints: what was saved comes back bit for bit, and anything damaged is refused in one sentence."""

import dataclasses
import gc
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny_models import TINY, TOKENS, filled, quantised

from ouromamba_jax.checkpoint import CheckpointError, load, read_description, resolve, save
from ouromamba_jax.models import create_model
from ouromamba_jax.quantize import OPERANDS, QuantConfig, memory_report
from ouromamba_jax.quantize.modules import Levels

CONFIGS = {
    "w4a4": QuantConfig.preset("w4a4"),
    "w4a8": QuantConfig.preset("w4a8"),
    "w6a6": QuantConfig.preset("w6a6", outlier_scale="free"),
    "w8a8": QuantConfig.preset("w8a8"),
    "every operand": QuantConfig.preset("w4a4", operands=OPERANDS),
    "no operand": QuantConfig.preset("w4a4", operands=()),
    "static": QuantConfig.preset("w4a4", detection="static"),
    "offline": QuantConfig.preset("w4a4", threshold="offline"),
    "released": QuantConfig.preset("w4a4", outlier_scale="free", spec="released"),
    "groups": QuantConfig(weight_bits=3, weight_group=2),
}
SKIPPED = ("stem.proj", "blocks.0.mixer.directions.1.x_proj", "blocks.0.mixer.z")


def assert_same(one: nnx.Module, other: nnx.Module, *, graph: bool = True) -> None:
    """The same graph, settings included, and the same bits in every leaf."""
    assert not graph or nnx.graphdef(one) == nnx.graphdef(other)
    left, right = (dict(nnx.to_flat_state(nnx.state(m))) for m in (one, other))
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert type(leaf) is type(right[path])
        assert leaf[...].dtype == right[path][...].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf[...]), np.asarray(right[path][...]), err_msg=str(path))


@partial(jax.jit, static_argnums=0)
def logits(graphdef, state, images):
    return nnx.merge(graphdef, state)(images)


def refused(path: Path, what: str) -> str:
    """The message of the refusal: one sentence that names the path and says `what`."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert what in message
    assert "\n" not in message
    return message


def edit(path: Path, **fields) -> None:
    """Changes fields of config.json; a dotted name is one inside "config"."""
    file = path / "config.json"
    description = json.loads(file.read_text())
    for name, value in fields.items():
        (description if name in description else description["config"])[name] = value
    file.write_text(json.dumps(description))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, nnx.Module]:
    model = filled(create_model("vim_micro", **TINY))
    path = tmp_path_factory.mktemp("float") / "model"
    save(path, model)
    return path, model


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_float_round_trip(saved):
    path, model = saved
    again = load(path)
    assert_same(model, again)
    images = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    expected = logits(nnx.graphdef(model), nnx.state(model), images)
    np.testing.assert_array_equal(logits(nnx.graphdef(again), nnx.state(again), images), expected)
    assert bool((jnp.abs(expected) > 0).all())
    assert again.config == model.config
    assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float16")]
)
def test_types_come_back(tmp_path, dtype, param_dtype):
    model = filled(create_model("vim_micro", dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), **TINY))
    save(tmp_path / "model", model)
    again = load(tmp_path / "model")
    assert_same(model, again, graph=False)  # a Flax layer also notes the type that it was initialised in
    assert again.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("skipped", [(), SKIPPED], ids=["all", "some skipped"])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_round_trip(tmp_path, name, skipped):
    model = quantised(CONFIGS[name], skipped=skipped)
    before = [np.asarray(leaf[...]) for _, leaf in nnx.to_flat_state(nnx.state(model))]
    save(tmp_path / "model", model)
    for value, (_, leaf) in zip(before, nnx.to_flat_state(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(value, np.asarray(leaf[...]))  # saving packs a copy
    assert_same(model, load(tmp_path / "model"))


@pytest.mark.parametrize("name", ["w4a4", pytest.param("every operand", marks=pytest.mark.slow)])
def test_logits_keep_their_bits(tmp_path, name):
    model = quantised(CONFIGS[name])
    save(tmp_path / "model", model)
    again = load(tmp_path / "model")
    images = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    expected = logits(nnx.graphdef(model), nnx.state(model), images)
    np.testing.assert_array_equal(logits(nnx.graphdef(again), nnx.state(again), images), expected)
    assert bool(jnp.isfinite(expected).all())
    assert float(jnp.std(expected)) > 0


def test_four_bit_weights_are_packed_on_disk(tmp_path):
    """Odd rows, too: 20 inputs take 10 rows of bytes, 5 take 3; 8-bit levels of A stay whole."""
    model = quantised(CONFIGS["w4a4"])
    save(tmp_path / "model", model)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "model" / "arrays")
    counted = 0
    for name, value in stored.items():
        leaf = dict((".".join(map(str, k)), v) for k, v in nnx.to_flat_state(nnx.state(model)))[name]
        if isinstance(leaf, Levels) and leaf.bits == 4:
            levels = np.asarray(leaf[...])
            assert value.dtype == np.uint8
            assert value.shape == ((levels.shape[0] + 1) // 2, levels.shape[1])
            low, high = np.asarray(value) & 15, np.asarray(value) >> 4
            rows = np.stack([low, high], 1).reshape(-1, levels.shape[1]).astype(np.int8)[: len(levels)]
            np.testing.assert_array_equal(np.where(rows > 7, rows - 16, rows), levels)
            counted += 1
        else:
            assert value.dtype == leaf[...].dtype
    assert counted == 2 + 2 * 2
    assert sum(np.asarray(v).nbytes for v in stored.values()) == memory_report(model).total


def test_a_missing_checkpoint(tmp_path):
    message = refused(tmp_path / "nothing", "there is no checkpoint at")
    assert "vim_micro" in message
    refused(tmp_path, "has no readable config.json")
    file = tmp_path / "file"
    file.write_text("x")
    refused(file, "has no readable config.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "damaged"),
        ('{"format": 1, "family"', "damaged"),
        ("\x00\x01", "damaged"),
        ("[1, 2]", "format None"),
        ("{}", "format None"),
        ('{"format": 2}', "format 2; this version reads format 1"),
        ('{"format": 1}', "does not describe a model"),
    ],
)
def test_a_damaged_description(copy, text, what):
    (copy / "config.json").write_text(text)
    refused(copy, what)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (dict(family="vit"), "no model family 'vit'"),
        (dict(config={}), "does not describe a model"),
        (dict(config=None), "does not describe a model"),
        (dict(dtype="float33"), "float33"),
        (dict(embed_dim="wide"), "does not describe a model"),
        (dict(img_size=2), "smaller than one patch"),
        (dict(depth=None), "does not describe a model"),
        (dict(surprise=1), "surprise"),
        (dict(preprocessing={"means": 3}), "does not describe a model"),
        (dict(quantization=[1]), "does not describe a model"),
        (dict(quantization={"blocks.7.mixer.in_proj": None}), "does not describe a model"),
        (dict(depth=2), "blocks.1.mixer.in_proj.kernel is missing"),
        (dict(depth=0), "blocks.0.mixer.in_proj.kernel is not part of the model"),
        (dict(num_classes=8), "head.proj.bias is float32[7], not float32[8]"),
        (dict(img_size=[8, 12]), "stem.positions is float32[13, 20], not float32[7, 20]"),
    ],
)
def test_a_description_of_another_model(copy, fields, what):
    edit(copy, **fields)
    refused(copy, what)


def test_every_mismatch_is_named(copy):
    edit(copy, num_classes=8, d_conv=5)
    message = refused(copy, "head.proj.kernel")
    for name in ("head.proj.bias", "directions.0.conv.kernel", "directions.1.conv.kernel"):
        assert name in message
    edit(copy, embed_dim=24)
    assert "and 1" in refused(copy, "; ")  # ten problems are listed, the others counted


def test_a_quantised_description_of_another_model(tmp_path):
    """A site that does not exist, other bits, another token count: refused, never reinterpreted."""
    model = quantised(CONFIGS["w4a4"])
    save(tmp_path / "saved", model)
    sites = read_description(tmp_path / "saved")["quantization"]

    def with_sites(changed: dict) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = Path(shutil.copytree(tmp_path / "saved", tmp_path / "copy"))
        edit(path, quantization=changed)
        return path

    def with_spec(site: str, config: dict | None = None, **fields) -> Path:
        spec = {**sites[site], **fields, "config": {**sites[site]["config"], **(config or {})}}
        return with_sites({**sites, site: spec})

    out_proj, scan = "blocks.0.mixer.out_proj", "blocks.0.mixer.scan"
    refused(with_sites({**sites, "blocks.3.mixer.out_proj": sites[out_proj]}), "has no site 'blocks.3.mixer.out_proj'")
    refused(with_sites({k: v for k, v in sites.items() if k != out_proj}), f"{out_proj}.kernel is missing")
    refused(with_sites({}), "is missing")
    refused(with_spec(out_proj, dict(weight_bits=8)), f"{out_proj}.levels is uint8[20, 20], not int8[40, 20]")
    refused(with_spec(out_proj, dict(weight_bits=9)), "weight_bits must be 2 to 8")
    refused(with_spec(out_proj, dict(weight_group=4)), f"{out_proj}.weight_scale is float32[1, 20]")
    refused(with_spec(out_proj, dict(bits=4)), "bits")
    refused(with_spec(out_proj, tokens=9), f"{out_proj}.act.scale is float32[13], not float32[9]")
    refused(with_spec(out_proj, dict(threshold="offline")), f"{out_proj}.act.theta is missing")
    refused(with_spec(scan, dict(operands=["A"])), f"{scan}.D is missing")


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.unlink()
    if how != "delete":
        file.write_bytes(data[: len(data) // 2] if how == "truncate" else b"")


@pytest.mark.parametrize("how", ["delete", "truncate", "empty"])
def test_damaged_arrays(saved, tmp_path, monkeypatch, how):
    """Whatever happens to any file below arrays/: a refusal, or (for files that hold no data) the same bits."""
    # Orbax drops the other reads when one fails; their complaints are not what is tested.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    path, model = saved
    files = sorted(f.relative_to(path) for f in (path / "arrays").rglob("*") if f.is_file())
    messages = []
    for i, file in enumerate(files):
        copied = Path(shutil.copytree(path, tmp_path / str(i)))
        damage(copied / file, how)
        try:
            again = load(copied)
        except CheckpointError as error:
            messages.append((str(copied), str(error)))
        else:
            assert_same(model, again)
    for name, message in messages:
        assert name in message
        assert "\n" not in message
    assert len(messages) >= 2
    shutil.rmtree(copied / "arrays")
    refused(copied, "")
    gc.collect()


def test_a_taken_name_is_refused(saved, tmp_path):
    path, model = saved
    before = (path / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="already exists; choose another path") as caught:
        save(path, model)
    assert str(path) in str(caught.value)
    assert (path / "config.json").read_bytes() == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        save(file, model)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model)
    assert_same(load(tmp_path / "empty"), model)
    save(tmp_path / "new" / "folders" / "model", model)
    assert_same(load(tmp_path / "new" / "folders" / "model"), model)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_left_half_written(saved, tmp_path, monkeypatch, error, when):
    original = ocp.StandardCheckpointer.save

    def failing(self, *args, **kwargs):
        if when == "after":
            original(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", failing)
    with pytest.raises(type(error)):
        save(tmp_path / "model", saved[1])
    assert list(tmp_path.iterdir()) == []


def test_embedded_names(tmp_path, monkeypatch):
    """A bare name falls back to what is shipped; a folder of that name comes first; no way out of the package."""
    monkeypatch.chdir(tmp_path)
    shipped = resolve("vim_micro")
    assert shipped.parts[-3:] == ("ouromamba_jax", "checkpoints", "vim_micro")
    assert load("vim_micro").config.num_classes == 10
    for name in ("vim_micr", "../checkpoints/vim_micro", "vim_micro/arrays"):
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            resolve(name)
    (tmp_path / "vim_micro").mkdir()
    assert resolve("vim_micro") == tmp_path / "vim_micro"


def test_description_holds_the_settings(tmp_path):
    config = dataclasses.replace(CONFIGS["w4a4"], sigma=2.5, n_refresh=7)
    save(tmp_path / "model", quantised(config))
    description = read_description(tmp_path / "model")
    assert description["family"] == "vim"
    site = description["quantization"]["blocks.0.mixer.out_proj"]
    assert (site["config"]["sigma"], site["config"]["n_refresh"], site["tokens"]) == (2.5, 7, TOKENS)
    assert description["quantization"]["stem.proj"]["config"]["weight_bits"] == 8
