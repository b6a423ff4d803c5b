"""What Hopper has beside: mbarriers, the tensor memory accelerator, wgmma."""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from .memory import LANE, names
from .threads import Fault, operation

SWIZZLES = {1: 128, 2: 64, 3: 32}
"""Bytes by the number in a matrix descriptor."""


def swizzled(address, width):
    """Where in shared memory a byte lies: its 16-byte unit is moved within `width` bytes by its row of 128."""
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)


@operation("fence")
def fence(threads, i):
    if i.op[1] != "proxy":
        return lambda index, lanes: None

    def step(index, lanes):
        fenced = np.zeros(threads.count + 1, bool)
        fenced[lanes + 1] = True
        threads.unfenced[fenced[threads.unfenced]] = 0

    return step


@operation("prefetch", "setmaxnreg")
def hint(threads, i):
    return lambda index, lanes: None


@dataclass
class Barrier:
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self):
        if self.pending < 0:
            raise Fault("more threads arrive at an mbarrier than it expects")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.expected, self.phase + 1


@operation("mbarrier")
def mbarrier(threads, i):
    where = threads.address(i.operands[0 if i.op[1] == "init" else 1])
    number = threads.read(i.operands[1 if i.op[1] == "init" else 2], np.uint32)

    def each(index, lanes):
        keys = zip(threads.block[lanes].tolist(), where(index, lanes).tolist(), strict=True)
        return zip(keys, np.broadcast_to(number(index), lanes.shape).tolist(), strict=True)

    def init(index, lanes):
        threads.mbarriers.update({key: Barrier(count, count) for key, count in each(index, lanes)})

    def arrive(index, lanes):
        for key, n in each(index, lanes):
            barrier = threads.mbarriers[key]
            barrier.pending -= 1 if "expect_tx" in i.op else n
            barrier.bytes += n if "expect_tx" in i.op else 0
            barrier.settle()

    if i.op[1] != "try_wait":
        return {"init": init, "arrive": arrive}[i.op[1]]
    write = threads.write(i.operands[0])

    def wait(index, lanes):
        over = np.array([threads.mbarriers[key].phase % 2 != parity for key, parity in each(index, lanes)])
        write(lanes[over], np.ones(over.sum(), bool))
        threads.at[lanes] = i.position + over
        threads.blocked[lanes[~over]] = True
        return True

    return wait


@operation("cp.async.bulk")
def bulk_copy(threads, i):
    """Of a window of an array, one for each thread that asks; outside the array, zeros are read and nothing written."""
    if "commit_group" in i.op:

        def commit(index, lanes):
            threads.stores.committed[index] += 1

        return commit
    if "wait_group" in i.op:
        return lambda index, lanes: threads.stores.complete(lanes, int(i.operands[0]))
    loads = len(i.operands) == 3
    shared, window = i.operands[:2] if loads else i.operands[1::-1]
    address, barrier = threads.address(shared), threads.address(i.operands[2]) if loads else None
    map_name, coordinates = re.match(r"\[(%\w+), \{(.*)\}\s*\]$", window).groups()
    number = threads.read(map_name, np.uint64)
    starts = [threads.read(x.strip(), np.int32) for x in reversed(coordinates.split(","))]

    def step(index, lanes):
        corners = np.stack([np.broadcast_to(read(index), lanes.shape) for read in starts], axis=1)
        maps = np.broadcast_to(number(index), lanes.shape) // 128
        addresses = address(index, lanes)
        keys = barrier(index, lanes) if loads else addresses
        for k, lane in enumerate(lanes):
            tensor_map = threads.tensor_maps[int(maps[k])]
            there, inside = _window(threads, tensor_map, corners[k])
            here = int(addresses[k]) + np.arange(there.size)
            if here[0] % 128 or here[-1] >= threads.shared_bytes or not threads.inside(there[inside], 1):
                raise Fault(f"misaligned or outside its memory: {i.text}")
            block = int(threads.block[lane])
            here = block * threads.shared_bytes + swizzled(here, tensor_map.swizzle)
            if loads:
                work = partial(_land, threads, there, inside, here, (block, int(keys[k])))
                threads.events.append(work) if threads.late else work()
            else:
                work = partial(_leave, threads, there, inside, here, i)
                threads.stores.add(np.array([lane]), work) if threads.late else work()

    return step


