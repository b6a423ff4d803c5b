"""`outlier_matmul`: the product of a split activation with a quantised weight, in integers, and its backends.

    Y[t, o] = S[t] * s_w[o] * (sum_c low[t, c] W[c, o] + 256 * sum_c high[t, c] W[c, o]) + b[o]

int8 operands, int32 accumulation: the integers are exact, so every backend returns the same ones, and only the float
epilogue rounds. One product where levels fit one byte.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.ops.cpu_barrier import cpu_barrier
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.meshes import by_samples, vary_alike
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split import Split
from ouromamba_jax.ops.straight_through import straight_through
from ouromamba_jax.pallas import int4_matmul, triton_matmul
from ouromamba_jax.pallas import outlier_matmul as kernel
from ouromamba_jax.pallas.kernel_weight import KernelWeight

Weight = QTensor | KernelWeight
Bias = Float[Array, " O"] | None


def _dot(levels: Int8[Array, "*rows K"], weight: Int8[Array, "K O"]) -> Int32[Array, "*rows O"]:
    contraction = (((levels.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(levels, weight, contraction, preferred_element_type=jnp.int32)


def _product(levels: Int8[Array, "B L K"], weight: Weight) -> Float32[Array, "B L O"]:
    """levels @ weight in units of the activation's step; sums of groups of inputs one after the other."""
    if weight.scale.shape[0] == 1:
        return _dot(levels, weight.values).astype(jnp.float32) * weight.scale[0][None, None]
    groups, O = weight.scale.shape
    levels = jnp.moveaxis(levels.reshape(*levels.shape[:-1], groups, -1), -2, 0)

    def add(total, group):
        levels, values, scale = group
        return total + _dot(levels, values).astype(jnp.float32) * scale[None, None], None

    start = jnp.zeros((*levels.shape[1:-1], O), jnp.float32)
    start, *each = vary_alike(start, levels, weight.values.reshape(groups, -1, O), weight.scale)
    return lax.scan(add, start, tuple(each))[0]


def _xla(split: Split, weight: Weight, bias: Bias = None, dtype: Any = jnp.float32) -> Float[Array, "B L O"]:
    # Levels are written before they are multiplied: a split that XLA fuses into the product leaves the fast path.
    y = _product(cpu_barrier(split.low), weight)
    if split.high is not None:
        y = y + 256.0 * _product(cpu_barrier(split.high), weight)
    y = y * split.scale[None, :, None]
    return (y if bias is None else y + bias.astype(jnp.float32)[None, None]).astype(dtype)


# In order of preference. "xla" is the reference and supports everything, so that only its name chooses what follows it.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, kernel.run),
    "mosaic_gpu_int4": Backend(int4_matmul.supports, int4_matmul.run),
    "xla": Backend(lambda split, weight, bias, dtype: None, _xla),
    "triton": Backend(triton_matmul.supports, triton_matmul.run),
}


def prepare(split: Split, weight: Weight, dtype: Any = jnp.float32) -> Weight:
    """`weight` in the layout of the backend that `outlier_matmul` takes by itself, which else is made in every call.

    Args:
      split: like those that the weight will meet; only shapes and types count (`jax.eval_shape`).
    """
    backend = choose("matmul", BACKENDS, None, split, weight, None, jnp.dtype(dtype))
    return kernel.prepare(split, weight) if backend is BACKENDS["mosaic_gpu"] else weight


@partial(jax.jit, static_argnames=("dtype", "implementation"))
def outlier_matmul(
    split: Split,
    weight: Weight,
    *,
    bias: Bias = None,
    dtype: Any = jnp.float32,
    residual: Float32[Array, "B L O"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L O"]:
    """Multiply a split activation (B, L, C) by a quantised weight (C, O), and add a bias.

    Gradients reach every float, the levels held fixed: the steps of both, the bias and the residual.

    Args:
      split: from `split_outliers`.
      weight: levels (C, O), with or without groups along C; as a QTensor, or as `prepare` lays it out.
      bias: floats (O,), added in float32.
      dtype: a float type, to which the float32 result is rounded once; the GPU kernels write float32 or bfloat16 only.
      residual: what the result, rounded, is added to in float32.
      implementation: a backend's name; None takes the first that supports the call.

    Raises:
      ValueError: inputs that do not agree in C or O, an unknown implementation, or a named one that refuses the call.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> x = jnp.asarray([[[0.5, -1.5], [25.0, 0.5], [1.0, 1.0]]])
      >>> split = om.split_outliers(x, jnp.full(3, 0.5), om.OutlierConfig())
      >>> weight = om.quantize_array(jnp.eye(2) * 14, bits=4)
      >>> om.outlier_matmul(split, weight)[0].round().tolist()
      [[7.0, -21.0], [350.0, 7.0], [14.0, 14.0]]
    """
    inputs, channels = weight.shape[0], split.shape[-1]
    if channels < inputs or (channels > inputs and split.first is not None):  # see `producers.split_after`
        raise ValueError(
            f"the activation has {channels} channels but the weight {inputs} inputs: "
            "pass a (C, O) weight (transpose a PyTorch one)"
        )
    dtype = jnp.dtype(dtype)
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"the bias must be ({weight.shape[1]},), one number per output, not {bias.shape}")
    backend = choose("matmul", BACKENDS, implementation, split, weight, bias, dtype)
    run, reference = (partial(_run, chosen, dtype) for chosen in (backend, BACKENDS["xla"]))
    differentiable = run if backend is BACKENDS["xla"] else straight_through(run, reference)
    return by_samples(differentiable, split, weight, bias, residual)


def _run(backend: Backend, dtype: Any, split: Split, weight: Weight, bias: Bias, residual: Array | None) -> Array:
    if backend is BACKENDS["mosaic_gpu"]:
        return backend.run(split, weight, bias, dtype, residual)
    if split.shape[-1] > (inputs := weight.shape[0]):
        high = None if split.high is None else split.high[..., :inputs]
        split = replace(split, low=split.low[..., :inputs], high=high)
    y = backend.run(split, weight, bias, dtype)
    return y if residual is None else residual + y.astype(jnp.float32)
