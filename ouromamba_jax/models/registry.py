"""The model registry: every published configuration by name, and the two ways to call a model."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike

from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.mambavision import MAMBAVISION_PRESETS, MambaVision, MambaVisionConfig
from ouromamba_jax.models.vim import VIM_PRESETS, Vim, VimConfig
from ouromamba_jax.models.vit import VIT_PRESETS, ViT, ViTConfig
from ouromamba_jax.models.vmamba import VMAMBA_PRESETS, VMamba, VMambaConfig
from ouromamba_jax.names import did_you_mean

_FAMILIES: dict[type, Any] = {VimConfig: Vim, VMambaConfig: VMamba, MambaVisionConfig: MambaVision, ViTConfig: ViT}
_PRESETS: dict[str, Any] = {**VIM_PRESETS, **VMAMBA_PRESETS, **MAMBAVISION_PRESETS, **VIT_PRESETS}
_PIXELS = tuple(field.name for field in dataclasses.fields(Preprocessing))


def list_models(pattern: str = "*") -> tuple[str, ...]:
    """Names that `create_model` knows, filtered by a shell-style pattern.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.list_models("vim_*stride8")
      ('vim_small_stride8', 'vim_tiny_stride8')
    """
    return tuple(sorted(fnmatch.filter(_PRESETS, pattern)))


def model_config(name: str, **overrides: Any) -> Any:
    """The frozen config of a published model with some fields replaced; see `override_config`.

    Raises:
      ValueError: for an unknown name or field; the message lists what exists.

    Examples:
      >>> from ouromamba_jax.models import model_config
      >>> model_config("vim_tiny", img_size=384).grid
      (24, 24)
    """
    if name not in _PRESETS:
        hint = did_you_mean(name, _PRESETS) or f"choose one of {', '.join(list_models())}."
        raise ValueError(f"there is no model named {name!r}; {hint}")
    return override_config(_PRESETS[name], overrides, name)


def override_config(config: Any, overrides: Mapping[str, Any], name: str = "the model") -> Any:
    """A config with some fields replaced, those of its preprocessing among them (mean, std, crop_pct, ...).

    Raises:
      ValueError: for an unknown field, or for an input size that leaves another field open.
    """
    fields = [f.name for f in dataclasses.fields(config)]
    pixels = {field: value for field, value in overrides.items() if field in _PIXELS and field not in fields}
    unknown = sorted(set(overrides) - set(fields) - set(pixels))
    if channels := {"in_chans", "channels"} & set(unknown):
        raise ValueError(f"{name} has no config field {channels.pop()}; channels are in_channels here, 1 or 3.")
    if unknown:
        raise ValueError(
            f"{name} has no config field {', '.join(unknown)}; its fields are {', '.join([*fields, *_PIXELS])}."
        )
    changed = dataclasses.replace(config, **{field: v for field, v in overrides.items() if field not in pixels})
    if pixels:
        changed = dataclasses.replace(changed, preprocessing=dataclasses.replace(changed.preprocessing, **pixels))
    if isinstance(changed, MambaVisionConfig) and "window_size" not in overrides:
        changed.check_resized(config)
    return changed


def config_class(family: str) -> type:
    """The config type of a family, e.g. "vim".

    Raises:
      ValueError: for an unknown family.
    """
    for config, model in _FAMILIES.items():
        if model.family == family:
            return config
    raise ValueError(f"there is no model family {family!r}; known: {', '.join(m.family for m in _FAMILIES.values())}.")


def build_model(
    config: Any, *, rngs: nnx.Rngs | None = None, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> VisionModel:
    """A freshly initialised model of the family that `config` belongs to."""
    rngs = nnx.Rngs(0) if rngs is None else rngs
    return _FAMILIES[type(config)](config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


def create_model(
    name: str,
    *,
    rngs: nnx.Rngs | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
    remat: bool = False,
    **overrides: Any,
) -> VisionModel:
    """A freshly initialised model by its published name.

    Args:
      name: one of `list_models()`.
      rngs: `nnx.Rngs` for the initial parameters; `nnx.Rngs(0)` if None.
      dtype: type of the computation; scans, norms and the residual stream stay in float32.
      param_dtype: type of the stored parameters.
      drop_path: rate of stochastic depth in the last block, from 0 in the first, in calls with `rngs`.
      remat: whether gradients compute every block again instead of keeping what is in it.
      **overrides: config fields, and those of their preprocessing, e.g. `img_size=384, num_classes=10, crop_pct=1.0`.

    Raises:
      ValueError: for an unknown name or config field.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> model = om.create_model("vim_micro", depth=1, num_classes=5)
      >>> model(jnp.zeros((1, 32, 32, 3))).shape
      (1, 5)
    """
    model = build_model(model_config(name, **overrides), rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    model.drop_path, model.remat = drop_path, remat
    return model


def pure(model: VisionModel) -> tuple[Callable[..., Array], nnx.State]:
    """(fn, state) with fn(state, images) -> logits, ready for `jax.jit`, `jax.grad` and `jax.vmap`.

    The module graph is fixed here, once; a jitted fn dispatches as fast as any function of a plain pytree. For training
    with `drop_path`, fn(state, images, rngs=key) takes a new key in every step.

    Gradients of a quantised model are straight-through: roundings have slope 1 where nothing is clipped, and the levels
    of weights are held fixed. They reach the images, all steps and scales, and the parameters that stayed float. Levels
    are integers, so `jax.grad` takes the state whole with allow_int=True alone, and their gradient is float0. To train,
    take the floats apart, and as float32, since an optimiser divides by what is zero in float16:

        floats, rest = nnx.split_state(state, nnx.Param, ...)
        floats = jax.tree.map(lambda x: x.astype(jnp.float32), floats)
        grads = jax.grad(lambda floats: loss(fn(nnx.merge_state(floats, rest), images)))(floats)

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> fn, state = om.pure(om.load("vim_micro"))
      >>> jax.jit(fn)(state, jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """
    graphdef, state = nnx.split(model)

    def fn(state: nnx.State, images: Array, *, rngs: Array | None = None) -> Array:
        options = {} if rngs is None else {"rngs": rngs}  # which a part of a model does not take
        return nnx.merge(graphdef, state)(images, **options)

    return fn, state