def _window(threads, tensor_map, corner):
    """Of each byte of a window, in its order in shared memory: where it lies in global memory, whether in the array."""
    itemsize = threads.arrays[tensor_map.array].dtype.itemsize
    axes = np.meshgrid(*(c + np.arange(n) for c, n in zip(corner, tensor_map.window, strict=True)), indexing="ij")
    element = sum(axis * stride for axis, stride in zip(axes, tensor_map.strides, strict=True))
    inside = np.all([(a >= 0) & (a < size) for a, size in zip(axes, tensor_map.sizes, strict=True)], axis=0)
    bytes_ = threads.starts[tensor_map.array] + element.reshape(-1, 1) * itemsize + np.arange(itemsize)
    return bytes_.ravel(), np.repeat(inside.ravel(), itemsize)


def _land(threads, there, inside, here, key):
    threads.shared[here] = np.where(inside, threads.memory[np.where(inside, there, 0)], 0)
    threads.unfenced[here] = 0
    threads.mbarriers[key].bytes -= here.size
    threads.mbarriers[key].settle()


def _leave(threads, there, inside, here, i, which=None):
    _fenced(threads, here, i)
    threads.memory[there[inside]] = threads.shared[here[inside]]


def _fenced(threads, where, i):
    """Writes of threads are seen by the accelerators only after a fence of theirs."""
    if threads.unfenced[where].any():
        raise Fault(f"reads what was written without a fence since: {i.text}")


@operation("wgmma")
def wgmma(threads, i):
    if i.op[1] == "fence":
        return lambda index, lanes: None
    if i.op[1] == "commit_group":

        def commit(index, lanes):
            threads.products.committed[index] += 1

        return commit
    if i.op[1] == "wait_group":
        return lambda index, lanes: threads.products.complete(lanes, int(i.operands[0]))
    columns = int(re.match(r"m64n(\d+)k32$", i.op[4])[1])
    if i.op[5:] != ("s32", "s8", "s8"):
        raise NotImplementedError(i.text)
    registers = names(i.operands[0])
    writes, sums = [threads.write(x) for x in registers], [threads.read(x, np.int32) for x in registers]
    left, right = (threads.read(x, np.uint64) for x in i.operands[1:3])
    adds = threads.read(i.operands[3], np.bool_)

    def step(index, lanes):
        """The product of each warp: 16 of the 64 rows."""
        threads.whole_warps(lanes, i)
        if not np.all(adds(index)):
            raise NotImplementedError(i.text)
        a, b = (np.broadcast_to(read(index), lanes.shape).copy() for read in (left, right))

        def multiply(which):
            who = lanes[which]
            own = threads.whole_warps(who, i)[:, 0]
            A = _matrix(threads, a[which], own, 64, i).reshape(len(own), 4, 16, 32)
            A = A[np.arange(len(own)), threads.thread[own] // 32 % 4]
            B = _matrix(threads, b[which], own, columns, i)
            product = (A.astype(np.float32) @ B.astype(np.float32).transpose(0, 2, 1)).astype(np.int32)
            for k, (write, read) in enumerate(zip(writes, sums, strict=True)):
                rows, column = LANE // 4 + 8 * (k // 2 % 2), 8 * (k // 4) + 2 * (LANE % 4) + k % 2
                write(who, read(who) + product[:, rows, column].ravel())

        if threads.late:
            threads.products.add(lanes, multiply)
        else:
            multiply(slice(None))

    return step


def _matrix(threads, descriptors, leaders, rows, i):
    """(warps, rows, 32) levels that descriptors point to: K inside, in the swizzle of shared memory."""
    descriptor = descriptors.reshape(-1, 32)[:, :1].astype(np.int64)
    width = SWIZZLES[int(descriptor[0, 0] >> 62 & 3)]
    start, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 32))
    row = np.arange(rows)
    address = start + row // 8 * stride + row % 8 * width
    address = swizzled(address[:, :, None] + np.arange(32), width)
    where = threads.block[leaders][:, None, None] * threads.shared_bytes + address
    _fenced(threads, where, i)
    return threads.shared[where].view(np.int8)
