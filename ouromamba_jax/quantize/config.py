"""What to quantise, and how: the frozen configuration of a quantisation run."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ouromamba_jax.fields import check_types
from ouromamba_jax.names import did_you_mean
from ouromamba_jax.ops.split import Detection, OutlierConfig

OPERANDS = ("delta", "B", "C", "A", "D", "u", "h", "y", "z", "q", "k", "v", "probs")
"""Tensors in and around a selective scan, and of dot-product attention, that can be quantised."""
ACTIVATION_OPERANDS = ("u", "delta", "B", "C", "y")
"""Those of a scan that are split while it runs."""
PARAMETER_OPERANDS = ("A", "D")
"""Those of a scan that are rounded once."""
FloatDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class QuantRule:
    """Settings for the sites whose path matches.

    Matches: `pattern`, a regular expression searched in the dotted path, e.g. r"blocks\\.0\\..*out_proj".
    Sets: the other fields, as `QuantConfig` has them; what is None stays as it was. `weight_group=0` gives all inputs
      one scale and `act_bits=0` quantises the weights alone, whatever the config says. `skip=True` leaves a site in
      float, `skip=False` takes that back.
    Of several rules that match a site, each field is set by the last rule that sets it: general rules come first.

    Examples:
      >>> import ouromamba_jax as om
      >>> config = om.QuantConfig.preset("w4a4", rules=(om.QuantRule(r"out_proj$", act_bits=8, outlier_bits=16),))
      >>> config.resolve("blocks.0.mixer.out_proj").act_bits, config.resolve("blocks.0.mixer.in_proj").act_bits
      (8, 4)
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    outlier_bits: int | None = None
    weight_group: int | None = None
    operands: tuple[str, ...] | None = None
    sigma: float | None = None
    n_refresh: int | None = None
    detection: Detection | None = None
    skip: bool | None = None

    def __post_init__(self):
        if self.operands is not None:
            object.__setattr__(self, "operands", _operand_names(self.operands))
        check_types(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the rule pattern {self.pattern!r} is not a regular expression: {error}.") from error
        others = [name for name in self.settings() if name != "skip"]
        if self.skip and others:
            raise ValueError(f"the rule {self.pattern!r} both skips its sites and sets {', '.join(others)}.")
        if not self.settings():
            raise ValueError(f"the rule {self.pattern!r} sets nothing; give it bits, operands or skip=True.")

    def settings(self) -> dict[str, Any]:
        """The fields that this rule sets."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "pattern"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def matches(self, path: str) -> bool:
        return re.search(self.pattern, path) is not None


@dataclass(frozen=True)
class QuantConfig(OutlierConfig):
    """How to quantise a model; the fields of `OutlierConfig` say how activations are split.

    Args:
      act_bits: as there, or None: weights alone are quantised, and multiply floats.
      sigma: as there; one more for delta, as in the paper.
      weight_bits: 2 to 8; symmetric, one scale per output channel.
      weight_group: input channels that share a weight scale, dividing those of every layer; None: all of them.
      operands: which tensors of each selective scan and attention are quantised. A and D, parameters, are rounded once.
      scale_search: "norm" minimises the 2.4 norm of the rounding error over 100 candidates, "max" takes the range.
      weight_rounding: "gptq" rounds a layer's inputs one after the other, the rest making up for what that changes in
        the outputs (Frantar et al. 2023), before the scales are tuned; "nearest" rounds each weight by itself.
      tune_epochs: passes over the calibration set in which each block's scales are tuned; 0 leaves them as found.
      tune_learning_rate: AdamW's, for the logarithm of every scale. The paper takes 5e-4, on the scales themselves.
      float_dtype: type in which parameters that stay float are kept.
      batch_size: images per step of calibration and tuning.
      rules: exceptions by path, the general ones first: see `QuantRule`.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.QuantConfig.preset("w8a8", outlier_bits=8).outlier_bits  # plain int8
      8
      >>> om.QuantConfig(weight_bits=3, act_bits=8, outlier_bits=16).largest_outlier
      32639
    """

    act_bits: Any = 4  # an int or None; the rivals, whose settings these are too, always have one
    weight_bits: int = 4
    weight_group: int | None = None
    operands: tuple[str, ...] = ("delta", "B", "C", "A", "D", "q", "k", "v", "probs")
    scale_search: Literal["norm", "max"] = "norm"
    weight_rounding: Literal["gptq", "nearest"] = "gptq"
    tune_epochs: int = 10
    tune_learning_rate: float = 2e-2
    float_dtype: FloatDtype = "float16"
    batch_size: int = 16
    rules: tuple[QuantRule, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "operands", _operand_names(self.operands))
        check_types(self)
        _ = self.splitting  # which checks its fields
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be 2 to 8, not {self.weight_bits}.")
        if self.weight_group is not None and self.weight_group < 1:
            raise ValueError(f"weight_group must be a positive number of channels, not {self.weight_group}.")
        if self.tune_epochs < 0 or self.batch_size < 1 or self.tune_learning_rate <= 0:
            raise ValueError("tune_epochs must be at least 0, batch_size at least 1 and tune_learning_rate positive.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "QuantConfig":
        """ "w4a4", "w4a8", "w6a6" or "w8a8" as in the paper: 8-bit outliers with 4- and 6-bit inliers, else 16-bit.

        The first and the last layer (stem and head) stay at 8 bits, by a rule that comes before those in `overrides`.

        Raises:
          ValueError: for another name.
        """
        if name not in PRESETS:
            hint = did_you_mean(name, PRESETS) or f"choose one of {', '.join(PRESETS)}."
            raise ValueError(f"there is no preset {name!r}; {hint}")
        fields = {**PRESETS[name], **overrides}
        if fields["act_bits"] is None:
            edge = _WEIGHT_EDGE
        else:
            edge = _PLAIN_EDGE if fields["act_bits"] == fields["outlier_bits"] == 8 else _EDGE
        return cls(**{**fields, "rules": (edge, *fields.pop("rules", ()))})

    @property
    def splitting(self) -> OutlierConfig:
        """Only what the splitting of activations depends on: two configs that agree in it share its compilations."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(OutlierConfig)}
        if self.act_bits is None:
            fields["act_bits"] = 8
        if self.detection == "none":  # there are no outliers, whatever their bits
            fields["outlier_bits"] = fields["act_bits"]
        if fields["outlier_bits"] == fields["act_bits"]:  # nothing sets outliers apart: plain rounding
            fields["detection"] = "none"
        return OutlierConfig(**fields)

    @property
    def activation_operands(self) -> tuple[str, ...]:
        """The operands that are quantised: none if the weights alone are."""
        return () if self.act_bits is None else self.operands

    def deciding(self, path: str) -> dict[str, QuantRule]:
        """For every field that rules set at `path`, the rule that decides: the last one that sets it."""
        return {name: rule for rule in self.rules if rule.matches(path) for name in rule.settings()}

    def resolve(self, path: str) -> "QuantConfig | None":
        """The settings of the site at `path`, rules applied; None if a rule leaves it in float.

        Raises:
          ValueError: naming the site, for a value that does not exist or does not go with the others there.
        """
        settings = {name: getattr(rule, name) for name, rule in self.deciding(path).items()}
        if settings.pop("skip", False):
            return None
        for name in ("weight_group", "act_bits"):
            if settings.get(name) == 0:
                settings[name] = None
        try:
            return dataclasses.replace(self, rules=(), **settings)
        except ValueError as error:
            raise ValueError(f"as its rules say, {path} cannot be quantised: {error}") from error


def _operand_names(operands: Any) -> tuple[str, ...]:
    """`operands` as a tuple, which can be hashed: configs are static arguments of compiled functions.

    Raises:
      ValueError: for what is no tuple of names, and for names that do not exist.
    """
    if isinstance(operands, str) or not isinstance(operands, Iterable):
        hint = f"; write ({operands!r},)" if isinstance(operands, str) else ""
        raise ValueError(f"operands must be a tuple of names, not {operands!r}{hint}.")
    operands = tuple(operands)
    unknown = [str(name) for name in operands if name not in OPERANDS]
    if unknown:
        raise ValueError(f"operands {', '.join(unknown)} do not exist; choose among {', '.join(OPERANDS)}.")
    return operands


_WEIGHT_EDGE = QuantRule(r"^(stem|head)\.", weight_bits=8)
_EDGE = QuantRule(r"^(stem|head)\.", weight_bits=8, act_bits=8, outlier_bits=16)
_PLAIN_EDGE = QuantRule(r"^(stem|head)\.", weight_bits=8, act_bits=8, outlier_bits=8)
PRESET_RULES = (_WEIGHT_EDGE, _EDGE, _PLAIN_EDGE)
"""What `QuantConfig.preset` puts before other rules, which may override all of it."""
PRESETS = {
    "w4a4": dict(weight_bits=4, act_bits=4, outlier_bits=8),
    "w4a8": dict(weight_bits=4, act_bits=8, outlier_bits=16),
    "w6a6": dict(weight_bits=6, act_bits=6, outlier_bits=8),
    "w8a8": dict(weight_bits=8, act_bits=8, outlier_bits=16),
}
"""Fields by the names that `QuantConfig.preset` takes, from fewest bits to most."""
