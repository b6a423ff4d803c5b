"""What the names and shapes of a checkpoint's tensors tell: its prefix, its family, its sizes, and what it is not."""

import math
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import numpy as np

from ouromamba_jax.convert.keymap import ConversionError
from ouromamba_jax.convert.unpickle import shown
from ouromamba_jax.models import config_class, list_models, model_config

_WRAPPER = re.compile(r"(?:(?:module|model|_orig_mod|backbone|encoder|net)\.)*")
_ROOT = re.compile(
    r"(?:patch_embed|layers|levels|blocks|norm|norm_f|norm_pre|fc_norm|head|head_dist|classifier)\."
    r"|(?:cls_token|dist_token|reg_token|pos_embed)"
)
# A key that only this family's checkpoints have.
_SIGNATURES = {
    "vim": re.compile(r"layers\.\d+\.mixer\..+"),
    "vmamba": re.compile(r"layers\.\d+\.blocks\.\d+\..+"),
    "mambavision": re.compile(r"levels\.\d+\..+"),
    "vit": re.compile(r"blocks\.\d+\.(?:attn|norm1)\..+"),
}
_OF_ANY_MODEL = ("num_classes", "in_channels")
HEAD = re.compile(r"(?:classifier\.)?head(?:_dist)?\.(?:weight|bias)")

Tensors = Mapping[str, np.ndarray]


