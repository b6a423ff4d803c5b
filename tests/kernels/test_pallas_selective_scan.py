"""What the GPU scan can beside the scans of test_scan.py: inputs in int8, and the states that it saves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from draws import normal
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny_models import TOKENS, quantised

from ouromamba_jax.ops import scan, scan_mosaic
from ouromamba_jax.ops.dispatch import Backend
from ouromamba_jax.ops.scan import BACKENDS, selective_scan
from ouromamba_jax.ops.split import for_product
from ouromamba_jax.ops.split_operand import SplitOperand, StackedOperand
from ouromamba_jax.ops.split_types import OutlierSplit
from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.pallas.selective_scan import Step, Steps
from ouromamba_jax.pallas.selective_scan_forward import forward
from ouromamba_jax.pallas.tiles import ScanTiles
from ouromamba_jax.quantize import QuantConfig

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def assert_near(value, expected, tolerance=tolerances.SCAN_VALUE["float32"]):
    error = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= tolerance * np.abs(np.asarray(expected)).max()


def random_levels(rng, shape, groups, *, far=False):
    """Levels, what they stand for, and the floats that those are; with `far`, with outliers on larger steps."""
    batch, length = shape[:2]
    level, outlier = (rng.integers(-127, 128, size=shape) for _ in range(2))
    size = rng.uniform(0.002, 0.02, size=(batch, length, groups))
    shift = rng.integers(0, 4, size=size.shape) if far else np.zeros(size.shape, int)

    def by_group(x):
        return x.reshape(batch, length, groups, -1)

    is_far = by_group(rng.random(shape) < 0.2) & (shift > 0)[..., None]
    levels = np.where(is_far, by_group(outlier) * 2.0 ** shift[..., None], by_group(level))
    floats = levels * size[..., None]
    level = np.where(is_far, 0, by_group(level)).reshape(shape)
    outlier = np.where(is_far | (shift == 0)[..., None], by_group(outlier), 0).reshape(shape)  # some are not read
    step = Step(jnp.asarray(size, jnp.float32))
    if far:
        step = step._replace(far=jnp.asarray(outlier, jnp.int8), shift=jnp.asarray(shift, jnp.int32))
    return jnp.asarray(level, jnp.int8), step, jnp.asarray(floats.reshape(shape), jnp.float32)


@pytest.mark.parametrize(
    ("names", "far"), [(("u", "delta", "B", "C"), ("u", "delta")), (("u", "C"), ())], ids=["all", "u_and_C"]
)
def test_levels_count_in_steps_of_their_token_and_group(names, far):
    rng = np.random.default_rng(0)
    batch, length, D, N, groups = 2, 5, 256, 8, 2
    inputs, steps, floats = {}, {}, {}
    for name, shape in {"u": (D,), "delta": (D,), "B": (groups, N), "C": (groups, N)}.items():
        level, step, floats[name] = random_levels(rng, (batch, length, *shape), groups, far=name in far)
        inputs[name] = level if name in names else floats[name]
        steps |= {name: step} if name in names else {}
    A = -jnp.exp(jnp.asarray(rng.normal(size=(D, N)).astype(np.float32)))
    skip = jnp.asarray(rng.normal(size=D).astype(np.float32))
    y, h_last, starts = forward(
        inputs["u"], inputs["delta"], A, inputs["B"], inputs["C"], skip,
        delta_softplus=True, levels=Steps(**steps), interpret=INTERPRET,
    )  # fmt: skip
    expected = selective_scan(
        floats["u"], floats["delta"], A, floats["B"], floats["C"], skip, delta_softplus=True, implementation="xla"
    )
    assert y.dtype == jnp.float32
    assert starts is None
    assert_near(y, expected.y)
    assert_near(h_last, expected.h_last)


@pytest.mark.parametrize("levels", [False, True], ids=["floats", "levels"])
@pytest.mark.parametrize(("states", "dtype"), [(8, "float32"), (8, "bfloat16"), (1, "bfloat16")])
def test_the_forward_pass_alone(states, dtype, levels):
    """No state is saved for a gradient; with `levels`, floats u beside delta in int8, as quantised models call."""
    rng = np.random.default_rng(4)
    batch, length, D = 2, 5, 20

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x = {"u": normal(batch, length, D), "delta": normal(batch, length, D)}
    x |= {name: normal(batch, length, 1, states) for name in "BC"}
    floats, steps = dict(x), Steps()
    if levels:
        x["delta"], step, floats["delta"] = random_levels(rng, (batch, length, D), 1, far=True)
        steps = Steps(delta=step)
    A = -jnp.exp(jnp.asarray(rng.normal(size=(D, states)), "float32"))
    y, h_last, starts = kernel.run(**x, A=A, delta_softplus=True, levels=steps, interpret=INTERPRET)
    expected = selective_scan(**floats, A=A, delta_softplus=True, implementation="xla")
    assert starts is None
    assert y.dtype == jnp.dtype(dtype)
    assert_near(y.astype("float32"), expected.y.astype("float32"), tolerances.SCAN_VALUE[dtype])
    assert_near(h_last, expected.h_last)


@pytest.mark.parametrize(
    ("groups", "segments"),
    [pytest.param(2, 1, marks=pytest.mark.slow), (3, 1), pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_groups_that_come_apart_give_the_bits_of_those_side_by_side(groups, segments):
    """Values and gradients; delta in levels of two steps, u in floats."""
    rng = np.random.default_rng(5)
    batch, length, channels, states = 2, 4, 20, 1
    D = groups * channels
    u, B, C = (jnp.asarray(rng.normal(size=(batch, length, *n)), "float32") for n in ((D,), *[(groups, states)] * 2))
    A = -jnp.exp(jnp.asarray(rng.normal(size=(D, states)), "float32"))
    level, step, _ = random_levels(rng, (batch, length, D), groups, far=True)
    dy = jnp.asarray(rng.normal(size=u.shape), "float32")

    def apart(x):
        return tuple(jnp.split(x, groups, axis=2))

    def results(cut):
        def outputs(u, size):
            numbers = size, step.shift
            if cut is apart:
                numbers = (tuple(x[:, :, g] for g in range(groups)) for x in numbers)
            size, shift = numbers
            levels = Steps(delta=Step(size, cut(step.far), shift))
            tiles = ScanTiles(piece=1, chunk=2, segments=segments)
            return kernel.run(cut(u), cut(level), A, B, C, levels=levels, tiles=tiles, interpret=INTERPRET)[0]

        y, pull_back = jax.vjp(outputs, u, step.size)
        return [y, *pull_back(dy)]

    for value, expected in zip(jax.jit(results, static_argnums=0)(apart), results(lambda x: x), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_stacked_operand_is_its_array(implementation, monkeypatch):
    """Of three groups; the same values, states and gradients, in u's type."""
    monkeypatch.setitem(
        BACKENDS, "mosaic_gpu", Backend(kernel.unsuitable, partial(scan_mosaic.run, interpret=INTERPRET))
    )
    rng = np.random.default_rng(6)
    shape, groups = (2, 4, 3, 20), 3
    u, delta = (jnp.asarray(rng.normal(size=shape), "bfloat16") for _ in range(2))
    B, C = (jnp.asarray(rng.normal(size=(2, 4, groups, 1)), "bfloat16") for _ in range(2))
    A = -jnp.exp(jnp.asarray(rng.normal(size=(60, 1)), "float32"))

    def results(operand):
        def outputs(u, delta):
            out = selective_scan(
                operand(u), operand(delta), A, B, C, delta_softplus=True, collect=lambda h: h.mean(1),
                implementation=implementation,
            )  # fmt: skip
            return out.y, out.states

        out, pull_back = jax.vjp(outputs, u, delta)
        return [*out, *pull_back(jax.tree.map(lambda x: normal(0, x.shape, x.dtype), out))]

    stacked = jax.jit(results, static_argnums=0)(StackedOperand)
    for value, expected in zip(stacked, jax.jit(results, static_argnums=0)(lambda x: x.reshape(2, 4, 60)), strict=True):
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)
    operand = StackedOperand(u)
    assert (operand.shape, operand.ndim, operand.dtype) == ((2, 4, 60), 3, jnp.bfloat16)
    np.testing.assert_array_equal(jnp.concatenate(operand.groups, axis=2), operand.merge())


