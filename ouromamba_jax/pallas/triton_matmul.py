"""The outlier matmul through jax-triton: when it applies, its operands, and the launch.

An optional backend (`pip install 'ouromamba_jax[triton]'`) beside the Mosaic kernels of `pallas/`, whose plan
it shares.
"""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split_types import OutlierSplit, Planes
from ouromamba_jax.pallas import accumulators
from ouromamba_jax.pallas import outlier_matmul as mosaic
from ouromamba_jax.pallas.device import default_device, device_target
from ouromamba_jax.pallas.packed_split import PackedSplit
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, matmul_tiles

VERSION = "0.3.1"
"""Of jax-triton. 0.4.1 fails on jax 0.12.0.1: its rule for dead code takes two arguments and is given three."""


def supports(split: OutlierSplit | Planes | PackedSplit, weight: QTensor, bias: Any, dtype: Any) -> str | None:
    """Why this call cannot run here, from shapes, dtypes, the device and what is installed; None if it can."""
    if reason := mosaic.supports(split, weight, bias, dtype):
        return reason
    assert isinstance(split, Planes)  # or there was a reason
    return _too_large(split, weight) or _missing()


def _too_large(planes: Planes, weight: QTensor) -> str | None:
    B, L, K = planes.shape
    rows = B * L * (2 if planes.fixed_point else 1)  # which may take two planes of rows
    largest = max(rows, weight.shape[1]) * (K + -K % TILE_K), rows * weight.shape[1]
    if max(largest) <= mosaic.INT32_MAX:
        return None
    return f"its indices are int32, too small for {rows} rows of {K} inputs and {weight.shape[1]} outputs"


def _missing() -> str | None:
    try:
        installed = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed == VERSION:
        return None
    return f"it needs jax-triton {VERSION} and found {installed} (pip install 'ouromamba_jax[triton]')"


def run(
    planes: Planes,
    weight: QTensor,
    bias: Float[Array, " O"] | None = None,
    *,
    dtype: Any = jnp.float32,
    limit: int | None = None,
) -> Float[Array, "B L O"]:
    """As the Mosaic `run`: row_scale * s_w * (2^shift * far @ W + near @ W) + bias, exact integers in int32."""
    import jax_triton  # here, because it is optional, and sets environment variables

    from ouromamba_jax.pallas.triton_matmul_kernel import matmul

    (B, L, K), O = planes.shape, weight.shape[1]
    tiles = launch_tiles(O)
    limit = mosaic.largest_shift(K, 8) if limit is None else limit
    capability = default_device().compute_capability.replace(".", "")
    y = jax_triton.triton_call(
        *operands(planes, weight, bias, tiles),
        kernel=matmul,
        out_shape=jax.ShapeDtypeStruct((B * L, O), dtype),
        grid=(-(-B * L // tiles.tile_m), -(-O // tiles.tile_n)),
        compute_capability=int(capability),  # jax-triton would ask the driver, which a compiling machine may lack
        num_stages=tiles.stages,
        num_warps=warps(tiles),
        **constants(B * L, O, K, tiles, limit, bias is not None),
    )
    return y.reshape(B, L, O)


def launch_tiles(outputs: int) -> MatmulTiles:
    """The default device's tiles for levels of a byte each, whatever their bits."""
    return matmul_tiles(device_target(), outputs, 8)


def warps(tiles: MatmulTiles) -> int:
    """Eight for large tiles: at 128 x 128, four on an A100 spill 16 bytes."""
    return 8 if tiles.tile_m * tiles.tile_n >= 128 * 128 else 4


def operands(planes: Planes, weight: QTensor, bias: Float[Array, " O"] | None, tiles: MatmulTiles) -> tuple[Array, ...]:
    """The kernel's inputs: planes of whole K-blocks, shifts of tiles, rows, the weight with K last, columns."""
    B, L, K = planes.shape
    M, whole_steps = B * L, K + -K % TILE_K
    near, far = (jnp.pad(x.reshape(M, -1), [(0, 0), (0, whole_steps - x.shape[2])]) for x in (planes.near, planes.far))
    values = jnp.pad(weight.values.T, [(0, 0), (0, -K % TILE_K)])
    shift, row_scale = planes.shift.reshape(M), planes.row_scale.reshape(M)
    # A last tile that is not full begins where it does in the kernel: at a multiple of the tile.
    largest = mosaic.largest_shifts(jnp.pad(shift, (0, -M % tiles.tile_m)), tiles.tile_m)
    columns = weight.scale[0]
    return near, far, largest, shift, row_scale, values, columns, columns if bias is None else bias


def constants(
    rows: int, outputs: int, inputs: int, tiles: MatmulTiles, limit: int, bias: bool = False
) -> dict[str, int]:
    """What the kernel is compiled for."""
    shape = {"M": rows, "N": outputs, "K": inputs + -inputs % TILE_K, "LIMIT": limit}
    return shape | {
        "TILE_M": tiles.tile_m,
        "TILE_N": tiles.tile_n,
        "TILE_K": TILE_K,
        "PART": accumulators.COLUMNS,
        "BIAS": bias,
    }
