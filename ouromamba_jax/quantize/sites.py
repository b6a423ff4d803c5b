"""Where a model can be quantised: its sites by dotted path, and the settings that a config gives them."""

import re
from collections.abc import Iterator
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from ouromamba_jax.models.layers import Operand, SelectiveScan
from ouromamba_jax.quantize.config import PRESET_RULES, QuantConfig, QuantRule

Site = nnx.Linear | SelectiveScan | Operand


def named_modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(dotted path, module) of the model itself, whose path is "", and of everything below it."""
    for path, module in nnx.iter_modules(model):
        yield ".".join(map(str, path)), module


def iter_sites(model: nnx.Module) -> Iterator[tuple[str, Site]]:
    """(dotted path, module) of everything that can be quantised: linear layers, selective scans, marked tensors.

    Of a model they are those of its stages, in the order of the forward pass. What stands at several paths has the
    first. So do their subclasses, which are known well enough to be left in float, but not to be quantised.
    """
    known = set()
    for path, part in getattr(model, "stages", (("", model),)):
        for inner, module in named_modules(part):
            if isinstance(module, Site) and id(module) not in known:
                known.add(id(module))
                yield ".".join(filter(None, (path, inner))), module


def set_module(model: Any, path: str, new: Any) -> None:
    """Replaces the submodule at the dotted `path`, and wherever else in the model it stands."""
    parent, name, old = model, "", model
    for name in path.split("."):
        parent, old = old, old[int(name)] if name.isdigit() else getattr(old, name)
    for holder, key in [(parent, name), *_places(model, old, set())]:
        if str(key).isdigit():
            holder[int(key)] = new
        else:
            setattr(holder, key, new)


def _places(module: Any, wanted: Any, seen: set[int]) -> Iterator[tuple[Any, Any]]:
    """(module, attribute or index) of all that hold `wanted`."""
    seen.add(id(module))
    for name, child in nnx.iter_children(module):
        if child is wanted:
            yield module, name
        elif isinstance(child, nnx.Module) and id(child) not in seen:
            yield from _places(child, wanted, seen)


_OF_ACTIVATIONS = ("act_bits", "outlier_bits", "sigma", "n_refresh", "detection")
_FIELDS: dict[type, tuple[str, ...]] = {
    nnx.Linear: ("skip", "weight_bits", "weight_group", *_OF_ACTIVATIONS),
    SelectiveScan: ("skip", "operands", *_OF_ACTIVATIONS),
    Operand: ("skip", "operands", *_OF_ACTIVATIONS),
}
"""What a rule can set at each kind of site."""


def _is_asked_for(site: Site, path: str, config: QuantConfig) -> bool:
    """Whether a site is to be quantised: a marked tensor by its name, scans unless only weights are."""
    if isinstance(site, Operand):
        return path.rsplit(".", 1)[-1] in config.activation_operands
    return config.act_bits is not None or isinstance(site, nnx.Linear)


def _mattering(site: Site, path: str, config: QuantConfig | None) -> tuple[str, ...]:
    """The fields of rules that have a say at a site with these settings."""
    if config is None:
        return ("skip",)
    fields = next(fields for kind, fields in _FIELDS.items() if isinstance(site, kind))
    if config.act_bits is None:
        return tuple(name for name in fields if name in ("skip", "act_bits", "weight_bits", "weight_group"))
    return fields if _is_asked_for(site, path, config) else ("skip", "operands")


def rules_at(site: Site, path: str, config: QuantConfig) -> dict[str, QuantRule]:
    """For every field that a rule sets at a site, and that matters there, the rule that decides."""
    mattering = _mattering(site, path, config.resolve(path))
    return {name: rule for name, rule in config.deciding(path).items() if name in mattering}


def resolve_sites(model: nnx.Module, config: QuantConfig) -> dict[str, QuantConfig]:
    """Settings by site. A marked tensor is a site only if the config names it among its operands.

    Raises:
      ValueError: if a rule decides nothing anywhere, settings contradict each other, a weight group does not divide the
        inputs of a layer, a layer computes what is not known here, or several stages share it.
    """
    sites = dict(iter_sites(model))
    resolved = {path: c for path in sites if (c := config.resolve(path)) is not None}
    active = {path: c for path, c in resolved.items() if _is_asked_for(sites[path], path, c)}
    _check_rules(sites, config)
    _check_not_shared(model, {id(sites[path]): path for path in active})
    for path, c in active.items():
        site = sites[path]
        if problem := _unknown(site):
            raise ValueError(
                f"{path} {problem}: put a plain one of the same effect there, or leave it in float, {skipping(path)}."
            )
        if c.weight_group is not None and isinstance(site, nnx.Linear):
            inputs = site.kernel.shape[0]
            if inputs % c.weight_group:
                layers = rf"\.{path.rsplit('.', 1)[-1]}$"  # of this name, in all blocks
                raise ValueError(
                    f"weight_group {c.weight_group} does not divide the {inputs} inputs of {path}; choose a divisor or "
                    f'except such layers, QuantRule(r"{layers}", weight_group=0).'
                )
    return active


def _unknown(site: Site) -> str:
    """What a site does that its kind does not; "" if nothing."""
    kind = next(kind for kind in _FIELDS if isinstance(site, kind))
    if type(site) is not kind:
        return f"is a {type(site).__name__}, and what it does beyond a {kind.__name__} would be lost"
    if isinstance(site, nnx.Linear) and (
        site.dot_general is not lax.dot_general or site.promote_dtype is not promote_dtype
    ):
        return "is a Linear with a dot_general or promote_dtype of its own, which would be lost"
    return ""


def _check_not_shared(model: nnx.Module, active: dict[int, str]) -> None:
    """Raises ValueError if a site of `active`, {id: path}, belongs to several stages: it has one set of scales."""
    for name, stage in getattr(model, "stages", ()):
        for path, site in iter_sites(stage):
            first = active.get(id(site))
            if first is not None and not first.startswith(f"{name}."):
                raise ValueError(
                    f"{name}.{path} is the same layer as {first}, and stages are quantised one by one: give each a "
                    f"copy (nnx.clone), or leave it in float, {skipping(first)}."
                )


def skipping(path: str) -> str:
    """How to write the rule that leaves the site at `path` in float."""
    return f'QuantRule(r"^{re.escape(path)}$", skip=True)'


def _check_rules(sites: dict[str, Site], config: QuantConfig) -> None:
    """Holds every rule, but those of presets, to decide something somewhere.

    Raises:
      ValueError: naming the first that does not, and what overrides it.
    """
    deciding = {id(rule) for path, site in sites.items() for rule in rules_at(site, path, config).values()}
    for rule in config.rules:
        if id(rule) in deciding or rule in PRESET_RULES:
            continue
        matched = [path for path in sites if rule.matches(path)]
        if not matched:
            raise ValueError(
                f"the rule {rule.pattern!r} matches no site of the model; paths look like {', '.join([*sites][:4])}."
            )
        others = {
            id(other): other.pattern
            for path in matched
            for name, other in config.deciding(path).items()
            if other is not rule and (name in rule.settings() or (name == "skip" and other.skip))
        }
        if others:
            raise ValueError(
                f"the rule {rule.pattern!r} decides nothing: {', '.join(map(repr, others.values()))} overrides it at "
                "every site; a later rule wins, so put the general ones first."
            )
        raise ValueError(
            f"the rule {rule.pattern!r} decides nothing: no quantised site that it matches, such as {matched[0]}, has "
            f"{', '.join(rule.settings())}; change its pattern or the operands."
        )
