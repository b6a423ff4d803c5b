"""Weights load beside whatever a training script keeps with them; all of that is inert, and none of it a weight."""

from pathlib import Path

import numpy as np
import pytest
from torch_file_writer import Call, Name, Raw, contiguous, encode, write

from ouromamba_jax.convert import TorchFileError, load_tensors, read_torch
from ouromamba_jax.convert.unpickle import Global, Inert

WEIGHT = np.arange(4, dtype=np.float32)
W = contiguous("0", WEIGHT)
NEW, CALL = b"\x81", b"R"


def made(name: str, *args, state=None, opcode: bytes = NEW) -> Call:
    module, _, last = name.rpartition(".")
    return Call(Name(module, last), args, state, opcode)


def filled(built: Call, items: dict) -> Raw:
    return Raw(encode(built) + b"(" + b"".join(encode(k) + encode(v) for k, v in items.items()) + b"u")


def file(folder: Path, **parts) -> Path:
    return write(folder / "a.pth", {"model": {"w": W}, **parts}, {"0": WEIGHT})


KINDS = {
    **{f"{name} by {how}": made(name, opcode=opcode, state={"_max_length": 3})
       for how, opcode in (("class", NEW), ("call", CALL))
       for name in (
           "mmengine.config.Config", "mmengine.config.config.Config", "mmengine.config.config.ConfigDict",
           "mmengine.config.ConfigDict", "mmengine.logging.HistoryBuffer", "mmengine.logging.MessageHub",
           "mmengine.logging.history_buffer.HistoryBuffer", "mmcv.utils.config.ConfigDict", "addict.addict.Dict",
           "addict.Dict", "omegaconf.dictconfig.DictConfig", "omegaconf.DictConfig", "omegaconf.listconfig.ListConfig",
           "omegaconf.nodes.AnyNode", "omegaconf.base.ContainerMetadata", "easydict.EasyDict", "yacs.config.CfgNode",
           "argparse.Namespace", "types.SimpleNamespace", "collections.OrderedDict", "collections.defaultdict",
           "pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict",
           "lightning_fabric.utilities.data.AttributeDict",
       )},
    "a config's dict": made("mmengine.config.config.ConfigDict", {"lr": 1}, opcode=CALL),
    "a tuple of a config": made("mmengine.config.Config", state=({"lr": 1}, "a.py", "lr = 1")),
    "items": filled(made("fvcore.common.config.CfgNode"), {"lr": 1}),
    "a list of a class": Raw(encode(made("my.types.Sizes")) + encode(3) + b"a"),
    "a path": made("pathlib.PosixPath", "/", "data", opcode=CALL),
    "a partial": made("functools.partial", Name("torch.nn.functional", "gelu"), opcode=CALL,
                      state=(Name("torch.nn.functional", "gelu"), (), {"approximate": "tanh"}, None)),
    "a function": Name("torch.nn.functional", "gelu"),
    "a class inside another": Raw(encode("my.models") + encode("Outer.Inner") + b"\x93"),
    "a script's class": made("__main__.Settings", state={"depth": 3}),
    "an annotation": Call(Name("operator", "getitem"), (Name("typing", "Dict"), (Name("builtins", "str"), 3))),
    "a version": made("torch.torch_version.TorchVersion", "2.6.0"),
    "a NumPy number": Call(Name("numpy._core.multiarray", "scalar"), (made("numpy.dtype", "f8", opcode=CALL), "x" * 8)),
    "a NumPy type": Name("numpy", "float32"),
    "sizes and devices": [made("torch.Size", (3, 4), opcode=CALL), made("torch.device", "cuda", 0, opcode=CALL)],
    "a day": made("datetime.timedelta", 1, 2, 3, opcode=CALL),
    "a scheduler": made("torch.optim.lr_scheduler.CosineAnnealingLR", state={"T_max": 30, "last": W}),
    "keys that are types": Raw(b"}" + encode(Name("torch", "float32")) + encode(1) + b"s"),
    "keys of several": Raw(b"}" + encode((Name("my.types", "Mode"), 3)) + encode(2) + b"s"),
    "keys that are objects": Raw(b"}" + encode(made("my.types.Mode", 1)) + encode(2) + b"s"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ["args", "meta"])
def test_metadata_of_every_kind_is_inert(tmp_path, kind, entry):
    path = file(tmp_path, **{entry: KINDS[kind]})
    np.testing.assert_array_equal(load_tensors(path)["w"], WEIGHT)
    value = read_torch(path)[entry]
    for part in value if isinstance(value, list) else [value]:
        assert type(part) in (dict, Inert, Global)


def test_metadata_keeps_what_it_says(tmp_path):
    path = file(tmp_path, config=KINDS["a config's dict"], meta=KINDS["a script's class"])
    tree = read_torch(path)
    assert tree["config"] == {"lr": 1}
    assert (str(tree["meta"].type), tree["meta"].state) == ("__main__.Settings", {"depth": 3})


@pytest.mark.parametrize("tree", ["weight", "entry", "file"])
@pytest.mark.parametrize("opcode", [NEW, CALL])
def test_metadata_is_never_a_weight(tmp_path, opcode, tree):
    """What stands in a weight's place is named, whatever it holds."""
    value = made("my.layers.Packed", W, opcode=opcode, state={"data": W})
    trees = {"weight": {"model": {"w": W, "b": value}}, "entry": {"epoch": 3, "model": value}, "file": value}
    with pytest.raises(TorchFileError, match=r"my\.layers\.Packed") as caught:
        load_tensors(write(tmp_path / "a.pth", trees[tree], {"0": WEIGHT}))
    if tree != "weight" or opcode == CALL:
        assert str(caught.value).endswith("write it again with torch.save(model.state_dict(), path).")


def test_metadata_of_a_tensor_s_own_class_is_refused(tmp_path):
    """A subclass may mean something else by the same numbers."""
    storage = Raw(encode(("storage", Name("torch", "FloatStorage"), W.key, "cpu", 4)) + b"Q")
    args = (storage, 0, (4,), (1,), False, made("collections.OrderedDict", opcode=CALL))

    def tensor(kind: str) -> Call:
        module, _, last = kind.rpartition(".")
        rebuild = Name("torch._utils", "_rebuild_tensor_v2")
        return Call(Name("torch._tensor", "_rebuild_from_type_v2"), (rebuild, Name(module, last), args, {"tag": 1}))

    plain = write(tmp_path / "a.pth", {"model": {"w": tensor("torch.nn.parameter.Parameter")}}, {"0": WEIGHT})
    np.testing.assert_array_equal(load_tensors(plain)["w"], WEIGHT)
    with pytest.raises(TorchFileError, match=r"refers to torchao\.dtypes\.AffineQuantizedTensor, which is not plain"):
        load_tensors(
            write(tmp_path / "b.pth", {"model": {"w": tensor("torchao.dtypes.AffineQuantizedTensor")}}, {"0": WEIGHT})
        )
