"""Interprets a checkpoint's pickle without executing anything that it says.

Python's own unpickler looks objects up by name and calls them. This machine does not: it interprets the few opcodes
that checkpoints use, builds dicts, lists and tuples itself, and turns everything else into inert records. It imports
nothing, calls nothing and sets no attribute that the file names. A name stands for itself; an object of a class that is
not known (NEWOBJ) is a record of its attributes and items, and never a tensor; a call of anything (REDUCE) that is not
on the lists below is refused. Each object is built once and only referred to afterwards, never copied, so that memory
stays proportional to the length of the pickle.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# Every name that a file may call, by what becomes of it. Matched on the exact (module, name) pair.
_DICTS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("yacs.config", "CfgNode")}
_DICTS |= {("mmengine.config.config", "ConfigDict"), ("mmcv.utils.config", "ConfigDict"), ("addict.addict", "Dict")}
_DICTS |= {("mmengine.config", "ConfigDict"), ("addict", "Dict"), ("easydict", "EasyDict")}
_TENSORS = {("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")}
_WRAPPERS = {("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")}
_SUBCLASS = ("torch._tensor", "_rebuild_from_type_v2")
_INERT = (
    {("argparse", "Namespace"), ("collections", "Counter"), ("collections", "deque"), ("_codecs", "encode")}
    | {("functools", "partial"), ("types", "SimpleNamespace"), ("types", "GenericAlias"), ("operator", "getitem")}
    | {("builtins", n) for n in ("set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "bytes")}
    # By getattr, pickle writes methods, such as those in mmengine's logs. Nothing is looked up, whatever the arguments.
    | {("builtins", "getattr"), ("builtins", "slice"), ("builtins", "complex"), ("copyreg", "_reconstructor")}
    | {("datetime", n) for n in ("date", "datetime", "time", "timedelta", "timezone")}
    | {("pathlib", n) for n in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    | {("numpy.core.multiarray", n) for n in ("scalar", "_reconstruct")}
    | {("numpy", n) for n in ("dtype", "ndarray")}
    | {("torch", n) for n in ("Size", "device", "Tensor", "bfloat16", "bool", "uint8", "int8", "int16", "int32")}
    | {("torch", n) for n in ("int64", "float16", "float32", "float64", *_STORAGE_DTYPES)}
    | {("torch.nn.parameter", n) for n in ("Parameter", "Buffer")}
)
# What keeps settings and logs: whatever in these packages is called makes an inert record.
_PACKAGES = {"mmengine", "mmcv", "addict", "easydict", "yacs", "omegaconf", "lightning", "lightning_fabric"}
_PACKAGES |= {"pytorch_lightning"}
# The same module under the names that other Python and NumPy versions write.
_ALIASES = {"__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray", "pathlib._local": "pathlib"}
_ALIASES |= {"copy_reg": "copyreg"}

_PUSH_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_PUSH_ARGUMENT |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
# What protocols 2 to 4 write. The text opcodes of older ones are refused before their arguments are parsed.
_PLAIN_OPCODES = _PUSH_ARGUMENT | _PUSH_CONSTANT.keys() | _TUPLE_SIZES.keys()
_PLAIN_OPCODES |= {"PROTO", "FRAME", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "FROZENSET", "TUPLE", "APPEND"}
_PLAIN_OPCODES |= {"APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET"}
_PLAIN_OPCODES |= {"LONG_BINGET", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}

RESAVE = "load it where PyTorch is installed and write it again with torch.save(model.state_dict(), path)"
_DAMAGED = "its pickle is damaged; download it again"


@dataclass(frozen=True)
class Global:
    """A name that the file mentions; it stands for itself and is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{shown(self.module)}.{shown(self.name)}"


@dataclass(eq=False)
class Inert:
    """An object that no weight is: its type's name, what it was built from, its attributes, items and pairs."""

    type: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    """Keys and values in turn, of a kind of dict."""


def unwrapped(value: Any) -> Any:
    """What a record wraps, one level deep: a dict's items, a node's content, the attributes of anything else."""
    if not isinstance(value, Inert):
        return value
    keys = value.pairs[::2]
    if keys and len(value.pairs) == 2 * len(keys) and all(type(key) is str for key in keys):
        return dict(zip(keys, value.pairs[1::2], strict=True))
    state = value.state
    if isinstance(state, dict):  # OmegaConf's containers and leaves, else a namespace
        return next((state[name] for name in ("_content", "_val") if name in state), state)
    return value