def split_scan(run, shift, steps, u, A):
    """y of a scan on random levels, delta's outliers `shift` bits (B, L) further out; one value per channel."""
    rng = np.random.default_rng(3)
    batch, length, channels = u.shape

    def operand(name, width):
        shape = (batch, length, width)
        outlier = jnp.asarray(rng.random(shape) < 0.3)
        inlier, far = (jnp.asarray(rng.integers(-q, q + 1, size=shape), jnp.int8) for q in (7, 127))
        zero = jnp.int8(0)
        bits = shift if name == "delta" else jnp.zeros_like(shift)
        step = jnp.ldexp(steps[name][None], bits)
        levels = jnp.where(outlier, zero, inlier), jnp.where(outlier, far, zero)
        split = OutlierSplit.from_levels(*levels, step, outlier, steps[name], pow2=True)
        return SplitOperand((for_product(split),), shape, jnp.dtype("float32"))

    delta = operand("delta", channels)
    B, C = (operand(name, 1).reshape(batch, length, 1, 1) for name in "BC")
    return run(
        u, delta, A, B, C, None, None, None, delta_softplus=True, h0=None, reverse=False, collect=None,
        state_transform=None,
    ).y  # fmt: skip


STEPS = {name: jnp.linspace(0.01, 0.02, 6) * (1 + i) for i, name in enumerate(("delta", "B", "C"))}
INTERPRETED = partial(scan_mosaic.run, tiles=ScanTiles(piece=1, chunk=2, segments=3), interpret=INTERPRET)


