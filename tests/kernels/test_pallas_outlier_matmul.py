"""The outlier matmul's kernels in interpret mode: every backend gives the reference's bits, without races.

Tests marked gpu, here and in the other files, run the compiled kernels on one GPU, in one process (of two, each would
reserve most of its memory): JAX_PLATFORMS=cuda python -m pytest -m gpu -n 0. With --emulate sm80, sm89 or sm90 they run
what was compiled for that architecture on a CPU (tests/ptx).
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import matmul
from ouromamba_jax.ops.qtensor import QTensor, max_level, quantize_array
from ouromamba_jax.ops.split import for_product, split_outliers
from ouromamba_jax.ops.split_calibration import search_token_scales
from ouromamba_jax.ops.split_types import LARGEST_FIXED_POINT, OutlierConfig, OutlierSplit, Planes
from ouromamba_jax.pallas import outlier_matmul as kernel
from ouromamba_jax.pallas.device import target_of
from ouromamba_jax.pallas.tiles import MatmulTiles, matmul_tiles

TILES = {
    "sm90": MatmulTiles(tile_m=128, tile_n=64, stages=2),
    "sm90_packed": MatmulTiles(tile_m=128, tile_n=64, stages=3, packed=True),
    "sm80": MatmulTiles(tile_m=128, tile_n=64, stages=2),
    "sm80_packed": MatmulTiles(tile_m=128, tile_n=64, stages=3, packed=True),
    "sm89": MatmulTiles(tile_m=64, tile_n=64, stages=3),
}


def options(name, **interpreter):
    return {"target": name[:4], "tiles": TILES[name], "interpret": plgpu.InterpretGPUParams(**interpreter)}


@cache
def product(name, detect_races=False, dtype="float32"):
    """A backend's product, compiled once for all inputs of the same shapes."""
    if name == "xla":
        run = matmul.BACKENDS["xla"].run
    elif name == "triton":
        run = partial(matmul._one_launch, triton_interpreter.run)
    else:
        run = partial(matmul._mosaic_gpu, **options(name, detect_races=detect_races))
    return jax.jit(
        lambda split, weight, bias=None: run(unread(for_product(split)), weight, bias, dtype=jnp.dtype(dtype))
    )


def unread(planes):
    """`planes` with levels where no product may look, as memory that nobody wrote holds them."""
    noise = jax.random.randint(jax.random.key(0), planes.far.shape, -128, 128, jnp.int8)
    return replace(planes, far=jnp.where(planes.shift[:, :, None] > 0, planes.far, noise))


CASES = {
    # kind: (B, L, K, O, outlier share, largest j, weight bits). "outliers": every column is one, and every tile holds
    # shifts. There is no capacity that this exceeds: `far` is as large as `near`.
    "mixed": (3, 67, 150, 70, 0.02, 4, 4),
    "inliers": (3, 67, 150, 70, 0.0, 0, 4),
    "outliers": (1, 128, 256, 64, 1.0, 2, 4),
    "small": (1, 5, 33, 20, 0.3, 1, 4),
    "w8": (2, 64, 128, 64, 0.05, 1, 8),
}


