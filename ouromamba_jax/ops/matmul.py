"""`outlier_matmul`: the product of a split activation with a quantised weight, in integers, and its backends.

    Y[t, o] = s_w[o] * (S[t] * sum_c I[t, c] W[c, o] + s_O[t] * sum_c O[t, c] W[c, o]) + b[o]

int8 operands, int32 accumulation. The integers are exact, so every backend returns the same ones; only the float
epilogue rounds, in the same order everywhere. A sample's result never depends on its batch mates.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.fixed_order import guard_product
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split import for_product
from ouromamba_jax.ops.split_types import OutlierConfig, OutlierSplit, Planes
from ouromamba_jax.pallas import int4_matmul, packed_split, triton_matmul
from ouromamba_jax.pallas import outlier_matmul as kernel
from ouromamba_jax.pallas.device import int4_reason
from ouromamba_jax.pallas.kernel_weight import KernelWeight
from ouromamba_jax.pallas.packed_split import PackedSplit

Activation = OutlierSplit | Planes | PackedSplit
Weight = QTensor | KernelWeight
Bias = Float[Array, " O"] | None


def _dot(levels: Int8[Array, "*rows K"], weight: Int8[Array, "K O"]) -> Int32[Array, "*rows O"]:
    contraction = (((levels.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(levels, weight, contraction, preferred_element_type=jnp.int32)


def _sum_groups(product: Callable[[Array, Array, Array], Array], levels: Array, weight: Weight) -> Array:
    """Sum over weight groups of product(levels (..., size), weight values (size, O), weight scale (O,))."""
    if weight.scale.shape[0] == 1:
        return product(levels, weight.values, weight.scale[0])
    groups, O = weight.scale.shape
    levels = jnp.moveaxis(levels.reshape(*levels.shape[:-1], groups, -1), -2, 0)
    values = weight.values.reshape(groups, -1, O)
    first = (levels[0], values[0], weight.scale[0])
    rest = (levels[1:], values[1:], weight.scale[1:])

    def guarded(group):  # or product and sum would be contracted in some shapes and not in others
        return guard_product(product(*group))

    return lax.scan(lambda total, group: (total + guarded(group), None), guarded(first), rest)[0]


def _one_product(planes: Planes, weight: Weight) -> Float32[Array, "B L O"]:
    """No token is shifted, all levels are near ones: one int8 product, a row scale and a column scale."""
    rows = planes.row_scale[:, :, None]

    def product(levels, values, scale):
        return rows * _dot(levels, values).astype(jnp.float32) * scale[None, None]

    return _sum_groups(product, planes.near, weight)


def _two_products(
    near: Int8[Array, "B L K"],
    far: Int8[Array, "B L K"],
    step: Float32[Array, "B L"],
    ratio: Float32[Array, "B L"],
    weight: Weight,
) -> Float32[Array, "B L O"]:
    """Two planes on steps of their own, added in units of far's: step * (near @ W * ratio + far @ W) * s_w."""
    step, ratio = step[:, :, None], ratio[:, :, None]

    def product(both, values, scale):
        products = _dot(both, values).astype(jnp.float32)
        return step * (products[0] * ratio + products[1]) * scale[None, None]

    return _sum_groups(product, jnp.stack([near, far]), weight)


def _shifted_products(planes: Planes, weight: Weight) -> Float32[Array, "B L O"]:
    """The ratio is 2^-j, so the only rounding is that of the sum: a fused multiply-add changes no bit.

    Tokens at j = 0 get the bits of `_one_product`.
    """
    ratio = jnp.ldexp(jnp.ones_like(planes.row_scale), -planes.shift)
    return _two_products(planes.near, planes.read_far, planes.step, ratio, weight)


def _fixed_point_product(planes: Planes, weight: Weight) -> Float32[Array, "B L O"]:
    """16-bit numbers by their bytes, in two int8 products: added in units of the low ones."""
    return _two_products(planes.far, planes.near, planes.row_scale, jnp.full_like(planes.row_scale, 256.0), weight)


def _xla(split: Activation, weight: Weight, bias: Bias = None, dtype: Any = jnp.float32) -> Float[Array, "B L O"]:
    return kernel.with_bias(_xla_product(split, weight), bias).astype(dtype)


