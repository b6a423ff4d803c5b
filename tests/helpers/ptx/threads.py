"""The threads of a launch: registers, program counters, barriers, and the memory they see."""

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .program import Launch, Program, TensorMap

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
TYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "pred": np.bool_}
TYPES |= {f"{letter}{bits}": t for letter in "bu" for bits, t in UNSIGNED.items()}
TYPES |= {f"s{bits}": t for bits, t in SIGNED.items()}

Step = Callable[[Any, np.ndarray], bool | None]
"""Runs an instruction on threads, given twice: as an index of all threads, which may be a slice, and as numbers. True
if it has set the program counters."""

OPERATIONS: dict[str, Callable[["Threads", Any], Step]] = {}
"""By the first word of an instruction, or the first three."""

TOGETHER = ("elect", "ldmatrix", "mma", "shfl", "stmatrix")
"""Whoever of a warp comes to one of these waits for its other threads."""
GLOBAL, SHARED, WINDOW = 1 << 33, 1 << 10, 1 << 24
"""Where global and shared memory start, and the length of the latter's window."""
GAP = 256
"""Bytes between arrays that no thread may touch, and what the first of them is aligned to."""


class Fault(Exception):
    """What a program does that it must not, or whose result would be up to chance."""


def operation(*names: str):
    def add(function):
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return add


