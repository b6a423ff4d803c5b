"""Instructions on registers: arithmetic, comparison, conversion, exchange within a warp, jumps and barriers."""

import operator
from functools import reduce

import numpy as np

from .program import split_list
from .threads import SIGNED, TYPES, UNSIGNED, Fault, operation


def elementwise(threads, i, dtype, function, operands=slice(1, None)):
    write, reads = threads.write(i.operands[0]), [threads.read(x, dtype) for x in i.operands[operands]]

    def step(index, lanes):
        values = [read(index) for read in reads]
        write(index, np.broadcast_to(function(*values), lanes.shape))

    return step


def register_type(i):
    return np.dtype(TYPES[i.op[-1]])


def simple(names, function):
    @operation(*names)
    def compiled(threads, i):
        return elementwise(threads, i, register_type(i), function)


simple(["add"], operator.add)
simple(["sub"], operator.sub)
simple(["div"], operator.truediv)
simple(["and"], operator.and_)
simple(["or"], operator.or_)
simple(["xor"], operator.xor)
simple(["not"], operator.invert)
simple(["neg"], operator.neg)
simple(["abs"], np.abs)
simple(["rcp"], lambda x: 1 / x)
simple(["ex2"], np.exp2)
simple(["lg2"], np.log2)
simple(["sqrt"], np.sqrt)
simple(["rsqrt"], lambda x: 1 / np.sqrt(x))
simple(["copysign"], lambda sign, x: np.copysign(x, sign))


@operation("dp4a")
def dp4a(threads, i):
    """A sum, and the products of four signed bytes."""

    def total(a, b, c):
        return sum((((a << n) >> 24) * ((b << n) >> 24) for n in map(np.int32, (0, 8, 16, 24))), c)

    return elementwise(threads, i, np.int32, total)


@operation("fma")
def fma(threads, i):
    def once_rounded(a, b, c):  # a product of float32 is exact in float64
        return (a.astype(np.float64) * b + c).astype(np.float32)

    return elementwise(threads, i, np.float32, once_rounded)


@operation("mul", "mad")
def mul(threads, i):
    dtype = register_type(i)
    if dtype.kind == "f":
        return elementwise(threads, i, dtype, operator.mul)
    bits = 8 * dtype.itemsize
    if i.op[1] == "lo":
        return elementwise(threads, i, dtype, lambda a, b, *c: sum(c, a * b))
    if i.op[0] == "mad":
        raise NotImplementedError(i.text)
    if i.op[1] == "hi" and bits == 64:
        return elementwise(threads, i, dtype, lambda a, b: (a.astype(object) * b.astype(object) >> 64).astype(dtype))
    wide = (SIGNED if dtype.kind == "i" else UNSIGNED)[2 * bits]
    shift, result = (0, wide) if i.op[1] == "wide" else (bits, dtype)
    return elementwise(threads, i, dtype, lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(shift)).astype(result))


@operation("min", "max")
def extremum(threads, i):
    keeps_nan = register_type(i).kind != "f" or "NaN" in i.op
    functions = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    return elementwise(threads, i, register_type(i), functions[i.op[0]][keeps_nan])


@operation("shl", "shr")
def shift(threads, i):
    dtype = register_type(i)
    write, read, by = (
        threads.write(i.operands[0]),
        threads.read(i.operands[1], dtype),
        threads.read(i.operands[2], "u4"),
    )
    function = np.left_shift if i.op[0] == "shl" else np.right_shift
    most = 8 * dtype.itemsize - 1

    def step(index, lanes):
        x, n = np.broadcast_arrays(read(index), by(index), lanes)[:2]
        inside = function(x, np.minimum(n, most).astype(dtype))
        beyond = np.right_shift(x, dtype.type(most)) if dtype.kind == "i" and i.op[0] == "shr" else dtype.type(0)
        write(index, np.where(n <= most, inside, beyond))

    return step


@operation("bfe")
def bfe(threads, i):
    """`length` bits from bit `start` on, fewer than all; unsigned."""
    if i.op[1] not in ("u32", "u64"):
        raise NotImplementedError(i.text)
    one = register_type(i).type(1)
    return elementwise(threads, i, register_type(i), lambda x, start, length: x >> start & ((one << length) - one))


COMPARISONS = {
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),
    # True for NaN
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}


@operation("setp")
def setp(threads, i):
    compare = COMPARISONS[i.op[1]]
    if len(i.op) == 3:
        return elementwise(threads, i, register_type(i), compare)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[i.op[2]]
    negated = i.operands[3].startswith("!")
    write, other = threads.write(i.operands[0]), threads.read(i.operands[3].lstrip("!"), np.bool_)
    a, b = (threads.read(x, register_type(i)) for x in i.operands[1:3])
    return lambda index, lanes: write(index, combine(compare(a(index), b(index)), other(index) != negated))


@operation("selp")
def selp(threads, i):
    write, chosen = threads.write(i.operands[0]), threads.read(i.operands[3], np.bool_)
    a, b = (threads.read(x, register_type(i)) for x in i.operands[1:3])
    return lambda index, lanes: write(index, np.where(chosen(index), a(index), b(index)))


