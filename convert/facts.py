"""What a checkpoint says of its model, in the published code's words, against the config it is loaded with.

Weights do not hold everything: where the class token stands, whether directions are halved, how large the windows are,
how pixels are normalised. Training files and hub folders often say it. They are not believed but compared: a
contradiction is an error.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ouromamba_jax.convert.keymap import ConversionError
from ouromamba_jax.convert.unpickle import is_simple, shown, unwrapped
from ouromamba_jax.data.preprocessing import CROP_MODES, INTERPOLATIONS
from ouromamba_jax.models import list_models, model_config

_SIZES = {
    "vim": ("img_size", "patch_size", "stride", "embed_dim", "depth", "d_state", "num_classes"),
    "vmamba": ("img_size", "dims", "depths", "ssm_ratio", "d_state", "mlp_ratio", "num_classes"),
    "mambavision": (
        "img_size", "dim", "in_dim", "depths", "window_size", "num_heads", "mlp_ratio", "layer_scale", "num_classes",
    ),
    "vit": (  # the value of a layer scale matters in training alone
        "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "class_token",
        "reg_tokens", "no_embed_class", "pre_norm", "qkv_bias", "qk_norm", "global_pool", "pool_include_prefix",
        "fc_norm", "norm_eps",
    ),
}  # fmt: skip
_SYNONYMS = {"nb_classes": "num_classes", "input_size": "img_size", "resolution": "img_size", "imgsize": "img_size"}
_SYNONYMS |= {"ssm_d_state": "d_state", "eval_crop_ratio": "crop_pct"}
_SYNONYMS |= dict.fromkeys(("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), "norm_eps")
_PIXELS = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
# What published code can do and this library does not build: setting, and its values that are built.
_OF_ANY = {"interpolation": INTERPOLATIONS, "crop_mode": CROP_MODES}
_BUILT: dict[str, dict[str, tuple[Any, ...]]] = {
    "vim": {
        "norm_eps": (1e-5,),
        "if_rope": (False,),
        "if_bidirectional": (False,),
        "bimamba_type": ("v2",),
        "rms_norm": (True,),
        "init_layer_scale": (None,),
    },
    "vmamba": {
        "norm_eps": (1e-5,),
        "forward_type": ("v05_noz", "v04_noz", "v03_noz", "v02_noz", "v3noz"),
        "ssm_act_layer": ("silu",),
        "mlp_act_layer": ("gelu",),
        "norm_layer": ("ln2d",),
        "downsample_version": ("v3",),
        "patchembed_version": ("v2",),
        "posembed": (False,),
        "gmlp": (False,),
    },
    "mambavision": {"qk_scale": (None,), "use_kan": (False,), "norm_eps": (1e-5,)},
    "vit": {
        "pos_embed": ("learn",),
        "global_pool": ("token", "avg"),
        "proj_bias": (True,),
        "final_norm": (True,),
        "scale_attn_norm": (False,),
        "scale_mlp_norm": (False,),
        "act_layer": (None, "gelu"),
    },
}
_YACS = {
    "EMBED_DIM": "dims", "DEPTHS": "depths", "SSM_RATIO": "ssm_ratio", "SSM_D_STATE": "d_state",
    "MLP_RATIO": "mlp_ratio", "SSM_FORWARDTYPE": "forward_type", "SSM_ACT_LAYER": "ssm_act_layer",
    "MLP_ACT_LAYER": "mlp_act_layer", "NORM_LAYER": "norm_layer", "DOWNSAMPLE": "downsample_version",
    "PATCHEMBED": "patchembed_version", "POSEMBED": "posembed", "GMLP": "gmlp",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One thing that a checkpoint says.

    Args:
      where: the part of the checkpoint.
      words: as it says it, e.g. "if_divide_out=False".
      field, value: what that is in the config; where it is not built, None and what would be.
    """

    where: str
    words: str
    field: str | None
    value: Any = None