def _xla_product(split: Activation, weight: Weight) -> Float32[Array, "B L O"]:
    if isinstance(split, OutlierSplit):  # with scales of its own
        return _two_products(split.near, split.far, split.outlier_scale, split.step_ratio, weight)
    split = split.planes() if isinstance(split, PackedSplit) else split
    planes = replace(split, near=split.near[..., : split.channels], far=split.far[..., : split.channels])
    if planes.fixed_point:
        return _fixed_point_product(planes, weight)
    return lax.cond(jnp.any(planes.shift > 0), _shifted_products, _one_product, planes, weight)


def _one_launch(
    launch: Callable[..., Array], planes: Planes, weight: Weight, bias: Bias = None, dtype: Any = jnp.float32
) -> Float[Array, "B L O"]:
    """One kernel, which is `launch`."""
    if planes.fixed_point:
        return kernel.fixed_point(launch, planes, weight, bias, dtype)
    return launch(planes, weight, bias, dtype=dtype)


def _mosaic_gpu(
    planes: Planes, weight: Weight, bias: Bias = None, dtype: Any = jnp.float32, **options
) -> Float[Array, "B L O"]:
    return _one_launch(partial(kernel.run, **options), planes, weight, bias, dtype)


def _triton(planes: Planes, weight: Weight, bias: Bias = None, dtype: Any = jnp.float32) -> Float[Array, "B L O"]:
    return _one_launch(triton_matmul.run, planes, weight, bias, dtype)


# In order of preference. "xla" is the reference and supports everything, so that only its name chooses what follows it.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, _mosaic_gpu),
    "mosaic_gpu_int4": Backend(int4_matmul.supports, int4_matmul.run),
    "xla": Backend(lambda split, weight, bias, dtype: None, _xla),
    "triton": Backend(triton_matmul.supports, _triton),
}


def takes_packed(config: OutlierConfig, weight: Weight, dtype: Any) -> bool:
    """Whether a layer should split with packed=True: "mosaic_gpu_int4" is first (`bench.preferring`) and can run."""
    first = next(iter(BACKENDS))
    reason = packed_split.unsuitable(config) or int4_matmul.unsuitable(weight, jnp.dtype(dtype)) or int4_reason()
    return first == "mosaic_gpu_int4" and reason is None


def prepare(split: Activation, weight: Weight, dtype: Any = jnp.float32) -> Weight:
    """`weight` laid out once for the backend that `outlier_matmul` takes by itself, which else would do so every time.

    A `KernelWeight` for the GPU kernels, packed if it has 4 bits; for other backends a `QTensor`.

    Args:
      split: an activation like those that the weight will meet; only shapes and types count (`jax.eval_shape`).
    """
    split = jax.eval_shape(for_product, split)
    backend = choose("matmul", BACKENDS, None, split, weight, None, jnp.dtype(dtype))
    if backend is BACKENDS["mosaic_gpu"] and isinstance(split, Planes):
        return kernel.prepare(split, weight)
    return QTensor(weight.values, weight.scale, weight.bits) if isinstance(weight, KernelWeight) else weight


@partial(jax.jit, static_argnames=("dtype", "implementation"))
def outlier_matmul(
    split: Activation,
    weight: Weight,
    *,
    bias: Bias = None,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "B L O"]:
    """Multiply a split activation (B, L, C) by a quantised weight (C, O), and add a bias.

    Args:
      split: from `split_outliers`, or from `split_for_product`, which leaves out what a product does not need.
      weight: levels (C, O), with or without groups along C; as a QTensor, or as `prepare` lays it out.
      bias: floats (O,), added in float32.
      dtype: a float type, to which the float32 result is rounded once; the GPU kernels write float32 or bfloat16 only.
      implementation: a backend's name; None takes the first that supports the call.

    Raises:
      ValueError: inputs that do not agree in C or O, an unknown implementation, or a named one that refuses the call.
    """
    if split.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"the activation has {split.shape[-1]} channels but the weight {weight.shape[0]} inputs: "
            "pass a (C, O) weight (transpose a PyTorch one)"
        )
    dtype = jnp.dtype(dtype)
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"the bias must be ({weight.shape[1]},), one number per output, not {bias.shape}")
    call = for_product(split), weight, bias, dtype
    return choose("matmul", BACKENDS, implementation, *call).run(*call)
