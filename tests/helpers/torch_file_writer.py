"""A writer of torch's zip format: opcodes by hand, since Python's pickler insists on importing what it writes."""

import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGE_NAMES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
STORAGE_NAMES |= {"int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}


@dataclass
class Name:
    """A global."""

    module: str
    name: str


@dataclass
class Call:
    """What `function(*args)` made, with attributes if `state` is given."""

    function: Name
    args: tuple
    state: object = None
    opcode: bytes = b"R"


@dataclass
class View:
    """A tensor that looks into storage `key`; every field as the file will claim it."""

    key: str
    dtype: str
    numel: int
    offset: object
    shape: object
    strides: object
    metadata: object = None


@dataclass
class Raw:
    """Opcodes as they are."""

    opcodes: bytes


def encode(x) -> bytes:
    """Pickle opcodes (protocol 2) that build x."""
    match x:
        case Raw():
            return x.opcodes
        case None:
            return b"N"
        case bool():
            return b"\x88" if x else b"\x89"
        case int():
            data = pickle.encode_long(x)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case Name():
            return b"c" + x.module.encode() + b"\n" + x.name.encode() + b"\n"
        case Call():
            built = encode(x.function) + encode(x.args) + x.opcode
            return built if x.state is None else built + encode(x.state) + b"b"
        case View():
            storage = ("storage", Name("torch", f"{STORAGE_NAMES[x.dtype]}Storage"), x.key, "cpu", x.numel)
            hooks = Call(Name("collections", "OrderedDict"), ())
            args = (Raw(encode(storage) + b"Q"), x.offset, x.shape, x.strides, False, hooks)
            args += () if x.metadata is None else (x.metadata,)
            return encode(Call(Name("torch._utils", "_rebuild_tensor_v2"), args))
        case tuple():
            return b"(" + b"".join(map(encode, x)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, x)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in x.items()) + b"u"
    raise TypeError(type(x))


def contiguous(key: str, array: np.ndarray) -> View:
    """The view that torch writes for a freshly made tensor."""
    strides = tuple(s // array.itemsize for s in array.strides)
    return View(key, array.dtype.name, array.size, 0, array.shape, strides)


def write(path: Path, tree, storages: dict[str, np.ndarray], **entries: bytes) -> Path:
    """A `.pth` as torch.save lays it out; `entries` replaces or adds parts of the archive."""
    parts = {"data.pkl": b"\x80\x02" + encode(tree) + b".", "byteorder": b"little", "version": b"3\n"}
    parts |= {f"data/{key}": array.tobytes() for key, array in storages.items()} | entries
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(f"archive/{name}", data)
    return path
