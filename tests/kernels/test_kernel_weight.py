"""Weights that lie as the GPU kernels read them: once, when a model is made or loaded, and as good as any QTensor."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from tiny_models import quantised

from ouromamba_jax import checkpoint, memory_report
from ouromamba_jax.data.preprocessing import height_width
from ouromamba_jax.evaluation import bench
from ouromamba_jax.models import pure
from ouromamba_jax.ops.qtensor import QTensor, max_level
from ouromamba_jax.pallas.kernel_weight import (
    INT32_MAX,
    KernelWeight,
    arrange,
    measured,
    pack_halves,
    unpack_halves,
)
from ouromamba_jax.pallas.tiles import MatmulTiles
from ouromamba_jax.quantize import QuantConfig, QuantLinear
from ouromamba_jax.quantize.kinds import prepare_weights

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
def test_levels_decide_whether_one_accumulator_holds_two_bytes(excess):
    """One column of 8-bit levels has the largest sum of magnitudes that int32 allows, or one more."""
    K, largest = 640, INT32_MAX // (127 * 256 + 127)
    levels = np.random.default_rng(4).integers(-60, 61, size=(K, 30))
    levels[:, 7] = (largest + excess) // K
    levels[: (largest + excess) % K, 7] += 1
    assert np.abs(levels).sum(axis=0).argmax() == 7
    laid_out = arrange(QTensor(jnp.asarray(levels, jnp.int8), jnp.ones((1, 30)), 8), TILES)
    assert not laid_out.wide  # by what its levels could be
    assert measured(laid_out).wide == (excess == 0)


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("vim", "w4a4"),
        pytest.param("vim", "w4a8", marks=pytest.mark.slow),
        pytest.param("vim", "w8a8", marks=pytest.mark.slow),
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
        laid_out = layer.layout.get_value()
        assert isinstance(laid_out, KernelWeight)
        assert laid_out.packed == (
            weight.bits == 4 and layer.spec.config.splitting.outlier_bits == 8 and weight.shape[0] % 64 == 0
        )
        assert laid_out.wide
        np.testing.assert_array_equal(laid_out.values, weight.values)
    assert memory_report(model) == memory

    checkpoint.save(tmp_path / "model", model)
    for layer, weight in zip(linears(checkpoint.load(tmp_path / "model")), before, strict=True):
        assert layer.layout is None
        np.testing.assert_array_equal(layer.weight.values, weight.values)
    loaded = on_a_gpu(checkpoint.load, tmp_path / "model")
    for layer, ours in zip(linears(loaded), linears(model), strict=True):
        np.testing.assert_array_equal(layer.layout.get_value().rows, ours.layout.get_value().rows)

    on_a_gpu(prepare_weights, model, capability="8.0")
    prepare_weights(model)  # on a CPU
    for layer, weight in zip(linears(model), before, strict=True):
        assert layer.layout is None
        np.testing.assert_array_equal(layer.weight.values, weight.values)


def test_only_for_backends_that_read_it(on_a_gpu):
    """XLA by preference, and layers that the kernels refuse, keep the matrix alone."""
    config = QuantConfig.preset("w4a4")
    model = quantised(config)
    with bench.preferring("xla"):
        on_a_gpu(prepare_weights, model)
    assert all(layer.layout is None for layer in linears(model))
    model = quantised(replace(config, weight_group=1))
    on_a_gpu(prepare_weights, model)
    inner = [layer for layer in linears(model) if layer.spec.config.act_bits == 4]
    assert inner
    assert all(layer.layout is None for layer in inner)
