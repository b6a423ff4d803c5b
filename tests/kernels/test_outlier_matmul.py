"""The outlier matmul's kernels in interpret mode: every backend gives the exact integers, without races.

Tests marked gpu, here and in the other files, run the compiled kernels on one GPU, in one process (of two, each would
reserve most of its memory): JAX_PLATFORMS=cuda python -m pytest -m gpu -n 0. With --emulate sm80, sm89 or sm90 they run
what was compiled for that architecture on a CPU (tests/helpers/ptx).
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
import triton_interpreter
from draws import heavy_tailed
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import matmul
from ouromamba_jax.ops.qtensor import QTensor, max_level, quantize_array
from ouromamba_jax.ops.split import OutlierConfig, Split, split_outliers
from ouromamba_jax.pallas import device, int4_matmul
from ouromamba_jax.pallas import outlier_matmul as kernel
from ouromamba_jax.pallas.device import target_of
from ouromamba_jax.pallas.kernel_weight import INT32_MAX
from ouromamba_jax.pallas.tiles import MatmulTiles, matmul_tiles

TILES = {
    "sm90": MatmulTiles(tile_m=128, tile_n=64, stages=2),
    "sm90_packed": MatmulTiles(tile_m=128, tile_n=64, stages=3, packed=True),
    "sm80": MatmulTiles(tile_m=128, tile_n=64, stages=2),
    "sm80_packed": MatmulTiles(tile_m=128, tile_n=64, stages=3, packed=True),
    "sm89": MatmulTiles(tile_m=64, tile_n=64, stages=3),
}
INT4 = {"sm80_int4": 256, "sm89_int4": 256, "sm80_full": 128}
"""Channels of a tile's list that the 4-bit kernel has room for: the last has too few."""
BACKENDS = (*TILES, *INT4, "triton")


@cache
def product(name, detect_races=False, dtype="float32"):
    """A backend's product, compiled once for all inputs of the same shapes."""
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    if name == "xla":
        run = matmul.BACKENDS["xla"].run
    elif name == "triton":
        run = partial(kernel.by_accumulator, triton_interpreter.launch)
    elif name in INT4:
        tiles = replace(TILES[name[:4]], packed=False)
        run = partial(int4_matmul.run, target=name[:4], tiles=tiles, capacity=INT4[name], interpret=interpret)
    else:
        run = partial(kernel.run, target=name[:4], tiles=TILES[name], interpret=interpret)
    return jax.jit(lambda split, weight, bias=None: run(split, weight, bias, jnp.dtype(dtype)))


CASES = {
    # kind: (B, L, K, O), share of levels beyond 4 bits, whether levels have two bytes, weight bits
    "mixed": ((3, 67, 300, 70), 0.006, False, 4),
    "inliers": ((3, 67, 300, 70), 0.0, False, 4),
    "outliers": ((1, 128, 256, 64), 1.0, False, 4),
    "one image": ((1, 5, 33, 20), 0.3, False, 4),
    "w8": ((2, 64, 128, 64), 0.05, False, 8),
    "two bytes": ((3, 67, 300, 70), 0.05, True, 4),
    "two products": ((2, 40, 640, 30), 0.05, True, 8),
}