def check_facts(
    name: str,
    family: str,
    config: Any,
    says: tuple[tuple[str, dict[str, Any]], ...],
    *,
    given: Collection[str],
    other_head: bool = False,
) -> None:
    """Compares what a checkpoint says of itself with the config.

    Args:
      name: the model's, for messages.
      says: (where, settings), untrusted.
      given: fields that the caller set; an input size that was asked for may differ from the file's, with its windows,
        and so may how pictures are prepared.
      other_head: whether the checkpoint's head is not used.

    Raises:
      ConversionError: naming what it says and what the config has, or what is not built.
    """
    claims = list(_claims(family, says))
    free = {"img_size", *_PIXELS} & set(given)
    free |= {*_PIXELS} if "preprocessing" in given else set()
    if {"img_size", "window_size"} <= set(given):
        # Windows belong to an input size: they are free where the caller chose both and the file has another size.
        same_size = any(claim.field == "img_size" and _agrees(config, claim) for claim in claims)
        free |= set() if same_size else {"window_size"}
    free |= {"num_classes"} if other_head else set()
    # The published code ignores pooling beside a class token.
    free |= {"pooling"} if getattr(config, "class_token", "none") != "none" else set()
    problems = []
    for where in dict.fromkeys(claim.where for claim in claims):
        here = [claim for claim in claims if claim.where == where]
        unbuilt = [claim for claim in here if claim.field is None]
        wrong = [c for c in here if c.field is not None and c.field not in free and not _agrees(config, c)]
        if unbuilt:
            said = ", ".join(dict.fromkeys(claim.words for claim in unbuilt))
            built = "; ".join(", ".join(map(str, claim.value)) for claim in unbuilt if claim.value)
            only = f" (only {built})" if built else ""
            problems.append(f"{where} says {said}, which this library does not build{only}")
        if wrong:
            said = ", ".join(dict.fromkeys(claim.words for claim in wrong))
            ours = ", ".join(f"{claim.field}={_value(config, claim.field)!r}" for claim in wrong)
            fields = ", ".join(f"{claim.field}={claim.value!r}" for claim in wrong)
            options = " ".join(f"--set {claim.field}={_as_option(claim.value)}" for claim in wrong)
            problems.append(f"{where} says {said}, but {name} has {ours}: pass {fields} ({options})")
    if problems:
        raise ConversionError(
            f"{'; '.join(problems)}; or pass the tensors alone, load_tensors(path), to go against the file."
        )


def _value(config: Any, field: Any) -> Any:
    return getattr(config.preprocessing if field in _PIXELS else config, field)


def _agrees(config: Any, claim: Claim) -> bool:
    field: Any = claim.field
    if field in ("mean", "std") and config.in_channels != len(claim.value):  # of gray images, the averages
        return _same(_value(config, field), (fmean(claim.value),) * config.in_channels)
    if field in _PIXELS:
        return _same(_value(config, field), claim.value)
    try:
        said = dataclasses.replace(config, **{field: claim.value})
    except (ValueError, TypeError):  # a value that no config takes contradicts any
        return False
    if field == "dims":
        return said.widths == config.widths
    if field == "img_size":
        return _pair(said.img_size) == _pair(config.img_size)
    return _same(getattr(said, field), getattr(config, field))


def _same(a: Any, b: Any) -> bool:
    """Equal, numbers as far as files round them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-3)
    return a == b


def _pair(size: Any) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _as_option(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)


def _claims(family: str, says: tuple[tuple[str, dict[str, Any]], ...]) -> Iterator[Claim]:
    """Explicit settings, and of what they leave open what timm's notes and the name of the architecture tell."""
    explicit, noted, named = [], [], []
    for where, settings in says:
        for part in _parts(settings):
            explicit += _of_settings(family, where, part)
            named += _of_name(family, where, part)
            for name in ("pretrained_cfg", "default_cfg"):  # of the weights that training may have begun with
                notes = unwrapped(part.get(name))
                if isinstance(notes, dict):
                    kept = {key: notes[key] for key in ("input_size", *_PIXELS) if key in notes}
                    noted += _of_settings(family, where, _plain(kept))
    found: dict[Claim, None] = {}
    for claims in (explicit, noted, named):
        fields = {claim.field for claim in found}
        found |= dict.fromkeys(claim for claim in claims if claim.field is None or claim.field not in fields)
    yield from found


