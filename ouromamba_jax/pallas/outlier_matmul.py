"""The outlier matmul on NVIDIA GPUs: when it applies, its operands, and the kernel of each architecture.

XLA runs inliers and outliers as two products with a float matrix between them. Here they are one launch: with
s_out = s_in * 2^j the outliers' product is shifted left by j in the accumulator that the inliers' product then adds to.
16-bit outliers come as fixed-point numbers of two bytes, whose high bytes are shifted by 8.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from ouromamba_jax.ops.fixed_order import guard_product
from ouromamba_jax.ops.qtensor import QTensor, max_level
from ouromamba_jax.ops.split_types import OutlierSplit, Planes
from ouromamba_jax.pallas.device import default_device, device_reason, device_target
from ouromamba_jax.pallas.kernel_weight import INT32_MAX, KernelWeight, arrange, is_wide, measured
from ouromamba_jax.pallas.packed_split import PackedSplit
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, Target, matmul_tiles

NOTHING = "there is nothing to multiply"


def largest_shift(inputs: int, weight_bits: int) -> int:
    """Largest j at which `inputs` int8 outliers shifted by j and as many inliers cannot overflow int32; -1 if none."""
    product = inputs * 127 * max_level(weight_bits) * (16 if weight_bits <= 4 else 1)  # packed levels count sixteenfold
    return (INT32_MAX // product - 1).bit_length() - 1 if 2 * product <= INT32_MAX else -1


def supports(
    split: OutlierSplit | Planes | PackedSplit, weight: QTensor | KernelWeight, bias: Any, dtype: Any
) -> str | None:
    """Why this call cannot run here, from shapes, dtypes and the device; None if it can."""
    if isinstance(split, OutlierSplit):
        return 'outlier_scale="free" needs two accumulators: split with outlier_scale="pow2"'
    if isinstance(split, PackedSplit):
        return "it takes dense levels: leave out packed=True when you split"
    if 0 in split.shape:
        return NOTHING
    return unsuitable(weight, dtype) or device_reason()


def unsuitable(weight: QTensor | KernelWeight, dtype: Any) -> str | None:
    """Why no kernel can multiply this weight or write this type, whatever the device; None if one can."""
    if weight.scale.shape[0] != 1:
        return "the accumulator holds all inputs: quantise the weight without groups"
    if largest_shift(weight.shape[0], weight.bits) < 0:
        return f"{weight.shape[0]} inputs of {weight.bits}-bit weights could overflow int32"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it writes float32 or bfloat16, not {dtype}"
    return None


def prepare(planes: Planes, weight: QTensor | KernelWeight) -> KernelWeight:
    """`weight` as the default device's kernel reads it for such planes, which `run` else makes of it in every call.

    Its levels are looked at, too: if int32 holds their products with 16-bit numbers, those take one accumulator.
    """
    # One accumulator for 16-bit numbers has no room for packed levels, which count sixteenfold.
    bits = 8 if planes.fixed_point else weight.bits
    return measured(arrange(weight, matmul_tiles(device_target(), weight.shape[1], bits)))


def largest_shifts(shift: Int32[Array, " M"], tile_m: int) -> Int32[Array, " tiles"]:
    """Of each tile of rows; where it is 0, `far` is not read."""
    return jnp.max(shift[first_rows(len(shift), tile_m)[:, None] + np.arange(tile_m)], axis=1)


def first_rows(M: int, tile_m: int) -> np.ndarray:
    """Of each tile: the last one of a ragged M starts at M - tile_m."""
    return np.minimum(np.arange(-(-M // tile_m)) * tile_m, M - tile_m).astype(np.int32)


def pad_to(x: Array, multiples: tuple[int, ...]) -> Array:
    """With zeros up to multiples of these sizes, one for each of its first axes."""
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


def with_bias(y: Float32[Array, "B L O"], bias: Float[Array, " O"] | None) -> Float32[Array, "B L O"]:
    """y + bias, which no compiler contracts with the products before it: the kernels do the same."""
    return y if bias is None else guard_product(y) + bias.astype(jnp.float32)[None, None]


def run(
    planes: Planes,
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    *,
    dtype: Any = jnp.float32,
    limit: int | None = None,
    target: Target | None = None,
    tiles: MatmulTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B L O"]:
    """row_scale * s_w * (2^shift * far @ W + near @ W) + bias, exact integers in int32.

    Args:
      dtype: of the result, float32 or bfloat16.
      limit: up to which shift int32 holds the sum of levels of a byte each; None takes `largest_shift`, and 4-bit
        levels may be packed.
      target, tiles: the default device's kernel and its tiles, unless given.
      interpret: `plgpu.InterpretGPUParams` to run on CPU.
    """
    (B, L, K), O = planes.shape, weight.shape[1]
    target = target or device_target()
    tiles = tiles or matmul_tiles(target, O, weight.bits if limit is None else 8)
    # At least one tile of rows, then whole eights of them: Mosaic copies no tile that starts between two.
    height = (tiles.tile_m if tiles.tile_m > B * L else 8,)
    whole = K + -K % TILE_K  # planes may be wider than the weight
    near, far = (pad_to(x[..., :whole].reshape(B * L, -1), (*height, TILE_K)) for x in (planes.near, planes.far))
    rows = [pad_to(x.reshape(B * L), height) for x in (planes.shift, planes.row_scale)]
    limit = largest_shift(K, weight.bits) if limit is None else limit
    largest = largest_shifts(rows[0], tiles.tile_m)
    columns = [pad_to(x, (tiles.tile_n,)) for x in (weight.scale[0], bias) if x is not None]
    launch = partial(_kernel(target, interpret), tiles=tiles, limit=limit, dtype=dtype, interpret=interpret)
    y = launch(near, far, largest, *rows, arrange(weight, tiles).rows, *columns)
    return y[: B * L, :O].reshape(B, L, O)


def fixed_point(
    launch: Callable[..., Array],
    planes: Planes,
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "B L O"]:
    """row_scale * (256 * high @ W + low @ W) * s_w + bias, to the bit as two products in float32 give it.

    Where int32 holds the sum there is one accumulator: then both products are below 2^24, and their sum in float32 is
    rounded once, as the accumulator is. Otherwise the bytes are the rows of one product of twice the height. Then the
    result is rounded to `dtype`.

    Args:
      launch: `run` of a backend, with what it needs beside planes, weight, bias and dtype.
    """
    if is_wide(weight):
        return launch(planes, weight, bias, dtype=dtype, limit=8)
    both, step = jnp.concatenate([planes.far, planes.near]), planes.row_scale[:, :, None]
    none, ones = jnp.zeros(both.shape[:2], jnp.int32), jnp.ones(both.shape[:2], jnp.float32)
    rows = Planes(both, both, none, ones, planes.channels)
    products = launch(rows, replace(weight, scale=jnp.ones_like(weight.scale)))
    high_product, low_product = products.reshape(2, *step.shape[:2], -1)
    y = step * (high_product * 256.0 + low_product) * weight.scale[0][None, None]
    return with_bias(y, bias).astype(dtype)


def _kernel(target: Target, interpret: Any):
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    if target == "sm90":
        from ouromamba_jax.pallas import outlier_matmul_sm90

        programs = 2 if interpret is not None else default_device().core_count
        return partial(outlier_matmul_sm90.matmul, programs=programs)
    from ouromamba_jax.pallas import outlier_matmul_sm80

    return outlier_matmul_sm80.matmul
