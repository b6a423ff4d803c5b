"""The trainable stand-ins: against the integers they stand for, the gradient of every scale, and the tuning."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantising import calibrated, float_model, images, module_at, stage_problem
from tolerances import FAKE_AGAINST_INTEGER

from ouromamba_jax import QuantConfig, QuantRule
from ouromamba_jax.quantize import OPERANDS, QuantSelectiveScan
from ouromamba_jax.quantize.kinds import install_fakes, kind_of
from ouromamba_jax.quantize.sites import set_module
from ouromamba_jax.quantize.stages import replace_sites
from ouromamba_jax.quantize.tune import log_factors, stage_loss, tune_scales, update_of

AGREEMENT = [
    ("w4a4", {}, False),
    *(
        pytest.param(name, fields, shifted, marks=pytest.mark.slow)
        for name, fields, shifted in (
            ("w4a4", dict(operands=OPERANDS, rules=()), True),
            ("w8a8", {}, False),
            ("w4a8", {}, False),
            ("w6a6", {}, False),
            ("w4a4", dict(detection="static"), False),
            ("w4a4", dict(detection="none"), False),
            ("w8a8", dict(detection="none"), False),
            ("w4a4", dict(weight_group=2, rules=()), False),
            ("w4a4", dict(operands=()), False),
            ("w4a4", dict(rules=(QuantRule("x_proj|scan", skip=True),)), False),
            ("w4a4", dict(act_bits=None, rules=()), False),
        )
    ),
]


class Beside:
    """A quantised site that also notes what its trainable stand-in makes of the same inputs."""

    def __init__(self, site, fake, path: str, pairs: dict[str, tuple[jax.Array, jax.Array]]):
        self.site, self.fake, self.path, self.pairs = site, fake, path, pairs

    def __call__(self, *inputs):
        y = self.site(*inputs)
        if not isinstance(self.site, QuantSelectiveScan):
            self.pairs[self.path] = self.fake(*inputs), y
            return y
        self.pairs[self.path] = self.fake(*inputs).y, y.y
        operands = zip(self.fake.operands(*inputs), self.site.operands(*inputs), strict=True)
        self.pairs |= {f"{self.path} {k}": v for k, v in zip(("u", "delta", *"ABCD"), operands, strict=True)}
        return y


@pytest.mark.parametrize(("name", "fields", "shifted"), AGREEMENT)
def test_fake_and_integer_paths_agree(name, fields, shifted):
    """With the same scales the trainable stand-ins compute what the quantised model computes.

    Every site, on what enters it in the quantised model; and the logits of at least two images. A rounding by which two
    sites differ may carry an entry at the next one across the edge of a level: in one image of ten, by the kind of CPU.
    """
    settings = dict(float_dtype="float32", scale_search="max", **fields)
    config = dataclasses.replace(QuantConfig.preset(name), **settings)
    model, x = float_model(), images(1)
    specs, found, _ = calibrated(model, x, config, shifted=shifted)
    sites = {path: module_at(model, path) for path in specs}
    modules = {path: kind_of(site).make(site, specs[path], found[path]) for path, site in sites.items()}
    (graphdef, state), (low_graphdef, low_state) = nnx.split(model), nnx.split(replace_sites(model, modules))

    @jax.jit
    def both(state, low_state, found, x):
        exact = nnx.merge(graphdef, state)(x)
        fake, real = install_fakes(nnx.merge(graphdef, state), specs, found), nnx.merge(low_graphdef, low_state)
        pairs = {}
        for path in specs:
            set_module(real, path, Beside(module_at(real, path), module_at(fake, path), path, pairs))
        return exact, fake(x), real(x), pairs

    exact, fake, real, pairs = both(state, low_state, found, x)
    assert len(pairs) >= len(specs)
    for path, (one, other) in pairs.items():
        assert float(jnp.abs(one - other).max()) <= FAKE_AGAINST_INTEGER * float(jnp.abs(one).max()), path
        assert float(jnp.std(one)) > 0, path
    difference, quantisation = (np.sort(jnp.abs(fake - other).max(axis=1)) for other in (real, exact))
    assert difference[1] <= FAKE_AGAINST_INTEGER * float(jnp.abs(fake).max())
    assert difference[-1] < 0.5 * quantisation[0]
    assert quantisation[0] > 1e-3


@partial(jax.jit, static_argnums=(0, 1))
def gradients(graphdef, specs, state, found, factors, x, target):
    return jax.grad(stage_loss, argnums=4)(graphdef, specs, state, found, factors, x, target)


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("stem", ()),
        ("blocks.0", ("delta", "B", "C", "A", "D")),
        pytest.param("blocks.0", OPERANDS, marks=pytest.mark.slow),
        ("head", ()),
    ],
)
def test_every_scale_receives_gradient(name, operands):
    """Every entry of every scale: tokens, output channels, directions, states; none is left as it was found."""
    stage, specs, found, x, out = stage_problem(name, operands)
    graphdef, state = nnx.split(stage)
    factors = log_factors(found)
    grads = gradients(graphdef, tuple(specs.items()), state, found, factors, x, update_of(out, x))
    assert jax.tree.structure(grads) == jax.tree.structure(factors)
    assert {path: set(group) for path, group in grads.items()} == {path: set(group) for path, group in found.items()}
    for (path, value), zero in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(factors), strict=True):
        assert value.shape == zero.shape
        assert bool(jnp.isfinite(value).all()), path
        assert bool((value != 0).all()), (path, np.argwhere(np.asarray(value) == 0))


def test_tuning_lowers_the_loss_and_moves_every_scale():
    stage, specs, found, x, out = stage_problem("blocks.0", ("delta", "B", "C", "A", "D"))
    config = QuantConfig(tune_epochs=25, batch_size=len(x), tune_learning_rate=0.03)
    target = update_of(out, x)
    tuned, losses = tune_scales(stage, specs, found, x, target, config)
    assert len(losses) == 25
    assert losses[-1] < 0.8 * losses[0], losses
    assert jax.tree.structure(tuned) == jax.tree.structure(found)
    for (path, before), after in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(tuned), strict=True):
        is_threshold = getattr(path[-1], "name", "") == "theta"
        assert bool((after == before).all() if is_threshold else (after != before).all()), path
        assert bool((after > 0).all()), path
    again = tune_scales(stage, specs, found, x, target, config)
    assert again[1] == losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again[0], tuned))
