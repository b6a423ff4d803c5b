"""Calibration images that never excite some tokens, such as those with bars, or show nothing: what is made of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantising import float_model, images

from ouromamba_jax import OutlierConfig, QuantConfig, quantize
from ouromamba_jax.ops.split_calibration import calibrate, quiet_tokens
from ouromamba_jax.quantize.run import constant_tokens
from ouromamba_jax.quantize.stages import StageInputs


@pytest.mark.parametrize("faint", [0.0, 1e-6])
@pytest.mark.parametrize("bits", [(4, 8), (8, 16), (8, 8)])
def test_tokens_that_calibration_does_not_excite(bits, faint):
    rng = np.random.default_rng(0)
    seen, new = rng.normal(size=(2, 6, 40, 64)).astype(np.float32)
    seen[:, :20] *= faint  # two windows
    config = OutlierConfig(*bits)
    found = calibrate(jnp.asarray(seen), config)
    error = np.asarray(found.fake(jnp.asarray(new), config)) - new
    parts = slice(20), slice(20, 40)
    quiet, heard = (float((new[:, part] ** 2).sum() / (error[:, part] ** 2).sum()) for part in parts)
    assert 10 * np.log10(quiet) > (1 if bits == (8, 8) else 10)
    assert heard > 30
    np.testing.assert_array_equal(quiet_tokens(found.scale), np.arange(40) < 20)
    excited = np.asarray(calibrate(jnp.asarray(seen[:, 20:]), config).scale)
    np.testing.assert_array_equal(np.asarray(found.scale)[20:], excited)


def test_tokens_that_differ_keep_their_steps():
    x = np.random.default_rng(1).normal(size=(6, 20, 64)).astype(np.float32)
    louder = x * np.geomspace(1, 6, 20, dtype=np.float32)[:, None]
    config = OutlierConfig()
    ratio = calibrate(jnp.asarray(louder), config).scale / calibrate(jnp.asarray(x), config).scale
    np.testing.assert_allclose(ratio, np.geomspace(1, 6, 20), rtol=0.3)
    assert not quiet_tokens(calibrate(jnp.asarray(louder), config).scale).any()


def test_an_activation_of_zeros():
    found = calibrate(jnp.zeros((2, 5, 64)), OutlierConfig())
    assert np.isfinite(found.scale).all()
    assert (np.asarray(found.scale) > 0).all()
    assert quiet_tokens(found.scale).all()


@pytest.fixture(scope="module")
def quantised():
    return lambda x: quantize(float_model(), x, QuantConfig.preset("w4a4", tune_epochs=0))[1]


def test_no_warning_where_nothing_is_quiet(quantised):
    assert quantised(images()).warnings() == []
    stem, x = float_model().stem, images()[:1]
    assert constant_tokens(StageInputs("stem", stem, x, x, {}, 1)) == {}  # of one image every token is the same in all


@pytest.mark.parametrize("bar", [0.0, 2.0], ids=["silent", "loud"])
def test_the_report_warns_of_tokens_without_sound_and_of_constant_ones(bar, quantised):
    barred = quantised(images().at[:, :4].set(bar))
    assert [site.quiet_tokens for site in barred.sites if site.path == "stem.proj"] == [4]  # the first row of patches
    (warning,) = barred.warnings()
    assert "hardly excite some tokens" in warning
    assert warning in str(barred)
    assert warning in barred.summary()


@pytest.mark.parametrize(
    "same", [jnp.zeros((3, 12, 16, 3)), jnp.repeat(images()[:1], 4, axis=0)], ids=["zeros", "one image four times"]
)
def test_the_report_warns_of_images_that_are_all_the_same(same, quantised):
    report = quantised(same)
    assert [site.quiet_tokens for site in report.sites if site.path == "stem.proj"] == [12]
    assert "hardly excite some tokens" in report.warnings()[0]
