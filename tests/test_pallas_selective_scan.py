"""The scan's forward kernel in interpret mode against the XLA implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.scan import selective_scan

CASES = {
    # name: (batch, length, D, N, groups, reverse, with bias, softplus, skip and gate)
    "mamba": (2, 5, 128, 16, 1, False, True),
    "groups": (1, 4, 256, 8, 2, False, True),
    "plain": (1, 7, 128, 1, 1, True, False),
}


def assert_near(value, expected):
    error = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= tolerances.SCAN_VALUE["float32"] * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_scan(name, capfd):
    batch, length, D, N, groups, reverse, full = CASES[name]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    u, delta, z = (normal(batch, length, D) for _ in range(3))
    B, C = (normal(batch, length, groups, N) for _ in range(2))
    A, skip, bias = -jnp.exp(normal(D, N)), normal(D), normal(D)
    options = {"z": z, "delta_bias": bias - 4, "delta_softplus": True} if full else {}
    delta = delta if full else jnp.abs(delta)
    arguments = (u, delta, A, B, C, skip if full else None)
    y, h_last = kernel.forward(
        *arguments, reverse=reverse, interpret=plgpu.InterpretGPUParams(detect_races=True), **options
    )
    expected = selective_scan(*arguments, reverse=reverse, implementation="xla", **options)
    assert_near(y, expected.y)
    assert_near(h_last, expected.h_last)
    assert "RACE" not in "".join(capfd.readouterr())


def test_shapes_that_do_not_fit_are_refused():
    x = jnp.zeros((1, 2, 64))
    B = jnp.zeros((1, 2, 1, 16))
    with pytest.raises(ValueError, match="64 channels"):
        kernel.forward(x, x, jnp.zeros((64, 16)), B, B)
