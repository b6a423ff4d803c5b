"""The outlier matmul through jax-triton: when it applies, its operands, and the launch.

An optional backend (`pip install 'ouromamba_jax[triton]'`) beside the Mosaic kernels of `pallas/`, whose plan
it shares.
"""

import importlib.metadata
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.pallas import outlier_matmul as mosaic
from ouromamba_jax.pallas.device import default_device, device_target
from ouromamba_jax.pallas.kernel_weight import KernelWeight
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, matmul_tiles

if TYPE_CHECKING:
    from ouromamba_jax.ops.split import Split

VERSION = "0.3.1"
"""Of jax-triton. 0.4.1 fails on jax 0.12.0.1: its rule for dead code takes two arguments and is given three."""


def supports(split: "Split", weight: QTensor | KernelWeight, bias: Any, dtype: Any) -> str | None:
    """Why this call cannot run here, from shapes, dtypes, the device and what is installed; None if it can."""
    return mosaic.supports(split, weight, bias, dtype) or _too_large(split, weight) or _missing()


def _too_large(split: "Split", weight: QTensor | KernelWeight) -> str | None:
    B, L, K = split.shape
    largest = max(B * L, weight.shape[1]) * (K + -K % TILE_K), B * L * weight.shape[1]
    if max(largest) <= mosaic.INT32_MAX:
        return None
    return f"its indices are int32, too small for {B * L} rows of {K} inputs and {weight.shape[1]} outputs"


def _missing() -> str | None:
    try:
        installed = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed == VERSION:
        return None
    return f"it needs jax-triton {VERSION} and found {installed} (pip install 'ouromamba_jax[triton]')"


def run(
    split: "Split",
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "B L O"]:
    """As the Mosaic `run`."""
    return mosaic.by_accumulator(_launch, split, weight, bias, dtype)


def _launch(
    split: "Split", weight: QTensor | KernelWeight, bias: Any = None, dtype: Any = jnp.float32, residual: Any = None
) -> Array:
    import jax_triton  # here, because it is optional, and sets environment variables

    from ouromamba_jax.pallas.triton_matmul_kernel import matmul

    (B, L, _), O = split.shape, weight.shape[1]
    tiles = matmul_tiles(device_target(), O, 8)  # levels of a byte each, whatever their bits
    capability = default_device().compute_capability.replace(".", "")
    y = jax_triton.triton_call(
        *operands(split, weight, bias),
        kernel=matmul,
        out_shape=jax.ShapeDtypeStruct((B * L, O), dtype),
        grid=(-(-B * L // tiles.tile_m), -(-O // tiles.tile_n)),
        compute_capability=int(capability),  # jax-triton would ask the driver, which a compiling machine may lack
        num_stages=tiles.stages,
        num_warps=warps(tiles),
        **constants(split, O, tiles, bias is not None),
    )
    y = y.reshape(B, L, O)
    return y if residual is None else residual + y


def warps(tiles: MatmulTiles) -> int:
    """Eight for large tiles: at 128 x 128, four on an A100 spill 16 bytes."""
    return 8 if tiles.tile_m * tiles.tile_n >= 128 * 128 else 4


def operands(split: "Split", weight: QTensor | KernelWeight, bias: Float[Array, " O"] | None) -> tuple[Array, ...]:
    """The kernel's inputs: planes of whole K-blocks, rows, the weight with K last, columns."""
    K = split.shape[2]

    def blocks(x):
        return jnp.pad(x.reshape(-1, K), [(0, 0), (0, -K % TILE_K)])

    low = blocks(split.low)
    high = low if split.high is None else blocks(split.high)
    columns = weight.scale[0]
    return low, high, split.scale, blocks(weight.values.T), columns, columns if bias is None else bias


def constants(split: "Split", outputs: int, tiles: MatmulTiles, bias: bool = False) -> dict[str, int]:
    """What the kernel is compiled for."""
    B, L, K = split.shape
    shape = {"M": B * L, "N": outputs, "K": K + -K % TILE_K, "TOKENS": L, "TWO_BYTES": split.high is not None}
    return shape | {"TILE_M": tiles.tile_m, "TILE_N": tiles.tile_n, "TILE_K": TILE_K, "BIAS": bias}
