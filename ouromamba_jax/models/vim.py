"""Vision Mamba (Vim, Zhu et al. 2024): bidirectional selective scans over patches and a class token among them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.data.preprocessing import Preprocessing, check_image_shape, height_width
from ouromamba_jax.models.base import check_fields
from ouromamba_jax.models.convolution import DepthwiseConv1d, convolved, extract_patches
from ouromamba_jax.models.layers import (
    Head,
    Operand,
    RMSNorm,
    SelectiveScan,
    after,
    channels_from,
    classifier,
    nan_unless_finite,
    normalised,
    projected,
    uniform,
    updated,
)
from ouromamba_jax.models.positions import resize_positions
from ouromamba_jax.models.tokens import TokenModel
from ouromamba_jax.models.trace import LayerTrace, ScanOrder, ScanTrace
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.producers import gated_mean


@dataclass(frozen=True)
class VimConfig:
    """Widths, depth and input of a Vim; defaults are Vim-Tiny's.

    `img_size` is an int or (height, width) in pixels, `in_channels` 3 for images in colour and 1 for gray ones. With
    stride < patch_size the patches overlap.

    Published variants share their weights' names and differ in what follows. `class_token` stands in the middle of the
    patches, or first, or one at either end, whose mean is classified, or there is "none"; then `pooling` makes the
    features: the mean of all tokens or the last one. `halve_directions` divides the sum of both scans by two
    (if_divide_out). `positions` are learned and added to the tokens (if_abs_pos_embed).
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    in_channels: Literal[1, 3] = 3
    num_classes: int = 1000
    d_conv: int = 4
    expand: int = 2
    class_token: Literal["middle", "first", "ends", "none"] = "middle"
    pooling: Literal["mean", "last"] = "mean"
    halve_directions: bool = True
    positions: bool = True
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self):
        check_fields(self, zero=("num_classes",))
        if min(self.grid) < 1:
            raise ValueError(
                f"img_size {self.img_size} is smaller than one patch of {self.patch_size} pixels; use a larger one."
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.embed_dim / 16)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the map of patches."""
        height, width = height_width(self.img_size)
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    @property
    def class_indices(self) -> tuple[int, ...]:
        """Places of the class tokens among all tokens."""
        return class_indices(self.class_token, self.grid[0] * self.grid[1])

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + len(self.class_indices)

    def resize_positions(self, positions: Float[Any, "L C"], source: tuple[int, int]) -> Float[Any, "l C"]:
        """Positions of a grid `source` of patches for this model's, bicubic without antialiasing."""
        places = class_indices(self.class_token, source[0] * source[1]), self.class_indices
        return resize_positions(positions, source, self.grid, places)


