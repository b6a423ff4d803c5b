"""Which models a checkpoint's names and shapes belong to, and the fields that fit it."""

import json
from pathlib import Path

import numpy as np
import pytest

from ouromamba_jax.convert import from_torch, load_tensors, matching_models
from ouromamba_jax.convert.recognise import main_difference
from ouromamba_jax.models import model_config

GOLDEN = Path(__file__).parents[1] / "golden"
NEAREST = {
    "deit3_base_patch16_224": "deit3_base",
    "deit_tiny_distilled_patch16_224": "deit_tiny_distilled",
    "mamba_vision_B": "mambavision_b",
    "mamba_vision_L2": "mambavision_l2",
    "mamba_vision_S": "mambavision_s",
    "mamba_vision_T": "mambavision_t",
    "mamba_vision_T2": "mambavision_t2",
    "vit_small_patch16_224": "vit_small",
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2": "vim_base",
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": "vim_tiny",
    "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": "vim_tiny_stride8",
    "vssm1_base_0229s": "vmamba_base_s1l20",
    "vssm1_tiny_0230s": "vmamba_tiny_s1l8",
    "vssm_small_0229": "vmamba_small_s2l15",
}


def tensors_of(variant: str) -> dict[str, np.ndarray]:
    manifest = json.loads((GOLDEN / "manifests" / f"{variant}.json").read_text())["state_dict"]
    return {key: np.broadcast_to(np.float32(0), shape) for key, (shape, _) in manifest.items()}


@pytest.mark.parametrize("variant", NEAREST)
def test_published_checkpoints(variant):
    found = matching_models({f"module.{key}": tensor for key, tensor in tensors_of(variant).items()})
    assert (NEAREST[variant], {}) in [model for model in found if not model[1]]
    assert found[0][1] == {}


@pytest.mark.parametrize("name", ["vim_a", "vmamba_a", "deit3_a"])
def test_the_fields_of_the_nearest_model_convert_an_unknown_one(name):
    file = GOLDEN / "models" / name / "checkpoint.pth"
    nearest, fields = matching_models(load_tensors(file))[0]
    assert nearest.startswith(name[:-1])
    fields |= {"deit3_a": dict(num_heads=5)}.get(name, {})  # which no tensor shows
    assert {"depth", "depths"} & set(fields)
    from_torch(nearest, file, **fields)


def test_positions_of_another_input_size_name_no_other_model():
    (variant,) = (variant for variant, name in NEAREST.items() if name == "vim_tiny")
    tensors = tensors_of(variant)
    assert main_difference("vim_tiny", model_config("vim_tiny", img_size=384), "vim", tensors) is None
    assert "take vim_tiny," in main_difference("vim_tiny_stride8", model_config("vim_tiny_stride8"), "vim", tensors)


def test_tensors_of_no_known_family():
    assert matching_models({"conv1.weight": np.zeros((4, 3, 3, 3))}) == []
