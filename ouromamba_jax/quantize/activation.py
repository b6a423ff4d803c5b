"""The quantiser of one activation, and what every quantised site stores."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.ops.passes import Ask, Asking
from ouromamba_jax.ops.scan_types import Product, Unsplit
from ouromamba_jax.ops.split import Split
from ouromamba_jax.ops.split_calibration import Calibration, calibrating
from ouromamba_jax.quantize.config import QuantConfig, QuantRule


class Typed(nnx.Variable):
    """An array that means nothing in another type: it is refused where it is read."""

    def __init__(self, value: Array, **metadata: Any):
        super().__init__(value, stored=value.dtype.name, **metadata)

    def __getitem__(self, key: Any) -> Any:
        wider = ("float32",) if self.stored == "bfloat16" else ()
        if self.dtype.name not in (self.stored, *wider) and self.dtype != jax.dtypes.float0:  # levels' gradient
            raise TypeError(
                f"levels or scales of the quantised model are {self.dtype} where it has {self.stored}: a cast has lost "
                "their values; cast leaves of type nnx.Param alone, of the model as it was saved."
            )
        return super().__getitem__(key)


class Levels(Typed):
    """Integer levels (rows, columns) of a weight or scan parameter; its metadata `bits` is what each needs at rest."""


class Calibrated(Typed):
    """What calibration found: a scale, threshold, shift or channel list."""


class KernelLayout(nnx.Variable):
    """A weight as a GPU kernel reads it, made of its `Levels`: never saved, nor counted."""


@dataclass(frozen=True)
class SiteSpec:
    """Static facts of one quantised site.

    Attributes:
      config: its settings.
      tokens: per sample, of what it was calibrated on.
      channels: of what it was calibrated on.
      two_bytes: the activations ("input", or operand and direction of a scan: "delta.0") whose outliers are shifted
        into a second byte.
    """

    config: QuantConfig
    tokens: int
    channels: int
    two_bytes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SiteSpec":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()}
        fields["rules"] = tuple(QuantRule(**rule) for rule in fields["rules"])
        return cls(QuantConfig(**fields), int(data["tokens"]), int(data["channels"]), tuple(data["two_bytes"]))


class ActQuantizer(nnx.Module):
    """Algorithm 2 with what calibration found for one activation."""

    def __init__(self, calibration: Calibration, config: QuantConfig):
        self.config = config.splitting
        self.scale = Calibrated(calibration.scale)
        self.theta, self.shift, self.channels = (
            None if found is None else Calibrated(found)
            for found in (calibration.theta, calibration.shift, calibration.channels)
        )

    @property
    def calibration(self) -> Calibration:
        optional = (self.theta, self.shift, self.channels)
        return Calibration(self.scale[...], *(None if found is None else found[...] for found in optional))

    def split(self, x: Float[Array, "B L C"]) -> Split:
        """Levels of x.

        Raises:
          ValueError: if x has another number of tokens than the calibration had.
        """
        check_tokens(x, self.scale.shape[0])
        return self.calibration.split(x, self.config)

    def unsplit(self, x: Float[Array, "B L C"] | Product) -> Unsplit:
        """x for a scan that may split it itself. Raises as `split` does."""
        check_tokens(x, self.scale.shape[0])
        found = self.calibration
        return Unsplit(x, found.scale, self.config, found.theta, found.shift, found.channels)

    def round(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        """What the levels of x stand for, in x's type; straight-through gradients. Raises as `split` does."""
        return self.unsplit(x).merge().astype(x.dtype)


def check_tokens(x: Float[Array, "B L ..."] | Product, calibrated: int) -> None:
    """Checks that x has as many tokens per sample as scales were found for.

    Raises:
      ValueError: if it has not.
    """
    if x.shape[1] != calibrated:
        raise ValueError(
            f"this model was calibrated at {calibrated} tokens per sample and got {x.shape[1]}; "
            "quantise it again at this input size."
        )


def calibrating_activation(config: QuantConfig, of: Callable[[Any], Array]) -> Asking[Calibration]:
    """`split_calibration.calibrating` with the settings of a site."""
    return calibrating(config.splitting, search=config.scale_search == "norm", of=of)


def shape_of(of: Callable[[Any], Array]) -> Asking[tuple[int, int]]:
    """(tokens, channels) of an activation, (B, L, ..., C)."""
    tokens, channels = yield Ask(lambda batch: (of(batch).shape[1], of(batch).shape[-1]), jnp.maximum)
    return int(tokens), int(channels)


def empty_calibration(config: QuantConfig, tokens: int, channels: int, *, two_bytes: bool) -> Calibration:
    """Zeros of the shapes that `calibrating_activation` would return."""
    return Calibration(
        scale=jnp.zeros((tokens,), jnp.float32),
        theta=jnp.zeros((tokens,), jnp.bfloat16) if config.splitting.detection == "dynamic" else None,
        shift=jnp.zeros((tokens,), jnp.int8) if two_bytes else None,
        channels=jnp.zeros((channels,), bool) if config.splitting.detection == "static" else None,
    )