def random_split(kind, seed=0):
    """Levels at their limits, and steps that are powers of two, so that floats are exact."""
    rng = np.random.default_rng(seed)
    (B, L, K, O), share, two_bytes, bits = CASES[kind]
    large = rng.random((B, L, K)) < share
    low = np.where(
        large, rng.choice([-128 if two_bytes else -127, 127, 9], size=(B, L, K)), rng.integers(-7, 8, (B, L, K))
    )
    high = rng.integers(-2, 3, (B, L, K)) * large if two_bytes else None
    planes = (None if x is None else jnp.asarray(x, jnp.int8) for x in (low, high))
    scale = jnp.exp2(jnp.asarray(rng.integers(-2, 3, L), jnp.float32))
    split = Split(*planes, scale, jnp.zeros((B, -(-L // 10), K), jnp.int8), 10)
    levels = rng.integers(-max_level(bits), max_level(bits) + 1, (K, O))
    column_scale = jnp.exp2(jnp.asarray(rng.integers(-2, 3, (1, O)), jnp.float32))
    return split, QTensor(jnp.asarray(levels, jnp.int8), column_scale, bits)


def exact(split, weight):
    total = np.asarray(split.levels(), np.int64) @ np.asarray(weight.values, np.int64)
    assert np.abs(total).max() < 2**24  # a float32 holds them all
    return total * np.asarray(split.scale)[None, :, None] * np.asarray(weight.scale)


def fits(name, kind):
    _, _, two_bytes, bits = CASES[kind]
    if name in INT4:
        return not two_bytes and bits == 4
    return not name.endswith("_packed") or (bits == 4 and not two_bytes)


SENTINELS = (("sm90_packed", "mixed"), ("sm80", "two bytes"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (n, k) if (n, k) in SENTINELS else pytest.param(n, k, marks=pytest.mark.kernels)
        for n in BACKENDS
        for k in CASES
        if fits(n, k)
    ],
)
def test_integers_are_exact(name, kind, capfd):
    """The interpreter raises (jax 0.12) or reports (0.11) accesses that no barrier orders.

    It does so for two equal writes, too, and a ragged number of rows needs them: only one case looks for races.
    """
    split, weight = random_split(kind)
    y = product(name, detect_races=kind == "outliers")(split, weight)
    np.testing.assert_array_equal(y, exact(split, weight))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.kernels
@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("kind", ["mixed", "inliers"])
def test_the_compact_kernel_runs_where_lists_fit(name, kind, monkeypatch):
    """With the dense one giving NaN, so that one sees which ran."""
    split, weight = random_split(kind)
    monkeypatch.setattr(int4_matmul.dense, "launch", lambda *_, **__: jnp.full((3, 67, 70), jnp.nan))
    y = product.__wrapped__(name)(split, weight)
    assert np.isfinite(np.asarray(y)).all() == (name != "sm80_full" or kind == "inliers")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_real_scales_and_a_bias(name, dtype):
    rng = np.random.default_rng(1)
    x = heavy_tailed(1, (3, 67, 150))
    split = split_outliers(x, jnp.asarray(rng.uniform(0.2, 0.4, 67), jnp.float32), OutlierConfig())
    weight = quantize_array(jnp.asarray(rng.normal(size=(150, 70)), jnp.float32), 4)
    bias = jnp.asarray(30 * rng.normal(size=70), "float32" if name == "triton" else "float16")
    y, expected = (product(n, dtype=dtype)(split, weight, bias) for n in (name, "xla"))
    assert y.dtype == dtype
    y, expected = (np.asarray(x, np.float32) for x in (y, expected))
    np.testing.assert_allclose(y, expected, rtol=tolerances.EPILOGUE_GPU[dtype], atol=tolerances.EPILOGUE_GPU[dtype])


@pytest.mark.kernels
@pytest.mark.parametrize("tile_n", [64, 128])
@pytest.mark.parametrize("two_bytes", [False, True])
def test_a_program_of_two_tiles_has_no_race(tile_n, two_bytes, capfd):
    """Three tiles for two programs: outputs leave by one slot of shared memory (64 columns), or two in turns."""
    rng = np.random.default_rng(9)
    low, high = (jnp.asarray(rng.integers(-9, 10, (1, 128, 128)), jnp.int8) for _ in range(2))
    split = Split(low, high if two_bytes else None, jnp.ones(128), low[:, :1], 128)
    weight = QTensor(jnp.asarray(rng.integers(-7, 8, (128, 3 * tile_n)), jnp.int8), jnp.ones((1, 3 * tile_n)), 4)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    y = kernel.run(split, weight, target="sm90", tiles=replace(TILES["sm90"], tile_n=tile_n), interpret=interpret)
    np.testing.assert_array_equal(y, exact(split, weight))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("inputs", [9399, 9400])
def test_two_bytes_at_the_limit_of_an_accumulator(inputs):
    """The largest level and weight everywhere: one launch while int32 holds the sum, else one for each byte."""
    weight = QTensor(jnp.full((inputs, 1), 7, jnp.int8), jnp.ones((1, 1)), 4)
    launched = []

    def launch(split, weight, bias=None, dtype=jnp.float32, residual=None):
        launched.append(split)
        sums = np.asarray(split.levels(), np.int64) @ np.asarray(weight.values, np.int64)
        assert np.abs(sums).max() <= INT32_MAX
        y = jnp.asarray(sums, jnp.float32) * split.scale[None, :, None]
        return y if residual is None else residual + y

    byte = jnp.full((1, 1, inputs), 127, jnp.int8)
    y = kernel.by_accumulator(launch, Split(byte, byte, jnp.ones(1), byte, 1), weight, None, jnp.float32)
    assert len(launched) == (1 if inputs == 9399 else 2)
    np.testing.assert_allclose(y, inputs * 7 * (127 * 256 + 127), rtol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["sm90", "sm80", "xla"])
def test_channels_beyond_the_weights_count_for_nothing(name):
    split, weight = random_split("mixed")
    more = jax.random.randint(jax.random.key(0), (3, 67, 20), -128, 128, jnp.int8)
    wider = replace(split, low=jnp.concatenate([split.low, more], axis=2), first=None)
    y = matmul.outlier_matmul(wider, weight) if name == "xla" else product(name)(wider, weight)
    np.testing.assert_array_equal(y, exact(split, weight))


def test_steps_of_any_tile_lie_side_by_side():
    scale = jnp.arange(5.0)
    more = np.asarray(kernel.periodic(scale, 8))
    for first in range(40):
        np.testing.assert_array_equal(more[first % 5 :][:8], (first + np.arange(8)) % 5)


def test_reasons_against_a_call(monkeypatch):
    split, weight = random_split("one image")
    two_bytes, _ = random_split("two bytes")
    f32 = jnp.dtype("float32")
    assert "NVIDIA" in kernel.supports(split, weight, None, jnp.bfloat16)
    assert "not float16" in kernel.supports(split, weight, None, jnp.dtype(jnp.float16))
    assert "groups" in kernel.supports(split, replace(weight, scale=jnp.ones((3, 20)), group=11), None, f32)
    assert "nothing" in kernel.supports(replace(split, low=split.low[:0]), weight, None, f32)
    wide = QTensor(jnp.zeros((2**18, 1), jnp.int8), jnp.ones((1, 1)), 8)
    assert "overflow" in kernel.supports(split, wide, None, f32)
    assert "not 8" in int4_matmul.supports(split, replace(weight, bits=8), None, f32)
    assert "two bytes" in int4_matmul.supports(two_bytes, weight, None, f32)
    with pytest.raises(ValueError, match="NVIDIA"):
        matmul.outlier_matmul(split, weight, implementation="mosaic_gpu")
    assert (target_of("9.0"), target_of("12.1")) == ("sm90", None)
    for target, reason in (("sm90", "Hopper"), ("sm80", None), ("sm89", None)):
        monkeypatch.setattr(device, "device_reason", lambda: None)
        monkeypatch.setattr(device, "device_target", lambda target=target: target)
        found = int4_matmul.supports(split, weight, None, f32)
        assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(("outputs", "width"), [(3072, 256), (384, 128), (192, 64), (56, 64)])
def test_the_widest_tile_that_divides_the_outputs(outputs, width):
    assert matmul_tiles("sm90", outputs, 4) == MatmulTiles(128, width, 3, packed=True)
    assert matmul_tiles("sm90", outputs, 8) == MatmulTiles(128, width, 3)
    assert matmul_tiles("sm80", outputs, 4) == MatmulTiles(128, min(width, 128), 3, packed=True)
    assert matmul_tiles("sm89", outputs, 8) == MatmulTiles(64, min(width, 128), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_gpu_int4", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize(
    ("B", "K", "O"),
    [(32, 768, 3072), (32, 1536, 768), (32, 192, 384), (1, 384, 768), (7, 384, 56), (2, 96, 8), (2, 160, 80)],
)
def test_on_the_device(name, B, K, O, outlier_bits, bits, request):
    """The compiled kernel itself, at the layers of Vim; of one image where it is emulated."""
    rng = np.random.default_rng(7)
    B = 1 if request.config.getoption("emulate") else B
    config = OutlierConfig(4, outlier_bits)
    x = heavy_tailed(7, (B, 197, K))
    split = split_outliers(x, jnp.full(197, 0.4), config, theta=jnp.full(197, 5.0), implementation="xla")
    weight = quantize_array(jnp.asarray(rng.normal(size=(K, O)), jnp.float32), bits)
    if name == "mosaic_gpu_int4" and (reason := int4_matmul.supports(split, weight, None, jnp.dtype("float32"))):
        pytest.skip(reason)
    bias = jnp.asarray(rng.normal(size=O), jnp.float16)
    for options in ({"dtype": jnp.float32}, {"dtype": jnp.bfloat16, "bias": bias}):
        y, expected = (matmul.outlier_matmul(split, weight, **options, implementation=n) for n in (name, "xla"))
        y, expected = (np.asarray(x, np.float32) for x in (y, expected))
        tolerance = tolerances.EPILOGUE_GPU[jnp.dtype(options["dtype"]).name]
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