@dataclass(frozen=True, eq=False)
class TorchTensor:
    """A tensor of the file, not read yet. Storage size, shape, strides and offset are claims that `view` checks."""

    reader: Callable[["TorchTensor"], Shaped[np.ndarray, "..."]] = field(repr=False)
    storage: str
    dtype: np.dtype
    storage_numel: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The values, read-only; tensors that share a storage share its memory.

        Raises:
          TorchFileError: if the storage is missing, damaged, or smaller than the tensor claims.
        """
        return self.reader(self)

    def view(self, raw: bytes) -> Shaped[np.ndarray, "..."]:
        """The tensor as a view of its storage's bytes.

        Raises:
          ValueError: if the storage has another size than declared, or the tensor reaches outside of it.
        """
        where = f"storage {shown(self.storage)}"
        if len(raw) != self.storage_numel * self.dtype.itemsize:
            raise ValueError(f"{where} holds {len(raw)} bytes, not as many as its tensors declare; download it again")
        if len(self.shape) != len(self.strides):
            raise ValueError(f"a tensor in {where} has more strides than axes, or fewer; download it again")
        numel = math.prod(self.shape)
        if numel == 0:
            return np.zeros(self.shape, self.dtype)
        # Steps along axes of length 1 are never taken; a file may write anything there.
        strides = tuple(step if size > 1 else 0 for size, step in zip(self.shape, self.strides, strict=True))
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, strides, strict=True))
        if numel > self.storage_numel or last >= self.storage_numel:
            raise ValueError(f"a tensor reaches outside of {where}, or repeats its values; {RESAVE}")
        flat = np.frombuffer(raw, self.dtype)[self.offset :]
        steps = tuple(step * self.dtype.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: np.dtype
    numel: int


def unpickle(pickle: bytes, reader: Callable[[TorchTensor], Shaped[np.ndarray, "..."]]) -> Any:
    """The object that a pickle describes, tensors unread; `reader` is what their `read()` calls.

    Raises:
      ValueError: for damaged pickles, calls of unknown names and opcodes that no checkpoint uses.
    """
    return _Machine(reader).run(pickle)


def shown(value: object, length: int = 100) -> str:
    """A value from an untrusted file, fit for a terminal: control characters escaped, cut to a length.

    Of what may be nested or huge only the type is shown: written out, a small file could fill the memory.
    """
    is_text = isinstance(value, str | Global | Exception) or is_simple(value)
    text = str(value) if is_text else f"a {type(value).__name__}"
    escaped = text[: length + 1].encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= length else escaped[: length - 3] + "..."


def is_simple(value: Any) -> bool:
    """A plain value, or a flat list of numbers: nothing nested is compared, hashed or shown."""
    if isinstance(value, list | tuple):
        return len(value) < 20 and all(isinstance(v, int | float) and is_simple(v) for v in value)
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float | str)


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, reader: Callable[[TorchTensor], np.ndarray]):
        self.reader = reader
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks set aside by MARK
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """Interprets the opcodes up to STOP and returns the object that they built."""
        stream = io.BytesIO(pickle)
        while code := stream.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(_DAMAGED)
            if opcode.name == "STOP":
                return self.pop()
            if opcode.name == "GLOBAL":
                self.push(_global(_line(stream), _line(stream)))
            elif opcode.name in _PLAIN_OPCODES:
                self.step(opcode.name, None if opcode.arg is None else opcode.arg.reader(stream))
            else:
                raise ValueError(f"its pickle uses {opcode.name}, which no checkpoint needs; nothing was executed")
        raise ValueError(_DAMAGED)

    def step(self, opcode: str, argument: Any) -> None:
        """One opcode."""
        if opcode in _PUSH_ARGUMENT:
            self.push(argument)
        elif opcode in _PUSH_CONSTANT:
            self.push(_PUSH_CONSTANT[opcode])
        elif opcode in _TUPLE_SIZES:
            items = [self.pop() for _ in range(_TUPLE_SIZES[opcode])]
            self.push(tuple(reversed(items)))
        else:
            self.step_other(opcode, argument)

    def step_other(self, opcode: str, argument: Any) -> None:
        """The opcodes that do more than push a value."""
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "EMPTY_DICT":
                self.push({})
            case "EMPTY_LIST":
                self.push([])
            case "EMPTY_SET":
                self.push(Inert(Global("builtins", "set")))
            case "FROZENSET":
                self.push(Inert(Global("builtins", "frozenset"), items=self.pop_mark()))
            case "TUPLE":
                self.push(tuple(self.pop_mark()))
            case "APPEND":
                self.add_items([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self.add_items(self.pop_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(_DAMAGED)
                self.push(self.memo[argument])
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.push(_global(module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = self.pop(), self.pop()
                self.push(self.rebuild(function, args, is_object=opcode == "NEWOBJ"))
            case "BUILD":
                state, target = self.pop(), self.top()
                if isinstance(target, Inert):
                    target.state = state
                elif not isinstance(target, dict):  # a state_dict carries `_metadata` this way; nothing needs it
                    raise ValueError(f"its pickle sets attributes of a {type(target).__name__}; nothing was executed")
            case "BINPERSID":
                self.push(_storage(self.pop()))

    def push(self, value: Any) -> None:
        """Puts an object on the stack."""
        self.stack.append(value)

    def top(self) -> Any:
        """The uppermost object."""
        if not self.stack:
            raise ValueError(_DAMAGED)
        return self.stack[-1]

    def pop(self) -> Any:
        """Takes the uppermost object off the stack."""
        self.top()
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Takes everything since the last MARK."""
        if not self.below:
            raise ValueError(_DAMAGED)
        items, self.stack = self.stack, self.below.pop()
        return items

    def add_items(self, items: list[Any]) -> None:
        """Extends the list, or the inert set, on top of the stack."""
        target = self.top()
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, list):
            raise ValueError(_DAMAGED)
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Puts alternating keys and values into the dict on top of the stack."""
        target = self.top()
        if isinstance(target, Inert):
            target.pairs.extend(items)
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(_DAMAGED)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only plain keys are hashed: hashing a deeply nested tuple would exhaust the C stack.
            if not all(_is_plain(part) for part in (key if isinstance(key, tuple) else (key,))):
                raise ValueError(f"its pickle uses a {type(key).__name__} as a key; {RESAVE}")
            if key in target:
                raise ValueError(f"its pickle sets {shown(key)} twice; download it again")
            target[key] = value

    def rebuild(self, function: Any, args: Any, *, is_object: bool) -> Any:
        """What torch would get by `function(*args)`, or from a class: a tensor, a dict, or an inert record."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("its pickle calls something that is not a known name; nothing was executed")
        name = (function.module, function.name)
        if name in _DICTS:
            return args[0] if len(args) == 1 and type(args[0]) is dict else {}
        if name in _WRAPPERS and args and isinstance(args[0], TorchTensor):
            return args[0]
        if name == _SUBCLASS and len(args) == 4 and isinstance(args[2], tuple):
            # A tensor with Python attributes: (rebuild function, type, its arguments, attributes).
            function, kind, args = args[0], args[1], args[2]
            if isinstance(kind, Global) and (kind.module, kind.name) not in _INERT:
                raise _refusal(kind)
            name = (function.module, function.name) if isinstance(function, Global) else _SUBCLASS
        if name in _TENSORS:
            return self.tensor(args)
        if name in _WRAPPERS or name == _SUBCLASS:
            raise ValueError(f"its pickle calls {name[1]} with arguments that torch never writes; nothing was executed")
        if is_object or name in _INERT or name[0].split(".")[0] in _PACKAGES:
            return Inert(Global(*name), args)
        raise _refusal(function)

    def tensor(self, args: tuple[Any, ...]) -> TorchTensor:
        """(storage, offset, size, stride, requires_grad, backward_hooks, metadata) as a TorchTensor."""
        if len(args) >= 4 and isinstance(args[0], _Storage) and not any(args[6:]):  # metadata marks lazy negation
            storage, offset = args[:2]
            shape, strides = (_sizes(value) for value in args[2:4])
            if type(offset) is int and offset >= 0 and shape is not None and strides is not None:
                numel = storage.numel
                return TorchTensor(self.reader, storage.key, storage.dtype, numel, offset, shape, strides)
        raise ValueError("its pickle describes a tensor with an impossible offset, shape or stride; download it again")


def _line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError(_DAMAGED)
    return line[:-1].decode("utf-8")


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool, bytes, Global, Inert)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A shape or strides: a tuple or torch.Size of non-negative integers; None for anything else."""
    if isinstance(value, Inert) and value.type == Global("torch", "Size") and len(value.args) == 1:
        value = value.args[0]
    ok = isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return value if ok else None


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(_DAMAGED)
    found = Global(_ALIASES.get(module, module), name)
    if not re.fullmatch(r"[\w.-]+", module + name):
        raise _refusal(found)
    return found


def _refusal(name: Global) -> ValueError:
    return ValueError(
        f"it refers to {name}, which is not plain checkpoint data; nothing was executed; "
        f"if you trust the file, {RESAVE}"
    )


def _storage(persistent_id: Any) -> _Storage:
    match persistent_id:
        case ("storage", Global("torch", name), str() as key, str(), int() as numel) if name in _STORAGE_DTYPES:
            if numel >= 0:
                return _Storage(key, _STORAGE_DTYPES[name], numel)
    raise ValueError("its pickle describes a storage of an unknown kind; nothing was executed")
