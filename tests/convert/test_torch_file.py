"""The checkpoint reader: what torch writes is read, everything else is refused, nothing is ever executed."""

import json
import os
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_file_writer import STORAGE_NAMES, Call, Name, Raw, View, contiguous, encode, write

from ouromamba_jax.convert import CheckpointNote, TorchFileError, load_tensors, read_torch
from ouromamba_jax.convert.unpickle import Inert

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"


def noise(*shape: int, dtype=np.float32) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(shape) * 50).astype(dtype)


def refusal(path: Path, **kwargs) -> str:
    """The one sentence with which a file is refused; it names the file."""
    with pytest.raises(TorchFileError) as caught:
        load_tensors(path, **kwargs)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- What torch writes ---


def test_both_golden_files_hold_the_same_arrays():
    torch_file = load_tensors(GOLDEN / "checkpoint.pth")
    safe = load_tensors(GOLDEN / "model.safetensors")
    assert len(torch_file) == 58
    assert torch_file.keys() == safe.keys()
    for key, value in torch_file.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, safe[key])


@pytest.mark.parametrize("dtype", STORAGE_NAMES)
def test_every_storage_type(tmp_path, dtype):
    array = noise(3, 5).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    loaded = load_tensors(write(tmp_path / "a.pth", {"w": contiguous("0", array)}, {"0": array}))["w"]
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)
    assert not loaded.flags.writeable


def test_views_that_share_a_storage(tmp_path):
    base = noise(6, 4)
    tree = {
        "whole": View("0", "float32", 24, 0, (6, 4), (4, 1)),
        "transposed": View("0", "float32", 24, 0, (4, 6), (1, 4)),
        "row": View("0", "float32", 24, 8, (4,), (1,)),
        "column": View("0", "float32", 24, 3, (6, 1), (4, 10**15)),
        "scalar": View("0", "float32", 24, 23, (), ()),
        "last": View("0", "float32", 24, 23, Call(Name("torch", "Size"), ((1,),)), (1,)),
        "empty": View("0", "float32", 24, 0, (0, 4), (4, 1)),
    }
    loaded = load_tensors(write(tmp_path / "a.pth", tree, {"0": base}))
    expected = [base, base.T, base[2], base[:, 3:], base[5, 3], base[5, 3:], base[:0]]
    for key, value in zip(tree, expected, strict=True):
        np.testing.assert_array_equal(loaded[key], value)
    assert np.shares_memory(loaded["whole"], loaded["transposed"])