def random_split(rng, kind):
    """Levels at their limits; with scales of 1 the result is the integer itself."""
    B, L, K, O, share, largest, bits = CASES[kind]
    mask = rng.random((B, L, K)) < share
    limit = 2 ** (bits - 1) - 1
    inlier = np.where(mask, 0, rng.integers(-limit, limit + 1, size=mask.shape)).astype(np.int8)
    outlier = np.where(mask, rng.choice([-127, 127, 3], size=mask.shape), 0).astype(np.int8)
    power = rng.integers(0, largest + 1, size=(B, L)) * (rng.random((B, L)) < 0.3)
    outlier_scale = np.ldexp(np.float32(1), power).astype(np.float32)
    scale = np.ones(L, np.float32)
    levels = rng.integers(-limit, limit + 1, size=(K, O)).astype(np.int8)
    split = OutlierSplit.from_levels(*map(jnp.asarray, (inlier, outlier, outlier_scale, mask, scale)), pow2=True)
    return split, QTensor(jnp.asarray(levels), jnp.ones((1, O), jnp.float32), bits)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("xla", *TILES, "triton") for k in CASES if k != "w8" or not n.endswith("_packed")],
)
def test_integers_are_exact(name, kind, capfd):
    """The interpreter raises (jax 0.12) or reports (0.11) accesses that no barrier orders.

    It does so for two equal writes, too, and a ragged number of rows needs them: only one case looks for races.
    """
    split, weight = random_split(np.random.default_rng(0), kind)
    inlier, outlier = (np.asarray(a).astype(np.int64) for a in (split.inlier_q, split.outlier_q))
    power = np.asarray(split.outlier_scale).astype(np.int64)[:, :, None]
    expected = (inlier + power * outlier) @ np.asarray(weight.values, np.int64)
    assert np.abs(expected).max() < 2**24  # a float32 holds them all
    y = product(name, detect_races=kind == "outliers")(split, weight)
    np.testing.assert_array_equal(np.asarray(y).astype(np.int64), expected)
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", [*TILES, "triton"])
def test_a_split_activation_gives_the_bits_of_xla(name):
    """Real scales, tokens that share no power of two, and one whose scale is NaN."""
    rng = np.random.default_rng(1)
    B, L, K, O = CASES["mixed"][:4]
    x = rng.normal(size=(B, L, K)) * np.where(rng.random((B, L, K)) < 0.01, 300, 1)
    x = jnp.asarray(x.astype(np.float32))
    scale = search_token_scales(x, OutlierConfig())
    split = split_outliers(x.at[1, 4, 9].set(jnp.nan), scale, OutlierConfig())
    weight = quantize_array(jnp.asarray(rng.normal(size=(K, O)).astype(np.float32)), 4)
    assert 0.1 < float(jnp.mean(split.shifted)) < 0.9
    y, expected = (np.asarray(product(n)(split, weight)) for n in (name, "xla"))
    assert np.isnan(y).sum() == O
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", ["sm90_packed", "sm80_packed"])
def test_packed_levels_do_not_overflow_float32(name):
    """They count sixteenfold, but not where floats are large."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 5, 33)).astype(np.float32)
    x[0, 2, ::4] = 1e37
    split = split_outliers(jnp.asarray(x), jnp.full(5, 0.3), OutlierConfig(sigma=0.5))
    weight = quantize_array(jnp.asarray(np.abs(rng.normal(size=(33, 20))).astype(np.float32) / 100), 4)
    y, expected = (np.asarray(product(n)(split, weight)) for n in (name, "xla"))
    assert 1e35 < np.abs(expected).max() < np.inf
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", [*TILES, "triton"])
def test_only_some_tiles_hold_a_shift(name):
    """Row 150 of 201, which for tiles of 128 rows is in the last one, and two or more tiles of columns."""
    rng = np.random.default_rng(12)
    B, L, K, O = CASES["mixed"][:4]
    inlier, outlier = (rng.integers(-q, q + 1, size=(B, L, K)) for q in (7, 127))
    mask = rng.random((B, L, K)) < 0.1
    power = np.zeros((B, L), int)
    power[2, 150 - 2 * L] = 3
    weight = rng.integers(-7, 8, size=(K, 2 * O))
    expected = (np.where(mask, outlier << power[:, :, None], inlier)) @ weight
    levels = (jnp.asarray(np.where(m, x, 0), jnp.int8) for m, x in ((~mask, inlier), (mask, outlier)))
    scales = jnp.ldexp(jnp.ones((B, L)), power), jnp.asarray(mask), jnp.ones(L)
    split = OutlierSplit.from_levels(*levels, *scales, pow2=True)
    tile = 128 if name == "triton" else TILES[name].tile_m
    assert 0 < (kernel.largest_shifts(jnp.asarray(power.reshape(-1)), tile) > 0).mean() < 1
    y = product(name)(split, QTensor(jnp.asarray(weight, jnp.int8), jnp.ones((1, 2 * O)), 4))
    np.testing.assert_array_equal(np.asarray(y).astype(np.int64), expected)


@pytest.mark.parametrize(
    ("name", "tile_n"),
    [("sm90", 64), ("sm90", 128), ("sm90_packed", 64), ("sm80", 64), ("sm80_packed", 64), ("sm89", 64)],
)
def test_bfloat16_outputs_are_the_float32_ones_rounded(name, tile_n):
    split, weight = random_split(np.random.default_rng(2), "mixed")
    launch = options(name) | {"tiles": replace(TILES[name], tile_n=tile_n)}
    y = jax.jit(partial(matmul._mosaic_gpu, dtype=jnp.bfloat16, **launch))(unread(for_product(split)), weight)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, product("xla")(split, weight).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "bits", "K", "dtype"),
    [(n, b, K, "float32") for n in ("sm90", "sm89", "triton") for b, K in ((4, 150), (8, 640))]
    + [("sm89", b, K, "bfloat16") for b, K in ((4, 150), (8, 640))],
)
def test_16_bit_outliers_give_the_bits_of_xla(name, bits, K, dtype):
    """W4A8, whose planes one accumulator holds, and W8A8 with too many inputs for that; one token takes floats."""
    rng = np.random.default_rng(10)
    B, L, O = 2, 40, 30
    assert (K * max_level(bits) * LARGEST_FIXED_POINT <= kernel.INT32_MAX) == (bits == 4)
    x = rng.normal(size=(B, L, K)) * np.where(rng.random((B, L, K)) < 0.01, 20, 1)
    config = OutlierConfig(act_bits=8, outlier_bits=16)
    scale = jnp.asarray(rng.uniform(0.02, 0.03, size=L).astype(np.float32))
    levels = rng.integers(-max_level(bits), max_level(bits) + 1, size=(K, O)).astype(np.int8)
    weight = QTensor(jnp.asarray(levels), jnp.asarray(rng.uniform(0.1, 1, size=(1, O)).astype(np.float32)), bits)
    for largest in (20, 1e6):
        x[1, 3, 5] = largest
        split = split_outliers(jnp.asarray(x.astype(np.float32)), scale, config)
        assert split.outlier_q.dtype == jnp.float32
        y, expected = (product(n, dtype=dtype)(split, weight) for n in (name, "xla"))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [
        *((name, "shifts", "bfloat16") for name in ("sm90", "sm80_packed", "sm89", "triton")),
        *((name, "bytes", "float32") for name in ("sm90", "sm80", "triton")),
        ("sm89", "rows of bytes", "float32"),
        ("triton", "rows of bytes", "bfloat16"),
    ],
)
def test_a_bias_is_added_in_float32(name, case, dtype):
    """To results of either sign and its own size; to one or two accumulators, to numbers of two bytes, to NaN."""
    rng = np.random.default_rng(11)
    B, L, K, O = (3, 67, 150, 70) if case != "rows of bytes" else (1, 40, 640, 30)
    x = rng.normal(size=(B, L, K)) * np.where(rng.random((B, L, K)) < 0.01, 300, 1)
    x[0, 5, 3], x[0, 9, 4] = 1e6, np.nan
    config = OutlierConfig() if case == "shifts" else OutlierConfig(act_bits=8, outlier_bits=16)
    split = split_outliers(jnp.asarray(x.astype(np.float32)), jnp.full(L, 0.3, jnp.float32), config)
    bits = 8 if case == "rows of bytes" else 4
    weight = quantize_array(jnp.asarray(rng.normal(size=(K, O)).astype(np.float32)), bits)
    if case == "shifts":
        assert for_product(split).shift.max() > kernel.largest_shift(K, bits)
    bias = jnp.asarray(30 * rng.normal(size=O), "float32" if name == "triton" else "float16")
    y, expected = (product(n, dtype=dtype)(split, weight, bias) for n in (name, "xla"))
    assert y.dtype == dtype
    y, expected = (np.asarray(x.astype(jnp.float32)) for x in (y, expected))
    assert np.isnan(y).sum() == O
    np.testing.assert_array_equal(y, expected)
    without = np.asarray(product("xla")(split, weight))
    rounded = (without + np.asarray(bias, np.float32)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(expected, rounded)


@pytest.mark.parametrize("inputs", [9399, 9400])
def test_fixed_point_numbers_at_the_limit_of_an_accumulator(inputs):
    """The largest number and weight everywhere: one launch while int32 holds the sum, else twice the rows."""
    weight = QTensor(jnp.full((inputs, 1), 7, jnp.int8), jnp.ones((1, 1), jnp.float32), 4)
    launched = []

    def launch(planes, weight, bias=None, *, dtype=jnp.float32, limit=None):
        launched.append(planes.near.shape[0])
        near, far, shift = (np.asarray(x, np.int64) for x in (planes.near, planes.far, planes.shift[:, :, None]))
        levels = near + np.where(shift > 0, np.left_shift(far, shift), 0)
        sums = levels @ np.asarray(weight.values, np.int64)
        assert np.abs(sums).max() * (1 if limit is not None else 16) <= kernel.INT32_MAX
        return jnp.asarray(sums.astype(np.float32)) * planes.row_scale[:, :, None] * weight.scale[0][None, None]

    both, shift = (jnp.full((1, 1, inputs), 127, jnp.int8),) * 2, jnp.full((1, 1), 8, jnp.int32)
    planes = Planes(*both, shift, jnp.full((1, 1), 0.3, jnp.float32), inputs, fixed_point=True)
    y = kernel.fixed_point(launch, planes, weight)
    assert launched == [1 if inputs == 9399 else 2]
    np.testing.assert_array_equal(y, matmul._fixed_point_product(planes, weight))


@pytest.mark.parametrize("name", TILES)
def test_the_largest_shift_fits(name):
    rng = np.random.default_rng(3)
    K, level = 128, (7 if TILES[name].packed else 127)
    bits, largest = (4, 16 * 7) if TILES[name].packed else (8, 127)
    limit = kernel.largest_shift(K, bits)
    assert K * 127 * largest * (2**limit + 1) < 2**31 <= K * 127 * largest * (2 ** (limit + 1) + 1)
    extreme = jnp.asarray(np.where(rng.random((1, 64, 1)) < 0.5, 127, -127).astype(np.int8) * np.ones(K, np.int8))
    weight = QTensor(jnp.full((K, 3), level, jnp.int8), jnp.ones((1, 3), jnp.float32), bits)
    rows = jnp.ones((1, 64), jnp.float32)
    planes = Planes(extreme, extreme, jnp.full((1, 64), limit, jnp.int32), rows, K)
    y = kernel.run(planes, weight, **options(name))
    exact = np.asarray(extreme, np.int64).sum(-1, keepdims=True) * level * (2**limit + 1) * np.ones(3, np.int64)
    np.testing.assert_array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "tile_n", "power"),
    [("sm90", 64, 1), ("sm90", 128, 1), ("sm90_packed", 64, 1), ("sm90", 128, 20), ("sm90_packed", 128, 20)],
)
def test_a_program_of_two_tiles_has_no_race(name, tile_n, power, capfd):
    """Three tiles for two programs: outputs leave by one slot of shared memory (64 columns), or two in turns."""
    rng = np.random.default_rng(9)
    M, K, O = 128, 128, 3 * tile_n
    near, far = (rng.integers(-9, 10, size=(1, M, K)).astype(np.int8) for _ in range(2))
    values = rng.integers(-7, 8, size=(K, O)).astype(np.int8)
    ones = jnp.ones((1, M), jnp.float32)
    planes = Planes(jnp.asarray(near), jnp.asarray(far), jnp.full((1, M), power, jnp.int32), ones, K)
    weight = QTensor(jnp.asarray(values), jnp.ones((1, O), jnp.float32), 4)
    assert (power > kernel.largest_shift(K, 4)) == (power == 20)
    launch = options(name, detect_races=True) | {"tiles": replace(TILES[name], tile_n=tile_n)}
    y = kernel.run(planes, weight, **launch)
    inliers, outliers = ((x.astype(np.int64) @ values.astype(np.int64)).astype(np.float32) for x in (near, far))
    np.testing.assert_array_equal(y, np.ldexp(np.ldexp(inliers, -power) + outliers, power))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in (*TILES, "triton")), ("sm90", "bfloat16")])
def test_a_shift_too_large_for_one_accumulator(name, dtype):
    """Some rows of a tile have one, up to the largest there is; the others give the integers as ever."""
    rng = np.random.default_rng(8)
    B, L, K, O = CASES["mixed"][:4]
    split, weight = random_split(rng, "mixed")
    weight = QTensor(weight.values, jnp.asarray(rng.uniform(0.1, 1, size=(1, O)).astype(np.float32)), 4)
    power = rng.integers(0, 5, size=(B, L)) + rng.choice([0, 8, 119], size=(B, L), p=[0.9, 0.05, 0.05])
    power[1, 7], power[0, :] = 126, 0
    scale = rng.uniform(1e-10, 3e-8, size=L).astype(np.float32)
    levels = split.inlier_q, split.outlier_q, jnp.asarray(np.ldexp(scale, power)), split.mask, jnp.asarray(scale)
    split = OutlierSplit.from_levels(*levels, pow2=True)
    tile = 128 if name == "triton" else TILES[name].tile_m
    assert kernel.largest_shifts(jnp.asarray(power.reshape(-1)), tile).max() > kernel.largest_shift(K, 4)
    y, expected = (np.asarray(product(n, dtype=dtype)(split, weight)) for n in (name, "xla"))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(y, expected)


def test_shifts_are_the_powers_of_the_scales():
    scale = np.random.default_rng(4).uniform(0.01, 3, size=5).astype(np.float32)
    power = np.array([[0, 1, 5, 40, 126]])
    outlier_scale = np.ldexp(scale[None], power).astype(np.float32)
    q = jnp.zeros((1, 5, 2), jnp.int8)
    split = OutlierSplit(q, q, jnp.asarray(outlier_scale), q > 0, jnp.asarray(scale), True)
    planes = for_product(split)
    np.testing.assert_array_equal(planes.shift, power)
    np.testing.assert_array_equal(planes.row_scale, scale[None])


def test_shifts_come_without_a_division():
    """XLA's on a GPU may return the float below a power of two, and a shift would be one too small."""
    split, _ = random_split(np.random.default_rng(4), "mixed")
    assert "stablehlo.divide" not in jax.jit(for_product).lower(split).as_text()


