"""The kernels of the split, and of an activation with its split, in interpret mode: XLA's levels, no races."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import heavy_tailed, normal
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import producers, split
from ouromamba_jax.ops.split import OutlierConfig, Split, split_outliers
from ouromamba_jax.pallas import outlier_split as kernel

LENGTH = 23  # of windows of 10, the last of 3


@cache
def compiled(config, shifted, races=False):
    interpret = plgpu.InterpretGPUParams(detect_races=races)

    def ours(x, scale, theta, shift=None):
        return split._mosaic_gpu(x, scale, config, theta=theta, shift=shift, channels=None, interpret=interpret)

    return jax.jit(ours)


def assert_equal(got: Split, expected: Split):
    assert (got.high is None) == (expected.high is None)
    for name in ("low", "high", "first"):
        a, b = getattr(got, name), getattr(expected, name)
        if b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=name)


def inputs(kind, channels, seed=0):
    """(x, scale, theta); scales that q = 7 levels of fit most entries."""
    x = heavy_tailed(seed, (2, LENGTH, channels)) * (4 if kind == "heavy" else 1)
    scale = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.4, LENGTH), jnp.float32)
    theta = {"inliers": 1e3, "outliers": 0.0}.get(kind, 1.5) * jnp.ones(LENGTH)
    if kind == "outliers":
        scale = scale / 1e3
    if kind == "broken":
        x = x.at[0, 3, 0].set(jnp.nan).at[1, 20, 0].set(jnp.inf).at[1, 2, channels - 1].set(-jnp.inf)
    return x, scale, theta


KINDS = ("random", "heavy", "inliers", "outliers", "broken")


@pytest.mark.parametrize(
    ("act_bits", "outlier_bits", "channels"),
    [
        (4, 8, 130),
        pytest.param(8, 16, 200, marks=pytest.mark.kernels),
        *(pytest.param(bits, 8, 96, marks=pytest.mark.kernels) for bits in (2, 3, 5, 6, 7, 8)),
        pytest.param(2, 16, 1, marks=pytest.mark.kernels),
        pytest.param(4, 4, 1, marks=pytest.mark.kernels),
    ],
)
def test_levels_are_those_of_xla(act_bits, outlier_bits, channels):
    config = OutlierConfig(act_bits, outlier_bits)
    shares = []
    for kind in KINDS:
        x, scale, theta = inputs(kind, channels)
        expected = split_outliers(x, scale, config, theta=theta, implementation="xla")
        assert_equal(compiled(config, False)(x, scale, theta), expected)
        shares.append(float(expected.listed().mean()))
    assert shares[2] < 0.2 < 0.9 < shares[3]


@pytest.mark.kernels
@pytest.mark.parametrize(("act_bits", "channels"), [(4, 130), (8, 20)])
def test_a_second_byte(act_bits, channels):
    config, shift = OutlierConfig(act_bits, 8), jnp.arange(LENGTH, dtype=jnp.int8) % 9
    for kind in KINDS:
        x, scale, theta = inputs(kind, channels)
        call = x, scale, theta, shift
        expected = split_outliers(x, scale, config, theta=theta, shift=shift, implementation="xla")
        assert_equal(compiled(config, True)(*call), expected)
    assert np.abs(expected.levels()).max() > 127


@pytest.mark.kernels
def test_nothing_listed():
    config = OutlierConfig(8, 8, detection="none")
    for kind in KINDS:
        x, scale, _ = inputs(kind, 20)
        expected = split_outliers(x, scale, config, implementation="xla")
        assert_equal(compiled(config, False)(x, scale, None), expected)
        assert not expected.listed().any()


@pytest.mark.kernels
@pytest.mark.parametrize(("window", "dtype"), [(13, "bfloat16"), (200, "float32"), (1, "float32")])
def test_other_windows(window, dtype):
    config = OutlierConfig(n_refresh=window)
    x, scale, theta = inputs("heavy", 20)
    x = x.astype(dtype)
    expected = split_outliers(x, scale, config, theta=theta, implementation="xla")
    assert_equal(compiled(config, False)(x, scale, theta), expected)


@pytest.mark.kernels
def test_no_access_races_another(capfd):
    """Of whole blocks of channels; a ragged one is written twice, alike."""
    x, scale, theta = inputs("heavy", 256)
    got = compiled(OutlierConfig(), False, races=True)(x, scale, theta)
    assert_equal(got, split_outliers(x, scale, OutlierConfig(), theta=theta, implementation="xla"))
    assert "RACE" not in "".join(capfd.readouterr())


def test_reasons_against_a_call():
    x = normal(0, (1, 4, 3))
    assert "NVIDIA" in kernel.supports(x, OutlierConfig(), theta=None)
    assert "static" in kernel.supports(x, OutlierConfig(detection="static"))
    assert "nothing" in kernel.supports(x[:0], OutlierConfig())
    with pytest.raises(ValueError, match="NVIDIA"):
        split_outliers(x, jnp.ones(4), OutlierConfig(), implementation="mosaic_gpu")


def vector(seed, channels, dtype="float32"):
    return normal(seed, (channels,), dtype)


def producer_calls(C, dtype="float32"):
    """{name: (producer, arrays, options)} on 12 tokens of C channels."""
    kind = dict(dtype=jnp.dtype(dtype))

    def x(seed, *shape):
        return heavy_tailed(seed, shape).astype(dtype)

    conv = x(1, 2, 12, 2 * C), normal(2, (4, C), dtype), vector(3, C, dtype)
    norm = 1 + 0.1 * vector(4, C), vector(5, C)
    return {
        "rms_norm": (producers.rms_norm, (x(0, 2, 12, C), norm[0]), dict(eps=1e-5, **kind)),
        "layer_norm": (producers.layer_norm, (x(0, 2, 3, 4, C), *norm), dict(eps=1e-5, **kind)),
        "merged_routes": (producers.merged_routes, (x(0, 2, 12, 4, C), *norm), dict(grid=(3, 4), eps=1e-5, **kind)),
        "gelu": (producers.gelu, (x(0, 2, 12, C),), dict(approximate=False)),
        "tanh gelu": (producers.gelu, (x(0, 2, 12, C),), dict(approximate=True)),
        "conv_silu": (producers.conv_silu, conv, dict(start=C, reverse=True, **kind)),
        "centred conv_silu": (producers.conv_silu, (*conv[:2], None), dict(causal=False, **kind)),
        "route": (producers.route, (x(0, 2, 3, 4, C),), dict(transpose=True, reverse=True)),
        "gated_mean": (producers.gated_mean, (x(0, 2, 12, 2, C), conv[0]), dict(start=C)),
        "beside_conv_silu": (producers.beside_conv_silu, (x(0, 2, 12, C), *conv), dict(start=C, causal=False, **kind)),
        "patches3x3": (producers.patches3x3, (x(0, 2, 5, 7, C),), dict(stride=2, **kind)),
        "patches3x3 of a GELU": (producers.patches3x3, (x(0, 2, 5, 7, C),), dict(stride=2, tanh_gelu=True, **kind)),
    }


def cropped(split: Split, like: Split) -> Split:
    """Without the channels that no product reads."""
    return replace(split, low=split.low[..., : like.shape[-1]])


ROWS = ("rms_norm", "layer_norm", "merged_routes")
CALLS = [
    *((name, C) for name in ROWS for C in (96, 200)),
    *((name, 96) for name in producer_calls(1) if name not in ROWS),
    ("gelu", 200),
    ("route", 130),
]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        call if call in (("rms_norm", 200), ("gelu", 96)) else pytest.param(*call, marks=pytest.mark.kernels)
        for call in CALLS
    ],
)
def test_an_activation_made_with_its_split(name, channels):
    """XLA's levels but where sums or transcendental functions round an entry at a tie elsewhere."""
    producer, arrays, options = producer_calls(channels)[name]
    tokens = producers._xla(producer, arrays, options, jnp.ones(12), OutlierConfig(), keep=True)[1].size
    tokens = tokens // 2 // (9 if name.startswith("patches3x3") else 2 if name == "beside_conv_silu" else 1) // channels
    scale = jnp.linspace(0.1, 0.3, tokens)
    call = producer, arrays, options, scale, OutlierConfig()
    keep = name not in ROWS
    calibrated = dict(theta=10 * scale, shift=None, channels=None, keep=keep)
    expected, made = producers._xla(*call, **calibrated)
    listed = np.abs(expected.levels()) > 7
    got, also = producers._mosaic_gpu(*call, **calibrated, interpret=plgpu.InterpretGPUParams())
    assert 0.02 < np.mean(listed) < 0.98
    assert got.low.shape[:2] == expected.low.shape[:2]
    got = cropped(got, expected)
    assert np.mean(got.low != expected.low) < 1e-3
    assert np.abs(got.levels() - expected.levels()).max() <= 1
    if keep:
        np.testing.assert_allclose(also, made, rtol=1e-5, atol=1e-5)


