"""Native checkpoints: what was saved comes back bit for bit, and anything damaged is refused in one sentence."""

import dataclasses
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from draws import normal
from flax import nnx
from tiny_models import TINY, TOKENS, quantised, random_model

from ouromamba_jax.checkpoint import CheckpointError, load, read_description, resolve, save
from ouromamba_jax.ops.passes import gather
from ouromamba_jax.quantize import OPERANDS, QuantConfig, memory_report
from ouromamba_jax.quantize.activation import Levels
from ouromamba_jax.quantize.floats import FloatSites, store_floats
from ouromamba_jax.quantize.kinds import apply_specs, kind_of
from ouromamba_jax.quantize.sites import iter_sites, named_modules

CONFIGS = {
    "w4a4": QuantConfig.preset("w4a4"),
    "w8a8": QuantConfig.preset("w8a8"),
    "every operand": QuantConfig.preset("w4a4", operands=OPERANDS),
    "no operand": QuantConfig.preset("w4a4", operands=()),
    "static": QuantConfig.preset("w4a4", detection="static"),
    "none": QuantConfig.preset("w4a4", detection="none"),
    "weights alone": QuantConfig(act_bits=None),
    "groups": QuantConfig(weight_bits=3, weight_group=2),
}
TWO_BYTES = {"blocks.0.mixer.out_proj": ("input",), "blocks.0.mixer.scan": ("delta.0", "B.1")}
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


def on_disk(path: Path) -> dict[str, np.ndarray]:
    """What Orbax alone reads, cut up by the index: leaves of one type lie by name, one after the other."""
    with ocp.StandardCheckpointer() as checkpointer:
        flat = checkpointer.restore(path / "arrays")
    index = read_description(path)["arrays"]
    assert flat.keys() == index.keys()
    arrays = {}
    for dtype, names in index.items():
        assert flat[dtype].dtype == jnp.dtype(dtype)
        ends = np.cumsum([math.prod(names[name]) for name in sorted(names)])
        assert flat[dtype].shape == (ends[-1],)
        parts = np.split(np.asarray(flat[dtype]), ends[:-1])
        arrays |= {name: part.reshape(names[name]) for name, part in zip(sorted(names), parts, strict=True)}
    return arrays


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, nnx.Module]:
    model = random_model("vim_micro", **TINY)
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
    images = normal(0, (2, 12, 16, 3))
    expected = logits(nnx.graphdef(model), nnx.state(model), images)
    np.testing.assert_array_equal(logits(nnx.graphdef(again), nnx.state(again), images), expected)
    assert bool((jnp.abs(expected) > 0).all())
    assert again.config == model.config
    assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float16")]
)
def test_types_come_back(tmp_path, dtype, param_dtype):
    model = random_model("vim_micro", dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), **TINY)
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


def test_sites_with_a_second_byte_come_back(tmp_path):
    model = quantised(CONFIGS["w4a4"], two_bytes=TWO_BYTES)
    mixer = model.blocks[0].mixer
    shifts = [
        act.shift for act in (mixer.out_proj.act, mixer.in_proj.act, *mixer.scan.act["delta"], *mixer.scan.act["B"])
    ]
    assert [shift is not None for shift in shifts] == [True, False, True, False, False, True]
    save(tmp_path / "model", model)
    assert_same(model, load(tmp_path / "model"))


@pytest.mark.parametrize("name", ["w4a4", "static", "none", "every operand"])
def test_what_calibration_stores_is_what_loading_expects(name):
    """`load` makes a model from the specs alone: the same scales, thresholds and lists as `quantize` found."""
    model, config = random_model("vim_micro", **TINY), dataclasses.replace(CONFIGS[name], scale_search="max")
    for path in ("blocks.0.mixer.in_proj", "blocks.0.mixer.scan"):
        site = dict(iter_sites(model))[path]
        x = normal(0, (2, TOKENS, 2, 40))
        seen = dict(u=x, delta=x, B=x[..., :3], C=x[..., :3], y=x, h=jnp.ones((2, TOKENS, 2)), input=x[:, :, 0, :20])
        asking = kind_of(site).calibrate(site, config.resolve(path), lambda batch: batch)
        spec, found = gather(asking, lambda seen=seen: [seen])
        module, expected = kind_of(site).make(site, spec, found), apply_specs(nnx.clone(model), {path: spec})
        expected = dict(named_modules(expected))[path]
        shapes = ({k: v.shape for k, v in nnx.to_flat_state(nnx.state(module))} for module in (module, expected))
        assert next(shapes) == next(shapes), path


def test_logits_keep_their_bits(tmp_path):
    model = quantised(CONFIGS["w4a4"])
    save(tmp_path / "model", model)
    again = load(tmp_path / "model")
    images = normal(0, (2, 12, 16, 3))
    expected = logits(nnx.graphdef(model), nnx.state(model), images)
    np.testing.assert_array_equal(logits(nnx.graphdef(again), nnx.state(again), images), expected)
    assert bool(jnp.isfinite(expected).all())
    assert float(jnp.std(expected)) > 0