def class_indices(class_token: str, patches: int) -> tuple[int, ...]:
    """Places of the class tokens among so many patches and themselves."""
    return {"middle": (patches // 2,), "first": (0,), "ends": (0, patches + 1), "none": ()}[class_token]


VIM_PRESETS = {
    "vim_tiny": VimConfig(),
    "vim_small": VimConfig(embed_dim=384),
    "vim_base": VimConfig(embed_dim=768),
    "vim_tiny_stride8": VimConfig(stride=8),
    "vim_small_stride8": VimConfig(stride=8, embed_dim=384),
    "vim_micro": VimConfig(
        img_size=32,
        patch_size=4,
        stride=4,
        embed_dim=64,
        depth=4,
        num_classes=10,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0),
    ),
}


class VimStem(nnx.Module):
    """Patches to tokens: linear projection, class tokens at their places, learned positions."""

    def __init__(self, config: VimConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        inputs = config.patch_size**2 * config.in_channels
        self.proj = nnx.Linear(inputs, config.embed_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = nnx.initializers.truncated_normal(0.02)
        tokens, width = len(config.class_indices), config.embed_dim
        shape = (width,) if tokens == 1 else (tokens, width)
        self.class_token = nnx.Param(init(rngs.params(), shape, param_dtype)) if tokens else None
        shape = (config.num_tokens, width)
        self.positions = nnx.Param(init(rngs.params(), shape, param_dtype)) if config.positions else None

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B L C"]:
        config = self.config
        check_image_shape(images, height_width(config.img_size), config.in_channels)
        patches, _ = extract_patches(images.astype(self.dtype), config.patch_size, config.stride)
        x = self.proj(patches).astype(jnp.float32)
        if self.class_token is not None:
            tokens = self.class_token[...].astype(jnp.float32).reshape(-1, 1, 1, config.embed_dim)
            for index, token in zip(config.class_indices, tokens, strict=True):
                token = jnp.broadcast_to(token, (x.shape[0], 1, config.embed_dim))
                x = jnp.concatenate([x[:, :index], token, x[:, index:]], axis=1)
        if self.positions is not None:
            x = x + self.positions[...].astype(jnp.float32)[None]
        return nan_unless_finite(x, images)


class VimDirection(nnx.Module):
    """What one scan direction owns: convolution and the projections that make delta, B and C."""

    def __init__(self, config: VimConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.splits = (config.dt_rank, config.dt_rank + config.d_state)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = self.channels = config.d_inner
        self.conv = DepthwiseConv1d(width, config.d_conv, **types)
        self.x_proj = nnx.Linear(width, config.dt_rank + 2 * config.d_state, use_bias=False, **types)
        self.dt_proj = nnx.Linear(
            config.dt_rank, width, use_bias=False, kernel_init=uniform(config.dt_rank**-0.5), **types
        )

    @unlisted
    def __call__(self, x: Float[Array, "B L D"], *, reverse: bool = False) -> tuple[Array, Array, Array, Array]:
        """(u, what dt_proj makes delta of, B, C) in scan order, of the first channels of x.

        `reverse` scans from the last token to the first; the convolution, too, is causal in reversed time.
        """
        made, u = convolved(self.x_proj, self.conv, x, self.channels, reverse=reverse)
        dt, B, C = jnp.split(made, self.splits, axis=-1)
        return u, dt, B, C


class VimMixer(nnx.Module):
    """Bidirectional Mamba block ("bimamba v2"): one projection in and out, two scans between."""

    def __init__(self, config: VimConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = config.d_inner
        self.in_proj = nnx.Linear(config.embed_dim, 2 * width, use_bias=False, **types)
        self.directions = nnx.List([VimDirection(config, **types) for _ in range(2)])
        self.scan = SelectiveScan(2, width, config.d_state, **types)
        self.z = Operand()
        self.out_proj = nnx.Linear(width, config.embed_dim, use_bias=False, **types)

    def __call__(self, x: Float[Array, "B L C"], norm: RMSNorm | None = None) -> Float[Array, "B L C"]:
        """Of x; with a norm, of the normalised x, and added to x."""
        operands, z = self._operands(x, norm)
        return self._merge(self.scan(*operands).y, *z, residual=None if norm is None else x)

    def trace(
        self, x: Float[Array, "B L C"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B L C"], tuple[ScanTrace, ...]]:
        """(output, one ScanTrace per direction: forward, backward)."""
        operands, z = self._operands(x)
        height, width = self.config.grid
        orders = tuple(ScanOrder(height, width, self.config.class_indices, reverse=r) for r in (False, True))
        out, scans = self.scan.trace(*operands, orders, collect=collect)
        return self._merge(out.y, *z), scans

    def _operands(
        self, x: Array, norm: RMSNorm | None = None
    ) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, int]]:
        x = normalised(self.in_proj, norm, x)
        made = (self.directions[0](x), self.directions[1](x, reverse=True))
        of_u, dt, of_B, of_C = zip(*made, strict=True)
        delta = projected(self.scan, [direction.dt_proj for direction in self.directions], dt)
        u, B, C = (jnp.stack(parts, axis=2) for parts in (of_u, of_B, of_C))
        return (u, delta, B, C), channels_from(self.config.d_inner, x, self.z)

    def _merge(
        self, y: Float[Array, "B L 2 E"], z: Float[Array, "B L D"], start: int, residual: Array | None = None
    ) -> Float[Array, "B L C"]:
        # Both directions are gated by the same silu(z), so the gate follows the mean.
        y = y if self.config.halve_directions else 2 * y
        return after(self.out_proj, gated_mean, y, z, start=start, residual=residual)


class VimBlock(nnx.Module):
    """x + mixer(RMSNorm(x)); x is the float32 residual stream."""

    def __init__(self, config: VimConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.embed_dim, dtype=dtype, param_dtype=param_dtype)
        self.mixer = VimMixer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L C"], kept: Float[Array, "B 2"] | None = None) -> Float[Array, "B L C"]:
        return updated(x, self.mixer(x, norm=self.norm), kept)

    def trace(
        self, x: Float[Array, "B L C"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B L C"], LayerTrace]:
        """(output, LayerTrace)."""
        mixer_in = self.norm(x)
        mixer_out, scans = self.mixer.trace(mixer_in, collect=collect)
        return x + mixer_out.astype(jnp.float32), LayerTrace(scans=scans, mixer_in=mixer_in, mixer_out=mixer_out)


class VimHead(Head):
    """Class tokens, or what pooling makes of all tokens, normalised, to logits."""

    def __init__(self, config: VimConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.norm = RMSNorm(config.embed_dim, dtype=dtype, param_dtype=param_dtype)
        self.proj = classifier(config.embed_dim, config.num_classes, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def features(self, x: Float[Array, "B L C"]) -> Float[Array, "B C"]:
        """The vector that the linear head sees."""
        if self.config.class_indices:
            x = jnp.stack([x[:, index] for index in self.config.class_indices], axis=1)
        elif self.config.pooling == "last":
            x = x[:, -1:]
        return jnp.mean(self.norm(x), axis=1)


class Vim(TokenModel):
    """Vision Mamba classifier."""

    family = "vim"

    def make_stages(self, config: VimConfig, **types: Any) -> tuple[VimStem, list[Any], VimHead]:
        stem = VimStem(config, **types)
        return stem, [VimBlock(config, **types) for _ in range(config.depth)], VimHead(config, **types)
