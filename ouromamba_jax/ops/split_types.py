"""The terms of OuroMamba's Algorithm 2: how an activation is split, and what the split is."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

from ouromamba_jax.ops.qtensor import divide, power_of_two_ratio

Threshold = Literal["online", "offline"]
Detection = Literal["dynamic", "static", "none"]
OutlierScale = Literal["pow2", "free"]

FRACTION_BITS = 12
"""16-bit outliers are multiplied on steps of at least S / 2^12, the finest at which 4-bit inliers still fit 16 bits."""
LARGEST_FIXED_POINT = 127 * 256 + 127
"""What two int8 bytes in units of 256 and 1 hold, if the high one stays within +-127."""
Form = Literal["split", "planes", "packed", "floats"]
"""What becomes of an activation: OutlierSplit, `Planes` or `PackedSplit` for a product, or floats rounded to these."""
Spec = Literal["paper", "released"]
StaticList = Literal["mean", "max"]


@dataclass(frozen=True)
class OutlierConfig:
    """How activations are split (see `split_outliers`).

    Attributes:
      act_bits: bits of inliers, 2..8.
      outlier_bits: bits of outliers, act_bits..8; 16 leaves outliers in the activation's own float type.
      n_refresh: tokens per window.
      sigma: standard deviations above the mean magnitude at which a channel is an outlier.
      threshold: "online" takes that statistic from the token itself, "offline" from calibration.
      detection: "dynamic" is Algorithm 2; "static" a fixed list of channels; "none" clips everything.
      static_list: statistic of the magnitude by which calibration picks the channels of detection="static".
      outlier_scale: "pow2" takes the inlier scale times a power of two, "free" the token's own maximum.
      spec: "released" reproduces the published code, whose trigger is shared by the whole batch.
    """

    act_bits: int = 4
    outlier_bits: int = 8
    n_refresh: int = 10
    sigma: float = 3.0
    threshold: Threshold = "online"
    detection: Detection = "dynamic"
    static_list: StaticList = "mean"
    outlier_scale: OutlierScale = "pow2"
    spec: Spec = "paper"

    def __post_init__(self):
        if not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must lie in 2..8, not {self.act_bits} (bits, not a number of levels)")
        if self.outlier_bits != 16 and not self.act_bits <= self.outlier_bits <= 8:
            raise ValueError(f"outlier_bits must be 16 or lie in act_bits..8, not {self.outlier_bits}")
        if self.n_refresh < 1:
            raise ValueError(f"n_refresh must be at least 1 token, not {self.n_refresh}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}")
        choices = (
            ("threshold", Threshold),
            ("detection", Detection),
            ("static_list", StaticList),
            ("outlier_scale", OutlierScale),
            ("spec", Spec),
        )
        for name, kind in choices:
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        published = (self.threshold, self.detection, self.outlier_scale) == ("online", "dynamic", "free")
        if self.spec == "released" and not published:
            raise ValueError(
                'spec="released" is what the published code does: it needs threshold="online", detection="dynamic" '
                'and outlier_scale="free"'
            )

    @property
    def needs_theta(self) -> bool:
        """Whether thresholds come from calibration."""
        return self.detection == "dynamic" and self.threshold == "offline"

    @property
    def pow2(self) -> bool:
        """Whether outliers are levels on the inliers' scale times a power of two."""
        return self.outlier_scale == "pow2" and self.outlier_bits != 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["near", "far", "outlier_scale", "mask", "inlier_scale"],
    meta_fields=["pow2"],
)
@dataclass(frozen=True)
class OutlierSplit:
    """An activation as inlier levels plus outliers, kept as the two matrices that a product reads.

    With pow2 scales a token at j = 0 has one step for everything, and all its levels are in `near`: its `far` is zero
    and need not be read. Every other token (j > 0, or a NaN scale), and every token of other scales, has its inliers in
    `near` and its outliers in `far`, each zero at the other's places. `from_levels` makes it so.

    Attributes:
      near: int8 (B, L, C), levels in units of inlier_scale.
      far: int8 (B, L, C), levels in units of outlier_scale; with 16-bit outliers the float activations themselves.
      outlier_scale: float32 (B, L); 1 with 16-bit outliers; NaN for a token that holds a NaN or an infinity, so
        that its results are NaN, not a silent clip.
      mask: bool (B, L, C), true at outliers; None where nobody asked for it.
      inlier_scale: float32 (L,).
      pow2: outlier_scale is inlier_scale times 2^j, j >= 0 (a static fact).
    """

    near: Int8[Array, "B L C"]
    far: Array
    outlier_scale: Float32[Array, "B L"]
    mask: Bool[Array, "B L C"] | None
    inlier_scale: Float32[Array, " L"]
    pow2: bool

    @classmethod
    def from_levels(
        cls,
        inlier_q: Int8[Array, "B L C"],
        outlier_q: Array,
        outlier_scale: Float32[Array, "B L"],
        mask: Bool[Array, "B L C"] | None,
        inlier_scale: Float32[Array, " L"],
        *,
        pow2: bool,
    ) -> "OutlierSplit":
        """From inliers and outliers, each zero at the other's places."""
        if not pow2:
            return cls(inlier_q, outlier_q, outlier_scale, mask, inlier_scale, pow2)
        far = jnp.where(_is_shifted(outlier_scale, inlier_scale)[:, :, None], outlier_q, 0)
        return cls(inlier_q + (outlier_q - far), far, outlier_scale, mask, inlier_scale, pow2)

    @property
    def inlier_q(self) -> Int8[Array, "B L C"]:
        """int8 levels within the inlier bits, zero at outliers."""
        return jnp.where(self.known_mask, 0, self.near) if self.pow2 else self.near

    @property
    def outlier_q(self) -> Array:
        """int8 levels within the outlier bits, or floats with 16-bit outliers; zero at inliers."""
        return jnp.where(self.known_mask, self.near + self.far, 0) if self.pow2 else self.far

    @property
    def known_mask(self) -> Bool[Array, "B L C"]:
        """The mask.

        Raises:
          ValueError: if it was left out.
        """
        if self.mask is None:
            raise ValueError("this split was made without its mask: call split_outliers with with_mask=True")
        return self.mask

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, C)."""
        return self.near.shape

    @property
    def has_float_outliers(self) -> bool:
        """Whether outliers are kept as floats ("16 bits")."""
        return self.far.dtype != jnp.int8

    @property
    def step_ratio(self) -> Float32[Array, "B L"]:
        """Inliers' step over the outliers' step: with pow2 scales exactly 2^-j, and 1 where the latter is NaN."""
        inlier = jnp.broadcast_to(self.inlier_scale[None], self.outlier_scale.shape)
        return power_of_two_ratio(inlier, self.outlier_scale) if self.pow2 else divide(inlier, self.outlier_scale)

    @property
    def shifted(self) -> Bool[Array, "B L"]:
        """Tokens whose outliers have a step of their own: with pow2 scales j > 0 (or NaN)."""
        return _is_shifted(self.outlier_scale, self.inlier_scale)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["near", "far", "shift", "row_scale"],
    meta_fields=["channels", "fixed_point"],
)
@dataclass(frozen=True)
class Planes:
    """What a product takes of a split: rows row_scale * (2^shift * far + near), which one accumulator can add.

    Of a split with pow2 scales these are its own near and far levels. One with 16-bit outliers becomes fixed-point
    numbers of two bytes. Their row's step is its inlier scale S times 2^k with the smallest k >= -12 at which its
    largest entry fits: an outlier is off by half a step, 2^-15 of the largest entry, and so is an inlier beside an
    outlier beyond 32639 S, where k > 0; other inliers are exact.

    Attributes:
      near: int8 (B, L, C or more). What follows the C channels is zero.
      far: int8 like near, within +-127. Of tokens whose shift is 0 it is not read, and holds whatever it may.
      shift: int32 (B, L), j of a pow2 scale, at most 126, and 8 for bytes.
      row_scale: float32 (B, L), NaN for a token that holds a NaN or an infinity.
      channels: C.
      fixed_point: whether near and far are low and high bytes.
    """

    near: Int8[Array, "B L width"]
    far: Int8[Array, "B L width"]
    shift: Int32[Array, "B L"]
    row_scale: Float32[Array, "B L"]
    channels: int
    fixed_point: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, C)."""
        B, L, _ = self.near.shape
        return B, L, self.channels

    @property
    def step(self) -> Float32[Array, "B L"]:
        """Of far's levels, row_scale * 2^shift."""
        return jnp.ldexp(self.row_scale, self.shift)

    @property
    def read_far(self) -> Int8[Array, "B L C"]:
        """far where it is read, else zeros."""
        return jnp.where(self.shift[:, :, None] > 0, self.far[..., : self.channels], 0)

    def merge(self) -> Float32[Array, "B L C"]:
        """The activation that the planes stand for; exact unless they are bytes."""
        near = self.near[..., : self.channels].astype(jnp.float32) * self.row_scale[:, :, None]
        return near + self.read_far.astype(jnp.float32) * self.step[:, :, None]


def _is_shifted(outlier_scale: Float32[Array, "B L"], inlier_scale: Float32[Array, " L"]) -> Bool[Array, "B L"]:
    return outlier_scale != inlier_scale[None]
