"""Loads, stores, fragments of matrices, the tensor cores' product of Ampere, and cp.async."""

import re

import numpy as np

from .program import split_list
from .threads import TYPES, operation

LANE = np.arange(32)


def names(operand):
    return split_list(operand[1:-1]) if operand[0] == "{" else [operand]


def space_of(i):
    return next((word for word in i.op if word in ("global", "shared")), "either")


@operation("ld")
def ld(threads, i):
    if i.op[1].startswith("param"):
        return parameter(threads, i)
    dtype, where = np.dtype(TYPES[i.op[-1]]), threads.address(i.operands[1])
    writes = [threads.write(x) for x in names(i.operands[0])]

    def step(index, lanes):
        address = where(index, lanes)
        threads.locate(address, lanes, dtype.itemsize * len(writes), space_of(i), i)
        for k, write in enumerate(writes):
            write(index, threads.load(address + k * dtype.itemsize, lanes, dtype, space_of(i), i))

    return step


def parameter(threads, i):
    """By name, or by an address that was chosen among those of several: as which their values stand here."""
    write, read = threads.write(i.operands[0]), threads.read(re.match(r"\[(%?\w+)\]$", i.operands[1])[1], np.uint64)
    return lambda index, lanes: write(index, np.broadcast_to(read(index), lanes.shape))


@operation("st")
def st(threads, i):
    dtype, where = np.dtype(TYPES[i.op[-1]]), threads.address(i.operands[0])
    reads = [threads.read(x, dtype) for x in names(i.operands[1])]

    def step(index, lanes):
        address = where(index, lanes)
        threads.locate(address, lanes, dtype.itemsize * len(reads), space_of(i), i)
        for k, read in enumerate(reads):
            value = np.broadcast_to(read(index), lanes.shape)
            threads.store(address + k * dtype.itemsize, lanes, value, space_of(i), i)

    return step


@operation("ldmatrix", "stmatrix")
def matrices(threads, i):
    """8 x 8 matrices of 16-bit numbers: lane 8k + r holds the address of row r of matrix k, lane l two of row l / 4."""
    loads = i.op[0] == "ldmatrix"
    if "trans" in i.op:
        raise NotImplementedError(i.text)
    registers, operand = (i.operands[0], i.operands[1]) if loads else (i.operands[1], i.operands[0])
    where = threads.address(operand)
    accesses = [threads.write(x) if loads else threads.read(x, np.uint32) for x in names(registers)]

    def step(index, lanes):
        threads.whole_warps(lanes, i)
        starts = where(index, lanes).reshape(-1, 32)
        for k, access in enumerate(accesses):
            rows = starts[:, 8 * k + LANE // 4]
            threads.locate(rows.ravel(), lanes, 16, "shared", i)
            address = (rows + 4 * (LANE % 4)).ravel()
            if loads:
                access(index, threads.load(address, lanes, np.uint32, "shared", i))
            else:
                threads.store(address, lanes, access(index), "shared", i)

    return step


@operation("mma")
def mma(threads, i):
    """D (16, 8) = A (16, K) B (K, 8) + C, a warp each: 32 bytes along K of int8, or of int4 two to a byte."""
    instruction = "mma.sync.aligned.m16n8k{}.row.col.s32.s{}.s{}.s32"
    bits = next((n for n in (8, 4) if ".".join(i.op) == instruction.format(256 // n, n, n)), None)
    if bits is None:
        raise NotImplementedError(i.text)
    d, a, b, c = map(names, i.operands)
    writes, sums = [threads.write(x) for x in d], [threads.read(x, np.int32) for x in c]
    left, right = ([threads.read(x, np.uint32) for x in operand] for operand in (a, b))
    each = 32 // bits  # levels of a register
    group, k = LANE // 4, each * (LANE % 4)[:, None] + np.arange(each)

    def step(index, lanes):
        warps = len(threads.whole_warps(lanes, i))

        def levels(read):
            both = np.ascontiguousarray(np.broadcast_to(read(index), lanes.shape)).view(np.int8).reshape(warps, 32, 4)
            return both if bits == 8 else np.stack([(both << 4) >> 4, both >> 4], axis=-1).reshape(warps, 32, 8)

        A, B = np.zeros((warps, 16, 256 // bits), np.float32), np.zeros((warps, 256 // bits, 8), np.float32)
        for n, read in enumerate(left):
            A[:, group[:, None] + 8 * (n % 2), k + 4 * each * (n // 2)] = levels(read)
        for n, read in enumerate(right):
            B[:, k + 4 * each * n, group[:, None]] = levels(read)
        product = (A @ B).astype(np.int32)  # below 2^24, so exact in float32
        for n, (write, read) in enumerate(zip(writes, sums, strict=True)):
            write(index, read(index) + product[:, group + 8 * (n // 2), 2 * (LANE % 4) + n % 2].ravel())

    return step


@operation("cp")
def cp(threads, i):
    if i.op[2] == "commit_group":

        def commit(index, lanes):
            threads.copies.committed[index] += 1

        return commit
    if i.op[2] == "wait_group":
        return lambda index, lanes: threads.copies.complete(lanes, int(i.operands[0]))
    to, source, size = threads.address(i.operands[0]), threads.address(i.operands[1]), int(i.operands[2])

    def copy(index, lanes):
        there, here = to(index, lanes), source(index, lanes)
        threads.locate(there, lanes, size, "shared", i)
        threads.locate(here, lanes, size, "global", i)

        def land(which):
            for offset in range(0, size, 4):
                value = threads.load(here[which] + offset, lanes[which], np.uint32, "global", i)
                threads.store(there[which] + offset, lanes[which], value, "shared", i)

        if threads.late:
            threads.copies.add(lanes, land)
        else:
            land(slice(None))

    return copy