def test_four_bit_weights_are_packed_on_disk(tmp_path):
    """Odd rows, too: 20 inputs take 10 rows of bytes, 5 take 3; 8-bit levels of A stay whole."""
    model = quantised(CONFIGS["w4a4"])
    save(tmp_path / "model", model)
    stored = on_disk(tmp_path / "model")
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
        ('{"format": 3, "family"', "damaged"),
        ("\x00\x01", "damaged"),
        ("[1, 2]", "is not a folder that save wrote"),
        ("{}", "is not a folder that save wrote"),
        ('{"format": 1}', "format 1, and this version reads format 3: convert or quantise the model again."),
        ('{"format": 2}', "format 2, and this version reads format 3: convert or quantise the model again."),
        ('{"format": 3}', "does not describe a model"),
    ],
)
def test_a_damaged_description(copy, text, what):
    (copy / "config.json").write_text(text)
    refused(copy, what)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (dict(family="swin"), "no model family 'swin'"),
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
        (dict(quantization={"stem.proj": {"config": 0, "tokens": 12, "channels": 20}}), "does not describe a model"),
        (dict(arrays=None), "does not describe a model"),
        (dict(arrays={"float33": {"stem.proj.bias": [20]}}), "float33"),
        (dict(arrays={"float32": {"stem.proj.bias": None}}), "does not describe a model"),
        (dict(arrays={}), "blocks.0.mixer.directions.0.conv.bias is missing"),
        (dict(files=None), "does not describe a model"),
        (dict(depth=2), "blocks.1.mixer.in_proj.kernel is missing"),
        (dict(depth=0), "depth is 0, but sizes and counts are whole numbers"),
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
    description = read_description(tmp_path / "saved")
    sites, configs = description["quantization"], description["quantization_configs"]
    assert len(configs) == len({json.dumps(c) for c in configs}) == 2  # edges and inner sites
    edges = sites["stem.proj"]["config"]
    assert {site for site, spec in sites.items() if spec["config"] == edges} == {"stem.proj", "head.proj"}

    def with_sites(changed: dict, extra: dict | None = None) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = Path(shutil.copytree(tmp_path / "saved", tmp_path / "copy"))
        edit(path, quantization=changed, quantization_configs=[*configs, extra] if extra else configs)
        return path

    def with_spec(site: str, config: dict | None = None, **fields) -> Path:
        changed = {**configs[sites[site]["config"]], **(config or {})}
        return with_sites({**sites, site: {**sites[site], "config": len(configs), **fields}}, extra=changed)

    out_proj, scan = "blocks.0.mixer.out_proj", "blocks.0.mixer.scan"
    refused(with_sites({**sites, "blocks.3.mixer.out_proj": sites[out_proj]}), "has no site 'blocks.3.mixer.out_proj'")
    refused(with_sites({k: v for k, v in sites.items() if k != out_proj}), f"{out_proj}.kernel is missing")
    refused(with_sites({}), "is missing")
    refused(with_spec(out_proj, dict(weight_bits=8)), f"{out_proj}.levels is uint8[20, 20], not int8[40, 20]")
    refused(with_spec(out_proj, dict(weight_bits=9)), "weight_bits must be 2 to 8")
    refused(with_spec(out_proj, dict(weight_group=4)), f"{out_proj}.weight_scale is float32[1, 20]")
    refused(with_spec(out_proj, dict(bits=4)), "bits")
    refused(with_sites({**sites, out_proj: {**sites[out_proj], "config": 2}}), "does not describe a model")
    refused(with_spec(out_proj, tokens=9), f"{out_proj}.act.scale is float32[13], not float32[9]")
    refused(with_spec(out_proj, two_bytes=["input"]), f"{out_proj}.act.shift is missing")
    refused(with_spec(out_proj, dict(detection="none")), f"{out_proj}.act.theta is not part of the model")
    refused(with_spec(out_proj, dict(detection="static")), f"{out_proj}.act.channels is missing")
    refused(with_spec(out_proj, dict(outlier_scale="free")), "outlier_scale")
    refused(with_spec(scan, dict(operands=["A"])), f"{scan}.D is missing")


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "delete":
        file.unlink()
    elif how == "flip":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])
    else:
        file.write_bytes(data[: len(data) // 2] if how == "truncate" else b"")


@pytest.mark.parametrize(
    ("how", "what"), [("delete", "missing"), ("flip", "damaged"), ("truncate", "damaged"), ("empty", "damaged")]
)
def test_damaged_arrays(saved, tmp_path, how, what):
    """Whatever happens to any file below arrays/, the refusal names that file and no other."""
    path, _ = saved
    files = sorted(f.relative_to(path / "arrays") for f in (path / "arrays").rglob("*") if f.is_file())
    assert len(files) >= 4
    for i, file in enumerate(files):
        copied = Path(shutil.copytree(path, tmp_path / str(i)))
        damage(copied / "arrays" / file, how)
        message = refused(copied, f"get another copy: {file.as_posix()} is {what}.")
        assert message.count(" is ") == 2


def test_every_flipped_bit_is_refused(saved, tmp_path):
    """In every file, bits of the first, the last and some random bytes."""
    copied = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    rng = np.random.default_rng(0)
    for file in sorted(f for f in (copied / "arrays").rglob("*") if f.is_file()):
        data = file.read_bytes()
        for place in (0, len(data) - 1, *rng.integers(0, len(data), 3)):
            wrong = bytearray(data)
            wrong[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(wrong)
            refused(copied, f"{file.relative_to(copied / 'arrays').as_posix()} is damaged")
        file.write_bytes(data)
    assert_same(load(copied), saved[1])


def test_added_and_removed_files(copy, saved):
    """Litter of file managers is passed over; anything else below arrays/ has no business there."""
    (copy / "arrays" / ".DS_Store").write_bytes(b"litter")
    (copy / "arrays" / "d" / "._x").write_bytes(b"litter")
    (copy / "notes.txt").write_text("beside the arrays is the user's own")
    assert_same(load(copy), saved[1])
    (copy / "arrays" / "d" / "more").write_bytes(b"")
    refused(copy, "get another copy: d/more is not part of it.")
    shutil.rmtree(copy / "arrays")
    refused(copy, "manifest.ocdbt is missing")
    (copy / "arrays").mkdir()
    refused(copy, "manifest.ocdbt is missing")


def test_files_of_another_checkpoint(saved, tmp_path):
    """Arrays whose digests are right but whose sizes do not fit the index."""
    save(tmp_path / "wide", random_model("vim_micro", **{**TINY, "num_classes": 9}))
    wide = read_description(tmp_path / "wide")
    own = read_description(saved[0])
    edit(tmp_path / "wide", config=own["config"], arrays=own["arrays"])
    refused(tmp_path / "wide", "the index in config.json adds up to")
    edit(tmp_path / "wide", arrays={"float16": wide["arrays"]["float32"]}, config=wide["config"])
    refused(tmp_path / "wide", "the index in config.json adds up to {'float16'")


def test_description_and_files_are_few(tmp_path):
    """A quantised model of hundreds of leaves takes a handful of files, and every distinct setting is stored once."""
    model = quantised(CONFIGS["every operand"])
    save(tmp_path / "model", model)
    files = [f for f in (tmp_path / "model").rglob("*") if f.is_file()]
    assert len(nnx.to_flat_state(nnx.state(model))) > 40
    assert len(files) < 15
    overhead = sum(f.stat().st_size for f in files) - memory_report(model).total
    assert overhead < 20_000


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


def test_a_place_that_cannot_be_written_is_named(saved, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"/file/model cannot be written in .*/file \(it is not a folder\)"):
        save(tmp_path / "file" / "model", saved[1])


def test_what_is_converted_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").touch()
    assert "is not a folder that save wrote: convert it first" in refused(Path("x.pth"), "x.pth")
    assert "convert its checkpoint first" in refused(Path("vim_tiny"), "vim_tiny is a model's name")


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
    sites, configs = description["quantization"], description["quantization_configs"]
    site = sites["blocks.0.mixer.out_proj"]
    settings = configs[site["config"]]
    assert (settings["sigma"], settings["n_refresh"], site["tokens"]) == (2.5, 7, TOKENS)
    assert configs[sites["stem.proj"]["config"]]["weight_bits"] == 8


@pytest.mark.parametrize("name", ["stem.positions", "head.proj.bias", "blocks.0.mixer.scan.A_log"])
def test_floats_are_never_stored_as_infinities(name):
    """65504 fits float16, 1e5 does not and is refused; bfloat16 has the range."""
    leaf = tuple(int(part) if part.isdigit() else part for part in name.split("."))

    def stored(value: float, dtype: str) -> tuple[np.ndarray, nnx.Module]:
        model = random_model("vim_micro", **TINY)
        variable = dict(nnx.to_flat_state(nnx.state(model)))[leaf]
        variable.set_value(variable[...].at[0].set(-value))
        nnx.update(model, nnx.from_flat_state([(leaf, variable)]))
        store_floats(model, jnp.dtype(dtype), FloatSites({}, {}, QuantConfig()), "")
        return np.asarray(dict(nnx.to_flat_state(nnx.state(model)))[leaf][...]), model

    message = f"^{re.escape(name)} has values beyond the range of float16; quantise with float_dtype='float32' or"
    for value in (65520.0, 1e5):
        with pytest.raises(ValueError, match=message):
            stored(value, "float16")
    assert stored(65504.0, "float16")[0].min() == -65504
    for dtype in ("bfloat16", "float32"):
        value, model = stored(1e5, dtype)
        assert np.isfinite(value).all()
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
