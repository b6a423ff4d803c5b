"""MambaVision (Hatamizadeh and Kautz 2025): convolutions, then Mamba and attention blocks on windows of the maps."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from ouromamba_jax.data.preprocessing import Preprocessing, check_image_shape, height_width
from ouromamba_jax.models.attention import SelfAttention
from ouromamba_jax.models.base import VisionModel, check_fields
from ouromamba_jax.models.convolution import Conv3x3, DepthwiseConv1d, convolved
from ouromamba_jax.models.layers import (
    MLP,
    Head,
    LayerNorm,
    Operand,
    SelectiveScan,
    added,
    after,
    as_tokens,
    broadcast_last,
    classifier,
    nan_unless_finite,
    normalised,
    projected,
    scaled,
    uniform,
    updated,
)
from ouromamba_jax.models.trace import LayerTrace
from ouromamba_jax.models.windows import WindowOrder, join_windows, split_windows
from ouromamba_jax.ops.producers import beside_conv_silu

_D_STATE, _D_CONV = 8, 3
_INIT = nnx.initializers.normal(0.02)


@dataclass(frozen=True)
class MambaVisionConfig:
    """Widths, depths, windows and input of a MambaVision; defaults are those of MambaVision-T.

    `img_size` is an int or (height, width) in pixels; no parameter depends on it, but the maps' padding does.
    `in_channels` is 3 for images in colour and 1 for gray ones. `dim` is the width of the first level, doubled from
    level to level, `in_dim` that of the stem. `depths`, `window_size` (in tokens) and `num_heads` have one entry per
    level; the first `conv_levels` are convolutional and use their depth only. `layer_scale` is the initial factor of
    every update in the other levels, None for none.
    """

    img_size: int | tuple[int, int] = 224
    dim: int = 80
    in_dim: int = 32
    depths: tuple[int, ...] = (1, 3, 8, 4)
    window_size: tuple[int, ...] = (8, 8, 14, 7)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    in_channels: Literal[1, 3] = 3
    num_classes: int = 1000
    conv_levels: int = 2
    preprocessing: Preprocessing = Preprocessing(crop_pct=1.0)

    def __post_init__(self):
        check_fields(self, zero=("conv_levels", "num_classes"))
        if not len(self.depths) == len(self.window_size) == len(self.num_heads):
            raise ValueError(
                f"depths {self.depths}, window_size {self.window_size} and num_heads {self.num_heads} must have one "
                "entry per level."
            )
        if self.mlp_ratio * self.dim < 1:
            raise ValueError(
                f"dim {self.dim} and mlp_ratio {self.mlp_ratio} leave a layer without channels; use larger ones."
            )
        for level in range(self.conv_levels, len(self.depths)):
            width, heads = self.widths[level], self.num_heads[level]
            if width % heads or width % 2:
                raise ValueError(
                    f"level {level} has {width} channels and {heads} heads; its channels must be even and a multiple "
                    "of its heads."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.dim * 2**level for level in range(len(self.depths)))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every level's map: each convolution of stride 2 rounds up."""
        height, width = height_width(self.img_size)
        return tuple((-(-height // 2**i), -(-width // 2**i)) for i in range(2, 2 + len(self.depths)))

    def check_resized(self, before: "MambaVisionConfig") -> None:
        """Refuses the windows of another input size: they have no parameters, so no checkpoint tells what they were.

        Raises:
          ValueError: if a hybrid level's map has another size than in `before`; the message names both choices.
        """
        hybrid = range(self.conv_levels, len(self.depths))
        if (
            self.window_size == before.window_size
            and self.grids[self.conv_levels :] != before.grids[self.conv_levels :]
        ):
            whole = tuple(max(self.grids[i]) if i in hybrid else window for i, window in enumerate(self.window_size))
            raise ValueError(
                f"img_size {self.img_size} changes the maps that windows of {before.window_size} tokens were chosen "
                f"for at {before.img_size}, and no weight tells whether they stay; set window_size, to {whole} for "
                f"one window per map or to {before.window_size} for the same windows."
            )

    def is_attention(self, level: int, index: int) -> bool:
        """Whether the `index`-th block of a hybrid level attends: the second half of them, the smaller if odd."""
        return index >= (self.depths[level] + 1) // 2


_BASE = MambaVisionConfig(dim=128, in_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5)
_LARGE = dataclasses.replace(_BASE, dim=196, num_heads=(4, 8, 16, 32))
_LARGE3 = dataclasses.replace(_LARGE, dim=256, depths=(3, 3, 20, 10))
_SQUASHED = Preprocessing(crop_pct=0.93, crop_mode="squash")
MAMBAVISION_PRESETS = {
    "mambavision_t": MambaVisionConfig(),
    "mambavision_t2": MambaVisionConfig(depths=(1, 3, 11, 4), preprocessing=Preprocessing(crop_pct=0.98)),
    "mambavision_s": MambaVisionConfig(
        dim=96, in_dim=64, depths=(3, 3, 7, 5), preprocessing=Preprocessing(crop_pct=0.93)
    ),
    "mambavision_b": _BASE,
    "mambavision_l": _LARGE,
    "mambavision_l2": dataclasses.replace(_LARGE, depths=(3, 3, 12, 5)),
    "mambavision_l2_512": dataclasses.replace(
        _LARGE, depths=(3, 3, 12, 5), img_size=512, window_size=(8, 8, 32, 16), preprocessing=_SQUASHED
    ),
    "mambavision_l3_256": dataclasses.replace(_LARGE3, img_size=256, window_size=(8, 8, 16, 8)),
    "mambavision_l3_512": dataclasses.replace(
        _LARGE3, img_size=512, window_size=(8, 8, 32, 16), preprocessing=_SQUASHED
    ),
    # A convolutional level of 12x12 tokens and a hybrid one of 6x6, which is one window as in the published networks.
    "mambavision_micro": MambaVisionConfig(
        img_size=48,
        dim=32,
        in_dim=16,
        depths=(1, 4),
        window_size=(6, 6),
        num_heads=(2, 4),
        num_classes=10,
        conv_levels=1,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0),
    ),
}


class MambaVisionStem(nnx.Module):
    """Images to maps of a quarter of their size: two halving convolutions, each with ReLU."""

    def __init__(self, config: MambaVisionConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(stride=2, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.size, self.channels = height_width(config.img_size), config.in_channels
        self.first = Conv3x3(self.channels, config.in_dim, **types)
        self.second = Conv3x3(config.in_dim, config.dim, **types)

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B h w C"]:
        check_image_shape(images, self.size, self.channels)
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(images)))).astype(jnp.float32)
        return nan_unless_finite(x, images)


class ConvBlock(nnx.Module):
    """x + conv2(gelu(conv1(x))), GELU in its tanh form; x is the float32 map between blocks.

    The first block of a later level halves the map before that.
    """

    def __init__(
        self,
        config: MambaVisionConfig,
        level: int,
        index: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim = config.widths[level]
        self.downsample = _downsample(config, level, index, **types)
        self.conv1 = Conv3x3(dim, dim, **types)
        self.conv2 = Conv3x3(dim, dim, **types)

    def __call__(self, x: Float[Array, "B H W I"], kept: Float[Array, "B 2"] | None = None) -> Float[Array, "B h w C"]:
        x = _enter(self.downsample, x)
        return updated(x, self.conv2(self.conv1(x), residual=x, tanh_gelu=True), kept)

    def trace(
        self, x: Float[Array, "B H W I"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B h w C"], LayerTrace]:
        """(output, LayerTrace without scans)."""
        del collect
        x = _enter(self.downsample, x)
        update = self.conv2(self.conv1(x), tanh_gelu=True)
        return x + update.astype(jnp.float32), LayerTrace((), as_tokens(x), as_tokens(update))


class MambaVisionMixer(nnx.Module):
    """One scan over half of the channels beside a branch without one; the halves are concatenated, not gated."""

    def __init__(self, dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear: dict[str, Any] = dict(use_bias=False, **types)
        half, rank = dim // 2, math.ceil(dim / 16)
        self.channels, self.splits = half, (rank, rank + _D_STATE)
        self.in_proj = nnx.Linear(dim, dim, kernel_init=_INIT, **linear)
        self.conv_x = DepthwiseConv1d(half, _D_CONV, causal=False, use_bias=False, **types)
        self.conv_z = DepthwiseConv1d(half, _D_CONV, causal=False, use_bias=False, **types)
        self.x_proj = nnx.Linear(half, rank + 2 * _D_STATE, kernel_init=uniform(half**-0.5), **linear)
        self.dt_proj = nnx.Linear(rank, half, kernel_init=uniform(rank**-0.5), **linear)
        self.scan = SelectiveScan(1, half, _D_STATE, **types)
        self.z = Operand()
        self.out_proj = nnx.Linear(dim, dim, kernel_init=_INIT, **linear)

    def __call__(
        self, x: Float[Array, "BW L C"], norm: LayerNorm | None = None, residual: Float32[Array, "BW L C"] | None = None
    ) -> Float[Array, "BW L C"]:
        """Of x, first normalised if there is a norm; added to `residual`."""
        operands, x = self._operands(x, norm)
        return self._merge(self.scan(*operands).y, x, residual)

    def trace(
        self, x: Float[Array, "BW L C"], order: WindowOrder, *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "BW L C"], LayerTrace]:
        """(output, LayerTrace with one scan)."""
        operands, projected = self._operands(x)
        out, scans = self.scan.trace(*operands, (order,), collect=collect)
        update = self._merge(out.y, projected)
        return update, LayerTrace(scans, x, update)

    def _operands(self, x: Array, norm: LayerNorm | None = None) -> tuple[tuple[Array, Array, Array, Array], Array]:
        x = normalised(self.in_proj, norm, x)
        made, u = convolved(self.x_proj, self.conv_x, x, self.channels)
        dt, B, C = jnp.split(made, self.splits, axis=-1)
        delta = projected(self.scan, [self.dt_proj], [dt])
        return (u[:, :, None], delta, B[:, :, None], C[:, :, None]), x

    def _merge(
        self, y: Float[Array, "BW L 1 E"], x: Float[Array, "BW L C"], residual: Array | None = None
    ) -> Float[Array, "BW L C"]:
        y, start = y[:, :, 0], y.shape[3]
        if (type(self.z), type(self.conv_z)) == (Operand, DepthwiseConv1d):
            parameters, options = self.conv_z.into()
            return after(self.out_proj, beside_conv_silu, y, x, *parameters, residual=residual, start=start, **options)
        z = self.z(jax.nn.silu(self.conv_z(x[..., start:])))
        return after(self.out_proj, lambda x: x, jnp.concatenate([y, z], axis=-1), residual=residual)


class HybridBlock(nnx.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), either update times its layer scale if there is one.

    x is the float32 map between blocks; the mixer, a scan or attention, sees windows of it. The first block of a level
    pads the map right and below to whole windows, the last one cuts the padding off: in between, padding is as any
    other token. The first block of a later level halves the map before that.
    """

    def __init__(
        self,
        config: MambaVisionConfig,
        level: int,
        index: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim = config.widths[level]
        self.window, self.grid = config.window_size[level], config.grids[level]
        self.crops = index == config.depths[level] - 1
        self.downsample = _downsample(config, level, index, **types)
        self.norm1 = LayerNorm(dim, dtype=dtype, param_dtype=param_dtype)
        if config.is_attention(level, index):
            self.mixer: Any = SelfAttention(dim, config.num_heads[level], **types)
        else:
            self.mixer = MambaVisionMixer(dim, **types)
        self.norm2 = LayerNorm(dim, dtype=dtype, param_dtype=param_dtype)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim), **types)
        scale = None if config.layer_scale is None else jnp.full((dim,), config.layer_scale, param_dtype)
        self.gamma1, self.gamma2 = (None if scale is None else nnx.Param(scale) for _ in range(2))

    def __call__(self, x: Float[Array, "B H W I"], kept: Float[Array, "B 2"] | None = None) -> Float[Array, "B h w C"]:
        x = self._enter(x)
        windows = split_windows(x, self.window)
        if self.gamma1 is None:
            y = self._joined(self.mixer(windows, norm=self.norm1, residual=windows))
        else:
            y = x + scaled(self.gamma1, self._joined(self.mixer(windows, norm=self.norm1)))
        return self._leave(updated(x, y, kept), kept)

    def trace(
        self, x: Float[Array, "B H W I"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B h w C"], LayerTrace]:
        """(output, LayerTrace or AttentionTrace); every window is a sample of its own, see `WindowOrder`."""
        x = self._enter(x)
        order = WindowOrder(self.window, self.window, map_height=self.grid[0], map_width=self.grid[1])
        update, layer = self.mixer.trace(split_windows(self.norm1(x), self.window), order, collect=collect)
        return self._leave(x + scaled(self.gamma1, self._joined(update))), layer

    def _enter(self, x: Array) -> Array:
        x = _enter(self.downsample, x)
        below, right = (-size % self.window for size in x.shape[1:3])
        return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))

    def _joined(self, windows: Array) -> Array:
        return join_windows(windows, self.window, self.grid)

    def _leave(self, x: Array, kept: Array | None = None) -> Array:
        x = updated(x, added(self.mlp, self.norm2, self.gamma2, x), kept, 1)
        return x[:, : self.grid[0], : self.grid[1]] if self.crops else x


class Affine(nnx.Module):
    """x * scale + bias per channel, in float32: what is left of a BatchNorm at inference."""

    def __init__(self, dim: int, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        scale, bias = (broadcast_last(p[...].astype(jnp.float32), x) for p in (self.scale, self.bias))
        return x.astype(jnp.float32) * scale + bias


class MambaVisionHead(Head):
    """The mean of all tokens, normalised with fixed statistics, and logits."""

    def __init__(self, config: MambaVisionConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.norm = Affine(width, param_dtype=param_dtype)
        self.proj = classifier(
            width, config.num_classes, kernel_init=_INIT, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
        """The vector that the linear head sees."""
        return self.norm(jnp.mean(x, axis=(1, 2)))  # the published order, norm before mean, gives the same


class MambaVision(VisionModel):
    """MambaVision classifier. Between its blocks flow maps (B, H, W, C), padded within a hybrid level.

    Its trace shows the stem's and the convolutions' maps as tokens (B, H * W, C), and every window of a hybrid level
    as a sample of its own (B * windows, window^2, C).
    """

    family = "mambavision"

    def make_stages(
        self, config: MambaVisionConfig, **types: Any
    ) -> tuple[MambaVisionStem, list[Any], MambaVisionHead]:
        stem = MambaVisionStem(config, **types)
        blocks = [
            (ConvBlock if level < config.conv_levels else HybridBlock)(config, level, index, **types)
            for level, depth in enumerate(config.depths)
            for index in range(depth)
        ]
        return stem, blocks, MambaVisionHead(config, **types)

    def for_size(self, size: tuple[int, int]) -> "MambaVision":
        model = super().for_size(size)
        model.stem.size = size
        for level, end in enumerate(self.map_blocks):
            for block in model.blocks[end + 1 - self.config.depths[level] : end + 1]:
                if isinstance(block, HybridBlock):
                    block.grid = model.config.grids[level]
        return model


def _downsample(config: MambaVisionConfig, level: int, index: int, **types: Any) -> Conv3x3 | None:
    if level == 0 or index > 0:
        return None
    return Conv3x3(config.widths[level - 1], config.widths[level], stride=2, use_bias=False, **types)


def _enter(downsample: Conv3x3 | None, x: Array) -> Array:
    return x if downsample is None else downsample(x, out_dtype=jnp.float32)
