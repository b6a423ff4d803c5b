"""Building blocks shared by the model families."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from ouromamba_jax.models.trace import ScanOrder, ScanTrace
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.producers import gelu, layer_norm, rms_norm, route
from ouromamba_jax.ops.scan import selective_scan
from ouromamba_jax.ops.scan_types import ScanOutput

_DT_MIN, _DT_MAX = 1e-3, 1e-1  # range of the step sizes at initialisation


def after(
    linear: Any,
    producer: Callable[..., Array],
    *arrays: Any,
    keep: bool = False,
    residual: Float32[Array, "... O"] | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Any,
) -> Any:
    """linear(producer(*arrays, **options)), added to `residual`; with `keep`, beside what the producer made.

    A quantised layer has a method `after`, and takes all as one where a kernel makes an activation with its levels.
    With `out_dtype` the product is cast to that; a quantised layer's is then not rounded to the layer's own type.
    """
    if hasattr(linear, "after"):
        return linear.after(producer, *arrays, keep=keep, residual=residual, out_dtype=out_dtype, **options)
    x = producer(*arrays, **options)
    y = linear(x) if out_dtype is None else linear(x).astype(out_dtype)
    y = y if residual is None else residual + y.astype(jnp.float32)
    return (y, x) if keep else y


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: DTypeLike, param_dtype: DTypeLike):
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return rms_norm(x, self.scale[...], eps=self.eps, dtype=self.dtype)

    @unlisted
    def into(self, linear: nnx.Module, x: Float[Array, "... C"]) -> Float[Array, "... O"]:
        """linear of the normalised x."""
        return after(linear, rms_norm, x, self.scale[...], eps=self.eps, dtype=self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: DTypeLike, param_dtype: DTypeLike):
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps, dtype=self.dtype)

    @unlisted
    def into(self, linear: nnx.Module, x: Float[Array, "... C"]) -> Float[Array, "... O"]:
        """linear of the normalised x."""
        return after(linear, layer_norm, x, self.scale[...], self.bias[...], eps=self.eps, dtype=self.dtype)


def normalised(linear: Any, norm: Any, x: Float[Array, "... C"]) -> Float[Array, "... O"]:
    """linear(norm(x)), or linear(x) without a norm. A norm that somebody put in the place of ours is just called."""
    if norm is None:
        return linear(x)
    return norm.into(linear, x) if type(norm) in (RMSNorm, LayerNorm) else linear(norm(x))


class Head(nnx.Module):
    """What every family's head does: features, then one linear layer `proj`, to float32 logits.

    A model without classes has no `proj`: its features come out.
    """

    proj: nnx.Linear | None

    def features(self, x: Array) -> Float[Array, "B C"]:
        """The vector that the linear layer sees."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Float[Array, "B classes"]:
        features = self.features(x)
        logits = features if self.proj is None else self.proj(features)
        return nan_unless_finite(logits.astype(jnp.float32), x)


def classifier(features: int, classes: int, **options: Any) -> nnx.Linear | None:
    """The last layer of a head, `options` as `nnx.Linear` takes them; None for no classes."""
    return nnx.Linear(features, classes, **options) if classes else None