def test_reasons_against_a_producer():
    producer, arrays, options = producer_calls(20)["rms_norm"]
    call = arrays, options, jnp.ones(12), OutlierConfig()
    assert "NVIDIA" in producers.kernel.supports(producer, *call, keep=False)
    assert "not written" in producers.kernel.supports(producer, *call, keep=True)
    assert "no kernel for sin" in producers.kernel.supports(jnp.sin, *call, keep=False)
    with pytest.raises(ValueError, match="NVIDIA"):
        producers.split_after(producer, *call[:2], jnp.ones(12), OutlierConfig(), implementation="mosaic_gpu")
    static = OutlierConfig(detection="static")
    assert "static" in producers.kernel.supports(producer, *call[:3], static, keep=False)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [192, 96])
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_on_the_device(channels, outlier_bits):
    """The compiled kernel itself; division is another one there, so some levels at ties differ by one."""
    config = OutlierConfig(4, outlier_bits)
    for kind in KINDS:
        x, scale, theta = inputs(kind, channels)
        call = partial(split_outliers, x, scale, config, theta=theta)
        got, expected = call(implementation="mosaic_gpu"), call(implementation="xla")
        np.testing.assert_array_equal(got.first, expected.first)
        assert np.abs(got.levels() - expected.levels()).max() <= 1
        assert np.mean(got.levels() != expected.levels()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", producer_calls(1))
def test_producers_on_the_device(name):
    producer, arrays, options = producer_calls(96)[name]
    made = jax.eval_shape(lambda *x: producer(*x, **options), *arrays)
    tokens = made.size // made.shape[0] // made.shape[-1]
    scale = jnp.linspace(0.1, 0.3, tokens)
    call = partial(
        producers.split_after, producer, arrays, options, scale, OutlierConfig(), keep=name not in ROWS, theta=9 * scale
    )
    (got, _), (expected, _) = (call(implementation=name) for name in ("mosaic_gpu", "xla"))
    got = cropped(got, expected)
    assert np.mean(got.levels() != expected.levels()) < 0.01