def without_prefix(tensors: Tensors, prefix: str | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors without what wrappers put in front of their names, and a note of what was done.

    Args:
      prefix: what to take off; the tensors that lack it are left out. None finds a prefix that is common to all keys
        that can belong to a model.

    Raises:
      ConversionError: if no key has the prefix.
    """
    if prefix is None:
        prefix = _common_prefix(tensors)
        if not prefix:
            return dict(tensors), []
    elif prefix:
        prefix = prefix.removeprefix("module.").removesuffix(".") + "."  # `module.` is off already
    stripped = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not stripped:
        found = sorted({key.split(".")[0] + "." for key in tensors if "." in key})
        raise ConversionError(
            f"no tensor's name starts with {prefix!r}; the names start with {', '.join(map(shown, found[:20]))}, so "
            "pass one of these as prefix (--prefix)."
        )
    if not prefix:
        return stripped, []
    left = [shown(key) for key in tensors if not key.startswith(prefix)]
    rest = f", and {len(left)} others are left out ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"
    return stripped, [f"the prefix {prefix!r} was taken off {len(stripped)} names{rest if left else ''}"]


def _common_prefix(tensors: Tensors) -> str:
    """The longest common run of wrappers' names, over all keys that go on as a model's do; "" if they differ."""
    found = set()
    for key in tensors:
        wrappers = _WRAPPER.match(key)[0]  # type: ignore[index]
        if _ROOT.match(key, len(wrappers)):
            found.add(wrappers)
    return found.pop() if len(found) == 1 else ""


def check_family(name: str, family: str, tensors: Tensors) -> None:
    """Refuses a checkpoint of another family.

    Raises:
      ConversionError: naming the family it is of.
    """
    bare = {key[len(_WRAPPER.match(key)[0]) :]: key for key in tensors}  # type: ignore[index]
    found = {other: bare[key] for other, sign in _SIGNATURES.items() for key in bare if sign.fullmatch(key)}
    if found and family not in found:
        other, key = next(iter(found.items()))
        raise ConversionError(
            f"the checkpoint is of the {other} family (it has {shown(key)}), but {name} is a {family} model; "
            f"pass the name of a {other} model."
        )


def check_release(family: str, tensors: Tensors) -> None:
    """Refuses architectures of the family that are recognised and not built.

    Raises:
      ConversionError: naming the architecture.
    """

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, key) for key in tensors)

    what = None
    if family == "vim" and has(r"layers\.0\.mixer\..+"):
        if has(r"rope\..+"):
            what = "a Vim with rotary positions (if_rope=True)", "rotary positions"
        elif has(r"layers\.\d+\.mixer\.gamma"):
            what = "a Vim with layer scale (init_layer_scale)", "that scale"
        elif not has(r"layers\.\d+\.mixer\.A_b_log"):
            what = "a Vim that scans in one direction (bimamba_type none)", "one direction"
        elif not has(r"layers\.\d+\.mixer\.conv1d_b\..+"):
            what = "a Vim of the first kind (bimamba_type v1, one convolution for both directions)", "that kind"
        elif has(r"norm_f\.bias"):
            what = "a Vim with LayerNorm (rms_norm=False)", "LayerNorm in Vim"
    elif family == "vmamba" and has(r"layers\.0\.blocks\.0\..+"):
        gated = [k for k in tensors if re.fullmatch(r"layers\.0\.blocks\.0\.(?:op|self_attention)\.in_proj\.weight", k)]
        if not has(r"layers\.\d+\.blocks\.\d+\.mlp\..+"):
            what = "VMamba's first release (vmambav0: a gate, 16 states, no MLP)", "that release"
        elif gated and _is_gated(tensors, gated[0]):
            what = "a VMamba with a gate (forward_type without noz)", "the gate"
        elif has(r"layers\.\d+\.downsample\.(?:reduction|norm)\..+"):
            what = "a VMamba with patch merging (downsample v1 or v2)", "patch merging"
        elif has("pos_embed"):
            what = "a VMamba with positions (posembed=True)", "positions in VMamba"
    elif family == "vit":
        what = next((names for pattern, names in _OTHER_TRANSFORMERS.items() if has(pattern)), None)
    if what is not None:
        raise ConversionError(
            f"the checkpoint is {what[0]}, and this library does not build {what[1]}; take a released one that "
            f"list_models() names, such as {list_models(f'{family}_tiny*')[0]}."
        )


# Keys of transformers that share timm's names: (what they are, what of it is not built).
_OTHER_TRANSFORMERS = {
    r"attn_pool\..+": ("a ViT with attention pooling (global_pool map)", "that pooling"),
    r"rope\..+|.*relative_position_bias_table": ("a transformer with relative positions", "relative positions"),
    r"blocks\.\d+\.attn\.(?:norm|q_proj|[qkv]_bias|in_proj)(?:\..+)?": (
        "a transformer with another attention",
        "that attention",
    ),
    r"blocks\.\d+\.mlp\.(?!fc[12]\.).+": ("a transformer with another MLP (mlp_layer, scale_mlp_norm)", "that MLP"),
}


def _is_gated(tensors: Tensors, key: str) -> bool:
    out = tensors.get(key.replace("in_proj", "out_proj"))
    return out is not None and tensors[key].ndim > 1 and out.ndim > 1 and len(tensors[key]) == 2 * out.shape[1]


def main_difference(name: str, config: Any, family: str, tensors: Tensors) -> str | None:
    """The fields in which a checkpoint's shapes differ from the config, and the model that has them, if there is one.

    Returns:
      a clause, or None if the shapes tell no difference.
    """
    parts = zip(*(key.split(".")[:-1] for key in tensors), strict=False)
    prefix = "".join(f"{same[0]}." for same in takewhile(lambda part: len(set(part)) == 1, parts))
    if prefix and any(_SIGNATURES[family].fullmatch(key.removeprefix(prefix)) for key in tensors):
        return f"every name in the checkpoint begins with {prefix!r}: pass prefix={prefix!r} (--prefix)"
    channels = _channels(tensors)
    if channels not in (None, 1, 3):
        return (
            f"the checkpoint takes images of {channels} channels and {name} of {config.in_channels}: train it on 1 or 3"
        )
    found = _fields(family, config, tensors)
    differ = {field: value for field, value in found.items() if _value(config, field) != value}
    if not any(HEAD.fullmatch(key) for key in tensors) and config.num_classes:
        return 'the checkpoint has no head: pass head="fresh" for a new one or num_classes=0 for features'
    if not differ:
        return _positions_of_another(name, config, family, tensors, found)
    theirs = " and ".join(f"{field}={value}" for field, value in differ.items())
    ours = " and ".join(f"{field}={_value(config, field)}" for field in differ)
    same = [other for other in _models_of(family) if _has(model_config(other), found)]
    way_out = f"pass {', '.join(f'{field}={value}' for field, value in differ.items())} (--set on the command line)"
    if same and name not in same:
        way_out = f"take {' or '.join(same[:3])}"
    elif set(differ) == {"num_classes"}:
        way_out += ', or head="fresh" for a new head'
    return f"the checkpoint has {theirs} where {name} has {ours}: {way_out}"


def matching_models(tensors: Tensors) -> list[tuple[str, dict[str, Any]]]:
    """Every model of the checkpoint's family, with the config fields in which the checkpoint differs; nearest first."""
    tensors, _ = without_prefix(tensors, None)
    families = [family for family, sign in _SIGNATURES.items() if any(map(sign.fullmatch, tensors))]
    found = []
    for family in families:
        for name in _models_of(family):
            config = model_config(name)
            fields = _fields(family, config, tensors)
            fields |= _img_size(family, config, fields, tensors)
            found.append((name, {field: value for field, value in fields.items() if _value(config, field) != value}))
    return sorted(found, key=lambda model: (sum(field not in _OF_ANY_MODEL for field in model[1]), len(model[1])))


def _models_of(family: str) -> list[str]:
    kind = config_class(family)
    return [name for name in list_models() if isinstance(model_config(name), kind)]


def _positions_of_another(name: str, config: Any, family: str, tensors: Tensors, found: dict[str, Any]) -> str | None:
    """A stride shows in the number of positions alone, which another input size changes, too."""
    positions = tensors.get("pos_embed")
    if family != "vim" or positions is None or positions.ndim != 3 or positions.shape[1] == config.num_tokens:
        return None
    others = [other for other in list_models(f"{family}_*") if other != name]
    same = [other for other in others if _has(model_config(other), found)]
    same = [other for other in same if model_config(other).num_tokens == positions.shape[1]]
    if not same:
        return None
    return (
        f"the checkpoint has {positions.shape[1]} positions, as {same[0]}, where {name} has {config.num_tokens}: take "
        f"{same[0]}, unless it was trained at another img_size"
    )


def _has(config: Any, fields: dict[str, Any]) -> bool:
    return all(_value(config, field) == value for field, value in fields.items() if field not in _OF_ANY_MODEL)


def _value(config: Any, field: str) -> Any:
    return config.widths if field == "dims" else getattr(config, field)


def _fields(family: str, config: Any, tensors: Tensors) -> dict[str, Any]:
    """Config fields that the tensors' names and shapes tell."""

    def size(key: str, axis: int = 0) -> int | None:
        return tensors[key].shape[axis] if key in tensors and tensors[key].ndim > axis else None

    found: dict[str, Any] = {}
    if family == "vim":
        found["embed_dim"] = size("norm_f.weight")
        found["depth"] = _count(r"layers\.(\d+)\..+", tensors)
        found["d_state"], found["d_conv"] = size("layers.0.mixer.A_log", 1), size("layers.0.mixer.conv1d.weight", 2)
        found["patch_size"] = size("patch_embed.proj.weight", 2)
        inner = size("layers.0.mixer.out_proj.weight", 1)
        if inner and found["embed_dim"]:
            found["expand"] = inner // found["embed_dim"]
        if found["depth"]:
            found["positions"] = "pos_embed" in tensors
            found["class_token"] = _class_token(config, tensors)
    elif family == "vmamba":
        stages = _count(r"layers\.(\d+)\..+", tensors)
        blocks = [_count(rf"layers\.{i}\.blocks\.(\d+)\..+", tensors) for i in range(stages)]
        widths = [_first(size, f"layers.{i}.blocks.0.", ("norm.weight", "ln_1.weight")) for i in range(stages)]
        found["depths"], found["dims"] = _whole(blocks), _whole(widths)
    elif family == "vit":
        found |= _of_vit(config, tensors, size)
    else:
        stages = _count(r"levels\.(\d+)\..+", tensors)
        found["depths"] = _whole([_count(rf"levels\.{i}\.blocks\.(\d+)\..+", tensors) for i in range(stages)])
        found["dim"], found["in_dim"] = size("levels.0.blocks.0.norm1.weight"), size("patch_embed.conv_down.0.weight")
    found["num_classes"] = _first(size, "", ("head.weight", "classifier.head.weight"))
    found["in_channels"] = 1 if _channels(tensors) == 1 else None  # three fit a model of one, too
    return {field: value for field, value in found.items() if value or value is False}


def _channels(tensors: Tensors) -> int | None:
    """Of the images that the first convolution takes."""
    names = (f"patch_embed.{name}.weight" for name in ("proj", "0", "conv_down.0"))
    first = next((tensors[name] for name in names if name in tensors), None)
    return first.shape[1] if first is not None and first.ndim == 4 else None


def _of_vit(config: Any, tensors: Tensors, size: Any) -> dict[str, Any]:
    """`_fields` of a ViT; heads show where q is normalised alone, a hidden width only where no ratio gives it."""
    dim, hidden = size("blocks.0.norm1.weight"), size("blocks.0.mlp.fc1.weight")
    depth = _count(r"blocks\.(\d+)\..+", tensors)
    if not (dim and hidden and depth):
        return {}
    scaled = {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(tensors)
    per_head = size("blocks.0.attn.q_norm.weight")
    found = {
        "embed_dim": dim,
        "depth": depth,
        "patch_size": size("patch_embed.proj.weight", 2),
        "num_heads": dim // per_head if per_head else None,
        "mlp_ratio": config.mlp_ratio if int(dim * config.mlp_ratio) == hidden else hidden / dim,
        "class_token": "cls_token" in tensors,
        "distilled": "dist_token" in tensors,
        "reg_tokens": size("reg_token", 1),
        "pre_norm": "norm_pre.weight" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": per_head is not None,
        "init_values": (config.init_values or 1e-6) if scaled else None,
    }
    if "fc_norm.weight" in tensors and config.norm_before_pooling:
        found["global_pool"] = "avg"
    rows, prefix = size("pos_embed", 1) or 0, _prefix_tokens(tensors)
    if prefix and _is_square(rows) != _is_square(rows - prefix):
        found["no_embed_class"] = _is_square(rows)
    return found


def _prefix_tokens(tensors: Tensors) -> int:
    tokens = (tensors.get(f"{name}_token") for name in ("cls", "dist", "reg"))
    return sum(token.shape[1] for token in tokens if token is not None and token.ndim > 1)


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _img_size(family: str, config: Any, fields: dict[str, Any], tensors: Tensors) -> dict[str, int]:
    """The side of the square images that positions are for, and the stride of a Vim's patches.

    A Vim's patches of another size than the config's are taken not to overlap.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return {}
    patch = fields.get("patch_size", config.patch_size)
    if family == "vit":
        beside = 0 if fields.get("no_embed_class") else _prefix_tokens(tensors)
        return {"img_size": math.isqrt(max(positions.shape[1] - beside, 1)) * patch}
    stride = config.stride if patch == config.patch_size else patch
    if (stride, positions.shape[1]) == (config.stride, config.num_tokens):
        return {}
    side = math.isqrt(positions.shape[1])
    return {"stride": stride, "img_size": (side - 1) * stride + patch}


def _class_token(config: Any, tensors: Tensors) -> str:
    if "cls_token_head" in tensors:
        return "ends"
    if "cls_token" not in tensors:
        return "none"
    return config.class_token if config.class_token in ("middle", "first") else "middle"


def _count(pattern: str, tensors: Tensors) -> int:
    numbers = [int(match[1]) for key in tensors if (match := re.fullmatch(pattern, key)) and len(match[1]) < 5]
    return max(numbers, default=-1) + 1


def _first(size: Any, start: str, keys: tuple[str, ...]) -> int | None:
    return next((n for key in keys if (n := size(start + key)) is not None), None)


def _whole(values: list[Any]) -> tuple[Any, ...] | None:
    return tuple(values) if values and all(values) else None
