"""What every family of models must do, checked on a small one of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tolerances import BFLOAT16_LOGITS, REORDERED

from ouromamba_jax.checkpoint import load, save
from ouromamba_jax.convert import from_torch
from ouromamba_jax.models import VisionModel
from ouromamba_jax.quantize import QuantConfig, QuantRule, quantize


def check_that_samples_do_not_mix(model: VisionModel, run: Any, x: jax.Array) -> None:
    """`run` is the jitted `pure(model)[0]`."""
    state = nnx.state(model)
    logits, other = run(state, x), run(state, x.at[0].multiply(2.0))
    np.testing.assert_allclose(run(state, x[::-1]), logits[::-1], rtol=0, atol=REORDERED)
    np.testing.assert_array_equal(other[1:], logits[1:])
    assert not np.allclose(other[0], logits[0], rtol=0, atol=REORDERED)


def check_other_types(name: str, weights: dict[str, np.ndarray], fields: dict[str, Any], x: jax.Array) -> None:
    """bfloat16 computes nearly the same, and is stored if asked for; logits stay float32."""
    expected = jax.jit(from_torch(name, weights, **fields))(x)
    logits = jax.jit(from_torch(name, weights, dtype=jnp.bfloat16, **fields))(x)
    assert logits.dtype == jnp.float32
    assert float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)) < BFLOAT16_LOGITS
    stored = from_torch(name, weights, param_dtype=jnp.bfloat16, **fields)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(stored, x).dtype == jnp.float32


def check_saved_and_loaded(model: VisionModel, folder: Path) -> None:
    save(folder, model)
    loaded = load(folder)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))


def sites_of(model: nnx.Module) -> set[str]:
    """Every matmul and operand that rounding must reach, read off the parameters; what a quantised model left out.

    A kernel is a matrix unless a depthwise convolution holds it, A_log belongs to a scan, and after a qkv kernel come
    the two products of attention.
    """
    sites = set()
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        *parents, leaf = map(str, path)
        module, above = ".".join(parents), ".".join(parents[:-1])
        if leaf == "kernel" and not parents[-1].startswith("conv"):
            sites.add(module)
            if parents[-1] == "qkv":
                sites |= {f"{above}.attention.{name}" for name in ("q", "k", "v", "probs")}
        elif leaf == "A_log":
            sites |= {f"{module}.{name}" for name in ("delta", "B", "C", "A", "D")}
    return sites


def published_matrices(weights: dict[str, np.ndarray]) -> int:
    """Matrices in a published checkpoint: of linear layers and dense convolutions; stacked ones count one by one."""
    ranks = [w.shape for name, w in weights.items() if name.endswith("weight") and w.ndim > 1]
    return sum(s[0] if len(s) == 3 else 1 for s in ranks if len(s) == 2 or s[1] > 1)  # depthwise: one input each


def check_that_no_block_is_skipped(model: VisionModel, weights: dict[str, np.ndarray], images: jax.Array) -> None:
    """`model`, made from published `weights`, is quantised whole; and this would show if a block were left out."""
    everything = sites_of(model)
    # The settings decide how a site is rounded, not whether: these compile fastest.
    config = QuantConfig(scale_search="max", detection="none", tune_epochs=0)
    low, report = quantize(model, images, config)
    assert sorted(site.path for site in report.sites) == sorted(everything)
    assert sum(site.kind == "matmul" for site in report.sites) == published_matrices(weights)
    assert not sites_of(low)
    last = f"blocks.{len(model.blocks) - 1}."
    low, report = quantize(model, images, dataclasses.replace(config, rules=(QuantRule(f"^{last}", skip=True),)))
    left = {path for path in everything if path.startswith(last)}
    assert left
    assert sites_of(low) == everything - {site.path for site in report.sites} == left
