"""The outlier matmul on NVIDIA GPUs: when it applies, its operands, and the kernel of each architecture.

One launch and one int32 accumulator: of levels of two bytes the high ones are multiplied first, then the accumulator is
shifted left by 8, then come the low ones.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from ouromamba_jax.ops.qtensor import QTensor, max_level
from ouromamba_jax.pallas.device import default_device, device_reason, device_target
from ouromamba_jax.pallas.kernel_weight import INT32_MAX, KernelWeight, arrange, is_wide, measured
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, Target, matmul_tiles

if TYPE_CHECKING:
    from ouromamba_jax.ops.split import Split

NOTHING = "there is nothing to multiply"


def supports(split: "Split", weight: QTensor | KernelWeight, bias: Any, dtype: Any) -> str | None:
    """Why this call cannot run here, from shapes, dtypes and the device; None if it can."""
    return NOTHING if 0 in split.shape else unsuitable(weight, dtype) or device_reason()


def unsuitable(weight: QTensor | KernelWeight, dtype: Any) -> str | None:
    """Why no kernel can multiply this weight or write this type, whatever the device; None if one can."""
    if weight.scale.shape[0] != 1:
        return "the accumulator holds all inputs: quantise the weight without groups"
    largest = max_level(weight.bits) * (16 if weight.bits <= 4 else 1)  # packed levels count sixteenfold
    if weight.shape[0] * 127 * largest > INT32_MAX:
        return f"{weight.shape[0]} inputs of {weight.bits}-bit weights could overflow int32"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it writes float32 or bfloat16, not {dtype}"
    return None


def prepare(split: "Split", weight: QTensor | KernelWeight) -> KernelWeight:
    """`weight` as the default device's kernel reads it for such a split, which `run` else makes of it in every call.

    Its levels are looked at, too: if int32 holds their products with two bytes, those take one accumulator.
    """
    return measured(arrange(weight, tiles_for(device_target(), split, weight)))


def tiles_for(target: Target, split: "Split", weight: QTensor | KernelWeight) -> MatmulTiles:
    """`matmul_tiles`: one accumulator for two bytes has no room for packed levels, which count sixteenfold.

    Nor are they worth padding the activation for. On sm80 a wide tile of two planes would spill.
    """
    inputs, outputs = weight.shape
    if split.high is None:
        return matmul_tiles(target, outputs, weight.bits if inputs % (TILE_K // 2) == 0 else 8)
    tiles = matmul_tiles(target, outputs, 8)
    return replace(tiles, tile_n=64) if target == "sm80" else tiles


def first_rows(M: int, tile_m: int) -> np.ndarray:
    """Of each tile: the last one of a ragged M starts at M - tile_m."""
    return np.minimum(np.arange(-(-M // tile_m)) * tile_m, M - tile_m).astype(np.int32)


def pad_to(x: Array, multiples: tuple[int, ...]) -> Array:
    """With zeros up to multiples of these sizes, one for each of its first axes."""
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


def periodic(scale: Float32[Array, " L"], rows: int) -> Float32[Array, " more"]:
    """Steps of as many tokens and `rows` more: whatever token a tile begins with, its rows' steps lie side by side."""
    return jnp.resize(scale, (scale.shape[0] + rows,))


def run(
    split: "Split",
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
    residual: Float32[Array, "B L O"] | None = None,
    **options: Any,
) -> Float[Array, "B L O"]:
    """S * s_w * (low @ W + 256 * high @ W) + bias, exact integers in int32; of `dtype`, float32 or bfloat16.

    Args:
      residual: to which that is added, in float32.
      options: of `launch`.
    """
    return by_accumulator(partial(launch, **options), split, weight, bias, dtype, residual)


def by_accumulator(
    launch: Callable[..., Array],
    split: "Split",
    weight: QTensor | KernelWeight,
    bias: Any,
    dtype: Any,
    residual: Float32[Array, "B L O"] | None = None,
) -> Float[Array, "B L O"]:
    """`launch` once where int32 holds the sum, else once for every byte, the low ones' product added to the others'."""
    if split.high is None or is_wide(weight):
        return launch(split, weight, bias, dtype, residual=residual)
    high = launch(replace(split, low=split.high, high=None, scale=256.0 * split.scale), weight)
    y = launch(replace(split, high=None), weight, bias, residual=high).astype(dtype)
    return y if residual is None else residual + y.astype(jnp.float32)


def launch(
    split: "Split",
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
    *,
    residual: Float32[Array, "B L O"] | None = None,
    target: Target | None = None,
    tiles: MatmulTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B L O"]:
    """`run` where int32 holds the sum.

    Args:
      target, tiles: the default device's kernel and its tiles, unless given.
      interpret: `plgpu.InterpretGPUParams` to run on CPU.
    """
    (B, L, K), O = split.shape, weight.shape[1]  # K may exceed the weight's, which zeros follow
    target = target or device_target()
    tiles = tiles or tiles_for(target, split, weight)
    # At least one tile of rows and of columns, then such parts as Mosaic's copies begin at.
    height, width = tiles.tile_m if tiles.tile_m > B * L else 8, tiles.tile_n if tiles.tile_n > O else 16
    depth = TILE_K
    if target == "sm90" and interpret is None:  # copies fill with zeros what they read beyond K
        depth = TILE_K // 2 if tiles.packed else 16 if K < TILE_K else 32
    planes = [pad_to(x.reshape(B * L, K), (height, depth)) for x in (split.high, split.low) if x is not None]
    columns = [pad_to(x, (width,)) for x in (weight.scale[0], bias) if x is not None]
    if target == "sm90" and interpret is None and residual is None:  # what would be written beyond N is not
        width = 16
    added = [] if residual is None else [pad_to(residual.reshape(B * L, O), (height, width))]
    y = _kernel(target, interpret, outputs=O + -O % width)(
        planes, periodic(split.scale, tiles.tile_m), arrange(weight, tiles).rows, columns, added, tiles=tiles,
        dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return y[: B * L, :O].reshape(B, L, O)


def _kernel(target: Target, interpret: Any, outputs: int):
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    if target == "sm90":
        from ouromamba_jax.pallas import outlier_matmul_sm90

        programs = 2 if interpret is not None else default_device().core_count
        return partial(outlier_matmul_sm90.matmul, programs=programs, outputs=outputs)
    from ouromamba_jax.pallas import outlier_matmul_sm80

    return outlier_matmul_sm80.matmul
