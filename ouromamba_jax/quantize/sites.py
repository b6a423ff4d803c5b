"""Where a model can be quantised: its sites by dotted path, and the settings that a config gives them."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from ouromamba_jax.models.layers import Operand, SelectiveScan
from ouromamba_jax.quantize.config import QuantConfig

Site = nnx.Linear | SelectiveScan | Operand


def named_modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(dotted path, module) of the model itself, whose path is "", and of everything below it."""
    for path, module in nnx.iter_modules(model):
        yield ".".join(map(str, path)), module


def iter_sites(model: nnx.Module) -> Iterator[tuple[str, Site]]:
    """(dotted path, module) of everything that can be quantised: linear layers, selective scans, marked tensors."""
    return ((path, module) for path, module in named_modules(model) if isinstance(module, Site))


def set_module(model: Any, path: str, new: Any) -> None:
    """Replaces the submodule at the dotted `path`."""
    *parents, last = path.split(".")
    for name in parents:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    if last.isdigit():
        model[int(last)] = new
    else:
        setattr(model, last, new)


def _is_asked_for(site: Site, path: str, config: QuantConfig) -> bool:
    """Whether a site is to be quantised: a marked tensor by its name, scans unless only weights are."""
    if isinstance(site, Operand):
        return path.rsplit(".", 1)[-1] in config.activation_operands
    return config.act_bits is not None or isinstance(site, nnx.Linear)


def resolve_sites(model: nnx.Module, config: QuantConfig) -> dict[str, QuantConfig]:
    """Settings by site. A marked tensor is a site only if the config names it among its operands.

    Raises:
      ValueError: if a rule matches nothing, or a weight group does not divide the inputs of a layer.
    """
    resolved = {path: (site, config.resolve(path)) for path, site in iter_sites(model)}
    active = {path: c for path, (site, c) in resolved.items() if c is None or _is_asked_for(site, path, c)}
    unused = [rule.pattern for rule in config.rules if not any(rule.matches(path) for path in active)]
    if unused:
        known = ", ".join(list(active)[:4])
        raise ValueError(f"the rule {unused[0]!r} matches no site of the model; paths look like {known}.")
    for path, c in active.items():
        site = resolved[path][0]
        if c is not None and c.weight_group is not None and isinstance(site, nnx.Linear):
            inputs = site.kernel.shape[0]
            if inputs % c.weight_group:
                layers = rf"\.{path.rsplit('.', 1)[-1]}$"  # of this name, in all blocks
                raise ValueError(
                    f"weight_group {c.weight_group} does not divide the {inputs} inputs of {path}; choose a divisor or "
                    f'except such layers, QuantRule(r"{layers}", weight_group=0).'
                )
    return {path: c for path, c in active.items() if c is not None}
