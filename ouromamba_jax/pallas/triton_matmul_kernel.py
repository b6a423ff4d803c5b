"""The Triton kernel of the outlier matmul: one launch, one accumulator. Importing it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    low_ptr,
    high_ptr,
    row_scale_ptr,
    weight_ptr,
    column_scale_ptr,
    bias_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TWO_BYTES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """(256 * high + low) @ W^T * column_scale * row_scale, for W (N, K) and K a multiple of TILE_K; with BIAS, plus it.

    Row r has the step of token r % TOKENS. As in the Mosaic kernels the high bytes come first. Rows and columns beyond
    M and N are read as the last ones and not written.
    """
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    read_rows, read_columns = tl.minimum(rows, M - 1), tl.minimum(columns, N - 1)
    inner = tl.arange(0, TILE_K)
    levels = read_rows[:, None] * K + inner[None, :]
    weights = weight_ptr + read_columns[None, :] * K + inner[:, None]
    accumulator = tl.full((TILE_M, TILE_N), 0, tl.int32)
    if TWO_BYTES:
        for step in range(K // TILE_K):
            block = step * TILE_K
            accumulator = tl.dot(
                tl.load(high_ptr + levels + block), tl.load(weights + block), accumulator, out_dtype=tl.int32
            )
        accumulator = accumulator << 8
    for step in range(K // TILE_K):
        block = step * TILE_K
        accumulator = tl.dot(
            tl.load(low_ptr + levels + block), tl.load(weights + block), accumulator, out_dtype=tl.int32
        )
    y = accumulator.to(tl.float32) * tl.load(column_scale_ptr + read_columns)[None, :]
    y = y * tl.load(row_scale_ptr + read_rows % TOKENS)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + read_columns)[None, :].to(tl.float32)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], y, mask=inside)
