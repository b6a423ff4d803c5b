"""Finished stages of a quantisation, kept in a folder: one .npz each, written whole, which names the run it is of."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.files import checksum, read_npz, whole_file
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.report import SiteReport
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import Fitted

Identity = dict[str, str]


def run_identity(model: VisionModel, images: Array | np.ndarray, config: QuantConfig) -> Identity:
    """What the bits of a quantisation depend on, by what to call it where it differs."""
    images = np.asarray(images)
    return {
        "model": f"{model.config} {jnp.dtype(model.dtype).name}",
        "weights": f"{checksum(jax.tree.leaves(nnx.state(model))):08x}",
        "images": f"{images.shape} {checksum([images]):08x}",
        "config": str(config),
        "version of JAX or of this library": f"{jax.__version__} {version('ouromamba_jax')}",
        "kind of device": jax.default_backend(),
    }


def keep_stage(folder: Path, name: str, fitted: Fitted, identity: Identity) -> None:
    """Writes a stage that `quantize` has finished to `folder`."""
    states = {path: nnx.to_flat_state(nnx.state(module)) for path, module in fitted.modules.items()}
    arrays: dict[str, Any] = {_key(path, key): leaf[...] for path, flat in states.items() for key, leaf in flat}
    modules: dict[str, Any] = fitted.modules
    facts = {
        "identity": identity,
        "specs": {path: module.spec.to_json() for path, module in modules.items()},
        "reports": [dataclasses.asdict(report) for report in fitted.reports],
        "losses": fitted.losses,
    }
    with whole_file(folder / f"{name}.npz") as file:
        np.savez(file, facts=np.asarray(json.dumps(facts)), **arrays)


def kept_stage(folder: Path, name: str, stage: nnx.Module, identity: Identity) -> Fitted | None:
    """What `keep_stage` wrote of a float stage; None if it wrote nothing.

    Raises:
      ValueError: if the file is damaged, or of another run.
    """
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    arrays = read_npz(path)
    try:
        facts = json.loads(str(arrays["facts"]))
        other = [what for what, value in identity.items() if facts["identity"][what] != value]
        if other:
            raise ValueError(f"{folder} holds an unfinished run with another {other[0]}; delete that folder.")
        specs = {site: SiteSpec.from_json(spec) for site, spec in facts["specs"].items()}
        sites = dict(iter_sites(stage))
        modules = {site: _restored(site, sites[site], spec, arrays) for site, spec in specs.items()}
        reports = tuple(SiteReport(**{**report, "rules": ()}) for report in facts["reports"])
        return Fitted(modules, reports, tuple(facts["losses"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a stage of a quantisation ({error}); delete it.") from error


def _restored(path: str, site: Any, spec: SiteSpec, arrays: dict[str, np.ndarray]) -> nnx.Module:
    kind = kind_of(site)
    graphdef, state = nnx.split(kind.make(site, spec, kind.empty(site, spec)))
    flat = [(key, leaf.replace(_value(arrays[_key(path, key)], leaf))) for key, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _value(stored: np.ndarray, leaf: nnx.Variable) -> Array:
    """An array in its type: NumPy's format has no bfloat16, and gives two bytes each instead."""
    return jnp.asarray(stored.view(leaf.dtype))


def _key(path: str, key: tuple[Any, ...]) -> str:
    return "/".join((path, *map(str, key)))
