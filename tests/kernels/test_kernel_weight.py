"""Weights that lie as the GPU kernels read them: once, when a model is made or loaded, and as good as any QTensor."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny_models import FAMILIES, quantised, random_model

from ouromamba_jax import checkpoint, memory_report, quantize
from ouromamba_jax.data.preprocessing import height_width
from ouromamba_jax.evaluation import bench
from ouromamba_jax.models import pure
from ouromamba_jax.ops import matmul
from ouromamba_jax.ops.qtensor import QTensor, max_level
from ouromamba_jax.ops.split import for_product, split_outliers
from ouromamba_jax.ops.split_calibration import search_token_scales
from ouromamba_jax.ops.split_types import LARGEST_FIXED_POINT, OutlierConfig, Planes
from ouromamba_jax.pallas import outlier_matmul as kernel
from ouromamba_jax.pallas.kernel_weight import (
    INT32_MAX,
    KernelWeight,
    arrange,
    measured,
    pack_halves,
    unpack_halves,
)
from ouromamba_jax.pallas.tiles import MatmulTiles, matmul_tiles
from ouromamba_jax.quantize import QuantConfig, QuantLinear
from ouromamba_jax.quantize.modules import prepare_weights

TILES = MatmulTiles(tile_m=128, tile_n=64, stages=2)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Calls within see an H100; none of them runs on it."""

    def call(function, *arguments, capability="9.0"):
        device = SimpleNamespace(platform="gpu", compute_capability=capability, core_count=132)
        with monkeypatch.context() as patch:
            for module in ("device", "outlier_matmul"):
                patch.setattr(f"ouromamba_jax.pallas.{module}.default_device", lambda: device)
            return function(*arguments)

    return call


def random_weight(rng, K, O, bits) -> QTensor:
    levels = rng.integers(-max_level(bits), max_level(bits) + 1, size=(K, O)).astype(np.int8)
    return QTensor(jnp.asarray(levels), jnp.asarray(rng.uniform(0.1, 1, size=(1, O)).astype(np.float32)), bits)


def linears(model) -> list[QuantLinear]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, QuantLinear)]


@pytest.mark.parametrize(("K", "O"), [(150, 70), (33, 20), (128, 64), (1536, 80), (1, 1), (64, 65)])
@pytest.mark.parametrize(("bits", "packed"), [(4, True), (4, False), (3, True), (8, False)])
def test_levels_come_back(K, O, bits, packed):
    weight = random_weight(np.random.default_rng(0), K, O, bits)
    laid_out = arrange(weight, replace(TILES, packed=packed))
    assert laid_out.shape == weight.shape
    assert laid_out.packed == packed
    bytes_of_a_row = (K + -K % 128) // (2 if packed else 1)
    assert laid_out.rows.shape == (O + -O % 64, bytes_of_a_row)
    np.testing.assert_array_equal(laid_out.values, weight.values)
    np.testing.assert_array_equal(laid_out.rows[O:], 0)
    other = arrange(laid_out, replace(TILES, packed=not packed and bits <= 4, tile_n=256))
    np.testing.assert_array_equal(other.values, weight.values)


def test_what_lies_right_stays():
    weight = random_weight(np.random.default_rng(1), 150, 300, 4)
    for packed in (False, True):
        laid_out = arrange(weight, MatmulTiles(128, 128, 3, packed))
        assert arrange(laid_out, MatmulTiles(64, 64, 2, packed)) is laid_out
        assert arrange(laid_out, MatmulTiles(128, 256, 3, packed)) is not laid_out
        assert arrange(laid_out, MatmulTiles(128, 128, 3, not packed)) is not laid_out


