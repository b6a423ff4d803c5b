"""Tile sizes of the GPU kernels, and the choice among them: plain numbers and pure functions."""

from dataclasses import dataclass
from typing import Literal

Target = Literal["sm80", "sm89", "sm90"]

TILE_K = 128
"""Bytes of K per step: one full row of the 128-byte swizzle."""


@dataclass(frozen=True)
class MatmulTiles:
    """One program computes tile_m x tile_n outputs with `stages` steps of TILE_K in flight.

    With `packed`, two 4-bit weight levels travel in a byte and are unpacked in shared memory (sm90) or registers.
    """

    tile_m: int
    tile_n: int
    stages: int
    packed: bool = False


def matmul_tiles(target: Target, outputs: int, weight_bits: int) -> MatmulTiles:
    """Tiles for a product with `outputs` columns; the widest that divides them, or 64 of a padded matrix.

    int32 accumulators decide: 64 x 256 for each of two warpgroups on sm90 (128 registers per thread), 128 x 128 for
    the one of sm80, 64 x 128 on sm89, whose shared memory holds 99 KiB. 4-bit weights stay packed: a step reads a
    quarter to a third less of the second cache, and below sm90 two programs fit on a multiprocessor.
    """
    widths = (256, 128, 64) if target == "sm90" else (128, 64)
    tile_n = next((n for n in widths if outputs % n == 0), 64)
    return MatmulTiles(64 if target == "sm89" else 128, tile_n, 3, weight_bits <= 4)


SCAN_CHANNELS = 128
"""Channels of a scan that one program walks: one per thread of a warpgroup."""
MIN_PROGRAMS = 512
"""Four for each of some 130 multiprocessors: 16 warps, enough to hide most of the latency of loads."""
MIN_SEGMENT = 64
"""Tokens worth a program of their own."""


@dataclass(frozen=True)
class ScanTiles:
    """How a scan is cut along its tokens.

    The forward pass saves a state every `chunk` tokens; the backward pass holds the states of `piece` tokens in
    registers. `segments` run side by side, and a second time from the states that they start from.
    """

    piece: int
    chunk: int
    segments: int = 1


def scan_tiles(states: int, programs: int, length: int) -> ScanTiles:
    """Tiles for a scan that would take so many programs (of 128 channels of a sample each) in one segment.

    Pieces are as long as registers allow, with two to a chunk: every second one walks half a chunk more. At 16 states
    that takes less than a saved state for every piece would: as much memory traffic as four inputs in float32.
    Segments are for few programs with many tokens, which leave most of a GPU idle.
    """
    piece = 4 if states == 16 else 8
    segments = 1
    while programs * segments < MIN_PROGRAMS and length % (2 * segments) == 0 and length >= 2 * segments * MIN_SEGMENT:
        segments *= 2
    return ScanTiles(piece, 2 * piece, segments)
