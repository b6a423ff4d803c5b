"""The published split on 4-bit tensor cores: packed inliers and listed outliers give the bits of dense products."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import matmul
from ouromamba_jax.ops import split as outliers
from ouromamba_jax.ops.dispatch import Backend
from ouromamba_jax.ops.qtensor import QTensor, quantize_array
from ouromamba_jax.ops.split import split_for_product, split_outliers
from ouromamba_jax.ops.split_calibration import search_token_scales
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.pallas import device, int4_matmul, outlier_split
from ouromamba_jax.pallas import outlier_matmul as dense
from ouromamba_jax.pallas.tiles import MatmulTiles

TILES = {"sm80": MatmulTiles(tile_m=128, tile_n=64, stages=2), "sm89": MatmulTiles(tile_m=64, tile_n=64, stages=3)}
CONFIG = OutlierConfig()


@pytest.fixture(params=["interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def splitter(request, monkeypatch, capfd):
    """The name of a backend of the split, in which no access races another."""
    run = partial(outlier_split.split, interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setitem(outliers.BACKENDS, "interpreted", Backend(outlier_split.unsuitable, run))
    yield request.param
    assert "RACE" not in "".join(capfd.readouterr())


def activations(seed, B, L, K, *, share=0.01, size=12):
    """Gaussian with some larger entries, and scales of activations without them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, L, K))
    scale = search_token_scales(jnp.asarray(x, jnp.float32), CONFIG)
    return jnp.asarray(x * np.where(rng.random((B, L, K)) < share, size, 1), jnp.float32), scale


def unread(packed):
    """With levels where no product may look, as memory that nobody wrote holds them."""
    noise = jax.random.randint(jax.random.key(0), packed.outliers.shape, -128, 128, jnp.int8)
    written = jnp.arange(packed.outliers.shape[-1])[None, None] < packed.counts[:, :, None]
    return replace(packed, outliers=jnp.where(written, packed.outliers, noise))


def launch(target, tiles, **interpreter):
    return {"target": target, "tiles": tiles, "interpret": plgpu.InterpretGPUParams(**interpreter)}


def run(split, weight, target, *rest, capacity=None, **interpreter):
    options = launch(target, TILES[target], **interpreter)
    return jax.jit(partial(int4_matmul.run, capacity=capacity, **options), static_argnums=3)(split, weight, *rest)


@pytest.mark.parametrize(
    ("L", "K", "config", "dtype"),
    [
        (12, 130, OutlierConfig(), "float32"),
        (7, 256, OutlierConfig(act_bits=3, outlier_bits=6, n_refresh=4), "bfloat16"),
        (11, 33, OutlierConfig(threshold="offline", n_refresh=20), "float32"),
    ],
)
def test_the_split_kernel_packs_the_reference(L, K, config, dtype, splitter):
    x, scale = activations(0, 2, L, K, size=40)
    x, theta = x.at[1, 2, 3].set(-jnp.inf).astype(dtype), jnp.full(L, 3.0)
    call = partial(split_for_product, x, scale, config, theta=theta, packed=True)
    got, expected = call(implementation=splitter), call(implementation="xla")
    assert (got.shape, got.window) == (expected.shape, expected.window) == (x.shape, min(config.n_refresh, L))
    fine = np.isfinite(expected.row_scale)
    assert fine.sum() == fine.size - 1
    assert (expected.shift > 0).any()
    for name in ("inliers", "counts", "shift", "row_scale"):
        a, b = (np.asarray(getattr(split, name)) for split in (got, expected))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a[fine], b[fine], err_msg=name)
    np.testing.assert_array_equal(got.places, expected.places)
    written = (np.arange(expected.outliers.shape[-1]) < np.asarray(expected.counts)[:, :, None]) & fine[:, :, None]
    assert 0 < written.sum() < written.size
    np.testing.assert_array_equal(np.asarray(got.outliers)[written], np.asarray(expected.outliers)[written])
    np.testing.assert_array_equal(np.isnan(got.row_scale), ~fine)


