"""Algorithm 2 in one GPU kernel: one program per window of one sample walks its tokens and reads each entry once.

What takes the time is a chain of reductions over the channels, each of which waits for the one before it: one for a
token that fits its scale while nothing is listed, two with a list, four for one that overflows. Its row arrives while
the token before it is split.

Mosaic adds in the order of `fixed_order.tree_sum`, and no product feeds a sum unrounded, so the lists are the
reference's bit for bit wherever division and square root are. Mosaic compiles those two to their fast forms (div.full,
sqrt.approx): on a GPU a level at an exact tie may differ by one from a CPU's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ouromamba_jax.ops.fixed_order import FLOAT32_MAX, LANES, guard_product, tree_sum
from ouromamba_jax.ops.qtensor import MIN_SCALE, divide, max_level
from ouromamba_jax.ops.split_types import (
    FRACTION_BITS,
    LARGEST_FIXED_POINT,
    Form,
    OutlierConfig,
    OutlierSplit,
    Planes,
)
from ouromamba_jax.pallas.device import device_reason
from ouromamba_jax.pallas.kernel_weight import INT32_MAX
from ouromamba_jax.pallas.packed_split import BLOCK, PackedSplit

WIDEST = 49 * LANES
"""Channels that a warpgroup's registers have room for: those of MambaVision-L's widest layer."""
WIDEST_AHEAD = 32 * LANES
"""Channels of which there is room for the next token, too."""
_LARGEST_RATIO = 2.0**126


def supports(x: Float[Array, "B L C"], config: OutlierConfig) -> str | None:
    """Why this call cannot run here, from static facts and the device; None if it can."""
    return unsuitable(x, config) or device_reason()


def unsuitable(x: Float[Array, "B L C"], config: OutlierConfig) -> str | None:
    """Why the kernel cannot split this, whatever the device; None if it can."""
    if config.detection != "dynamic" or config.spec != "paper":
        return 'it is Algorithm 2 itself: detection="dynamic" and spec="paper"'
    if x.size == 0:
        return "there is nothing to split"
    if x.shape[-1] > WIDEST:
        return f"{x.shape[-1]} channels do not fit a warpgroup's registers, {WIDEST} do"
    if x.size > INT32_MAX - WIDEST:
        return f"{x.size} entries are more than int32 can count"
    return None


def split(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: None = None,
    with_mask: bool = False,
    form: Form = "split",
    interpret: Any = None,
) -> OutlierSplit | Planes | PackedSplit | Float[Array, "B L C"]:
    """`outliers.split_outliers` for what `supports` accepts; `channels` are those of another detection.

    As "planes" it is `outliers.for_product` of that, with zeros up to whole K-steps of a product, as "packed" the
    `PackedSplit`, as "floats" what it stands for, in x's type. A split with "free" scales has no planes and is returned
    itself.
    """
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from ouromamba_jax.pallas.store import store_listed

    B, L, C = x.shape
    packed = form == "packed"
    width, window = C + -C % (BLOCK if packed else LANES), min(config.n_refresh, L)
    ahead = width <= WIDEST_AHEAD
    q_in, q_out = max_level(config.act_bits), max_level(config.outlier_bits)
    floats = config.outlier_bits == 16
    planes = form == "planes" and (config.pow2 or floats)
    fixed_point = planes and floats
    online = config.threshold == "online"
    limits = scale if theta is None else theta

    def iota(size):
        return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=1))

    def total(values):
        return tree_sum(values)[0] if interpret is not None else jnp.sum(values)

    def running_count(flags, buffer):
        """How many flags there are up to each channel; to the left of the row lie zeros."""
        buffer[:width] = jnp.zeros((width,), jnp.float32)
        buffer[width:] = jnp.where(flags, 1.0, 0.0)
        for step in (2**i for i in range((width - 1).bit_length())):
            # Pallas puts a barrier before and behind the store.
            buffer[width:] = buffer[width:] + buffer[width - step : 2 * width - step]
        return buffer[width:].astype(jnp.int32)

    def body(x, scale, limits, *rest):
        results, buffer = rest[: len(written)], rest[len(written) :]
        sample, start = lax.axis_index("sample"), lax.axis_index("window") * window
        present = iota(width) < C

        tokens_here = jnp.minimum(window, L - start)

        def load(i):
            """A token's row, scale and limit; what it reads beyond its channels is the next one's."""
            t = start + jnp.minimum(i, tokens_here - 1)
            row = x[pl.ds((sample * L + t) * C, width)].astype(jnp.float32)
            return jnp.where(present, row, 0.0) if width > C else row, scale[t], limits[t]

        def grow(free, limit):
            """The channels that a token which overflows adds to the list."""
            if not online:
                return (free >= limit) & present
            mean = divide(total(free), C)
            deviation = free - mean
            square = jnp.where(present, guard_product(deviation * deviation), 0.0)
            std = jnp.sqrt(divide(total(square), max(C - 1, 1)))
            return (deviation >= config.sigma * std) & present

        def extend(listed, count, found):
            """The list, as places from 1 on where somebody asks for these, and how many it holds, or at most."""
            if not packed:
                return jnp.where(found, 1, listed), jnp.int32(C)
            found = found & (listed == 0)
            order = running_count(found, *buffer)
            return jnp.where(found, count + order, listed), count + jnp.max(order)

        def token(i, carry):
            listed, count, *loaded = carry
            row, step, limit = loaded[0] if ahead else load(i)
            following, t = [load(i + 1)] if ahead else [], start + i  # which arrives while this token is split
            magnitude = jnp.abs(row)
            if interpret is not None or not online:
                # A NaN counts as infinite: the reference says so of thresholds, and a CPU may drop it from a maximum.
                magnitude = jnp.where(magnitude <= FLOAT32_MAX, magnitude, jnp.inf)
            free = jnp.where(listed > 0, 0.0, magnitude)
            largest_free = jnp.max(free)
            listed, count = lax.cond(
                divide(largest_free, q_in) > step,
                lambda: extend(listed, count, grow(free, limit)),
                lambda: (listed, count),
            )
            is_outlier = listed > 0
            inliers = _levels(divide(row, step), q_in)
            if fixed_point:
                size = jnp.where(is_outlier, magnitude, jnp.abs(inliers) * step)
                largest = jnp.max(jnp.where(magnitude < jnp.inf, size, jnp.inf))
            else:
                outliers_only = jnp.where(is_outlier, magnitude, 0.0)
                largest = lax.cond(count > 0, lambda: jnp.max(outliers_only), lambda: jnp.float32(0))
            finite = (largest_free < jnp.inf) & (largest < jnp.inf)
            if fixed_point:
                own, value = _fixed_point(row, inliers, is_outlier, step, largest, finite)
                high = jnp.round((value + 0.5) * (1 / 256))  # the low byte is in -128..127; Mosaic has no floor
                write(t, results, value - 256.0 * high, high, jnp.where(finite, own, jnp.nan), jnp.int32(8))
                return listed, count, *following
            shift = jnp.int32(0)
            if config.pow2:
                shift, power = _power_that_fits(jnp.where(finite, divide(largest, step), 0.0), q_out)
                own, is_far = step * power, is_outlier & ((shift > 0) | ~finite)
            else:
                own = jnp.float32(1) if floats else divide(jnp.maximum(largest, MIN_SCALE), q_out)
                is_far = is_outlier
            own = jnp.where(finite, own, jnp.nan)
            outliers = row if floats else _levels(divide(row, own), q_out)
            known_step = jnp.where(finite, step, jnp.nan)
            if form == "floats":
                write(t, results, jnp.where(is_outlier, outliers * own, inliers * known_step))
                return listed, count, *following
            if packed:
                inliers_only = jnp.where(is_outlier, 0.0, inliers)
                inliers_out, outliers_out, _, *numbers_out = results
                write(t, [inliers_out, *numbers_out], nibbles(inliers_only), count, shift, known_step)
                store_listed(outliers_out.at[sample, t], listed, outliers.astype(jnp.int8), emulated=interpret)
                return listed, count, *following
            near = jnp.where(is_far, 0.0, jnp.where(is_outlier, outliers, inliers))
            far = jnp.where(is_far, outliers, 0.0)
            if planes:
                near_out, far_out, *numbers_out = results
                write(t, [near_out, *numbers_out], near, known_step, shift)
                pl.when(shift > 0)(lambda: write(t, [far_out], far))  # nobody reads the others
            else:
                write(t, results, near, far, own, *([listed] if with_mask else []))
            return listed, count, *following

        def nibbles(levels):
            """Bytes of two: another thread holds the other half of the row."""
            (row,) = buffer
            row[:width] = levels
            low, high = row[: width // 2], row[width // 2 : width]
            return 16.0 * high + jnp.where(low < 0, low + 16.0, low)

        def write(t, outputs, *values):
            for output, value in zip(outputs, values, strict=True):
                output[sample, t] = value.astype(output.dtype)

        nothing = jnp.zeros((width,), jnp.int32), jnp.int32(0)
        places, *_ = lax.fori_loop(0, tokens_here, token, (*nothing, *([load(0)] if ahead else [])))
        if packed:
            write(lax.axis_index("window"), results[2:3], places)

    entries, tokens, windows = (B, L, width), (B, L), -(-L // window)
    body.__name__ = "outlier_split"  # as profilers show it
    if form == "floats":
        body.__name__ += "_floats"
        written: list[tuple[tuple[int, ...], Any]] = [(entries, x.dtype)]
    elif planes:
        body.__name__ += "_bytes" if fixed_point else "_planes"
        written = [(entries, jnp.int8), (entries, jnp.int8), (tokens, jnp.float32), (tokens, jnp.int32)]
    elif packed:
        body.__name__ += "_packed"
        written = [((B, L, width // 2), jnp.int8), (entries, jnp.int8), ((B, windows, width), jnp.int16)]
        written += [(tokens, jnp.int32), (tokens, jnp.int32), (tokens, jnp.float32)]
    else:
        written = [(entries, jnp.int8), (entries, x.dtype if floats else jnp.int8), (tokens, jnp.float32)]
        written += [(entries, jnp.int8)] if with_mask else []
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(*array) for array in written),
        grid=(B, windows),
        grid_names=("sample", "window"),
        scratch_types=[plgpu.SMEM((2 * width,), jnp.float32)] if packed else [],
        # Only places and nibbles cross shared memory: nothing else needs the barriers that Pallas puts around stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not packed),
        **({"interpret": interpret} if interpret is not None else {}),
    )
    results = kernel(jnp.pad(x.reshape(-1), (0, width - C)), scale, limits)  # rows as they are: C may be 1
    if form == "floats":
        return results[0][..., :C]
    if planes:
        near, far, row_scale, shift = results
        return Planes(near, far, shift, row_scale, C, fixed_point)
    if packed:
        packed_inliers, levels, places, counts, shift, row_scale = results
        return PackedSplit(packed_inliers, levels, places, counts, shift, row_scale, C, window)
    near, far, outlier_scale, *mask = results
    found = mask[0][..., :C] != 0 if with_mask else None
    return OutlierSplit(near[..., :C], far[..., :C], outlier_scale, found, scale, config.pow2)


def _levels(ratio, q: int):
    """Rounded half to even and clipped to [-q, q]; both orders give the same."""
    return jnp.round(jnp.minimum(jnp.maximum(ratio, -float(q)), float(q)))


def _fixed_point(row, inliers, is_outlier, step, largest, finite):
    """(step of the row's numbers, and these, at most 32639 in magnitude); see `Planes`."""

    def too_large(state):
        return finite & (largest > state[0])

    def double(state):
        bound, own, ratio = state
        return bound * 2.0, own * 2.0, ratio * 0.5

    bound = step * (LARGEST_FIXED_POINT / 2**15) * 2.0 ** (15 - FRACTION_BITS)
    start = bound, step * 2.0**-FRACTION_BITS, jnp.float32(2.0**FRACTION_BITS)
    _, own, ratio = lax.while_loop(too_large, double, start)  # the inliers' step over the numbers'
    # Halves are rounded up, as by the reference's shifts: anything below the last bit, 2^-14, decides so.
    scaled = jnp.round(inliers * jnp.maximum(ratio, 2.0**-14) + jnp.where(ratio < 1, 2.0**-16, 0.0))
    return own, jnp.where(is_outlier, jnp.round(divide(row, own)), scaled)  # whatever, where the step will be NaN


def _power_that_fits(ratio, q: int):
    """(j, 2^j) of the smallest j >= 0 for which round(ratio / 2^j) <= q."""

    def halve(state):
        ratio, shift, power = state
        return ratio * 0.5, shift + 1, power * 2.0

    def clips(state):
        return state[0] >= q + 0.5

    return lax.while_loop(clips, halve, (jnp.minimum(ratio, _LARGEST_RATIO), jnp.int32(0), jnp.float32(1)))[1:]
