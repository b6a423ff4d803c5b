"""Tiny quantised models without calibration: every site replaced, levels and scales drawn at random."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ouromamba_jax.models import create_model
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.modules import Levels, Scale, SiteSpec
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.specs import apply_specs

TINY = dict(img_size=(12, 16), patch_size=4, stride=4, embed_dim=20, depth=1, d_state=3, num_classes=7)
TOKENS = 13
"""Two windows of ten tokens; a class token in the middle of a 3 x 4 grid."""


def filled(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Random values of the right kind in every leaf."""
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        shape, dtype = leaf[...].shape, leaf[...].dtype
        is_bool = dtype == jnp.dtype(bool)
        if isinstance(leaf, Levels):
            limit = 2 ** (leaf.bits - 1) - 1
            value = rng.integers(-limit, limit + 1, shape)
            value = -np.abs(value) if path[-1] == "A" else value  # states decay
        elif isinstance(leaf, Scale) and not is_bool:
            value = rng.uniform(0.01, 0.1, shape)
        else:
            value = rng.standard_normal(shape) > 1 if is_bool else rng.standard_normal(shape)
        leaf.set_value(jnp.asarray(value, dtype))
    return model


def quantised(config: QuantConfig, *, skipped: tuple[str, ...] = ()) -> nnx.Module:
    """What `quantize` makes of a tiny Vim; the sites in `skipped` stay float."""
    model = create_model("vim_micro", rngs=nnx.Rngs(2), **TINY)
    specs = {}
    for path, site in iter_sites(model):
        resolved = config.resolve(path)
        if path not in skipped and not (path.endswith(".z") and "z" not in resolved.operands):
            tokens = {"stem.proj": TOKENS - 1, "head.proj": 1}.get(path, TOKENS)
            specs[path] = SiteSpec(resolved, tokens=tokens, channels=20 if isinstance(site, nnx.Linear) else 40)
    model = apply_specs(model, specs)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if isinstance(leaf, nnx.Param):
            leaf.set_value(leaf[...].astype(config.float_dtype))
    return filled(model)