def test_a_packed_split_holds_the_levels_of_the_dense_one():
    x, scale = activations(1, 2, 23, 150, size=40)
    split = split_outliers(x, scale, CONFIG)
    packed = split_for_product(x, scale, CONFIG, packed=True)
    planes, expected = packed.planes(), outliers.for_product(split)
    shifted = np.asarray(expected.shift) > 0
    assert 0 < shifted.mean() < 1
    np.testing.assert_array_equal(planes.near[..., :150], expected.near)
    np.testing.assert_array_equal(planes.read_far, expected.read_far)
    assert not planes.near[..., 150:].any()
    np.testing.assert_array_equal(planes.merge(), expected.merge())
    for sample, window in ((0, 0), (1, 2)):
        mask = np.asarray(split.mask[sample, 10 * window : 10 * window + 10])
        when = np.where(mask.any(0), mask.argmax(0), 10)  # a channel was listed
        order = np.argsort(when, stable=True)[: mask.any(0).sum()]
        assert 1 < len(order) < 150
        assert np.unique(when[order]).size > 1
        np.testing.assert_array_equal(packed.places[sample, window][order], np.arange(len(order)) + 1)
        assert np.count_nonzero(packed.places[sample, window]) == len(order)


CASES = {
    # kind: (B, L, K, O), share of larger entries, their size, the scales' factor, capacity, whether every list fits it
    "mixed": ((3, 67, 300, 70), 0.01, 8, 1, 256, True),
    "shifts": ((3, 67, 300, 70), 0.003, 40, 1, 256, True),
    "inliers": ((1, 128, 256, 64), 0.0, 1, 3, 128, True),
    "outliers": ((1, 128, 256, 64), 1.0, 12, 1 / 8, 256, True),
    "overflow": ((3, 67, 300, 70), 0.05, 8, 1, 128, False),
    "one image": ((1, 5, 33, 20), 0.05, 8, 1, None, True),
}


