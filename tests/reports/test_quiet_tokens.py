"""Calibration images that never excite some tokens, such as those with bars: steps that serve other images, too."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantising import float_model, images

from ouromamba_jax import OutlierConfig, QuantConfig, quantize
from ouromamba_jax.ops.split_calibration import calibrate, count_quiet


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
    assert count_quiet(found.scale) == 20
    excited = np.asarray(calibrate(jnp.asarray(seen[:, 20:]), config).scale)
    np.testing.assert_array_equal(np.asarray(found.scale)[20:], excited)


def test_tokens_that_differ_keep_their_steps():
    x = np.random.default_rng(1).normal(size=(6, 20, 64)).astype(np.float32)
    louder = x * np.geomspace(1, 6, 20, dtype=np.float32)[:, None]
    config = OutlierConfig()
    ratio = calibrate(jnp.asarray(louder), config).scale / calibrate(jnp.asarray(x), config).scale
    np.testing.assert_allclose(ratio, np.geomspace(1, 6, 20), rtol=0.3)
    assert count_quiet(calibrate(jnp.asarray(louder), config).scale) == 0


def test_an_activation_of_zeros():
    found = calibrate(jnp.zeros((2, 5, 64)), OutlierConfig())
    assert np.isfinite(found.scale).all()
    assert (np.asarray(found.scale) > 0).all()


def test_the_report_warns_of_them():
    config = QuantConfig.preset("w4a4", tune_epochs=0)
    _, fine = quantize(float_model(), images(), config)
    assert fine.warnings() == []
    _, barred = quantize(float_model(), images().at[:, :6].set(0.0), config)
    assert {s.path: s.quiet_tokens > 0 for s in barred.sites if s.path == "stem.proj"} == {"stem.proj": True}
    (warning,) = barred.warnings()
    assert "hardly excite some tokens" in warning
    assert warning in str(barred)
    assert warning in barred.summary()