def test_a_sample_in_levels_keeps_its_bits_beside_one_with_shifted_outliers():
    u, A = normal(0, (2, 6, 20)), -jnp.linspace(0.5, 2.0, 20)[:, None]
    run = jax.jit(partial(split_scan, INTERPRETED))
    alike = run(jnp.zeros((2, 6), jnp.int32), STEPS, u, A)
    shifted = run(jnp.zeros((2, 6), jnp.int32).at[1, 2].set(3), STEPS, u, A)
    np.testing.assert_array_equal(alike[0], shifted[0])
    np.testing.assert_array_equal(alike[1, :2], shifted[1, :2])
    assert (alike[1, 2:] != shifted[1, 2:]).any()


def test_gradients_reach_the_steps_of_levels():
    """Of those in int8, and of those with a shifted outlier."""
    arguments = STEPS, normal(0, (2, 6, 20)), -jnp.linspace(0.5, 2.0, 20)[:, None]
    cotangent = normal(1, (2, 6, 20))

    def results(run, shift):
        y, pull_back = jax.vjp(partial(split_scan, run, shift), *arguments)
        return y, pull_back(cotangent)

    ours, reference = (jax.jit(partial(results, run)) for run in (INTERPRETED, BACKENDS["xla"].run))
    for shift in (jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 6), jnp.int32).at[1, 2].set(2)):
        actual, expected = jax.tree.leaves(ours(shift)), jax.tree.leaves(reference(shift))
        assert len(actual) == 6
        for value, wanted in zip(actual, expected, strict=True):
            assert_near(value, wanted, tolerances.SCAN_GRADIENT["float32"])


PROJECTIONS = [f"mixer.directions.{g}.{name}" for g in range(2) for name in ("x_proj", "dt_proj")]
LINEAR = ("stem.proj", "head.proj", *(f"blocks.0.{name}" for name in ("mixer.in_proj", "mixer.out_proj", *PROJECTIONS)))


