"""What the GPU scan can beside the scans of test_scan.py: groups apart, levels, splits of its own, saved states."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from draws import heavy_tailed
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import scan, scan_mosaic
from ouromamba_jax.ops.matmul import outlier_matmul
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.scan import BACKENDS, selective_scan
from ouromamba_jax.ops.scan_types import Product, Unsplit
from ouromamba_jax.ops.split import OutlierConfig, Split
from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.pallas.scan_operand import Operand
from ouromamba_jax.pallas.tiles import ScanTiles

INTERPRET = plgpu.InterpretGPUParams()


def assert_near(value, expected, tolerance=tolerances.SCAN_VALUE["float32"]):
    error = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= tolerance * np.abs(np.asarray(expected)).max()


def random_part(rng, kind, shape):
    """One group of u or delta, (B, L, E)."""
    if kind == "floats":
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    if kind == "unsplit":
        x, scale = heavy_tailed(int(rng.integers(99)), shape), jnp.asarray(rng.uniform(0.1, 0.2, shape[1]), jnp.float32)
        shift = jnp.asarray(rng.integers(0, 4, shape[1]), jnp.int8)
        return Unsplit(x, scale, OutlierConfig(), 8 * scale, shift)
    if kind.startswith("product"):
        split = random_part(rng, "two bytes" if kind.endswith("two bytes") else "levels", (*shape[:2], 6))
        values = jnp.asarray(rng.integers(-127, 128, (6, shape[2])), jnp.int8)
        weight = QTensor(values, jnp.asarray(rng.uniform(0.001, 0.002, (1, shape[2])), jnp.float32), 8)
        value = outlier_matmul(split, weight, implementation="xla")
        scale = jnp.asarray(rng.uniform(0.02, 0.04, shape[1]), jnp.float32)
        return Unsplit(Product(value, split, weight, jnp.dtype("float32")), scale, OutlierConfig(), 9 * scale)
    low, high = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in range(2))
    step = rng.uniform(0.002, 0.02, shape[1]) / (100 if kind == "two bytes" else 1)
    return Split(low, high if kind == "two bytes" else None, jnp.asarray(step, jnp.float32), low[:, :1], shape[1])


def random_call(rng, kinds_of_u, kinds_of_delta, width, states, length=13):
    groups = len(kinds_of_u)
    u, delta = (
        tuple(random_part(rng, kind, (2, length, width)) for kind in kinds) for kinds in (kinds_of_u, kinds_of_delta)
    )

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    D = groups * width
    x = dict(u=u, delta=delta, A=-jnp.exp(array(D, states)), D=array(D), delta_bias=array(D))
    x |= {name: array(2, length, groups, states) for name in "BC"}
    optional = dict(z=None, h0=None, delta_softplus=True, reverse=False, collect=None, state_transform=None)
    return x | optional


OPERANDS = {
    "floats": (("floats",) * 2,) * 2,
    "levels": (("levels",) * 2, ("levels", "two bytes")),
    "u alone": (("two bytes",) * 3, ("floats",) * 3),
    "unsplit": (("floats",) * 2, ("unsplit",) * 2),
    "both unsplit": (("unsplit",), ("unsplit",)),
    "products": (("floats",) * 2, ("product", "product of two bytes")),
    "mixed": (("floats", "levels"), ("unsplit", "levels")),
}


@pytest.mark.parametrize(
    ("kinds", "width", "states"),
    [
        ("unsplit", 130, 2),
        *(pytest.param(kinds, width, 1, marks=pytest.mark.kernels) for kinds in OPERANDS for width in (20, 130)),
        pytest.param("levels", 128, 8, marks=pytest.mark.kernels),
    ],
)
def test_every_group_is_read_as_it_lies(kinds, width, states):
    call = random_call(np.random.default_rng(0), *OPERANDS[kinds], width, states)
    y, h_last, _ = scan_mosaic.run(**call, interpret=INTERPRET)
    expected = BACKENDS["xla"].run(**call)
    assert y.dtype == jnp.float32
    assert_near(y, expected.y)
    assert_near(h_last, expected.h_last)


@pytest.mark.kernels
@pytest.mark.parametrize("kinds", ["unsplit", "products"])
def test_a_window_goes_on_in_the_next_segment(kinds):
    """Three segments of eight tokens, windows of ten; lists that began anew would change levels by a quarter."""
    call = random_call(np.random.default_rng(4), *OPERANDS[kinds], 20, 1, length=24)
    tiles = ScanTiles(piece=1, chunk=2, segments=3)
    y, h_last, _ = scan_mosaic.run(**call, tiles=tiles, interpret=INTERPRET)
    expected = BACKENDS["xla"].run(**call)
    assert_near(y, expected.y)
    assert_near(h_last, expected.h_last)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [20, 130])
def test_products_on_the_device(width):
    call = random_call(np.random.default_rng(5), *OPERANDS["products"], width, 1)
    call.pop("state_transform")
    y, expected = (selective_scan(**call, implementation=name).y for name in ("mosaic_gpu", "xla"))
    assert_near(y, expected, tolerances.SCAN_VALUE_GPU["float32"])


@pytest.mark.kernels
@pytest.mark.parametrize("kinds", OPERANDS)
def test_gradients_of_every_group(kinds):
    """To floats, and to the steps of levels; two segments."""
    call = random_call(np.random.default_rng(1), *OPERANDS[kinds], 20, 1, length=12)
    ours = partial(scan_mosaic.run, tiles=ScanTiles(piece=1, chunk=2, segments=2), interpret=INTERPRET)

    def gradients(run):
        def loss(A, bias, u, delta):
            u, delta = (
                tuple(s if part is None else part for s, part in zip(call[name], x, strict=True))
                for name, x in (("u", u), ("delta", delta))
            )
            return jnp.sum(run(**call | dict(A=A, delta_bias=bias, u=u, delta=delta)).y ** 2)

        floats = [tuple(x if isinstance(x, jax.Array) else None for x in call[name]) for name in ("u", "delta")]
        return jax.grad(loss, (0, 1, 2, 3))(call["A"], call["delta_bias"], *floats)

    for value, expected in zip(*(jax.tree.leaves(gradients(run)) for run in (ours, BACKENDS["xla"].run)), strict=True):
        assert_near(value, expected, tolerances.SCAN_GRADIENT["float32"])


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_groups_apart_are_their_stack(implementation, monkeypatch):
    """The same bits, in u's type, or B's where u is split."""
    run = partial(scan_mosaic.run, interpret=INTERPRET)
    monkeypatch.setitem(BACKENDS, "mosaic_gpu", scan.Backend(kernel.unsuitable, run))
    call = random_call(np.random.default_rng(2), ("floats",) * 3, ("floats",) * 3, 20, 1)
    call.pop("state_transform")
    stacked = {name: jnp.concatenate(call[name], axis=2) for name in ("u", "delta")}
    y = selective_scan(**call, implementation=implementation).y
    np.testing.assert_array_equal(y, selective_scan(**call | stacked, implementation=implementation).y)
    split = random_call(np.random.default_rng(2), ("levels",) * 3, ("floats",) * 3, 20, 1)
    split.pop("state_transform")
    split |= {name: split[name].astype(jnp.bfloat16) for name in "BC"}
    assert selective_scan(**split, implementation=implementation).y.dtype == jnp.bfloat16


def test_parts_that_do_not_fit():
    call = random_call(np.random.default_rng(3), ("floats",) * 2, ("floats",) * 2, 4, 1)
    call.pop("state_transform")
    with pytest.raises(ValueError, match="u must be 2 parts of one shape"):
        selective_scan(**call | {"u": call["u"] * 2})
    with pytest.raises(ValueError, match="delta must be 2 parts of one shape"):
        selective_scan(**call | {"delta": (call["delta"][0], call["delta"][1][..., :3])})


@pytest.mark.kernels
def test_the_saved_states_are_those_before_each_chunk():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    u, delta, B, C = normal(1, 7, 20), jnp.abs(normal(1, 7, 20)), normal(1, 7, 1, 1), normal(1, 7, 1, 1)
    A, h0 = -jnp.exp(normal(20, 1)), normal(1, 20, 1)
    tiles = ScanTiles(piece=1, chunk=2)
    *_, starts = kernel.run(
        (Operand(u),), (Operand(delta),), A, B, C, h0=h0, with_starts=True, tiles=tiles, interpret=INTERPRET
    )
    states = selective_scan(u, delta, A, B, C, h0=h0, collect=lambda h: h, implementation="xla").states
    np.testing.assert_array_equal(starts[:, 0], h0)
    assert_near(starts[:, 1:], states[:, 1:6:2])


@pytest.mark.kernels
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
