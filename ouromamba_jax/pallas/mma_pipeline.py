"""Products of levels on Ampere and Ada: K-steps arrive by cp.async, mma.sync adds them to accumulators in registers."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from ouromamba_jax.pallas.nibbles import as_int4, sixteenfold
from ouromamba_jax.pallas.tiles import TILE_K

Packing = Literal["int8", "packed", "int4"]
"""One to a byte; 4-bit weights two to a byte, unpacked in registers; weights and activations two to a byte."""
HALF = TILE_K // 2
ACCUMULATOR = plgpu.Layout.MMA_ACC(jnp.int8)
"""Of either product: a 4-bit one has the same."""


def zeros(rows: int, columns: int) -> Int32[Array, "rows columns"]:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.int32), ACCUMULATOR)


def multiply_add(
    plane: Any,
    weight: Any,
    accumulator: Int32[Array, "rows columns"],
    *,
    packing: Packing,
    stages: int,
    emulated: bool,
    steps: Int32[Array, ""] | None = None,
) -> Int32[Array, "rows columns"]:
    """accumulator + plane @ weight^T; packed weights count sixteenfold.

    Args:
      plane: a reference to int8 (rows, bytes), whole steps of `TILE_K` bytes.
      weight: a reference to int8 (columns, bytes), half as many if "packed". Nibbles are those of `pack_halves`, "int4"
        of any block that both operands share.
      stages: steps in flight.
      emulated: whether this is interpreted, without mma.
      steps: how many of the steps count; None takes all.
    """
    columns, width = weight.shape[0], HALF if packing == "packed" else TILE_K
    tiling = plgpu.TilingTransform((8, width))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]

    def step(indices, left, right, acc):
        if steps is None:
            return product(left, right, acc)
        return lax.cond(indices[0] < steps, lambda: product(left, right, acc), lambda: acc)

    def product(left, right, acc):
        layout = None if emulated else plgpu.Layout.MMA_RHS(jnp.int8)
        rhs = right[...].T if emulated else plgpu.load(right.transpose((1, 0)), layout=layout, optimized=False)
        if packing != "packed":
            return accumulate(acc, left, rhs)
        for half in range(2):
            unpacked, part = sixteenfold(rhs, high=half == 1, layout=layout), pl.ds(half * HALF, HALF)
            acc = accumulate(acc, left.at[:, part], unpacked)
        return acc

    def accumulate(acc, left, rhs):
        if emulated:
            pairs = [(left[...], rhs)]
            if packing == "int4":
                pairs = [[sixteenfold(x, high=high, layout=None) >> 4 for x in pairs[0]] for high in (False, True)]
            return acc + sum(jnp.matmul(a, b, preferred_element_type=jnp.int32) for a, b in pairs)
        lhs = plgpu.load(left, layout=plgpu.Layout.MMA_LHS(jnp.int8), optimized=False)
        if packing == "int4":
            lhs, rhs = as_int4(lhs, axis=1), as_int4(rhs, axis=0)
        return plgpu.mma(acc, lhs, rhs)

    def column(step):
        """Skipped steps reload the last counted block, which is cached."""
        return step if steps is None else jnp.clip(steps - 1, 0, step)

    def spec(height, width):
        return plgpu.BlockSpec(
            (height, width),
            lambda step: (0, column(step)),
            transforms=(tiling, swizzle),
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )

    pipeline = plgpu.emit_pipeline(
        step,
        grid=(plane.shape[1] // TILE_K,),
        in_specs=[spec(plane.shape[0], TILE_K), spec(columns, width)],
        max_concurrent_steps=stages,
        init_carry=accumulator,
    )
    return pipeline(plane, weight)