@pytest.mark.parametrize(
    ("M", "tile_m", "expected"), [(384, 128, [6, 7, 0]), (270, 64, [6, 0, 0, 7, 7]), (64, 64, [6])]
)
def test_outliers_are_read_where_a_tile_holds_a_shift(M, tile_m, expected):
    """At rows 63 and 213; the last tile of 270 rows starts at 206."""
    shift = np.zeros(M, np.int32)
    for row, power in ((63, 6), (213, 7)):
        shift[row : row + 1] = power
    assert kernel.largest_shifts(jnp.asarray(shift), tile_m).tolist() == expected


def test_reasons_against_a_call():
    split, weight = random_split(np.random.default_rng(6), "small")
    planes = for_product(split)
    assert "NVIDIA" in kernel.supports(planes, weight, None, jnp.bfloat16)
    assert "not float16" in kernel.supports(planes, weight, None, jnp.dtype(jnp.float16))
    assert "two accumulators" in kernel.supports(for_product(replace(split, pow2=False)), weight, None, jnp.float32)
    floats = replace(split, far=split.far.astype(jnp.float32), pow2=False)
    assert "NVIDIA" in kernel.supports(for_product(floats), weight, None, jnp.float32)
    grouped = QTensor(weight.values, jnp.ones((3, 20), jnp.float32), 4, 11)
    assert "groups" in kernel.supports(planes, grouped, None, jnp.float32)
    with pytest.raises(ValueError, match="NVIDIA"):
        matmul.outlier_matmul(split, weight, implementation="mosaic_gpu")
    assert (target_of("9.0"), target_of("12.1")) == ("sm90", None)