@pytest.fixture
def training_file(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    """What a training run saves: weights, EMA, optimizer, scheduler, argparse arguments, numpy scalars."""
    weight, ema = noise(4, 3), noise(4, 3) + np.float32(1)
    ordered = Call(Name("collections", "OrderedDict"), ())
    state_dict = Raw(
        encode(ordered)
        + b"("
        + encode("module.head.weight")
        + encode(contiguous("0", weight))
        + b"u"
        + encode({"_metadata": Call(Name("collections", "OrderedDict"), ())})
        + b"b"
    )
    path = Call(Name("pathlib", "PosixPath"), ("/", "data", "imagenet"))
    numpy_dtype = Call(Name("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    numpy_bytes = Call(Name("_codecs", "encode"), ("x" * 8, "latin1"))
    args = {"lr": 5e-4, "epochs": 300, "resume": "", "amp": True, "data_path": path, "device": None}
    args["dtype"] = Name("torch", "float32")
    args["devices"] = Call(Name("torch", "device"), ("cuda", 0))
    tree = {
        "model": state_dict,
        "optimizer": {
            "state": {0: {"step": 310_000, "exp_avg": contiguous("missing", weight), "amsgrad": False}},
            "param_groups": [{"lr": 1e-6, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1, 2]}],
        },
        "lr_scheduler": {"milestones": Call(Name("collections", "Counter"), ({30: 1},))},
        "epoch": 299,
        "model_ema": {
            "head.weight": Call(Name("torch._utils", "_rebuild_parameter"), (contiguous("1", ema), True, {}))
        },
        "scaler": {"scale": 65536.0, "seen": Call(Name("__builtin__", "set"), ([1, 2],))},
        "args": Call(Name("argparse", "Namespace"), (), args, b"\x81"),
        "max_accuracy": Call(Name("numpy._core.multiarray", "scalar"), (numpy_dtype, numpy_bytes)),
        "config": Call(Name("yacs.config", "CfgNode"), (), {"__immutable__": True}, b"\x81"),
    }
    return write(tmp_path / "train.pth", tree, {"0": weight, "1": ema}), weight, ema


def test_training_file(training_file):
    path, weight, ema = training_file  # the optimizer's storage does not exist: only what is needed is read
    with pytest.warns(CheckpointNote, match="entry 'model' was taken, and model_ema"):
        loaded = load_tensors(path)
    assert list(loaded) == ["head.weight"]
    np.testing.assert_array_equal(loaded["head.weight"], weight)
    np.testing.assert_array_equal(load_tensors(path, entry="model_ema")["head.weight"], ema)
    tree = read_torch(path)
    assert isinstance(tree["args"], Inert)
    assert tree["args"].state["lr"] == 5e-4
    assert tree["epoch"] == 299


def test_entries(training_file, tmp_path):
    path, weight, _ = training_file
    assert "pick one of: model, model_ema" in refusal(path, entry="ema")
    assert "optimizer" in refusal(path, entry="optimizer")
    named = write(tmp_path / "b.pth", {"state_dict": {"w": contiguous("0", weight)}, "epoch": 3}, {"0": weight})
    np.testing.assert_array_equal(load_tensors(named)["w"], weight)
    flat = write(tmp_path / "c.pth", {"w": contiguous("0", weight), "epoch": 3}, {"0": weight})
    assert "epoch (int)" in refusal(flat)
    assert "empty" in refusal(write(tmp_path / "d.pth", {"model": {}}, {}))
    assert "no dictionary" in refusal(write(tmp_path / "e.pth", [1, 2], {}))
    both = {"w": contiguous("0", weight), "module.w": contiguous("0", weight)}
    assert "'module.'" in refusal(write(tmp_path / "f.pth", both, {"0": weight}))
    with pytest.raises(TorchFileError, match="leave `entry` out"):
        load_tensors(GOLDEN / "model.safetensors", entry="model")


def test_safetensors(tmp_path):
    values = noise(2, 3).astype(ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    np.testing.assert_array_equal(load_tensors(path)["w"], values)
    path.write_bytes(path.read_bytes()[:-1])
    assert "safetensors" in refusal(path)
    path.write_bytes(b"")
    refusal(path)


# --- Hostile files ---

CANARY = "canary-was-written"


def hostile_trees(canary: Path):
    """Pickles that would write the canary, or poison the reader, if anything in them were followed."""
    shell = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    namespace = Name("argparse", "Namespace")
    system = Name("os", "system")
    yield "os.system", Call(system, (shell,))
    yield "posix.system", Call(Name("posix", "system"), (shell,))
    yield "subprocess", Call(Name("subprocess", "Popen"), (["touch", str(canary)],))
    yield "eval", Call(Name("builtins", "eval"), (code,))
    yield "exec in python 2's spelling", Call(Name("__builtin__", "exec"), (code,))
    yield "getattr", Call(Name("builtins", "getattr"), (Name("os", "x"), "system"))
    yield "torch.load inside", Call(Name("torch.storage", "_load_from_bytes"), ("x",))
    yield "a module's own code", Call(Name("torch.nn.modules.linear", "Linear"), (), {"forward": 1}, b"\x81")
    yield "numpy's exec", Call(Name("numpy.testing._private.utils", "runstring"), (code, {}))
    dotted = encode("collections") + encode("OrderedDict.__init__.__globals__") + b"\x93"
    yield "dotted STACK_GLOBAL", Raw(dotted)
    yield "STACK_GLOBAL of os.system", Raw(encode("os") + encode("system") + b"\x93" + encode((shell,)) + b"R")
    yield "STACK_GLOBAL of numbers", Raw(encode(1) + encode(2) + b"\x93")
    yield "name with a space", Raw(b"ccollections OrderedDict\n__class__\n")
    yield "INST", Raw(b"(" + encode(shell) + b"ios\nsystem\n")
    yield "OBJ", Raw(b"(" + encode(system) + encode(shell) + b"o")
    yield "NEWOBJ_EX", Raw(encode(namespace) + encode(()) + encode({}) + b"\x92")
    yield "EXT1", Raw(b"\x82\x01")
    yield "text PERSID", Raw(b"Pstorage\n")
    yield "calling a dict", Call(Raw(encode({})), (shell,))
    yield "calling an object", Call(Raw(encode(Call(namespace, ()))), (shell,))
    yield "calling with a list", Raw(encode(namespace) + encode([shell]) + b"R")
    yield (
        "attributes of a name",
        Raw(encode(namespace) + encode({"__setstate__": Name("argparse", "Namespace")}) + b"b"),
    )
    yield "attributes of a list", Raw(encode([1]) + encode({"append": 1}) + b"b")
    yield "attributes of a tensor", Raw(encode(View("0", "float32", 4, 0, (4,), (1,))) + encode({"reader": 1}) + b"b")
    yield "subclass with a callable", Call(Name("torch._tensor", "_rebuild_from_type_v2"), (system, 1, (shell,), {}))
    yield "parameter of a shell", Call(Name("torch._utils", "_rebuild_parameter"), (shell, True, {}))
    yield "tensor of nothing", Call(Name("torch._utils", "_rebuild_tensor_v2"), ())
    for odd in (
        1,
        "storage",
        (),
        ("storage",),
        ("module", 1, 2, 3, 4),
        ("storage", system, "0", "cpu", 4),
        ["storage"],
    ):
        yield f"persistent id {odd}"[:40], Raw(encode(odd) + b"Q")
    yield "persistent id of an unknown storage", Raw(encode(("storage", Name("torch", "Size"), "0", "cpu", 4)) + b"Q")
    yield "negative storage", Raw(encode(("storage", Name("torch", "FloatStorage"), "0", "cpu", -4)) + b"Q")
    yield "unhashable key", {"a": Raw(b"}" + encode([]) + encode(1) + b"s")}
    yield "the same key twice", Raw(b"}(" + (encode("a") + encode(1)) * 2 + b"u")
    yield "appending to a dict", Raw(b"}" + encode(1) + b"a")
    yield "memo out of nowhere", Raw(b"j\xff\xff\xff\x7f")
    yield "stack underflow", Raw(b"00R")
    yield "mark underflow", Raw(b"e")
    yield "deep tuple as a key", Raw(b"}" + b")" + b"\x85" * 100_000 + encode(1) + b"s")
    claims = {
        "past the end": (0, (5,), (1,)),
        "offset past the end": (4, (1,), (1,)),
        "far offset": (10**18, (1,), (1,)),
        "stride past the end": (0, (2, 2), (3, 1)),
        "negative stride": (3, (4,), (-1,)),
        "negative offset": (-1, (2,), (1,)),
        "negative size": (0, (-4,), (1,)),
        "bool size": (0, (True,), (1,)),
        "huge expansion": (0, (2**40,), (0,)),
        "overflowing numel": (0, (2**33, 2**33), (0, 0)),
        "overflowing stride": (0, (2, 2), (2**62, 2**62)),
        "ranks that differ": (0, (4,), (1, 1)),
        "sixty axes": (0, (1,) * 60, (1,) * 60),
        "text shape": (0, "4", (1,)),
        "float size": (0, (4.0,), (1,)),
        "huge empty": (0, (0, 2**40, 2**40), (1, 1, 1)),
    }
    for name, (offset, shape, strides) in claims.items():
        yield f"tensor: {name}", View("0", "float32", 4, offset, shape, strides)
    yield "tensor: more than its storage", View("0", "float32", 2**40, 0, (2**40,), (1,))
    yield "tensor: less than its storage", View("0", "float32", 3, 0, (3,), (1,))
    yield "tensor: no such storage", View("9", "float32", 4, 0, (4,), (1,))
    yield "tensor: storage outside", View("../../etc/passwd", "float32", 4, 0, (4,), (1,))
    yield "tensor: lazily negated", View("0", "float32", 4, 0, (4,), (1,), {"neg": True})


HOSTILE = dict(hostile_trees(Path(CANARY)))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    values = noise(4)
    for place, tree in enumerate(({"model": {"w": HOSTILE[name]}}, {"model": {"w": HOSTILE[name]}, "args": None})):
        message = refusal(write(tmp_path / f"{place}.pth", tree, {"0": values}))
        assert len(message) < 600
    assert not (tmp_path / CANARY).exists()


# Names that are not called, and an object of a class: inert beside the weights. (Tensors there are not read.)
INERT = {"getattr", "a module's own code", "dotted STACK_GLOBAL"}


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.startswith("tensor: ")])
def test_hostile_pickle_beside_the_weights_is_refused_or_inert(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    values = noise(4)
    path = write(tmp_path / "a.pth", {"model": {"w": contiguous("0", values)}, "args": HOSTILE[name]}, {"0": values})
    try:
        np.testing.assert_array_equal(load_tensors(path)["w"], values)
        assert name in INERT
    except TorchFileError:
        assert name not in INERT
    assert not (tmp_path / CANARY).exists()


def test_the_canary_would_sing(tmp_path, monkeypatch):
    """The hostile pickles are live: Python's own unpickler runs them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + encode(HOSTILE["os.system"]) + b".")
    assert (tmp_path / CANARY).exists()


def test_hostile_objects_beside_the_model_are_refused_by_name(tmp_path):
    values = noise(4)
    tree = {"model": {"w": contiguous("0", values)}, "args": HOSTILE["os.system"]}
    assert "os.system" in refusal(write(tmp_path / "a.pth", tree, {"0": values}))
    tree["args"] = Raw(b"c\x1b[2Jevil\nname\n")
    message = refusal(write(tmp_path / "b.pth", tree, {"0": values}))
    assert "\x1b" not in message
    assert r"\x1b[2Jevil.name" in message


def test_attributes_reach_inert_records_only(tmp_path):
    """BUILD on a record keeps the state as data, whatever it is called."""
    odd = {"__class__": 1, "__setstate__": Name("argparse", "Namespace"), "read": 2}
    tree = {
        "args": Call(Name("argparse", "Namespace"), (), odd),
        "n": Call(Name("collections", "OrderedDict"), (), odd),
    }
    loaded = read_torch(write(tmp_path / "a.pth", tree, {}))
    assert type(loaded["args"]) is Inert
    assert set(vars(loaded["args"])) == {"type", "args", "state", "items", "pairs"}
    assert loaded["n"] == {}


def test_memo_and_nesting_bombs_stay_small(tmp_path):
    bomb = b"]()q\x00" + (b"(" + b"h\x00" * 9 + b"tq\x00") * 200 + b"e"  # 9^200 empty tuples, if anyone counted
    deep = b")" + b"\x85" * 100_000
    tree = {"bomb": Raw(bomb), "put": Raw(b"N" + b"r\xff\xff\xff\xff"), "deep": Raw(deep)}
    assert set(read_torch(write(tmp_path / "a.pth", tree, {}))) == set(tree)
    big = write(tmp_path / "b.pth", {}, {}, **{"data.pkl": b"\x80\x02" + b"N" * (17 * 2**20)})
    assert "16 MB" in refusal(big)


# --- Archives ---


def test_files_that_are_no_checkpoint(tmp_path):
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    tar = b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)
    cases = {
        b"": "empty",
        legacy: "legacy format",
        tar: "legacy format",
        pickle.dumps({"a": 1}): "not a zip archive",
        b"<html>404</html>": "it is a web page",
        b"PK\x03\x04" + bytes(100): "cannot be read",
    }
    for number, (content, words) in enumerate(cases.items()):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        message = refusal(path)
        assert words in message
        if words == "legacy format":
            assert "torch.save" in message
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("length", [30, 5000, -1, -30])
def test_a_file_cut_short_is_to_be_downloaded_again(tmp_path, length):
    path = tmp_path / "a.pth"
    path.write_bytes((GOLDEN / "checkpoint.pth").read_bytes()[:length])
    assert re.search(r": it is cut short or damaged \(.*\); download it again\.$", refusal(path))


def archive(path: Path, parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in parts:
            file.writestr(name, data)
    return path


def test_archives_that_torch_never_writes(tmp_path):
    values = noise(4)
    tree = b"\x80\x02" + encode({"w": contiguous("0", values)}) + b"."
    good = [("a/data.pkl", tree), ("a/data/0", values.tobytes())]
    np.testing.assert_array_equal(load_tensors(archive(tmp_path / "good.pth", good))["w"], values)
    assert "big-endian" not in refusal(archive(tmp_path / "1.pth", [*good, ("a/byteorder", b"big")]))
    assert "compressed" in refusal(archive(tmp_path / "2.pth", good, zipfile.ZIP_DEFLATED))
    assert "2 parts" in refusal(archive(tmp_path / "3.pth", [*good, ("b/data.pkl", tree)]))
    assert "0 parts" in refusal(archive(tmp_path / "4.pth", [("/data.pkl", tree), ("x/y/data.pkl", tree)]))
    assert "TorchScript" in refusal(archive(tmp_path / "5.pth", [*good, ("a/constants.pkl", tree)]))
    assert "data/0 is missing" in refusal(archive(tmp_path / "6.pth", [*good[:1], ("/a/data/0", values.tobytes())]))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(tmp_path / "7.pth", [*good, good[1]])
    assert "same name" in refusal(twice)


def test_sizes_that_the_directory_makes_up(tmp_path):
    values = noise(4)
    path = write(tmp_path / "a.pth", {"w": View("0", "float32", 2**28, 0, (2**28,), (1,))}, {"0": values})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46  # the central directory's record
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**30, 2**30)
    path.write_bytes(content)
    assert "larger than the file" in refusal(path)


def test_damaged_golden_files(tmp_path):
    """Cut or changed anywhere: the values as they were, or one sentence. A CRC guards every byte of the weights."""
    content = (GOLDEN / "checkpoint.pth").read_bytes()
    original = load_tensors(GOLDEN / "checkpoint.pth")
    random = np.random.default_rng(11)
    path = tmp_path / "damaged.pth"
    start = content.index(b"\x80\x02}")
    ends = [0, 1, 4, len(content) - 1, *random.integers(0, len(content), 46)]
    for end in ends:
        path.write_bytes(content[:end])
        refusal(path)
    directory = len(content) - 4000
    places = [*random.integers(0, len(content), 40), *random.integers(directory, len(content), 60)]
    places += [*random.integers(start, start + 5000, 20)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            loaded = load_tensors(path)
        except TorchFileError:
            continue
        for key, value in loaded.items():
            np.testing.assert_array_equal(value, original[key])


def test_damaged_pickles(tmp_path):
    """The same inside the pickle, where no CRC helps: opcodes changed at random never do more than fail."""
    with zipfile.ZipFile(GOLDEN / "checkpoint.pth") as file:
        tree = file.read("checkpoint/data.pkl")
    random = np.random.default_rng(13)
    failures = 0
    for _ in range(150):
        changed = bytearray(tree)
        for place in random.integers(0, len(tree), random.integers(1, 4)):
            changed[place] = random.integers(256)
        path = archive(tmp_path / "a.pth", [("a/data.pkl", bytes(changed))])
        try:
            read_torch(path)
        except TorchFileError:
            failures += 1
    assert failures > 30


def test_reading_imports_nothing(training_file):
    before = set(sys.modules)
    read_torch(training_file[0])
    assert set(sys.modules) == before
    assert "torch" not in sys.modules
    assert os.environ.get("JAX_PLATFORMS") == "cpu"
