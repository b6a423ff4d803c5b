"""Quantised weights: `QTensor`, the 2.4-norm scale search that makes one, and packing for storage.

Everything here is symmetric: a level is an integer in [-q, q] with q = 2^(bits-1) - 1, so zero is exact and the
lowest two's-complement code stays unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, UInt8

SEARCH_NORM = 2.4
MIN_SCALE = 1e-8
"""Scale of an all-zero row: positive, so that no division needs a guard."""


def max_level(bits: int) -> int:
    """Largest level of a symmetric `bits`-wide integer: 7 for 4 bits, 127 for 8."""
    return 2 ** (int(bits) - 1) - 1


def divide(a: Float32[Array, "..."], b: Float32[Array, "..."] | float) -> Float32[Array, "..."]:
    """a / b, b broadcast to a: IEEE division on a CPU; on an NVIDIA GPU (div.full) up to 2 ulp off, even for a = b.

    XLA turns division by a constant or a broadcast into multiplication by a reciprocal, which moves a level at a tie
    and differs between jit and no jit. A divisor that depends on `a` element by element escapes that rewrite.
    """
    return a / jnp.where(jnp.isnan(a), jnp.float32(1), jnp.broadcast_to(b, a.shape))


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["bits", "group"])
@dataclass(frozen=True)
class QTensor:
    """A matrix of small integers with one float scale per output channel and group of inputs.

    Invariants, which `check` enforces:
      values  int8 (K, O), levels in [-q, q] with q = 2^(bits-1) - 1; K inputs, O outputs (the layout of a Flax kernel)
      scale   float32 (K // group, O), or (1, O) without groups; finite and positive
      bits    2..8; levels always occupy int8 in memory (`pack_levels` gives them their bits on disk)
      group   None, or a divisor of K: rows [g*group, (g+1)*group) share scale[g]

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> weight = om.quantize_array(jnp.asarray([[0.7, -1.4], [0.3, 0.6]]), bits=4)
      >>> weight.values.dtype.name, weight.values.shape, weight.scale.shape
      ('int8', (2, 2), (1, 2))
      >>> weight.check()
    """

    values: Int8[Array, "K O"]
    scale: Float32[Array, "groups O"]
    bits: int = field(default=8)
    group: int | None = field(default=None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Float32[Array, "K O"]:
        """values * scale, in float32."""
        K, O = self.shape
        groups = self.scale.shape[0]
        levels = self.values.astype(jnp.float32).reshape(groups, K // groups, O)
        return (levels * self.scale[:, None, :]).reshape(K, O)

    def check(self) -> None:
        """Raise ValueError naming every broken invariant. Reads the values: call it outside `jax.jit`."""
        problems = []
        if not 2 <= self.bits <= 8:
            problems.append(f"bits must lie in 2..8, not {self.bits}")
        if self.values.ndim != 2 or self.values.dtype != jnp.int8:
            problems.append(f"values must be int8 (K, O), not {self.values.dtype} {self.values.shape}")
        elif self.group is not None and (self.group < 1 or self.values.shape[0] % self.group):
            problems.append(f"group {self.group} does not divide the {self.values.shape[0]} inputs")
        else:
            groups = 1 if self.group is None else self.values.shape[0] // self.group
            expected = (groups, self.values.shape[1])
            if self.scale.shape != expected or self.scale.dtype != jnp.float32:
                problems.append(f"scale must be float32 {expected}, not {self.scale.dtype} {self.scale.shape}")
        if not problems:
            largest = int(np.abs(np.asarray(self.values, np.int32)).max(initial=0))
            if largest > max_level(self.bits):
                problems.append(f"level {largest} does not fit {self.bits} bits (at most {max_level(self.bits)})")
            scale = np.asarray(self.scale)
            if not (np.isfinite(scale) & (scale > 0)).all():
                problems.append("every scale must be finite and positive")
        if problems:
            raise ValueError("QTensor is inconsistent: " + "; ".join(problems))


def search_scale(
    x: Float[Array, "..."], limit: float | Float[Array, ""], *, axes: Sequence[int], fractions: Sequence[float]
) -> Float32[Array, "..."]:
    """The scale, out of `max|x| * fraction / limit`, that minimises mean |x - quantised x|^2.4 over `axes`.

    The first of several equal scores wins. One pass over x per candidate, never a broadcast over them.

    Args:
      limit: largest level, `max_level(bits)`; it may be traced, so that one compilation serves all bit widths.

    Returns:
      x's shape with `axes` kept as 1; at least 1e-8 everywhere.
    """
    x = x.astype(jnp.float32)
    axes = tuple(axes)
    limit = jnp.asarray(limit, jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    candidates = jnp.asarray(np.asarray(fractions, np.float32))

    def score(scale):
        error = jnp.abs(x - scale * jnp.clip(jnp.round(divide(x, scale)), -limit, limit))
        # exp and log are vectorised on CPU, a power is not: a sixth of the time. log(0) = -inf gives 0 again.
        return jnp.mean(jnp.exp(SEARCH_NORM * jnp.log(error)), axis=axes, keepdims=True)

    def step(i, best):
        best_score, best_scale = best
        scale = jnp.maximum(divide(largest * candidates[i], limit), MIN_SCALE)
        new_score = score(scale)
        better = new_score < best_score
        return jnp.where(better, new_score, best_score), jnp.where(better, scale, best_scale)

    start = jnp.full_like(largest, jnp.inf), jnp.maximum(divide(largest, limit), MIN_SCALE)
    return lax.fori_loop(0, len(fractions), step, start)[1]


FULL_RANGE_FRACTIONS = tuple(i / 100 for i in range(1, 101))
"""1 % .. 100 % of the range, ascending."""


def _split_groups(w: Float[Array, "K O"], group: int | None) -> Float[Array, "groups size O"]:
    K, O = w.shape
    if group is not None and (group < 1 or K % group):
        raise ValueError(f"weight group {group} does not divide the {K} inputs: choose a divisor, or None")
    return w.reshape(1 if group is None else K // group, -1, O)


def search_weight_scale(
    w: Float[Array, "K O"], bits: int, *, group: int | None = None, search: bool = True
) -> Float32[Array, "groups O"]:
    """Scales per output channel (and group of `group` inputs): 100-step search, or max|w|/q with search=False."""
    return _search_weight_scale(w, jnp.float32(max_level(bits)), group, search)


@partial(jax.jit, static_argnames=("group", "search"))
def _search_weight_scale(w, limit, group, search):
    fractions = FULL_RANGE_FRACTIONS if search else (1.0,)
    return search_scale(_split_groups(w, group), limit, axes=(1,), fractions=fractions)[:, 0, :]


@partial(jax.jit, static_argnames=("bits", "group"))
def quantize_with_scale(
    w: Float[Array, "K O"], scale: Float32[Array, "groups O"], bits: int, *, group: int | None = None
) -> QTensor:
    """Round half to even onto the grid of `scale`, clipped to [-q, q]."""
    q = max_level(bits)
    grouped = _split_groups(w.astype(jnp.float32), group)
    levels = jnp.clip(jnp.round(divide(grouped, scale[:, None, :])), -q, q)
    return QTensor(levels.reshape(w.shape).astype(jnp.int8), scale, bits, group)


def quantize_array(w: Float[Array, "K O"], bits: int, *, group: int | None = None) -> QTensor:
    """Quantise a weight matrix: scales by the 100-step search, one per output channel and group of inputs.

    Args:
      w: (K, O) float, inputs first.
      bits: 2..8.
      group: inputs per scale, a divisor of K; None takes all K.

    Raises:
      ValueError: bits out of range, w not a matrix, or group not dividing K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> om.quantize_array(jnp.asarray([[0.7, -1.4], [0.3, 0.6]]), bits=4).values.tolist()
      [[7, -7], [3, 3]]
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"weights can have 2..8 bits, not {bits} (bits, not a number of levels)")
    if w.ndim != 2:
        raise ValueError(f"quantize_array takes a (K, O) matrix, not shape {w.shape}: reshape it first")
    return quantize_with_scale(w, search_weight_scale(w, bits, group=group), bits, group=group)


def packed_rows(rows: int, bits: int) -> int:
    """Bytes of a column of `rows` levels of `bits` bits without gaps."""
    return -(-rows * bits // 8)


def pack_levels(values: Int8[np.ndarray, "K O"], bits: int) -> UInt8[np.ndarray, "bytes O"]:
    """Levels as they are stored: down each column one after the other, lowest bit first, 0 past the last."""
    spread = np.unpackbits(values.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(values.shape[0] * bits, values.shape[1]), axis=0, bitorder="little")


def unpack_levels(packed: UInt8[np.ndarray, "bytes O"], bits: int, rows: int) -> Int8[np.ndarray, "K O"]:
    """Inverse of `pack_levels`; `rows` is K.

    Raises:
      ValueError: if K levels take another number of bytes.
    """
    if packed.shape[0] != packed_rows(rows, bits):
        raise ValueError(f"{packed.shape[0]} bytes do not hold {rows} levels of {bits} bits: pass the K of the packed.")
    spread = np.unpackbits(packed, axis=0, count=rows * bits, bitorder="little").reshape(rows, bits, packed.shape[1])
    levels = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    unused = np.uint8(8 - bits)
    return (levels << unused).view(np.int8) >> unused.view(np.int8)  # which repeats the sign
