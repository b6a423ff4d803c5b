"""kSQ-VMM on every family: which scales are searched, and which widths its rules give."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import FAMILIES, float_model, heavy_tailed, images, modules_of
from flax import nnx

from ouromamba_jax.baselines import quantize_baseline
from ouromamba_jax.baselines.base import EDGES
from ouromamba_jax.baselines.ksq_grids import interval
from ouromamba_jax.baselines.ksq_vmm import KSQScan, RoundedLinear, RoundedModule
from ouromamba_jax.models.layers import RMSNorm
from ouromamba_jax.quantize import QuantRule
from ouromamba_jax.quantize.modules import iter_sites

PATCHES = {
    "vim": {"stem.proj"},
    "vmamba": {"stem.first.proj", "stem.second.proj", "blocks.1.downsample.proj"},
    "mambavision": {"stem.first.proj", "stem.second.proj", "blocks.1.downsample.proj"},
}
"""The convolutions that make patches."""


@cache
def low(family: str, **fields) -> nnx.Module:
    x = images(count=3) if family == "vim" else heavy_tailed(3, (3, 16, 16, 3))
    return quantize_baseline(float_model(family), x, "ksq_vmm", weight_bits=4, act_bits=4, **fields)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_weights_of_patch_convolutions_take_their_range(family):
    """A search never ends at the range itself, which is none of its candidates."""
    modules, by_range = modules_of(low(family)), set()
    linears = {path: site for path, site in iter_sites(float_model(family)) if isinstance(site, nnx.Linear)}
    for path, linear in linears.items():
        module = modules[path]
        assert isinstance(module, RoundedLinear)
        covering = interval(jnp.max(jnp.abs(linear.kernel[...])), module.levels.bits)
        if module.weight_scale[...] == covering:
            by_range.add(path)
    assert "head.proj" in linears
    assert by_range == PATCHES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_convolutions_of_stem_and_head_have_8_bits(family):
    """As their linear layers have. What is rounded there needs more levels than 4 bits have."""
    model = low(family)
    bits = {path: module.bits for path, module in modules_of(model).items() if isinstance(module, RoundedModule)}
    assert bits == {path: 8 if path.startswith(("stem.", "head.")) else 4 for path in bits}
    assert {path.split(".")[0] for path in bits} == {"blocks", "head"} | ({"stem"} if family == "vmamba" else set())
    norm = model.head.norm
    y = norm(heavy_tailed(5, (6, norm.inner.scale.shape[0])))
    levels = np.asarray(y / norm.out_scale[...])
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert 8 < np.abs(levels).max() <= 128


def test_rules_reach_what_is_no_site():
    rules = (QuantRule(r"^head\.", skip=True), QuantRule(r"^blocks\.0\.", act_bits=6), *EDGES)
    model = low("vim", rules=rules)
    assert type(model.head.norm) is RMSNorm
    assert type(model.head.proj) is nnx.Linear
    block = model.blocks[0]
    assert isinstance(block.mixer.scan, KSQScan)
    assert block.norm.bits == block.mixer.directions[0].conv.bits == block.mixer.scan.bits == 6
    assert block.mixer.out_proj.bits == (4, 6)
    assert model.stem.proj.bits == (8, 8)