@operation("mov")
def mov(threads, i):
    """Also of a register to several narrower ones, {a, b}, or back."""
    dtype = register_type(i)
    several = next((split_list(x[1:-1]) for x in i.operands if x[0] == "{"), None)
    if several is None:
        return elementwise(threads, i, dtype, lambda x: x)
    bits = 8 * dtype.itemsize // len(several)
    shifts = [dtype.type(bits * k) for k in range(len(several))]
    if i.operands[0][0] == "{":
        read, writes = threads.read(i.operands[1], dtype), [threads.write(x) for x in several]

        def unpack(index, lanes):
            for write, shift in zip(writes, shifts, strict=True):
                write(index, (read(index) >> shift).astype(UNSIGNED[bits]))

        return unpack
    write, reads = threads.write(i.operands[0]), [threads.read(x, UNSIGNED[bits]) for x in several]
    return lambda index, lanes: write(
        index, reduce(operator.or_, (r(index).astype(dtype) << s for r, s in zip(reads, shifts, strict=True)))
    )


ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def cvt(threads, i):
    target, source = i.op[-2:]
    if target == "bf16x2":
        bf16 = TYPES["bf16"]
        write, (high, low) = threads.write(i.operands[0]), [threads.read(x, np.float32) for x in i.operands[1:]]

        def pair(index, lanes):
            halves = (x(index).astype(bf16).view(np.uint16).astype(np.uint32) for x in (high, low))
            write(index, next(halves) << np.uint32(16) | next(halves))

        return pair
    from_type, to_type = np.dtype(TYPES[source]), np.dtype(TYPES[target])

    def convert(x):
        rounded = ROUNDING[i.op[1]](x) if i.op[1] in ROUNDING else x
        if from_type.kind == "f" and to_type.kind in "iu":  # saturates; NaN is 0
            limits = np.iinfo(to_type)
            rounded = np.nan_to_num(np.clip(rounded.astype(np.float64), limits.min, limits.max))
        return rounded.astype(to_type)

    return elementwise(threads, i, from_type, convert)


@operation("cvta")
def cvta(threads, i):
    """Addresses say themselves which memory they are in."""
    return elementwise(threads, i, np.uint64, lambda x: x)


@operation("prmt")
def prmt(threads, i):
    """Four bytes of two words, chosen by a nibble each; its highest bit asks for the byte's sign in all bits."""

    def permute(a, b, selection):
        a, b, selection = np.broadcast_arrays(a, b, selection)
        pool = np.stack([a, b], axis=-1).view(np.uint8)
        picks = selection[:, None] >> np.arange(0, 16, 4, np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(pool, (picks & 7).astype(np.int64), axis=1)
        signs = (chosen.view(np.int8) >> 7).view(np.uint8)
        return np.where(picks & 8, signs, chosen).view(np.uint32)[:, 0]

    return elementwise(threads, i, np.uint32, permute, slice(1, 4))


@operation("shfl")
def shfl(threads, i):
    """From another lane of the warp; lanes without a source keep their own."""
    name, _, found = i.operands[0].partition("|")
    write, tell = threads.write(name), threads.write(found) if found else None
    read, by = threads.read(i.operands[1], np.uint32), threads.read(i.operands[2], np.int32)
    mode = i.op[2]

    def step(index, lanes):
        warps = threads.whole_warps(lanes, i)
        lane, n = np.arange(32), np.broadcast_to(by(index), lanes.shape).reshape(warps.shape)
        source = {"bfly": lane ^ n, "idx": n & 31, "down": lane + n, "up": lane - n}[mode] + 0 * lane
        inside = (source >= 0) & (source < 32)
        values = np.broadcast_to(read(index), lanes.shape).reshape(warps.shape)
        write(index, np.take_along_axis(values, np.where(inside, source, lane), 1).ravel())
        if tell:
            tell(index, inside.ravel())

    return step


@operation("elect")
def elect(threads, i):
    name, _, leads = i.operands[0].partition("|")
    write, tell = threads.write(name), threads.write(leads)

    def step(index, lanes):
        threads.whole_warps(lanes, i)
        write(index, np.zeros(lanes.size, np.uint32))
        tell(index, lanes % 32 == 0)

    return step


@operation("bra")
def bra(threads, i):
    taken = threads.read(i.predicate, np.bool_) if i.predicate else None

    def step(index, lanes):
        target = threads.program.labels[i.operands[0]]
        jump = True if taken is None else taken(index) != i.negated
        threads.at[index] = np.where(jump, target, i.position + 1)
        return True

    return step


@operation("ret")
def ret(threads, i):
    def step(index, lanes):
        threads.done[index] = True
        return True

    return step


@operation("bar")
def bar(threads, i):
    if i.op[1:] != ("sync",):
        raise NotImplementedError(i.text)
    number = threads.read(i.operands[0], np.uint32)
    expected = threads.read(i.operands[1] if len(i.operands) > 1 else str(threads.program.threads), np.uint32)

    def step(index, lanes):
        if (number(index) > 15).any():
            raise Fault(f"no such barrier: {i.text}")
        threads.barrier[index], threads.expected[index], threads.at[index] = number(index), expected(index), i.position
        return True

    return step
