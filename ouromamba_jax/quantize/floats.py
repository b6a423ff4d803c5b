"""What of a stage stays in float, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ouromamba_jax.models.layers import Operand, SelectiveScan
from ouromamba_jax.quantize.config import ACTIVATION_OPERANDS, QuantConfig
from ouromamba_jax.quantize.scan import QuantSelectiveScan
from ouromamba_jax.quantize.sites import Site, named_modules


@dataclass(frozen=True)
class FloatSites:
    """Why the sites of a stage, or parts of them, are float.

    Args:
      sites: (path in the model, site) by path in the stage; a layer that several stages share has one in the model.
      replaced: what a method put in the place of sites, by path in the stage.
      config: of the whole model, with its rules.
    """

    sites: dict[str, tuple[str, Site]]
    replaced: dict[str, nnx.Module]
    config: QuantConfig

    def parameter(self, path: str, name: str) -> str:
        """Why the parameter `name` of the module at `path` is float."""
        inside = [site for site in self.sites if f"{path}.".startswith(f"{site}.")]
        if inside and inside[0] not in self.replaced:
            return self._whole(inside[0])
        if type(self.replaced.get(path)) is QuantSelectiveScan and name in ("A_log", "D"):
            return self._by_list(path)
        return "not a matmul"

    def activations(self) -> Iterator[tuple[str, str]]:
        """(path in the stage, reason) of the marked tensors and operands of scans that are not rounded.

        What a rival's own scan does not round is not listed: its method says that.
        """
        for path, (place, site) in self.sites.items():
            module = self.replaced.get(path)
            if isinstance(site, Operand) and module is None:
                yield path, self._whole(path)
            if isinstance(site, SelectiveScan) and (module is None or type(module) is QuantSelectiveScan):
                settings = self.config.resolve(place)
                rounded = () if module is None or settings is None else settings.activation_operands
                reason = self._whole(path) if module is None else self._by_list(path)
                yield from ((f"{path}.{name}", reason) for name in (*ACTIVATION_OPERANDS, "h") if name not in rounded)

    def _whole(self, path: str) -> str:
        """Why a site was not replaced."""
        place, site = self.sites[path]
        settings = self.config.resolve(place)
        if settings is None:
            return f"the rule {self.config.deciding(place)['skip'].pattern!r} leaves it out"
        if settings.act_bits is None and not isinstance(site, nnx.Linear):
            return "only the weights of linear layers are quantised"
        if isinstance(site, Operand) and place.rpartition(".")[2] not in settings.operands:
            return self._by_list(path)
        return "the method leaves it out"

    def _by_list(self, path: str) -> str:
        rule = self.config.deciding(self.sites[path][0]).get("operands")
        return "the operand list leaves it out" if rule is None else f"the rule {rule.pattern!r} does not list it"


def store_floats(stage: nnx.Module, dtype: Any, why: FloatSites, prefix: str) -> list[tuple[str, int, str]]:
    """Keeps what stayed float in `dtype`; returns (path, entries, reason) of each.

    Raises:
      ValueError: if a value is beyond the range of `dtype`.
    """
    kept = []
    for path, module in named_modules(stage):
        for name, leaf in vars(module).items():
            if isinstance(leaf, nnx.Param):
                exact, rounded = leaf[...], leaf[...].astype(dtype)
                dotted = prefix + (f"{path}.{name}" if path else name)
                if bool((jnp.isfinite(exact) & ~jnp.isfinite(rounded)).any()):
                    raise ValueError(
                        f"{dotted} has values beyond the range of {dtype}; quantise with float_dtype='float32' or "
                        "'bfloat16'."
                    )
                leaf.set_value(rounded)
                kept.append((dotted, leaf.size, why.parameter(path, name)))
    return kept
