"""The Triton kernel of the outlier matmul: one launch, in most tiles one accumulator. Importing it imports Triton."""

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def matmul(
    near_ptr,
    far_ptr,
    largest_shift_ptr,
    shift_ptr,
    row_scale_ptr,
    weight_ptr,
    column_scale_ptr,
    bias_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
):
    """((far @ W^T) * 2^shift + near @ W^T) * row_scale * column_scale, for W (N, K) and K a multiple of TILE_K.

    With BIAS, plus bias (N,).

    As in the Mosaic kernels the outlier blocks come first, only in a tile that holds a shift; then every row is
    shifted, or cleared if it has no shift, then come the blocks of `near`, which every tile has: the integers are
    exact. A tile with a shift beyond LIMIT takes two accumulators, PART columns at a time. Rows and columns beyond M
    and N are read as the last ones and not written.
    """
    row_tile = tl.program_id(0)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    first_column = tl.program_id(1) * TILE_N
    read_rows = tl.minimum(rows, M - 1)
    inner = tl.arange(0, TILE_K)
    planes = read_rows[:, None] * K + inner[None, :]
    power = tl.load(shift_ptr + read_rows)
    row_scale = tl.load(row_scale_ptr + read_rows)
    largest_shift = tl.load(largest_shift_ptr + row_tile)

    if largest_shift <= LIMIT:
        columns = first_column + tl.arange(0, TILE_N)
        read_columns = tl.minimum(columns, N - 1)
        weights = weight_ptr + read_columns[None, :] * K + inner[:, None]
        accumulator = tl.full((TILE_M, TILE_N), 0, tl.int32)
        for step in range(tl.minimum(largest_shift, 1) * (K // TILE_K)):
            block = step * TILE_K
            accumulator = tl.dot(
                tl.load(far_ptr + planes + block), tl.load(weights + block), accumulator, out_dtype=tl.int32
            )
        accumulator = tl.where(power[:, None] > 0, accumulator << power[:, None], 0)
        for step in range(K // TILE_K):
            block = step * TILE_K
            accumulator = tl.dot(
                tl.load(near_ptr + planes + block), tl.load(weights + block), accumulator, out_dtype=tl.int32
            )
        y = accumulator.to(tl.float32) * row_scale[:, None] * tl.load(column_scale_ptr + read_columns)[None, :]
        if BIAS:  # not contracted with the product before it
            y = tl.minimum(y, FLOAT32_MAX, tl.PropagateNan.ALL)
            y = y + tl.load(bias_ptr + read_columns)[None, :].to(tl.float32)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out_ptr + rows[:, None] * N + columns[None, :], y, mask=inside)
    else:
        beyond = power > LIMIT
        up = ((127 + power) << 23).to(tl.float32, bitcast=True)
        down = ((127 - power) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(beyond, row_scale * up, row_scale)
        for part in range(TILE_N // PART):
            columns = first_column + part * PART + tl.arange(0, PART)
            read_columns = tl.minimum(columns, N - 1)
            weights = weight_ptr + read_columns[None, :] * K + inner[:, None]
            outliers = tl.full((TILE_M, PART), 0, tl.int32)
            inliers = tl.full((TILE_M, PART), 0, tl.int32)
            for step in range(K // TILE_K):
                block = step * TILE_K
                levels = tl.load(weights + block)
                outliers = tl.dot(tl.load(far_ptr + planes + block), levels, outliers, out_dtype=tl.int32)
                inliers = tl.dot(tl.load(near_ptr + planes + block), levels, inliers, out_dtype=tl.int32)
            exact = tl.where(power[:, None] > 0, outliers << tl.where(beyond, 0, power)[:, None], 0) + inliers
            rounded = outliers.to(tl.float32) + inliers.to(tl.float32) * down[:, None]
            y = tl.where(beyond[:, None], rounded, exact.to(tl.float32)) * scale[:, None]
            y = y * tl.load(column_scale_ptr + read_columns)[None, :]
            if BIAS:
                y = tl.minimum(y, FLOAT32_MAX, tl.PropagateNan.ALL)
                y = y + tl.load(bias_ptr + read_columns)[None, :].to(tl.float32)
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(out_ptr + rows[:, None] * N + columns[None, :], y, mask=inside)