@pytest.mark.parametrize(("target", "kind"), [(t, k) for t in TILES for k in CASES if (t, k) != ("sm89", "shifts")])
def test_integers_are_exact(target, kind, monkeypatch, capfd):
    """With the compact kernel where lists fit, and the dense one where not: here that gives NaN, so one sees which."""
    (B, L, K, O), share, size, factor, capacity, fits = CASES[kind]
    x, scale = activations(2, B, L, K, share=share, size=size)
    config = replace(CONFIG, threshold="offline" if kind == "outliers" else "online")
    call = x, scale * factor, config
    theta = jnp.zeros(L)  # below everything
    split, packed = split_outliers(*call, theta=theta), split_for_product(*call, theta=theta, packed=True)
    assert (np.asarray(packed.shift) > 0).any() == (kind in ("shifts", "outliers"))
    inlier, outlier = (np.asarray(a).astype(np.int64) for a in (split.inlier_q, split.outlier_q))
    assert split.mask.all() == (kind == "outliers")
    assert split.mask.any() == (kind != "inliers")
    values = np.random.default_rng(3).integers(-7, 8, size=(K, O))
    expected = (inlier + (outlier << np.asarray(packed.shift)[:, :, None])) @ values
    assert np.abs(expected).max() < 2**24  # a float32 holds them all
    packed = replace(unread(packed), row_scale=jnp.ones_like(packed.row_scale))
    weight = QTensor(jnp.asarray(values, jnp.int8), jnp.ones((1, O), jnp.float32), 4)
    call = partial(run, packed, weight, target, capacity=capacity, detect_races=B * L % 64 == 0)
    y = call()
    np.testing.assert_array_equal(np.asarray(y).astype(np.int64), expected)
    monkeypatch.setattr(dense, "run", lambda *_, **__: jnp.full((B, L, O), jnp.nan))
    assert np.isfinite(np.asarray(call())).all() == fits
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("target", "size"), [("sm80", 40), ("sm80", 1e6), ("sm89", 40)])
def test_real_scales_and_a_bias_give_the_bits_of_xla(target, size):
    """Also a shift that one accumulator is too small for, and a token whose scale is NaN."""
    x, scale = activations(4, 3, 67, 150, share=0.002, size=40)
    x = x.at[1, 4, 9].set(jnp.nan).at[2, 1, 5].set(size)
    packed = split_for_product(x, scale, CONFIG, packed=True)
    assert (packed.shift.max() > dense.largest_shift(150, 4)) == (size > 40)
    rng = np.random.default_rng(5)
    weight = quantize_array(jnp.asarray(rng.normal(size=(150, 70)), jnp.float32), 4)
    bias = jnp.asarray(rng.normal(size=70), jnp.float16)
    y = run(unread(packed), weight, target, bias, jnp.dtype("bfloat16"))
    expected = matmul.outlier_matmul(split_outliers(x, scale, CONFIG), weight, bias=bias, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    y, expected = (np.asarray(a, np.float32) for a in (y, expected))
    assert np.isnan(expected).sum() == 70
    np.testing.assert_array_equal(y, expected)


def test_other_backends_take_a_packed_split():
    x, scale = activations(6, 2, 23, 40)
    weight = quantize_array(jnp.asarray(np.random.default_rng(7).normal(size=(40, 9)), jnp.float32), 4)
    y = matmul.outlier_matmul(split_for_product(x, scale, CONFIG, packed=True), weight)
    np.testing.assert_array_equal(y, matmul.outlier_matmul(split_for_product(x, scale, CONFIG), weight))


@pytest.mark.parametrize(("B", "L", "window", "tile_m"), [(3, 67, 10, 64), (2, 5, 2, 16), (1, 256, 300, 128)])
def test_a_tile_has_the_places_of_all_its_windows(B, L, window, tile_m):
    rng = np.random.default_rng(8)
    windows = -(-L // window)
    places = rng.integers(0, 30, size=(B, windows, 24)).astype(np.int16)
    x, scale = activations(9, B, L, 24)
    split = split_for_product(x, scale, replace(CONFIG, n_refresh=window), packed=True)
    first = dense.first_rows(-(-max(B * L, tile_m) // 8) * 8, tile_m)
    tile_rows = first[:, None] + np.arange(tile_m)
    found, member = int4_matmul.places_in_tiles(replace(split, places=jnp.asarray(places), window=window), tile_rows)
    of_tokens = np.repeat(places, window, axis=1)[:, :L].reshape(B * L, -1)
    expected = of_tokens[np.minimum(tile_rows, B * L - 1)]
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(found), member[:, :, None], axis=1), expected)
    np.testing.assert_array_equal((np.asarray(found) > 0).any(1), (expected > 0).any(1))


def test_reasons_against_a_call(monkeypatch):
    x, scale = activations(10, 1, 6, 24)
    packed, planes = (split_for_product(x, scale, CONFIG, packed=p) for p in (True, False))
    weight = QTensor(jnp.ones((24, 3), jnp.int8), jnp.ones((1, 3)), 4)
    dtype = jnp.dtype("float32")
    assert "packed=True" in int4_matmul.supports(planes, weight, None, dtype)
    assert "leave out packed=True" in dense.supports(packed, weight, None, dtype)
    assert "not 8" in int4_matmul.supports(packed, replace(weight, bits=8), None, dtype)
    assert "groups" in int4_matmul.supports(packed, replace(weight, scale=jnp.ones((2, 3)), group=12), None, dtype)
    with pytest.raises(ValueError, match="NVIDIA"):
        matmul.outlier_matmul(packed, weight, implementation="mosaic_gpu_int4")
    for target, reason in (("sm90", "Hopper"), ("sm80", None), ("sm89", None)):
        monkeypatch.setattr(device, "device_reason", lambda: None)
        monkeypatch.setattr(device, "device_target", lambda target=target: target)
        found = int4_matmul.supports(packed, weight, None, dtype)
        assert found is None if reason is None else found.startswith(reason)
    for config in (OutlierConfig(act_bits=5), OutlierConfig(outlier_scale="free"), OutlierConfig(outlier_bits=16)):
        with pytest.raises(ValueError, match="cannot be packed"):
            split_for_product(x, scale, config, packed=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "K", "O"), [(32, 768, 3072), (32, 1536, 768), (1, 384, 768), (7, 384, 56)])
def test_on_the_device(B, K, O, request, monkeypatch):
    """Split and product as compiled, at the layers of Vim; of one image where it is emulated.

    First by the compact kernel, the dense one being NaN; then a shift needs the latter.
    """
    B = 1 if request.config.getoption("emulate") else B
    x, scale = activations(11, B, 197, K, share=0.0003)
    scale = 2 * scale  # of which Gaussians hold no outlier, so that the lists fit
    packed = split_for_product(x, scale, CONFIG, packed=True)
    weight = quantize_array(jnp.asarray(np.random.default_rng(12).normal(size=(K, O)), jnp.float32), 4)
    if reason := int4_matmul.supports(packed, weight, None, jnp.dtype("float32")):
        pytest.skip(reason)
    for entry, kernel in ((1.0, lambda *_, **__: jnp.full((B, 197, O), jnp.nan)), (1e5, dense.run)):
        monkeypatch.setattr(dense, "run", kernel)
        jax.clear_caches()
        x = x.at[0, 50, 3].set(entry)
        packed = split_for_product(x, scale, CONFIG, packed=True)
        assert packed.places.any()
        y = matmul.outlier_matmul(packed, weight, implementation="mosaic_gpu_int4")
        expected = matmul.outlier_matmul(split_outliers(x, scale, CONFIG), weight, implementation="xla")
        np.testing.assert_array_equal(y, expected)