@pytest.mark.parametrize(("outputs", "width"), [(3072, 256), (384, 128), (192, 64), (56, 64)])
def test_the_widest_tile_that_divides_the_outputs(outputs, width):
    assert matmul_tiles("sm90", outputs, 4) == MatmulTiles(128, width, 3, packed=True)
    assert matmul_tiles("sm90", outputs, 8) == MatmulTiles(128, width, 3)
    assert matmul_tiles("sm80", outputs, 4) == MatmulTiles(128, min(width, 128), 3, packed=True)
    assert matmul_tiles("sm89", outputs, 8) == MatmulTiles(64, min(width, 128), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("config", [OutlierConfig(), OutlierConfig(act_bits=8, outlier_bits=16)], ids=["8", "16"])
@pytest.mark.parametrize(
    ("B", "K", "O"), [(32, 768, 3072), (32, 1536, 768), (32, 192, 384), (1, 384, 768), (7, 384, 56)]
)
def test_on_the_device(name, B, K, O, config, bits, request):
    """The compiled kernel itself, at the layers of Vim; of one image where it is emulated.

    Token 50 needs a shift that one accumulator is too small for, and 16-bit outliers beyond the inliers' fixed point.
    """
    rng = np.random.default_rng(7)
    B = 1 if request.config.getoption("emulate") else B
    x = rng.normal(size=(B, 197, K)) * np.where(rng.random((B, 197, K)) < 0.001, 100, 1)
    x = jnp.asarray(x.astype(np.float32))
    scale = search_token_scales(x, config)
    split = split_outliers(x.at[0, 50, 3].set(1e5), scale, config)
    if config.outlier_bits == 8:
        assert split.outlier_scale[0, 50] > scale[50] * 2.0 ** kernel.largest_shift(K, 4)
    weight = quantize_array(jnp.asarray(rng.normal(size=(K, O)).astype(np.float32)), bits)
    bias = jnp.asarray(rng.normal(size=O), jnp.float16)
    for options in ({"dtype": jnp.float32}, {"dtype": jnp.bfloat16, "bias": bias}):
        y, expected = (matmul.outlier_matmul(split, weight, **options, implementation=n) for n in (name, "xla"))
        np.testing.assert_array_equal(y, expected)