def test_halves_of_a_block_share_bytes():
    """Input k and k + 64 of every 128."""
    rows = jnp.asarray(np.random.default_rng(2).integers(-8, 8, size=(5, 256)).astype(np.int8))
    packed = np.asarray(pack_halves(rows)).astype(np.int16) & 255
    for k in (0, 63, 128, 191):
        byte = packed[:, k // 128 * 64 + k % 128]
        np.testing.assert_array_equal(byte & 15, np.asarray(rows[:, k], np.int16) & 15)
        np.testing.assert_array_equal(byte >> 4, np.asarray(rows[:, k + 64], np.int16) & 15)
    np.testing.assert_array_equal(unpack_halves(pack_halves(rows)), rows)


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_a_product_has_the_same_bits(target, outlier_bits):
    """In the kernel, packed where its outliers have 8 bits, and through XLA."""
    rng = np.random.default_rng(3)
    B, L, K, O = 2, 70, 150, 70
    config = OutlierConfig(act_bits=4 if outlier_bits == 8 else 8, outlier_bits=outlier_bits)
    x = rng.normal(size=(B, L, K)) * np.where(rng.random((B, L, K)) < 0.01, 300, 1)
    x = jnp.asarray(x.astype(np.float32))
    split = split_outliers(x, search_token_scales(x, config), config)
    weight = random_weight(rng, K, O, 4)
    tiles = replace(TILES, packed=outlier_bits == 8, stages=3)
    laid_out = arrange(weight, tiles)
    launch = partial(matmul._mosaic_gpu, target=target, tiles=tiles, interpret=plgpu.InterpretGPUParams())
    expected = matmul.outlier_matmul(split, weight)
    np.testing.assert_array_equal(matmul.outlier_matmul(split, laid_out), expected)
    np.testing.assert_array_equal(jax.jit(launch)(for_product(split), laid_out), expected)


def logits(model):
    function, state = pure(model)
    images = normal(0, (2, *height_width(model.config.img_size), 3))
    return jax.jit(function)(state, images)


def test_a_model_gives_the_same_logits_wherever_it_was_prepared(on_a_gpu):
    model = quantised(QuantConfig.preset("w4a4"))
    expected = logits(model)
    on_a_gpu(prepare_weights, model)
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_levels_decide_whether_one_accumulator_holds_16_bit_numbers(target, excess):
    """One column of 8-bit levels has the largest sum of magnitudes that int32 allows, or one more."""
    rng = np.random.default_rng(4)
    K, O, rows = 640, 30, 40
    levels = rng.integers(-60, 61, size=(K, O))
    largest = INT32_MAX // LARGEST_FIXED_POINT
    levels[:, 7] = (largest + excess) // K
    levels[: (largest + excess) % K, 7] += 1
    levels[:, 7] *= rng.choice([-1, 1], size=K)
    assert np.abs(levels).sum(axis=0).argmax() == 7
    scale = jnp.asarray(rng.uniform(0.1, 1, size=(1, O)).astype(np.float32))
    weight = QTensor(jnp.asarray(levels, jnp.int8), scale, 8)
    laid_out = arrange(weight, TILES)
    assert not laid_out.wide  # by what its levels could be
    laid_out = measured(laid_out)
    assert laid_out.wide == (excess == 0)
    launched = []

    def launch(planes, weight, bias=None, **options):
        launched.append(planes.near.shape[0])
        return kernel.run(
            planes, weight, bias, target=target, tiles=TILES, interpret=plgpu.InterpretGPUParams(), **options
        )

    both = rng.integers(-127, 128, size=(2, 1, rows, K))
    both[:, 0, 0] = 127 * np.sign(levels[:, 7])  # the largest numbers, all of one sign in the products
    step = jnp.asarray(rng.uniform(0.1, 1, size=(1, rows)).astype(np.float32))
    shift = jnp.full((1, rows), 8, jnp.int32)
    planes = Planes(*jnp.asarray(both, jnp.int8), shift, step, K, fixed_point=True)
    y = kernel.fixed_point(launch, planes, laid_out)
    assert launched == [1 if excess == 0 else 2]
    np.testing.assert_array_equal(y, matmul._fixed_point_product(planes, weight))


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("vim", "w4a4"),
        ("vim", "w4a8"),
        ("vim", "w8a8"),
        pytest.param("vmamba", "w4a4", marks=pytest.mark.slow),
        pytest.param("mambavision", "w4a4", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_was_prepared_for_a_gpu(family, bits, on_a_gpu, tmp_path):
    """No call lays a weight out again; file and memory are what they were, and it can go back."""
    model = quantised(QuantConfig.preset(bits), family)
    before = [layer.weight for layer in linears(model)]
    memory = memory_report(model)

    on_a_gpu(prepare_weights, model)
    for layer, weight in zip(linears(model), before, strict=True):
        assert isinstance(layer.weight, KernelWeight)
        unpacked = layer.spec.config.splitting.outlier_bits == 16
        tiles = matmul_tiles("sm90", weight.shape[1], 8 if unpacked else weight.bits)
        assert layer.weight.packed == (weight.bits == 4 and not unpacked)
        assert layer.weight.wide
        assert arrange(layer.weight, tiles) is not layer.weight  # a property makes a new one each time
        assert arrange(layer.weight, tiles).rows is layer.weight.rows
    assert memory_report(model) == memory

    checkpoint.save(tmp_path / "model", model)
    for layer, weight in zip(linears(checkpoint.load(tmp_path / "model")), before, strict=True):
        assert isinstance(layer.weight, QTensor)
        np.testing.assert_array_equal(layer.weight.values, weight.values)
    loaded = on_a_gpu(checkpoint.load, tmp_path / "model")
    for layer, ours in zip(linears(loaded), linears(model), strict=True):
        np.testing.assert_array_equal(layer.weight.rows, ours.weight.rows)

    on_a_gpu(prepare_weights, model, capability="8.0")
    prepare_weights(model)  # on a CPU
    for layer, weight in zip(linears(model), before, strict=True):
        assert isinstance(layer.weight, QTensor)
        np.testing.assert_array_equal(layer.weight.values, weight.values)


def test_only_for_backends_that_read_it(on_a_gpu):
    """XLA by preference, and layers that the kernels refuse, keep the matrix."""
    config = QuantConfig.preset("w4a4")
    model = quantised(config)
    with bench.preferring("xla"):
        on_a_gpu(prepare_weights, model)
    assert all(isinstance(layer.weight, QTensor) for layer in linears(model))
    for refused in (replace(config, outlier_scale="free"), replace(config, weight_group=1)):
        model = quantised(refused)
        on_a_gpu(prepare_weights, model)
        inner = [layer for layer in linears(model) if layer.spec.config.act_bits == 4]
        assert inner
        assert all(isinstance(layer.weight, QTensor) for layer in inner)


def test_quantising_ends_with_it(on_a_gpu, monkeypatch):
    """Its own forward passes, here on a CPU, take the matrices."""
    model = random_model("vim_micro", **FAMILIES["vim"])
    images = normal(0, (2, *FAMILIES["vim"]["img_size"], 3))
    seen = []
    monkeypatch.setattr(
        sys.modules["ouromamba_jax.quantize.stages"],
        "prepare_weights",
        lambda model: seen.extend(layer.weight for layer in linears(model)) or on_a_gpu(prepare_weights, model),
    )
    low, _ = quantize(model, images, QuantConfig.preset("w4a4", tune_epochs=0))
    assert seen
    assert all(isinstance(weight, QTensor) for weight in seen)
    for layer, weight in zip(linears(low), seen, strict=True):
        np.testing.assert_array_equal(layer.weight.values, weight.values)
        assert isinstance(layer.weight, KernelWeight)
