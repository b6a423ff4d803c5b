"""PTX and the host code of a Mosaic kernel, parsed."""

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Instruction:
    """`@predicate op operands`, e.g. op ("add", "s32"); operands are texts, braces and brackets included."""

    position: int
    op: tuple[str, ...]
    operands: list[str]
    predicate: str | None
    negated: bool
    text: str


@dataclass
class Program:
    """One kernel: its instructions, the position of each label, the bits of each register (1 for a predicate)."""

    threads: int
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def width(self, register: str) -> int:
        """Bits of a register, declared by name or, like %r<10>, by the letters of many."""
        return self.widths.get(register) or self.widths[re.match(r"%[a-z]+", register)[0]]


def split_list(text: str) -> list[str]:
    """`a, {b, c}, [d+4]` at its outer commas."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def parse(text: str) -> Program:
    """The only kernel in a PTX module."""
    text = re.sub(r"//[^\n]*|\.(loc|file)\b[^\n]*", "", text)
    (entry,) = re.finditer(r"\.visible \.entry \w+\((.*?)\)(.*?)\n\{", text, re.DOTALL)
    parameters = [re.search(r"(\w+)(\[\d+\])?$", p)[1] for p in split_list(entry[1])]
    x, y, z = map(int, re.search(r"\.maxntid (\d+), (\d+), (\d+)", entry[2]).groups())
    program = Program(x * y * z, parameters)
    scopes: list[dict[str, str]] = [{}]  # inline assembly declares registers and labels in braces of its own
    for statement in re.finditer(r"\s*(?:([$\w]+):|([{}])(?=\s)|([^;]+);)", text[entry.end() :]):
        label, brace, code = statement.groups()
        if brace == "{":
            scopes.append({})
        elif brace and len(scopes) == 1:
            return program
        elif brace:
            scopes.pop()
        elif label:
            program.labels[_local(label, scopes, statement.start())] = len(program.instructions)
        else:
            _add(program, " ".join(code.split()), scopes, statement.start())
    raise ValueError("the kernel has no end")


def _local(name: str, scopes: list[dict[str, str]], at: int) -> str:
    """The name under which a scope's own register or label is known everywhere."""
    return scopes[-1].setdefault(name, f"{name}__{at}") if len(scopes) > 1 else name


def _add(program: Program, code: str, scopes: list[dict[str, str]], at: int) -> None:
    if code.startswith(".reg"):
        _, kind, names = code.split(maxsplit=2)
        for name in split_list(names):
            known = name.partition("<")[0] if "<" in name else _local(name, scopes, at)
            program.widths[known] = 1 if kind == ".pred" else int(kind[2:])
    elif not code.startswith("."):
        jump = re.search(r"\bbra\S* (\w+)$", code)
        if jump and len(scopes) > 1:
            _local(jump[1], scopes, at)
        for old, new in scopes[-1].items() if len(scopes) > 1 else ():
            code = re.sub(rf"(?<![\w%$]){old}(?!\w)", new, code)
        predicate, op, operands = re.match(r"(@!?\S+ )?(\S+)(.*)", code).groups()
        negated = bool(predicate) and predicate[1] == "!"
        program.instructions.append(
            Instruction(
                len(program.instructions),
                tuple(op.split(".")),
                split_list(operands),
                predicate[1 + negated : -1] if predicate else None,
                negated,
                code,
            )
        )


@dataclass
class TensorMap:
    """What the tensor memory accelerator knows of an array: sizes, strides and window in elements, outermost first."""

    array: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    window: tuple[int, ...]
    swizzle: int


@dataclass
class Launch:
    """How the host launches a kernel; a parameter is the number of an array, or a list of tensor maps."""

    grid: tuple[int, int, int]
    shared_bytes: int
    parameters: list[int | list[TensorMap]]


def parse_host(text: str) -> Launch:
    """The launch that a Mosaic kernel's host code (LLVM, one straight line) prepares."""
    arguments, body = re.search(r"^define \w+ @\w+\((.*?)\) \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE).groups()
    return _Host([argument.split()[-1] for argument in split_list(arguments)]).run(body)


SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i8": 1}


class _Host:
    """Pointers are (object, offset in bytes); an array's pointer, loaded through the last argument, is its number."""

    def __init__(self, arguments: list[str]) -> None:
        self.values: dict[str, Any] = {**{name: (name, 0) for name in arguments}, arguments[-1]: ("arrays", 0)}
        self.memory: dict[tuple, Any] = {}
        self.maps: dict[tuple, TensorMap] = {}

    def value(self, text: str) -> Any:
        text = text.split()[-1]
        if text in ("undef", "poison"):
            return {}
        return self.values[text] if text[0] == "%" else int(text)

    def run(self, body: str) -> Launch:
        for line in body.splitlines():
            name, _, code = line.strip().rpartition(" = ")
            op, _, rest = code.partition(" ")
            if op == "call":
                function, arguments = re.search(r"@(\w+)\((.*)\)", rest).groups()
                arguments = [self.value(x) for x in split_list(arguments)]
                if function in ("mosaic_gpu_build_kernel_spec", "mosaic_gpu_launch_kernel"):  # of jax 0.12, 0.11
                    return self.launch(*arguments)
                self.tensor_map(*arguments)
            else:
                self.values[name] = self.result(name, op, split_list(rest))
        raise ValueError("the host code builds no kernel")

    def result(self, name: str, op: str, args: list[str]) -> Any:
        if op == "store":
            self.memory[self.value(args[1])] = self.value(args[0])
        elif op == "load":
            kind, offset = where = self.value(args[1])
            # Where there is nothing, these are the bytes of tensor maps, which are known by where they lie.
            return offset // 8 if kind == "arrays" else self.memory.get(where, where)
        elif op == "alloca":
            return name, 0
        elif op == "getelementptr":
            pointer, *index = (self.value(x) for x in args[1:])
            size = SIZES.get(args[0].split()[-1])  # of an array's entry; a struct's fields are told apart by name
            return (pointer[0], pointer[1] + index[0] * size) if size else ((pointer, "field", index[1]), 0)
        elif op == "insertvalue":
            return self.value(args[0]) | {tuple(args[2:]): self.value(args[1])}
        elif op == "extractvalue":
            return self.value(args[0])[tuple(args[1:])]
        elif op == "mul":
            return self.value(args[0]) * self.value(args[1])
        elif op == "add":
            assert self.value(args[1]) == 0, "an array that does not start at its pointer"
            return self.value(args[0])
        elif op in ("ptrtoint", "inttoptr"):
            return self.value(args[0].split()[1])
        else:
            raise NotImplementedError(op)

    def tensor_map(self, where, array, _type, rank, sizes, strides, swizzle, window) -> None:
        sizes, strides, window = (
            tuple(self.memory[base, offset + 8 * k] for k in range(rank)) for base, offset in (sizes, strides, window)
        )
        self.maps[where] = TensorMap(array, sizes, strides, window, swizzle)

    def launch(self, *arguments) -> Launch:
        grid, shared_bytes, (pointers, _) = arguments[1:4], arguments[10], arguments[13]
        parameters = []
        while where := self.memory.get((pointers, 8 * len(parameters))):
            value = self.memory.get(where, where)
            maps = {offset: m for (base, offset), m in self.maps.items() if (base, 0) == value}
            parameters.append([maps[offset] for offset in sorted(maps)] or value)
        return Launch(grid, shared_bytes, parameters)
