"""Vision transformers: ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021) and DeiT III (Touvron et al. 2022)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.data.preprocessing import Preprocessing, check_image_shape, height_width
from ouromamba_jax.models.attention import SelfAttention
from ouromamba_jax.models.base import check_fields
from ouromamba_jax.models.convolution import extract_patches
from ouromamba_jax.models.layers import MLP, Head, LayerNorm, added, classifier, nan_unless_finite, scaled, updated
from ouromamba_jax.models.tokens import TokenModel
from ouromamba_jax.models.trace import AttentionTrace, ScanOrder

_INIT = nnx.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class ViTConfig:
    """Widths, depth, tokens and input of a vision transformer; fields have timm's names, defaults are DeiT-Tiny's.

    `img_size` is an int or (height, width) in pixels, a multiple of `patch_size`; `in_channels` is 3 for images in
    colour and 1 for gray ones.

    Prefix tokens come before the patches: a class token if `class_token`, a distillation token if `distilled`, and
    `reg_tokens` registers. Learned positions are added to all tokens, or with `no_embed_class` to the patches alone.
    `pre_norm` normalises what enters the first block, and the patches' projection has no bias then. `qk_norm`
    normalises every head's q and k. `init_values` is the initial factor of every residual update, None for none.

    The head classifies the class token ("token") or the mean ("avg") of the patches, with `pool_include_prefix` of all
    tokens. The last norm comes before pooling, with `fc_norm` after it; None is False for "token" and True for "avg".
    A distilled model has a second layer for the distillation token, and its logits are the mean of both.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    in_channels: Literal[1, 3] = 3
    num_classes: int = 1000
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    global_pool: Literal["token", "avg"] = "token"
    pool_include_prefix: bool = False
    fc_norm: bool | None = None
    norm_eps: float = 1e-6
    preprocessing: Preprocessing = Preprocessing(crop_pct=0.9)

    def __post_init__(self):
        check_fields(self, zero=("num_classes", "reg_tokens"))
        height, width = height_width(self.img_size)
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}; use one that whole patches "
                "cover."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}; change one of them."
            )
        if self.hidden_dim < 1:
            raise ValueError(
                f"embed_dim {self.embed_dim} and mlp_ratio {self.mlp_ratio} leave a layer without channels; use larger "
                "ones."
            )
        if self.global_pool == "token" and not self.class_token:
            raise ValueError('a model without class_token has no token to classify; use global_pool="avg".')
        if self.distilled and self.global_pool == "avg":
            raise ValueError('a distilled model classifies its first two tokens; use global_pool="token".')

    @property
    def hidden_dim(self) -> int:
        """Channels between the two layers of an MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the map of patches."""
        height, width = height_width(self.img_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.distilled + self.reg_tokens

    @property
    def class_indices(self) -> tuple[int, ...]:
        """Places of the tokens that are no patches among all tokens."""
        return tuple(range(self.prefix_tokens))

    @property
    def num_tokens(self) -> int:
        return self.prefix_tokens + math.prod(self.grid)

    @property
    def num_positions(self) -> int:
        """Learned positions: of the patches, and unless `no_embed_class` of the tokens before them."""
        return self.num_tokens - (self.prefix_tokens if self.no_embed_class else 0)

    @property
    def norm_before_pooling(self) -> bool:
        """Whether the last norm is of the tokens, or of what pooling makes of them."""
        return self.global_pool == "token" if self.fc_norm is None else not self.fc_norm

    def resize_positions(self, positions: Float[Any, "L C"], source: tuple[int, int]) -> Float[Array, "l C"]:
        """Positions of a grid `source` of patches for this model's, bicubic with antialiasing, as timm resizes them.

        Those of the tokens before the patches are kept.
        """
        first = len(positions) - math.prod(source)
        patches = positions[first:].reshape(*source, -1)
        resized = jax.image.resize(patches, (*self.grid, patches.shape[-1]), "bicubic", antialias=True)
        return jnp.concatenate([positions[:first], resized.reshape(-1, patches.shape[-1])])


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}
_HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
VIT_PRESETS = {
    **{f"deit_{name}": ViTConfig(**size) for name, size in _SIZES.items()},
    **{f"deit_{name}_distilled": ViTConfig(distilled=True, **size) for name, size in _SIZES.items()},
    "deit3_small": ViTConfig(no_embed_class=True, init_values=1e-6, **_SIZES["small"]),
    "deit3_base": ViTConfig(no_embed_class=True, init_values=1e-6, **_SIZES["base"]),
    **{f"vit_{name}": ViTConfig(preprocessing=_HALF, **size) for name, size in _SIZES.items()},
    "vit_micro": ViTConfig(
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        preprocessing=replace(_HALF, crop_pct=1.0),
    ),
}


