"""Facts that weights do not hold: every variant's arithmetic, and what a checkpoint says of itself."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import mambavision_reference
import numpy as np
import pytest
import vim_reference
from safetensors.numpy import save_file
from tolerances import PARITY
from torch_file_writer import Call, Name, Raw, contiguous, encode, write

from ouromamba_jax.convert import ConversionError, from_torch, load_tensors
from ouromamba_jax.models import create_model, model_config

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
VIM_A = dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3, num_classes=10)
TINY = dict(img_size=(12, 20), patch_size=4, stride=4, embed_dim=20, depth=2, d_state=3, num_classes=7)
TOKENS = {"middle": ("cls_token",), "first": ("cls_token",), "ends": ("cls_token_head", "cls_token_tail"), "none": ()}
VARIANTS = {
    "first token, no halving": dict(class_token="first", halve_directions=False),
    "two tokens, no positions": dict(class_token="ends", positions=False),
    "no token, mean": dict(class_token="none", halve_directions=False),
    "no token, last": dict(class_token="none", pooling="last", positions=False),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / "vim_a" / "model.safetensors")


def refused(name: str, source, **fields) -> str:
    """The one sentence of the refusal."""
    with pytest.raises(ConversionError) as caught:
        from_torch(name, source, **fields)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def training_file(path: Path, tensors: dict[str, np.ndarray], **parts) -> Path:
    views = {key: contiguous(str(i), value) for i, (key, value) in enumerate(tensors.items())}
    return write(path, {"model": views, **parts}, {view.key: tensors[key] for key, view in views.items()})


def namespace(**fields) -> Call:
    return Call(Name("argparse", "Namespace"), (), fields, b"\x81")


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_vim_compute_what_their_reference_does(case):
    fields = VARIANTS[case]
    rng = np.random.default_rng(len(case))
    token = fields["class_token"]
    weights = vim_reference.random_weights(
        rng, patch=4, patches=15, dim=20, depth=2, states=3, classes=7, class_tokens=TOKENS[token],
        positions=fields.get("positions", True),
    )  # fmt: skip
    images = rng.standard_normal((2, 3, 12, 20)).astype(np.float32)
    expected, updates, scans = vim_reference.forward(
        weights, images, stride=4, first=token == "first", halve=fields.get("halve_directions", True),
        pool="none" if fields.get("pooling") == "last" else "mean",
    )  # fmt: skip
    model = from_torch("vim_tiny", weights, **TINY, **fields)
    logits, trace = jax.jit(lambda model, x: model.trace(x))(model, jnp.asarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=PARITY)
    for layer, update, ys in zip(trace.layers, updates, scans, strict=True):
        np.testing.assert_allclose(layer.mixer_out, update, rtol=0, atol=PARITY)
        for scan, y in zip(layer.scans, ys, strict=True):
            np.testing.assert_allclose(scan.y, y, rtol=0, atol=PARITY * max(1.0, np.abs(y).max()))
            assert scan.order.length == y.shape[1]
            kept = np.delete(np.arange(y.shape[1]), model.config.class_indices)
            kept = y.shape[1] - 1 - kept if scan.order.reverse else kept
            np.testing.assert_array_equal(scan.order.to_image(scan.y), np.asarray(scan.y)[:, kept])


def test_variants_of_mambavision_use_the_windows_and_heads_they_are_told():
    """The windows and heads that a small model is told are those it computes with, and they matter."""
    shape = dict(dim=8, in_dim=4, depths=(1, 2), mlp_ratio=2.0, conv_levels=1)
    weights = mambavision_reference.random_weights(np.random.default_rng(3), classes=5, **shape)
    images = np.random.default_rng(4).standard_normal((1, 3, 32, 32)).astype(np.float32)
    told = dict(window_size=(8, 2), num_heads=(1, 2))
    model = from_torch("mambavision_t", weights, img_size=32, num_classes=5, **told, **shape)
    logits = jax.jit(model)(jnp.asarray(images.transpose(0, 2, 3, 1)))
    for windows, heads in (((8, 2), (1, 2)), ((8, 4), (1, 2)), ((8, 2), (1, 4))):
        expected, _, _ = mambavision_reference.forward(weights, images, windows=windows, heads=heads)
        difference = np.abs(logits - expected).max()
        same = (windows, heads) == tuple(told.values())
        assert difference < 2 * PARITY if same else difference > 100 * PARITY


@pytest.mark.parametrize(
    ("name", "size", "windows", "dim", "depths"),
    [
        ("mambavision_l2_512", 512, (8, 8, 32, 16), 196, (3, 3, 12, 5)),
        ("mambavision_l3_256", 256, (8, 8, 16, 8), 256, (3, 3, 20, 10)),
        ("mambavision_l3_512", 512, (8, 8, 32, 16), 256, (3, 3, 20, 10)),
    ],
)
def test_variants_of_mambavision_have_one_window_per_map(name, size, windows, dim, depths):
    config = model_config(name)
    assert (config.img_size, config.window_size, config.dim, config.depths) == (size, windows, dim, depths)
    assert config.num_heads == (4, 8, 16, 32)
    assert config.grids[2:] == tuple((w, w) for w in windows[2:])


def test_variants_an_input_size_that_leaves_the_windows_open():
    with pytest.raises(ValueError, match=re.escape("(8, 8, 32, 16) for one window per map or to (8, 8, 14, 7)")):
        create_model("mambavision_t", img_size=512)
    assert model_config("mambavision_t", img_size=512, window_size=(8, 8, 14, 7)).grids[2] == (32, 32)
    assert model_config("mambavision_t", img_size=222).window_size == (8, 8, 14, 7)  # the same maps


# --- What a checkpoint says


@pytest.mark.parametrize(
    ("said", "words", "way_out"),
    [
        (dict(if_divide_out=False), "if_divide_out=False, but", "halve_directions=False"),
        (dict(if_devide_out=False), "if_devide_out=False, but", "halve_directions=False"),
        (dict(if_cls_token=True, use_middle_cls_token=False), "use_middle_cls_token=False", "class_token='first'"),
        (dict(if_cls_token=True, use_double_cls_token=True), "use_double_cls_token=True", "class_token='ends'"),
        (dict(if_cls_token=False), "if_cls_token=False", "class_token='none'"),
        (dict(if_abs_pos_embed=False), "if_abs_pos_embed=False", "positions=False"),
        (dict(nb_classes=100), "nb_classes=100", "num_classes=100"),
        (dict(model="vim_tiny_patch16_224_bimambav2_final_pool_mean_with_cls_token"), "model=vim", "'first'"),
    ],
)
def test_facts_that_contradict_the_config_are_refused_with_both_values(tmp_path, tensors, said, words, way_out):
    path = training_file(tmp_path / "a.pth", tensors, args=namespace(**said, lr=1e-3, resume=""))
    message = refused("vim_tiny", path, **VIM_A)
    assert f"'args' of {path} says" in message
    assert words in message
    assert f"pass {way_out}" in message or way_out in message
    field = way_out.split("=")[0].strip("'")
    assert field not in VIM_A or repr(VIM_A[field]) in message
    from_torch("vim_tiny", tensors, **VIM_A)  # the way to go against the file


@pytest.mark.parametrize(
    "said",
    [
        dict(if_rope=True, if_rope_residual=True),
        dict(bimamba_type="v1"),
        dict(if_bidirectional=True),
        dict(if_cls_token=False, final_pool_type="max"),
        dict(model="vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token"),
    ],
)
def test_facts_of_what_is_not_built_are_refused(tmp_path, tensors, said):
    path = training_file(tmp_path / "a.pth", tensors, args=namespace(**said))
    assert "which this library does not build" in refused("vim_tiny", path, **VIM_A)


@pytest.mark.parametrize("head", ["checkpoint", "fresh"])
def test_facts_that_agree_are_silent(tmp_path, tensors, head):
    """Among what training files hold besides, and settings that the published code ignores."""
    said = json.loads((GOLDEN / "vim_a" / "config.json").read_text())["kwargs"]
    args = namespace(**said, if_devide_out=True, input_size=32, drop=0.1, nested={"depth": {"x": [1]}}, head_size=None)
    path = training_file(tmp_path / "a.pth", tensors, args=args, arch="vim_tiny_with_midclstok_div2", epoch=3)
    fields = dict(VIM_A, num_classes=10 if head == "checkpoint" else 4)
    assert from_torch("vim_tiny", path, head=head, **fields).config.num_classes == fields["num_classes"]


def test_facts_of_a_hub_folder_and_of_an_architecture_name(tmp_path):
    fields = dict(img_size=64, dim=10, in_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2)
    fields |= dict(num_classes=10)
    weights = load_tensors(GOLDEN / "mambavision_a" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"window_size": [8, 8, 4, 2], "num_heads": [1, 2, 4, 8], "model_type": "x"}))
    from_torch("mambavision_t", tmp_path, window_size=(8, 8, 4, 2), **{**fields, "img_size": 64})
    config.write_text(json.dumps({"num_heads": [1, 2, 2, 8], "img_size": 64}))
    message = refused("mambavision_t", tmp_path, window_size=(8, 8, 4, 2), **fields)
    assert f"{config} says num_heads=[1, 2, 2, 8], but mambavision_t has num_heads=(1, 2, 4, 8)" in message
    file = training_file(tmp_path / "a.pth", weights, arch="mamba_vision_L2_512_21k")
    message = refused("mambavision_t", file, window_size=(8, 8, 14, 7), **fields)
    assert "arch=mamba_vision_L2_512_21k, but mambavision_t has num_heads=(1, 2, 4, 8)" in message
    assert "img_size" not in message  # the caller chose another, and the windows with it


def test_facts_of_windows_belong_to_an_input_size(tmp_path):
    weights = load_tensors(GOLDEN / "mambavision_a" / "model.safetensors")
    fields = dict(dim=10, in_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2, num_classes=10)

    def said(**settings) -> Path:
        return training_file(tmp_path / "a.pth", weights, args=namespace(**settings))

    file = said(window_size=[8, 8, 8, 4], img_size=128)
    chosen = dict(img_size=64, window_size=(8, 8, 4, 2))
    from_torch("mambavision_t", file, **chosen, **fields)
    same_maps = refused("mambavision_t", file, img_size=222, **fields)  # as at 224, for which windows of 14 were chosen
    assert "says window_size=[8, 8, 8, 4], but mambavision_t has window_size=(8, 8, 14, 7): pass" in same_maps
    message = refused("mambavision_t", said(window_size=[8, 8, 8, 4], img_size=64), **chosen, **fields)
    assert "--set window_size=8,8,8,4" in message
    assert "says input_size=128, but" in refused("mambavision_t", said(input_size=128), **fields)


def test_facts_of_a_yaml_tree(tmp_path):
    """VMamba's training files hold their whole configuration."""
    weights = load_tensors(GOLDEN / "vmamba_a" / "model.safetensors")
    fields = dict(img_size=64, dims=8, depths=(1, 1, 2, 1), num_classes=10)

    def file(**vssm) -> Path:
        tree = {"MODEL": {"NUM_CLASSES": 10, "VSSM": {"EMBED_DIM": 8, "DEPTHS": [1, 1, 2, 1], **vssm}}, "DATA": {}}
        node = encode(Call(Name("yacs.config", "CfgNode"), (), None, b"\x81"))
        items = b"".join(encode(key) + encode(value) for key, value in tree.items())
        return training_file(tmp_path / "a.pth", weights, config=Raw(node + b"(" + items + b"u"))

    from_torch("vmamba_tiny_s1l8", file(SSM_FORWARDTYPE="v05_noz", SSM_RATIO=1.0), **fields)
    assert "forward_type=v2" in refused("vmamba_tiny_s1l8", file(SSM_FORWARDTYPE="v2"), **fields)
    assert "ssm_ratio=2.0, but vmamba_tiny_s1l8 has ssm_ratio=1.0" in refused(
        "vmamba_tiny_s1l8", file(SSM_RATIO=2.0), **fields
    )