@pytest.mark.parametrize("name", ["w4a4", "w4a8"])
def test_a_quantised_block_hands_its_levels_to_the_kernel(name, monkeypatch):
    """As it is: the backend in front is taken. 16-bit outliers have no levels, and B and C come as floats anyway."""
    config = dataclasses.replace(QuantConfig.preset(name), float_dtype="float32", detection="static")
    block = quantised(config, skipped=LINEAR).blocks[0]
    x = normal(0, (2, TOKENS, 20))
    expected = jax.jit(block)(x)
    seen = set()

    def run(*, delta, B, C, **call):
        seen.add(type(delta))
        assert not isinstance(B, SplitOperand)
        return scan_mosaic.run(delta=delta, B=B, C=C, **call, interpret=INTERPRET)

    monkeypatch.setattr(scan, "BACKENDS", {"interpreted": Backend(kernel.unsuitable, run), **BACKENDS})
    actual = jax.jit(lambda x: block(x))(x)
    assert seen == {SplitOperand if name == "w4a4" else StackedOperand}
    assert_near(actual, expected, tolerances.FAKE_AGAINST_INTEGER)


def test_the_saved_states_are_those_before_each_chunk():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    u, delta, B, C = normal(1, 7, 20), jnp.abs(normal(1, 7, 20)), normal(1, 7, 1, 1), normal(1, 7, 1, 1)
    A, h0 = -jnp.exp(normal(20, 1)), normal(1, 20, 1)
    tiles = ScanTiles(piece=1, chunk=2)
    *_, starts = kernel.run(u, delta, A, B, C, h0=h0, with_starts=True, tiles=tiles, interpret=INTERPRET)
    states = selective_scan(u, delta, A, B, C, h0=h0, collect=lambda h: h, implementation="xla").states
    np.testing.assert_array_equal(starts[:, 0], h0)
    assert_near(starts[:, 1:], states[:, 1:6:2])


def test_segments_give_the_scan_in_one_go():
    """Three at once: values, collected states, and gradients through everything that the segments hand on."""
    rng = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    x = dict(u=normal(2, 9, 20), delta=normal(2, 9, 20) - 2, A=-jnp.exp(normal(20, 1)), B=normal(2, 9, 1, 1))
    x |= dict(C=normal(2, 9, 1, 1), D=normal(20), z=normal(2, 9, 20), delta_bias=normal(20), h0=normal(2, 20, 1))
    options = dict(delta_softplus=True, reverse=True, collect=lambda h: h * h, state_transform=None)
    cotangents = normal(2, 9, 20), normal(2, 20, 1), normal(2, 9, 20, 1)

    def results(run):
        def outputs(x):
            return tuple(run(**x, **options))

        def forward_and_back(x, cotangents):
            out, pull_back = jax.vjp(outputs, x)
            return out, pull_back(cotangents)

        return jax.tree.leaves(jax.jit(forward_and_back)(x, cotangents))

    kernels = partial(scan_mosaic.run, tiles=ScanTiles(piece=1, chunk=2, segments=3), interpret=INTERPRET)
    for actual, expected in zip(results(kernels), results(BACKENDS["xla"].run), strict=True):
        assert_near(actual, expected, tolerances.SCAN_GRADIENT["float32"])


@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups", "segments"),
    [(32, 197, 768, 2, 1), (32, 3136, 384, 4, 4), (1, 3136, 384, 4, 32), (32, 784, 768, 4, 2), (1, 196, 1536, 4, 2)],
)
def test_many_tokens_of_few_channels_are_cut(batch, length, channels, groups, segments):
    """Vim, and the stages of VMamba."""
    B = jax.ShapeDtypeStruct((batch, length, groups, 1), jnp.float32)
    A = jax.ShapeDtypeStruct((channels, 1), jnp.float32)
    assert kernel.tiles_for(A, B).segments == segments
