"""VMamba (VSSM, Liu et al. 2024) as released ("v05_noz"): four selective scans across the feature maps of a pyramid."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.data.preprocessing import Preprocessing, check_image_shape, height_width
from ouromamba_jax.models.base import VisionModel, check_fields
from ouromamba_jax.models.convolution import DepthwiseConv2d, HalvingConv
from ouromamba_jax.models.layers import (
    MLP,
    Head,
    LayerNorm,
    SelectiveScan,
    after,
    as_tokens,
    classifier,
    nan_unless_finite,
    normalised,
    projected,
    scan_map,
    uniform,
    updated,
)
from ouromamba_jax.models.trace import LayerTrace, ScanOrder, ScanTrace
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.producers import gelu, merged_routes, route, silu_once, summed_routes

# Row by row, column by column, and both again from the last token: (transpose, reverse) of every scan direction.
DIRECTIONS = ((False, False), (True, False), (False, True), (True, True))
_INIT = nnx.initializers.normal(0.02)


@dataclass(frozen=True)
class VMambaConfig:
    """Widths, depths and input of a VMamba; defaults are those of VMamba-Tiny, s1l8.

    `img_size` is an int or (height, width) in pixels. It is what the model was made for; no parameter depends on it,
    and a float model takes images of any size. `in_channels` is 3 for images in colour and 1 for gray ones. `dims`
    holds the width of every stage, or the first stage's, to be doubled from stage to stage; `depths` the blocks of
    every stage.
    """

    img_size: int | tuple[int, int] = 224
    dims: int | tuple[int, ...] = 96
    depths: tuple[int, ...] = (2, 2, 8, 2)
    ssm_ratio: float = 1.0
    d_state: int = 1
    mlp_ratio: float = 4.0
    in_channels: Literal[1, 3] = 3
    num_classes: int = 1000
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self):
        check_fields(self, zero=("num_classes",))
        if not isinstance(self.dims, int) and len(self.dims) != len(self.depths):
            raise ValueError(
                f"dims {self.dims} and depths {self.depths} must have one entry per stage, or dims be one."
            )
        # The stem's first convolution has half of the first width.
        if self.widths[0] < 2 or min(self.ssm_ratio, self.mlp_ratio) * min(self.widths) < 1:
            raise ValueError(
                f"dims {self.dims}, ssm_ratio {self.ssm_ratio} and mlp_ratio {self.mlp_ratio} leave a layer without "
                "channels; use larger ones."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every stage."""
        if isinstance(self.dims, int):
            return tuple(self.dims * 2**i for i in range(len(self.depths)))
        return self.dims

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every stage's map at `img_size`: each convolution of stride 2 rounds up."""
        height, width = height_width(self.img_size)
        return tuple((-(-height // 2**i), -(-width // 2**i)) for i in range(2, 2 + len(self.depths)))

    def d_inner(self, dim: int) -> int:
        """Channels of the scans in a block of width `dim`."""
        return int(self.ssm_ratio * dim)

    def dt_rank(self, dim: int) -> int:
        """Rank of the step sizes' projection in a block of width `dim`; it does not grow with ssm_ratio."""
        return math.ceil(dim / 16)


VMAMBA_PRESETS = {
    "vmamba_tiny_s1l8": VMambaConfig(),
    "vmamba_small_s1l20": VMambaConfig(depths=(2, 2, 20, 2)),
    "vmamba_base_s1l20": VMambaConfig(dims=128, depths=(2, 2, 20, 2)),
    "vmamba_tiny_s2l5": VMambaConfig(depths=(2, 2, 5, 2), ssm_ratio=2.0),
    "vmamba_small_s2l15": VMambaConfig(depths=(2, 2, 15, 2), ssm_ratio=2.0),
    "vmamba_base_s2l15": VMambaConfig(dims=128, depths=(2, 2, 15, 2), ssm_ratio=2.0),
    # Maps of 8x8 and 4x4 tokens; a third stage would leave 2x2, too few for patch contrast.
    "vmamba_micro": VMambaConfig(
        img_size=32,
        dims=32,
        depths=(2, 4),
        num_classes=10,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0),
    ),
}


class VMambaStem(nnx.Module):
    """Images to maps of a quarter of their size: two halving convolutions with a GELU between."""

    def __init__(self, config: VMambaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.channels, width = config.in_channels, config.widths[0]
        self.first = HalvingConv(self.channels, width // 2, **types)
        self.second = HalvingConv(width // 2, width, **types)

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B h w C"]:
        check_image_shape(images, None, self.channels)
        x = self.second(gelu(self.first(images), approximate=False)).astype(jnp.float32)
        return nan_unless_finite(x, images)


class VMambaDirection(nnx.Module):
    """What one scan direction owns: the projections that make delta, B and C."""

    def __init__(self, config: VMambaConfig, dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        rank, width = config.dt_rank(dim), config.d_inner(dim)
        self.splits = (rank, rank + config.d_state)
        types: dict[str, Any] = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.x_proj = nnx.Linear(width, rank + 2 * config.d_state, kernel_init=uniform(width**-0.5), **types)
        self.dt_proj = nnx.Linear(rank, width, kernel_init=uniform(rank**-0.5), **types)

    @unlisted
    def __call__(self, x: Float[Array, "B H W E"], **order: Any) -> tuple[Array, Array, Array]:
        """(what dt_proj makes delta of, B, C) of a map, in this direction's scan order."""
        dt, B, C = jnp.split(after(self.x_proj, route, x, **order), self.splits, axis=-1)
        return dt, B, C


class VMambaMixer(nnx.Module):
    """SS2D without gate ("v05_noz"): projection, depthwise convolution, four scans across the map, sum, projection."""

    def __init__(self, config: VMambaConfig, dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = config.d_inner(dim)
        self.in_proj = nnx.Linear(dim, width, use_bias=False, kernel_init=_INIT, **types)
        self.conv = DepthwiseConv2d(width, **types)
        self.directions = nnx.List([VMambaDirection(config, dim, **types) for _ in DIRECTIONS])
        self.scan = SelectiveScan(len(DIRECTIONS), width, config.d_state, **types)
        self.norm = LayerNorm(width, dtype=dtype, param_dtype=param_dtype)
        self.out_proj = nnx.Linear(width, dim, use_bias=False, kernel_init=_INIT, **types)

    def __call__(self, x: Float[Array, "B H W C"], norm: LayerNorm | None = None) -> Float[Array, "B H W C"]:
        """Of x; with a norm, of the normalised x, and added to x."""
        u, *operands = self._operands(x, norm)
        return self._merge(scan_map(self.scan, u, DIRECTIONS, *operands).y, x.shape, None if norm is None else x)

    def trace(
        self, x: Float[Array, "B H W C"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B H W C"], tuple[ScanTrace, ...]]:
        """(output, one ScanTrace per direction, as in `DIRECTIONS`)."""
        orders = tuple(ScanOrder(x.shape[1], x.shape[2], transpose=t, reverse=r) for t, r in DIRECTIONS)
        u, delta, B, C = self._operands(x)
        u = jnp.stack([route(u, transpose=t, reverse=r) for t, r in DIRECTIONS], axis=2)
        out, scans = self.scan.trace(u, delta, B, C, orders, collect=collect)
        return self._merge(out.y, x.shape), scans

    def _operands(self, x: Array, norm: LayerNorm | None = None) -> tuple[Array, Array, Array, Array]:
        """A map u, and delta, B and C along its routes."""
        x = silu_once(self.conv(normalised(self.in_proj, norm, x)))
        made = [
            direction(x, transpose=t, reverse=r) for direction, (t, r) in zip(self.directions, DIRECTIONS, strict=True)
        ]
        dt, of_B, of_C = zip(*made, strict=True)
        delta = projected(self.scan, [direction.dt_proj for direction in self.directions], dt)
        B, C = (jnp.stack(parts, axis=2) for parts in (of_B, of_C))
        return x, delta, B, C

    def _merge(
        self, y: Float[Array, "B L 4 E"], shape: tuple[int, ...], residual: Array | None = None
    ) -> Float[Array, "B H W C"]:
        norm, grid = self.norm, (shape[1], shape[2])
        if type(norm) is not LayerNorm:  # but what somebody put in its place
            return after(self.out_proj, lambda x: x, norm(summed_routes(y, grid=grid)), residual=residual)
        options: dict[str, Any] = dict(grid=grid, eps=norm.eps, dtype=norm.dtype)
        return after(self.out_proj, merged_routes, y, norm.scale[...], norm.bias[...], residual=residual, **options)


class VMambaBlock(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x)); x is the float32 map between blocks.

    The first block of a later stage halves the map before that: it takes `inputs` channels and works on `dim`.
    """

    def __init__(
        self,
        config: VMambaConfig,
        inputs: int | None,
        dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.downsample = None if inputs is None else HalvingConv(inputs, dim, **types)
        self.norm = LayerNorm(dim, dtype=dtype, param_dtype=param_dtype)
        self.mixer = VMambaMixer(config, dim, **types)
        self.norm2 = LayerNorm(dim, dtype=dtype, param_dtype=param_dtype)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim), **types)

    def __call__(self, x: Float[Array, "B H W I"], kept: Float[Array, "B 2"] | None = None) -> Float[Array, "B h w C"]:
        x = self._enter(x)
        x = updated(x, self.mixer(x, norm=self.norm), kept)
        return updated(x, self.mlp(x, norm=self.norm2, residual=x), kept, 1)

    def trace(
        self, x: Float[Array, "B H W I"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B h w C"], LayerTrace]:
        """(output, LayerTrace); the trace's tokens are in row-major order."""
        x = self._enter(x)
        mixer_in = self.norm(x)
        out, scans = self.mixer.trace(mixer_in, collect=collect)
        return self._leave(x, out), LayerTrace(scans, as_tokens(mixer_in), as_tokens(out))

    def _enter(self, x: Array) -> Array:
        return x if self.downsample is None else self.downsample(x).astype(jnp.float32)

    def _leave(self, x: Array, mixer_out: Array) -> Array:
        x = x + mixer_out.astype(jnp.float32)
        return self.mlp(x, norm=self.norm2, residual=x)


class VMambaHead(Head):
    """Every token normalised, their mean, and logits."""

    def __init__(self, config: VMambaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.widths[-1]
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.norm = LayerNorm(width, **types)
        self.proj = classifier(width, config.num_classes, kernel_init=_INIT, rngs=rngs, **types)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
        """The vector that the linear head sees."""
        return jnp.mean(self.norm(x), axis=(1, 2), dtype=jnp.float32)


class VMamba(VisionModel):
    """VMamba classifier. Between its blocks flow maps (B, H, W, C); its trace shows them as tokens (B, H * W, C)."""

    family = "vmamba"

    def make_stages(self, config: VMambaConfig, **types: Any) -> tuple[VMambaStem, list[Any], VMambaHead]:
        stem = VMambaStem(config, **types)
        blocks = []
        before = None
        for width, depth in zip(config.widths, config.depths, strict=True):
            blocks += [VMambaBlock(config, before if i == 0 else None, width, **types) for i in range(depth)]
            before = width
        return stem, blocks, VMambaHead(config, **types)