def test_facts_that_are_nonsense_do_no_harm(tmp_path, tensors):
    odd = namespace(depth="deep", if_cls_token="yes", img_size=[1, [2]], embed_dim=None, final_pool_type=3, stride={})
    message = refused("vim_tiny", training_file(tmp_path / "a.pth", tensors, args=odd), **VIM_A)
    assert "says depth=deep, but vim_tiny has depth=3" in message


# --- Older architectures


def test_releases_that_are_recognised_are_named(tensors):
    def vim(add=(), drop="none"):
        return {k: v for k, v in tensors.items() if drop not in k} | {key: tensors["norm_f.weight"] for key in add}

    for source, words in (
        (vim(("rope.freqs_cos",)), "if_rope=True"),
        (vim(("layers.0.mixer.gamma",)), "init_layer_scale"),
        (vim(drop="A_b_log"), "bimamba_type none"),
        (vim(drop="conv1d_b"), "bimamba_type v1"),
        (vim(("norm_f.bias",)), "rms_norm=False"),
    ):
        assert words in refused("vim_tiny", source, **VIM_A)


def test_releases_of_vmamba():
    e = np.zeros
    block = "layers.0.blocks.0"
    first = {f"{block}.ln_1.weight": e(8), f"{block}.self_attention.in_proj.weight": e((32, 8))}
    assert "VMamba's first release" in refused("vmamba_tiny_s1l8", first)
    gated = {f"{block}.op.in_proj.weight": e((32, 8)), f"{block}.op.out_proj.weight": e((8, 16))}
    gated |= {f"{block}.mlp.fc1.weight": e((32, 8))}
    assert "a gate" in refused("vmamba_tiny_s1l8", gated)
    merging = {f"{block}.mlp.fc1.weight": e((32, 8)), "layers.0.downsample.reduction.weight": e((16, 32))}
    assert "patch merging" in refused("vmamba_tiny_s1l8", merging)