class ViTStem(nnx.Module):
    """Patches to tokens: linear projection, the tokens before them, learned positions."""

    def __init__(self, config: ViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        width = config.embed_dim

        def learned(count: int) -> nnx.Param | None:
            return nnx.Param(_INIT(rngs.params(), (count, width), param_dtype)) if count else None

        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inputs = config.patch_size**2 * config.in_channels
        self.proj = nnx.Linear(inputs, width, use_bias=not config.pre_norm, **types)
        self.class_token = learned(config.class_token)
        self.dist_token = learned(config.distilled)
        self.reg_tokens = learned(config.reg_tokens)
        self.positions: Any = learned(config.num_positions)
        eps = config.norm_eps
        self.norm = LayerNorm(width, eps=eps, dtype=jnp.float32, param_dtype=param_dtype) if config.pre_norm else None

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B L C"]:
        config = self.config
        check_image_shape(images, height_width(config.img_size), config.in_channels)
        patches, _ = extract_patches(images.astype(self.dtype), config.patch_size, config.patch_size)
        x = self.proj(patches).astype(jnp.float32)
        positions = self.positions[...].astype(jnp.float32)[None]
        if config.no_embed_class:
            x = x + positions
        prefix = [tokens for tokens in (self.class_token, self.dist_token, self.reg_tokens) if tokens is not None]
        before = [jnp.broadcast_to(p[...].astype(jnp.float32), (x.shape[0], *p.shape)) for p in prefix]
        x = jnp.concatenate([*before, x], axis=1)
        if not config.no_embed_class:
            x = x + positions
        return nan_unless_finite(x if self.norm is None else self.norm(x), images)


class ViTBlock(nnx.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), either update times its layer scale if there is one.

    x is the float32 residual stream; the mixer is self-attention between all tokens.
    """

    def __init__(self, config: ViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        dim, eps, scale = config.embed_dim, config.norm_eps, config.init_values
        self.norm1 = LayerNorm(dim, eps=eps, **types)
        self.mixer = SelfAttention(
            dim, config.num_heads, qkv_bias=config.qkv_bias, qk_norm=eps if config.qk_norm else None, rngs=rngs, **types
        )
        self.norm2 = LayerNorm(dim, eps=eps, **types)
        self.mlp = MLP(dim, config.hidden_dim, rngs=rngs, **types)
        gammas = (None if scale is None else nnx.Param(jnp.full((dim,), scale, param_dtype)) for _ in range(2))
        self.gamma1, self.gamma2 = gammas

    def __call__(self, x: Float[Array, "B L C"], kept: Float[Array, "B 2"] | None = None) -> Float[Array, "B L C"]:
        return self._leave(updated(x, added(self.mixer, self.norm1, self.gamma1, x), kept), kept)

    def trace(
        self, x: Float[Array, "B L C"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B L C"], AttentionTrace]:
        """(output, AttentionTrace)."""
        order = ScanOrder(*self.config.grid, self.config.class_indices)
        update, layer = self.mixer.trace(self.norm1(x), order, collect=collect)
        return self._leave(x + scaled(self.gamma1, update)), layer

    def _leave(self, x: Array, kept: Array | None = None) -> Array:
        return updated(x, added(self.mlp, self.norm2, self.gamma2, x), kept, 1)


class ViTHead(Head):
    """The pooled tokens, normalised, to logits; a distilled model's class and distillation token each by their own."""

    def __init__(self, config: ViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        dim, classes = config.embed_dim, config.num_classes
        types: dict[str, Any] = dict(kernel_init=_INIT, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = LayerNorm(dim, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.proj = classifier(dim, classes, **types)
        self.proj_dist = classifier(dim, classes, **types) if config.distilled else None

    def features(self, x: Float[Array, "B L C"]) -> Float[Array, "B ..."]:
        """The vector (B, C) that the linear head sees; of a distilled model both of them, (B, 2, C)."""
        config = self.config
        if config.distilled:
            return self.norm(x[:, :2])
        if config.global_pool == "token":
            return self.norm(x[:, 0])
        x = x if config.pool_include_prefix else x[:, config.prefix_tokens :]
        return jnp.mean(self.norm(x), axis=1) if config.norm_before_pooling else self.norm(jnp.mean(x, axis=1))

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B classes"]:
        if not self.config.distilled:
            return super().__call__(x)
        tokens = self.features(x)
        seen = [
            (token if proj is None else proj(token)).astype(jnp.float32)
            for proj, token in ((self.proj, tokens[:, 0]), (self.proj_dist, tokens[:, 1]))
        ]
        return nan_unless_finite((seen[0] + seen[1]) / 2, x)


class ViT(TokenModel):
    """Vision transformer. Its trace shows attention in place of scans."""

    family = "vit"

    def make_stages(self, config: ViTConfig, **types: Any) -> tuple[ViTStem, list[Any], ViTHead]:
        stem = ViTStem(config, **types)
        return stem, [ViTBlock(config, **types) for _ in range(config.depth)], ViTHead(config, **types)
