"""The published code's asymmetric quantiser for delta, against its recorded outputs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from ouromamba_jax.outlier_types import OutlierConfig
from ouromamba_jax.released import quantize_asymmetric, search_ranges

GOLDEN = np.load(Path(__file__).parent / "golden" / "quant" / "q_act_d_L40.npz")
BITS = {16: 4, 256: 8, 65536: 16}


def config(levels: int, outlier_levels: int) -> OutlierConfig:
    return OutlierConfig(BITS[levels], BITS[outlier_levels], sigma=4.0, outlier_scale="free", spec="released")


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("outlier_levels", [256, 65536])
def test_the_recordings(levels, outlier_levels):
    key, settings = f"a{levels}_o{outlier_levels}_", config(levels, outlier_levels)
    scale, zero = (jnp.asarray(GOLDEN[key + name][0, :, 0]) for name in ("s", "z"))
    found_scale, found_zero = search_ranges(jnp.asarray(GOLDEN["calib"]), settings)
    np.testing.assert_allclose(found_scale, scale, rtol=tolerances.SCALE_ROUNDING)
    np.testing.assert_array_equal(found_zero, zero)
    together, mask = quantize_asymmetric(jnp.asarray(GOLDEN["x"]), scale, zero, settings)
    np.testing.assert_array_equal(mask, GOLDEN[key + "outlier_mask"])
    np.testing.assert_array_equal(together, GOLDEN[key + "out"])
    for b in range(len(GOLDEN["x"])):
        alone, mask = quantize_asymmetric(jnp.asarray(GOLDEN["x"][b : b + 1]), scale, zero, settings)
        np.testing.assert_array_equal(mask[0], GOLDEN[key + "outlier_mask_single"][b])
        np.testing.assert_array_equal(alone[0], GOLDEN[key + "out_single"][b])


def test_gradients_reach_x_and_scale():
    settings = config(16, 256)
    scale, zero = search_ranges(jnp.asarray(GOLDEN["calib"]), settings)
    x = jnp.asarray(GOLDEN["x"])
    weight = jax.random.normal(jax.random.key(0), x.shape)
    loss = lambda x, s: jnp.sum(weight * quantize_asymmetric(x, s, zero, settings)[0])  # noqa: E731
    to_x, to_scale = jax.grad(loss, argnums=(0, 1))(x, scale)
    assert float(jnp.mean((to_x != 0).astype(jnp.float32))) > 0.2
    assert bool((to_scale != 0).all())