class MLP(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(
            kernel_init=nnx.initializers.normal(0.02), dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.fc1 = nnx.Linear(dim, hidden, **types)
        self.fc2 = nnx.Linear(hidden, dim, **types)

    def __call__(
        self, x: Float[Array, "... C"], norm: LayerNorm | None = None, residual: Float32[Array, "... C"] | None = None
    ) -> Float[Array, "... C"]:
        """Of x, first normalised if there is a norm; added to `residual`."""
        return after(self.fc2, gelu, normalised(self.fc1, norm, x), approximate=False, residual=residual)


def scaled(gamma: nnx.Param | None, update: Float[Array, "... C"]) -> Float32[Array, "... C"]:
    """A residual update in float32, times its layer scale if there is one."""
    update = update.astype(jnp.float32)
    return update if gamma is None else update * broadcast_last(gamma[...].astype(jnp.float32), update)


def added(module: Any, norm: Any, gamma: nnx.Param | None, x: Float32[Array, "... C"]) -> Float32[Array, "... C"]:
    """x + module(norm(x)), the update times its layer scale if there is one; the module takes (x, norm, residual)."""
    return module(x, norm=norm, residual=x) if gamma is None else x + scaled(gamma, module(x, norm=norm))


class SelectiveScan(nnx.Module):
    """The scan of one mixer with its parameters, all directions at once as groups of channels.

    u and delta are (B, L, G, E), B and C (B, L, G, N), each direction in its own scan order; delta comes without
    bias and before softplus. `operands` is where a quantised model steps in.
    """

    def __init__(
        self,
        directions: int,
        channels: int,
        d_state: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.directions = directions
        self.dtype = dtype
        total = directions * channels
        a = jnp.log(jnp.arange(1, d_state + 1, dtype=param_dtype))
        self.A_log = nnx.Param(jnp.tile(a[None], (total, 1)))
        self.D = nnx.Param(jnp.ones((total,), param_dtype))
        span = math.log(_DT_MAX) - math.log(_DT_MIN)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (total,), param_dtype) * span + math.log(_DT_MIN))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # inverse of softplus

    def operands(self, u: Array, delta: Array, B: Array, C: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
        """(u, delta, A, B, C, D) as the scan uses them; grouped as given."""
        return u, delta, self.decay_rates(), B, C, self.D[...].astype(jnp.float32)

    def decay_rates(self) -> Float[Array, "GE N"]:
        """A = -exp(A_log), in float32."""
        return -jnp.exp(self.A_log[...].astype(jnp.float32))

    def delta_bias(self, delta: Float[Array, "B L G E"]) -> Float[Array, "1 1 G E"]:
        """The bias that the scan adds to `delta`, in its shape and type."""
        return self.dt_bias[...].astype(delta.dtype).reshape(1, 1, *delta.shape[2:])

    def step_sizes(self, delta: Float[Array, "B L G E"]) -> Float[Array, "B L G E"]:
        """softplus(delta + bias), in float32."""
        delta = delta.astype(jnp.float32)
        return jax.nn.softplus(delta + self.delta_bias(delta))

    def __call__(
        self,
        u: Float[Array, "B L G E"],
        delta: Float[Array, "B L G E"],
        B: Float[Array, "B L G N"],
        C: Float[Array, "B L G N"],
        *,
        collect: Callable[[Array], Any] | None = None,
    ) -> ScanOutput:
        return self.scan(*self.operands(u, delta, B, C), collect=collect)

    @unlisted
    def scan(self, u, delta, A, B, C, D, *, collect=None, state_transform=None) -> ScanOutput:
        """Runs the scan on ready operands; y comes back as (B, L, G, E)."""
        out = selective_scan(
            apart(u),
            apart(delta),
            A,
            B,
            C,
            D,
            delta_bias=self.dt_bias[...].astype(jnp.float32),
            delta_softplus=True,
            collect=collect,
            state_transform=state_transform,
        )
        return out._replace(y=out.y.reshape(*out.y.shape[:2], self.directions, -1))

    def trace(
        self, u: Array, delta: Array, B: Array, C: Array, orders: tuple[ScanOrder, ...], *, collect=None
    ) -> tuple[ScanOutput, tuple[ScanTrace, ...]]:
        """As `__call__`, and one ScanTrace per direction. `collect` sees one direction's h (B, E, N) at a time."""
        u, delta, A, B, C, D = self.operands(u, delta, B, C)
        groups, channels = u.shape[2], u.shape[3]

        def collect_groups(h: Array) -> Any:  # mapped, not called once each: slices of h would be copied at every step
            by_group = h.reshape(h.shape[0], groups, channels, -1)
            return jax.vmap(collect, in_axes=1, out_axes=1)(by_group)

        out = self.scan(u, delta, A, B, C, D, collect=None if collect is None else collect_groups)
        delta = self.step_sizes(delta)
        A, D = A.reshape(groups, channels, -1), D.reshape(groups, channels)
        scans = tuple(
            ScanTrace(
                u=u[:, :, g],
                delta=delta[:, :, g],
                A=A[g],
                B=B[:, :, g],
                C=C[:, :, g],
                D=D[g],
                y=out.y[:, :, g],
                states=jax.tree.map(lambda states: states[:, :, g], out.states),  # noqa: B023
                order=order,
            )
            for g, order in enumerate(orders)
        )
        return out, scans


class Operand(nnx.Module):
    """Marks a tensor that a quantised model may round; computes nothing."""

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return x


def channels_from(start: int, x: Float[Array, "... D"], operand: Any) -> tuple[Float[Array, "... D"], int]:
    """(array, its first channel that counts): operand(x[..., start:]), not copied where the operand stays as it is."""
    return (x, start) if type(operand) is Operand else (operand(x[..., start:]), 0)


def updated(
    x: Float32[Array, "B ..."], y: Float32[Array, "B ..."], kept: Float32[Array, "B 2"] | None, branch: int = 0
) -> Float32[Array, "B ..."]:
    """y, which a residual branch made of x; of every sample its update y - x times `kept[:, branch]`, if there is one.

    A block has up to two branches; `VisionModel.drop_path` says what the factors are.
    """
    if kept is None:
        return y
    return x + kept[:, branch].reshape(-1, *(1,) * (x.ndim - 1)) * (y - x)


class DotProductAttention(nnx.Module):
    """softmax(q k^T / sqrt(head width)) v with several heads, each a contiguous part of the channels.

    No product but these two multiplies activations by activations. `q`, `k`, `v` (B, L, C) and `probs` (B, heads, L, L)
    mark their operands, so that a quantised model can round them.
    """

    def __init__(self, heads: int, *, dtype: DTypeLike):
        self.heads = heads
        self.dtype = dtype
        self.q, self.k, self.v, self.probs = (Operand() for _ in range(4))

    def __call__(self, q: Float[Array, "B L C"], k: Float[Array, "B L C"], v: Float[Array, "B L C"]) -> Array:
        return self.trace(q, k, v)[0]

    def trace(
        self, q: Float[Array, "B L C"], k: Float[Array, "B L C"], v: Float[Array, "B L C"]
    ) -> tuple[Float[Array, "B L C"], Float[Array, "B heads L L"]]:
        """(output, attention maps); every row of a map sums to 1."""
        q, k, v = (
            point(x).reshape(*x.shape[:2], self.heads, -1) for point, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = product("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
        probs = self.probs(jax.nn.softmax(scores).astype(self.dtype))
        out = product("bhlm,bmhd->blhd", probs, v).astype(self.dtype)
        return out.reshape(*out.shape[:2], -1), probs


def nan_unless_finite(y: Float[Array, "B ..."], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """y, but NaN for every sample whose x is not finite.

    Integers hold no NaN: without this a quantised model would classify a broken sample without a word.
    """
    finite = jnp.isfinite(x).all(axis=range(1, x.ndim))
    return jnp.where(finite.reshape(-1, *(1,) * (y.ndim - 1)), y, jnp.nan)


def scan_map(
    scan: Any, x: Float[Array, "B H W E"], orders: Sequence[tuple[bool, bool]], delta: Array, B: Array, C: Array
) -> ScanOutput:
    """A scan of a map's tokens by several routes, (transpose, reverse) each; u is x along them, the others lie so.

    A quantised scan has a method `of_map`, and reads the map itself.
    """
    if hasattr(scan, "of_map"):
        return scan.of_map(x, orders, delta, B, C)
    return scan(jnp.stack([route(x, transpose=t, reverse=r) for t, r in orders], axis=2), delta, B, C)


def projected(scan: Any, projections: Sequence[Any], inputs: Sequence[Array]) -> Any:
    """What each direction's linear layer makes of its input, as the scan's delta.

    A quantised scan may make the products of quantised layers itself, and then gets them uncomputed.
    """
    if getattr(scan, "takes_products", False):
        made = tuple(
            linear.promise(x) if hasattr(linear, "promise") else None
            for linear, x in zip(projections, inputs, strict=True)
        )
        if None not in made:
            return made
    return jnp.stack([linear(x) for linear, x in zip(projections, inputs, strict=True)], axis=2)


def apart(x: Float[Array, "B L G E"] | tuple[Any, ...]) -> tuple[Any, ...]:
    """What each direction has, one by one: a kernel that reads them so leaves XLA no use for their stack."""
    return x if isinstance(x, tuple) else tuple(x[:, :, g] for g in range(x.shape[2]))


def merge_groups(x: Float[Array, "B L G E"]) -> Float[Array, "B L GE"]:
    """Channels of all directions side by side, group-major, as `selective_scan` takes them."""
    return x.reshape(*x.shape[:2], -1)


def broadcast_last(vector: Float[Array, " C"], like: Array) -> Array:
    """`vector` with leading axes added until its rank is that of `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def as_tokens(x: Float[Array, "... C"]) -> Float[Array, "B L C"]:
    """Samples on the first axis, channels on the last, all between as tokens; a vector per sample is one token."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def uniform(bound: float) -> Callable[..., Array]:
    """Initialiser: uniform in [-bound, bound]."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