class Threads:
    """All threads of all blocks.

    Args:
      arguments, results: what global memory holds at first, in the order of the kernel's; only results are written.
      late: whether asynchronous copies and products land as late as they may, or at once.
      seed: of the order of warps, of late events, and of what memory holds at first.
    """

    def __init__(
        self,
        program: Program,
        launch: Launch,
        arguments: list[np.ndarray],
        results: list[np.ndarray],
        *,
        late: bool,
        seed: int,
    ):
        self.program, self.launch, self.late = program, launch, late
        self.arrays, self.arguments = [*arguments, *results], len(arguments)
        self.random = np.random.default_rng(seed)
        self.count = int(np.prod(launch.grid)) * program.threads
        self.number = np.arange(self.count)
        self.thread, self.block = self.number % program.threads, self.number // program.threads
        warps = [np.flatnonzero(self.thread // 32 == w) for w in range(program.threads // 32)]
        self.warpgroups = [warps[n : n + 4] for n in range(0, len(warps), 4)]
        self.registers: dict[str, np.ndarray] = {}
        self.at = np.zeros(self.count, np.int64)
        self.done, self.blocked = np.zeros(self.count, bool), np.zeros(self.count, bool)
        self.barrier, self.expected = np.full(self.count, -1), np.zeros(self.count, np.int64)
        self._place(launch)
        self.events: list[Callable[[], None]] = []  # asynchronous work that waits for nothing
        self.copies, self.products, self.stores = (Groups(self.count) for _ in range(3))
        self.mbarriers: dict[tuple[int, int], Any] = {}
        self.unfenced = np.zeros(self.shared.size, np.int64)  # writers (plus 1) that have not fenced since
        self.steps = [self._compile(i) for i in program.instructions]
        self.together = {n for n, i in enumerate(program.instructions) if i.op[0] in TOGETHER}
        self.joins = self.together.union(program.labels.values())

    def _place(self, launch: Launch) -> None:
        starts = np.cumsum([0, *(-(-a.nbytes // GAP) * GAP + GAP for a in self.arrays)])
        self.starts, size = starts[:-1], int(starts[-1])
        self.memory, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        for start, array in zip(self.starts, self.arrays, strict=True):
            self.memory[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            self.valid[start : start + array.nbytes] = True
        self.tensor_maps: list[TensorMap] = []
        self.parameters: dict[str, int] = {}
        for name, parameter in zip(self.program.parameters, launch.parameters, strict=True):
            if isinstance(parameter, list):
                self.tensor_maps = parameter
                self.parameters[name] = 0  # its maps are numbered by their place, 128 bytes each
            else:
                self.parameters[name] = GLOBAL + int(self.starts[parameter])
        self.shared_bytes = SHARED + -(-launch.shared_bytes // 1024) * 1024
        self.shared = self.random.integers(0, 256, self.count // self.program.threads * self.shared_bytes, np.uint8)

    # Running

    def run(self) -> list[np.ndarray]:
        """The results.

        Raises:
          Fault: an access outside arrays or misaligned, threads that wait for ever, and more of this kind.
        """
        with np.errstate(all="ignore"):
            while not self.done.all():
                started = [self._exhaust(self.warpgroups[n]) for n in self.random.permutation(len(self.warpgroups))]
                if not any(started):
                    if not self.events:
                        waiting = {self.program.instructions[at].text for at in self.at[~self.done]}
                        raise Fault(f"threads wait for ever: {sorted(waiting)}")
                    self.events.pop(self.random.integers(len(self.events)))()
        self.stores.complete(self.number, 0, everything=True)
        if self.events or self.copies or self.products:
            raise Fault("the kernel ended before its copies or products")
        placed = list(zip(self.starts, self.arrays, strict=True))[self.arguments :]
        return [self.memory[start:][: array.nbytes].view(array.dtype).reshape(array.shape) for start, array in placed]

    def _exhaust(self, warps: list[np.ndarray]) -> bool:
        """Runs a warpgroup's warps until all of them wait for others; whether one of them moved."""
        moved = False
        while True:
            self.progress = False
            for warp in self.random.permutation(len(warps)):
                self.blocked[warps[warp]] = False
                while self._advance(warps[warp]):
                    pass
            if not (self._release() or self.progress):
                return moved
            moved = True

    def _advance(self, warp: np.ndarray) -> bool:
        """Runs those threads of a warp that are furthest behind, up to a jump, a wait or a place where others join."""
        ready = warp[~(self.done[warp] | self.blocked[warp] | (self.barrier[warp] >= 0))]
        if not ready.size:
            return False
        at, lanes = self._furthest_behind(ready)
        index = slice(None) if lanes.size == self.count else lanes
        start = at
        while not self.steps[at](index, lanes):
            at += 1
            if lanes.size < ready.size and at in self.joins:
                self.at[index] = at
                break
        self.progress |= at > start or not self.blocked[lanes].all()
        return True

    def _furthest_behind(self, ready: np.ndarray) -> tuple[int, np.ndarray]:
        """An instruction, and the threads that are there: whole warps, if it is one that these execute together."""
        at = int(self.at[ready].min())
        lanes = ready[self.at[ready] == at]
        if at not in self.together:
            return at, lanes
        whole = lanes[np.bincount(lanes // 32)[lanes // 32] == 32]
        others = ready[self.at[ready] > at]
        if whole.size or not others.size:
            return at, whole if whole.size else lanes
        return self._furthest_behind(others)

    def _release(self) -> bool:
        waiting = np.flatnonzero(self.barrier >= 0)
        if not waiting.size:
            return False
        key = self.block[waiting] * 16 + self.barrier[waiting]
        _, inverse, arrived = np.unique(key, return_inverse=True, return_counts=True)
        if (arrived[inverse] > self.expected[waiting]).any():
            raise Fault("more threads at a barrier than it expects")
        freed = waiting[arrived[inverse] == self.expected[waiting]]
        self.barrier[freed] = -1
        self.at[freed] += 1
        return bool(freed.size)

    def _compile(self, i) -> Step:
        step = (OPERATIONS.get(".".join(i.op[:3])) or OPERATIONS[i.op[0]])(self, i)
        if i.predicate is None or i.op[0] == "bra":
            return step
        predicate = self.read(i.predicate, np.bool_)

        def where_true(index, lanes):
            active = lanes[predicate(index) != i.negated]
            if active.size and step(active, active):
                raise NotImplementedError(i.text)

        return where_true

    def whole_warps(self, lanes: np.ndarray, i) -> np.ndarray:
        """The threads in rows of 32."""
        if lanes.size % 32 or ((lanes.reshape(-1, 32) % 32) != np.arange(32)).any():
            raise Fault(f"part of a warp runs {i.text}")
        return lanes.reshape(-1, 32)

    # Operands

    def read(self, text: str, dtype: Any) -> Callable[[Any], np.ndarray]:
        """A function from an index of threads to an operand's values, or its value for all."""
        dtype = np.dtype(dtype)
        grid = self.launch.grid
        special = {
            "%tid.x": self.thread,
            "%ctaid.x": self.block % grid[0],
            "%ctaid.y": self.block // grid[0] % grid[1],
            "%ctaid.z": self.block // (grid[0] * grid[1]),
        }
        if text in special:
            values = special[text].astype(dtype)
            return lambda index: values[index]
        if text in self.parameters or text.startswith("__dynamic_shmem__"):
            base = self.parameters[text] if text in self.parameters else SHARED + int(text.partition("+")[2] or 0)
            constant = np.array([base]).astype(dtype)
            return lambda index: constant
        if text[0] != "%" and text not in self.program.widths:
            constant = _literal(text, dtype)
            return lambda index: constant
        if dtype == np.bool_:
            return lambda index: self.registers[text][index]
        narrow = UNSIGNED[8 * dtype.itemsize]
        return lambda index: self.registers[text][index].astype(narrow, copy=False).view(dtype)

    def write(self, name: str) -> Callable[[Any, np.ndarray], None]:
        """A function that sets a register of some threads; a narrower value fills it by its sign."""
        width = self.program.width(name) if name != "_" else 64
        stored = np.bool_ if width == 1 else UNSIGNED[width]

        def write(index, value):
            if name not in self.registers:
                self.registers[name] = np.zeros(self.count, stored)
            if width > 1:
                wide = SIGNED[width] if value.dtype.kind == "i" else UNSIGNED[width]
                value = value.view(stored) if value.dtype.itemsize * 8 == width else value.astype(wide).view(stored)
            self.registers[name][index] = value

        return write

    def address(self, text: str) -> Callable[[Any, np.ndarray], np.ndarray]:
        """Of an operand like [%rd1+16] or [__dynamic_shmem__0+16]."""
        base, _, offset = text[1:-1].strip().partition("+")
        in_register = base in self.program.widths or base[0] == "%"
        read = self.read(base, UNSIGNED[self.program.width(base) if in_register else 64])
        return lambda index, lanes: np.broadcast_to(read(index).astype(np.int64) + int(offset or 0), lanes.shape)

    # Memory

    def locate(self, address: np.ndarray, lanes: np.ndarray, size: int, space: str, i) -> tuple[np.ndarray, np.ndarray]:
        """The memory that addresses lie in, and where; `space` is shared, global or any other word for either."""
        if (address % size).any():
            raise Fault(f"misaligned: {i.text}")
        in_shared = address < WINDOW
        if in_shared.all() and space != "global":
            if ((address < SHARED) | (address + size > self.shared_bytes)).any():
                raise Fault(f"outside shared memory: {i.text}")
            return self.shared, self.block[lanes] * self.shared_bytes + address
        where = address - GLOBAL
        if space == "shared" or in_shared.any() or not self.inside(where, size):
            raise Fault(f"outside every array: {i.text}")
        return self.memory, where

    def inside(self, where: np.ndarray, size: int) -> bool:
        within = ((where >= 0) & (where + size <= self.memory.size)).all()
        return bool(within and self.valid[where].all() and self.valid[where + size - 1].all())

    def load(self, address, lanes, dtype, space, i) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        memory, where = self.locate(address, lanes, size, space, i)
        return memory.view(dtype)[where // size]

    def store(self, address, lanes, value, space, i) -> None:
        size = value.dtype.itemsize
        memory, where = self.locate(address, lanes, size, space, i)
        if memory is self.memory and (where < self.starts[self.arguments]).any():
            raise Fault(f"writes to an argument: {i.text}")
        memory.view(value.dtype)[where // size] = value
        if memory is self.shared and self.tensor_maps:
            self.unfenced[where[:, None] + np.arange(size)] = lanes[:, None] + 1


class Groups:
    """Asynchronous work that a thread commits in groups and waits for, all but the latest few."""

    def __init__(self, threads: int):
        self.committed = np.zeros(threads, np.int64)
        self.work: list[tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], None]]] = []

    def __bool__(self) -> bool:
        return bool(self.work)

    def add(self, lanes: np.ndarray, function: Callable[[np.ndarray], None]) -> None:
        """`function(which)` does the work of lanes[which]."""
        self.work.append((lanes, self.committed[lanes], function))

    def complete(self, lanes: np.ndarray, left: int, everything: bool = False) -> None:
        waits = np.zeros(self.committed.size, bool)
        waits[lanes] = True
        rest = []
        for who, group, function in self.work:
            due = waits[who] & ((group < self.committed[who] - left) | everything)
            if due.any():
                function(due)
            if not due.all():
                rest.append((who[~due], group[~due], _of_the_others(function, ~due)))
        self.work = rest


def _of_the_others(function, others):
    def run(which):
        mask = np.zeros(others.size, bool)
        mask[np.flatnonzero(others)[which]] = True
        function(mask)

    return run


def _literal(text: str, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_:
        return np.array([int(text) != 0])
    if text.startswith("0f"):
        return np.array([int(text[2:], 16)], np.uint32).view(np.float32)
    bits = 8 * dtype.itemsize
    return np.array([int(re.sub("U$", "", text), 0) & (2**bits - 1)], UNSIGNED[bits]).view(dtype)