def _parts(settings: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """The settings, those nested in them where timm and this field's code put them, and VMamba's YAML tree."""
    settings = _plain(settings)
    yield settings
    for name in ("model_args", "model_kwargs", "kwargs", "config"):
        if isinstance(settings.get(name), dict):
            yield _plain(settings[name])
    model, data = settings.get("MODEL"), settings.get("DATA")
    if isinstance(model, dict) and isinstance(vssm := unwrapped(model.get("VSSM")), dict):
        yield _plain({_YACS[key]: value for key, value in vssm.items() if key in _YACS})
        yield {"num_classes": model.get("NUM_CLASSES")}
        if isinstance(data, dict):
            yield {"img_size": data.get("IMG_SIZE"), "interpolation": data.get("INTERPOLATION")}


def _plain(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings by name, each taken out of the record that may wrap it."""
    values = {key: unwrapped(value) for key, value in settings.items() if isinstance(key, str)}
    return {
        key: [unwrapped(v) for v in value] if isinstance(value, list) and len(value) < 20 else value
        for key, value in values.items()
    }


def _of_settings(family: str, where: str, settings: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for key, value in settings.items():
        if not is_simple(value):
            continue
        words = f"{shown(key)}={shown(value)}"
        field = _SYNONYMS.get(key, key)
        value = tuple(value) if isinstance(value, list) else value
        if field in _PIXELS:
            if not _is_of_pixels(field, value):
                continue
            if field in ("mean", "std") and max(value) > 2:  # of pixels of 0..255
                value = tuple(round(v / 255, 6) for v in value)
        built = (_BUILT[family] | _OF_ANY).get(field)
        if built is not None and not any(_same(good, value) for good in built):
            claims.append(Claim(where, words, None, built))
        elif field in (*_SIZES[family], *_PIXELS) and value is not None:
            if field == "img_size" and isinstance(value, tuple) and len(value) == 3:
                value = value[1:]  # (channels, height, width)
            claims.append(Claim(where, words, field, value))
    return claims + (_of_vim(where, settings) if family == "vim" else [])


def _is_of_pixels(field: str, value: Any) -> bool:
    """Whether a setting of such a name can be one of how pictures are prepared."""
    if field in ("mean", "std"):
        return isinstance(value, tuple) and len(value) in (1, 3)
    return type(value) in (int, float) if field == "crop_pct" else isinstance(value, str) and value != ""


def _of_vim(where: str, settings: Mapping[str, Any]) -> list[Claim]:
    """Vim's flags, several of which make one field."""
    claims = []

    def words(*keys: str) -> str:
        return " and ".join(f"{key}={shown(settings[key])}" for key in keys if key in settings)

    tokens = ("if_cls_token", "use_double_cls_token", "use_middle_cls_token")
    if settings.get("if_cls_token") is False:
        claims.append(Claim(where, words(tokens[0]), "class_token", "none"))
    elif settings.get("use_double_cls_token") is True:
        claims.append(Claim(where, words(*tokens[:2]), "class_token", "ends"))
    elif "use_middle_cls_token" in settings:
        place = "middle" if settings["use_middle_cls_token"] is True else "first"
        claims.append(Claim(where, words(*tokens), "class_token", place))
    for key, field in (("if_divide_out", "halve_directions"), ("if_abs_pos_embed", "positions")):
        misspelt = "if_devide_out" if key == "if_divide_out" and key not in settings else key
        if isinstance(settings.get(misspelt), bool):
            claims.append(Claim(where, words(misspelt), field, settings[misspelt]))
    pool = settings.get("final_pool_type")
    if pool in ("mean", "none"):
        claims.append(Claim(where, words("final_pool_type"), "pooling", "last" if pool == "none" else "mean"))
    elif isinstance(pool, str) and settings.get("if_cls_token") is False:
        claims.append(Claim(where, words("final_pool_type"), None))
    return claims


def _of_name(family: str, where: str, settings: Mapping[str, Any]) -> list[Claim]:
    """What the names of published factories say."""
    claims = []
    for key in ("arch", "model", "architecture", "model_name"):
        name = settings.get(key)
        if not isinstance(name, str):
            continue
        words = f"{key}={shown(name)}"
        if family == "vim" and name.startswith("vim_"):
            patterns = (
                ("rope", None, None),
                ("noclstok|no_cls_token", "class_token", "none"),
                ("double_cls_token", "class_token", "ends"),
                ("midclstok|middle_cls_token", "class_token", "middle"),
                ("with_cls_token", "class_token", "first"),
                ("_div2", "halve_directions", True),
            )
            claims += [Claim(where, words, field, value) for sign, field, value in patterns if re.search(sign, name)]
        if family == "mambavision" and (preset := _mambavision_preset(name)):
            said = model_config(preset)
            fields = ("img_size", "window_size", "num_heads")
            claims += [Claim(where, words, field, getattr(said, field)) for field in fields]
        published = re.fullmatch(r"(?:deit3?|vit)_(tiny|small|base)(?:_distilled)?_patch\d+_\d+(?:\..*)?", name)
        if family == "vit" and published:  # what the tensors do not show
            claims.append(Claim(where, words, "num_heads", model_config(f"vit_{published[1]}").num_heads))
    return claims


def _mambavision_preset(name: str) -> str | None:
    match = re.fullmatch(r"mamba_?vision_([a-z][0-9]?)(_256|_512)?(?:_1k|_21k)?", name.lower().replace("-", "_"))
    preset = None if match is None else f"mambavision_{match[1]}{match[2] or ''}"
    return preset if preset in list_models() else None
