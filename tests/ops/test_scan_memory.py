"""The selective scan never holds all of its states, unless they are asked for."""

import jax
import pytest
from scan_inputs import make_inputs
from tiers import slow

from ouromamba_jax import selective_scan

pytestmark = pytest.mark.optimized


def sizes_in(jaxpr):
    """The sizes of all intermediates, those of inner computations included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


@pytest.mark.parametrize("collect", [None, *slow(lambda h: h.mean((1, 2)))], ids=["plain", "collect"])
def test_no_array_of_all_states_is_formed(collect):
    batch, length, channels, d_state = 2, 394, 32, 16
    inputs = make_inputs(batch, length, channels, d_state)
    all_states = batch * length * channels * d_state

    def gradient(collect):
        def loss(x):
            out = selective_scan(**x, delta_softplus=True, collect=collect)
            return out.y.sum() + (0.0 if collect is None else out.states.sum())

        return jax.grad(loss)

    def largest(collect):
        return max(sizes_in(jax.make_jaxpr(gradient(collect))(inputs).jaxpr))

    assert largest(lambda h: h) >= all_states  # the measure does see them where they are asked for
    assert largest(collect) <= all_states / 4
    temporary = jax.jit(gradient(collect)).lower(inputs).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * all_states  # bytes of all states in float32
