"""What a source says of arithmetic and preprocessing that no weight shows, against the config it is loaded with."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_file_writer import Call, Name, Raw, contiguous, encode, write

from ouromamba_jax.cli.main import main
from ouromamba_jax.convert import ConversionError, from_torch, load_tensors
from ouromamba_jax.convert.facts import check_facts
from ouromamba_jax.models import model_config

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
MANIFESTS = GOLDEN.parents[1] / "manifests"
VIM_A = dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3, num_classes=10)
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
HALF = dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    save_file(load_tensors(GOLDEN / "model.safetensors"), path / "model.safetensors")
    return path


def says(name: str, settings: dict, *, given=(), **fields) -> str:
    """The one sentence with which `settings` are refused, or nothing."""
    config, family = model_config(name, **fields), re.sub("deit3?", "vit", name.split("_")[0])
    try:
        check_facts(name, family, config, (("it", settings),), given=given)
    except ConversionError as error:
        message = str(error)
        assert message.endswith("; or pass the tensors alone, load_tensors(path), to go against the file.")
        assert "\n" not in message
        return message
    return ""


@pytest.mark.parametrize("inside", ["", "pretrained_cfg", "default_cfg", "model_args"])
@pytest.mark.parametrize(
    ("said", "contradiction"),
    [
        (
            HALF,
            "says mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], but vim_tiny has mean=(0.485, 0.456, 0.406), "
            "std=(0.229, 0.224, 0.225): pass mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5) "
            "(--set mean=0.5,0.5,0.5 --set std=0.5,0.5,0.5)",
        ),
        (dict(crop_pct=0.9), "crop_pct=0.9, but vim_tiny has crop_pct=0.875: pass crop_pct=0.9 (--set crop_pct=0.9)"),
        (dict(interpolation="bilinear"), "interpolation=bilinear, but vim_tiny has interpolation='bicubic': pass"),
        (dict(interpolation="hamming"), "hamming, which this library does not build (only bicubic, bilinear, nearest)"),
        (dict(crop_mode="squash"), "crop_mode=squash, but vim_tiny has crop_mode='center': pass crop_mode='squash'"),
        (dict(crop_mode="border"), "crop_mode=border, which this library does not build (only center, squash)"),
        (dict(input_size=[3, 256, 256]), "but vim_tiny has img_size=224: pass img_size=(256, 256) (--set img_size="),
    ],
)
def test_said_preprocessing_that_contradicts_names_both_values(inside, said, contradiction):
    assert contradiction in says("vim_tiny", {inside: said} if inside else said)


@pytest.mark.parametrize(
    "said",
    [
        IMAGENET | dict(crop_pct=0.875, interpolation="bicubic", crop_mode="center", input_size=[3, 224, 224]),
        dict(mean=list(map(float, np.float32(IMAGENET["mean"])))),
        dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
        dict(mean=None, std=None, crop_pct=None, interpolation="", crop_mode=None, input_size=None, img_size=None),
        dict(std=0.02, mean="0.5", crop_pct="deep", interpolation=3, crop_mode=[1]),  # of something else
        dict(norm_epsilon=1e-5, rms_norm=True, drop_path=0.3, train_interpolation="random", opt_eps=1e-8),
    ],
)
def test_said_preprocessing_that_agrees_or_means_something_else_is_silent(said):
    assert says("vim_tiny", said) == ""
    assert says("vim_tiny", {"pretrained_cfg": said}) == ""


def test_said_preprocessing_of_published_models_agrees():
    """Every setting that timm and the authors' code record of their models, those that training alone uses, too."""
    names = {"T": "t", "T2": "t2", "S": "s", "B": "b", "L": "l", "L2": "l2", "L2_512_21k": "l2_512"}
    sources = {f"mambavision_{name}": f"mamba_vision_{source}" for source, name in names.items()}
    families = {"deit": ("tiny", "small", "base"), "deit3": ("small", "base"), "vit": ("tiny", "small", "base")}
    sources |= {f"{kind}_{size}": f"{kind}_{size}_patch16_224" for kind, sizes in families.items() for size in sizes}
    sources |= {"vmamba_tiny_s1l8": "vssm1_tiny_0230s", "vmamba_base_s2l15": "vssm_base_0229"}
    for name, source in sources.items():
        recorded = json.loads((MANIFESTS / f"{source}.json").read_text())
        cfgs = recorded.get("pretrained_cfg", {"": recorded.get("default_cfg", {})})
        said = [says(name, {**recorded["kwargs"], "pretrained_cfg": c, "architecture": source}) for c in cfgs.values()]
        assert "" in said, said  # weights of one name differ in crop_pct and mean


@pytest.mark.parametrize("name", ["vim_tiny", "vmamba_tiny_s1l8", "mambavision_t"])
@pytest.mark.parametrize("key", ["norm_eps", "norm_epsilon", "layer_norm_eps"])
def test_said_norm_epsilon(name, key):
    assert f"{key}=1e-06, which this library does not build (only 1e-05)" in says(name, {key: 1e-6})
    assert says(name, {key: 1e-5}) == ""
    message = says("vit_tiny", {key: 1e-5})
    assert f"{key}=1e-05, but vit_tiny has norm_eps=1e-06: pass norm_eps=1e-05 (--set norm_eps=1e-05)" in message
    assert says("vit_tiny", {key: 1e-5}, norm_eps=1e-5) == ""


def test_said_preprocessing_of_training_arguments_and_trees():
    assert "eval_crop_ratio=1.0, but vim_tiny has crop_pct=0.875" in says("vim_tiny", dict(eval_crop_ratio=1.0))
    tree = {"MODEL": {"VSSM": {}}, "DATA": {"IMG_SIZE": 384, "INTERPOLATION": "bilinear"}}
    message = says("vmamba_tiny_s1l8", tree)
    assert "img_size=384, interpolation=bilinear, but vmamba_tiny_s1l8 has img_size=224" in message
    tree["DATA"] = {"IMG_SIZE": 224, "INTERPOLATION": "bicubic"}
    assert says("vmamba_tiny_s1l8", tree) == ""


def test_said_preprocessing_of_gray_images_is_averaged():
    assert says("vim_tiny", IMAGENET, in_channels=1) == ""
    assert "has mean=(0.449" in says("vim_tiny", HALF, in_channels=1)
    assert "--set mean=0.5, --set std=0.5,)" in says("vim_tiny", dict(mean=[0.5], std=[0.5]), in_channels=1)


def test_said_preprocessing_is_not_guessed_from_a_name():
    """DeiT's training normalises models of any name alike."""
    assert says("deit_tiny", {"architecture": "vit_tiny_patch16_224"}) == ""
    for name in ("vit_tiny", "deit_tiny", "deit3_small"):
        assert says(name, {"arch": f"{name}_patch16_224"}) == ""
    assert says("vit_base", {"architecture": "vit_base_patch16_224.dino", "pretrained_cfg": HALF}) == ""
    trained = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": IMAGENET}
    assert says("deit_tiny", trained) == ""


def test_said_preprocessing_of_what_training_began_with_counts_last():
    began = {"pretrained_cfg": {"num_classes": 1000, "input_size": [3, 224, 224]}, "num_classes": 10, "img_size": 384}
    assert says("vit_tiny", began, num_classes=10, img_size=384) == ""
    assert "img_size=384, but" in says("vit_tiny", began, num_classes=10)


def test_said_preprocessing_is_free_where_it_is_given(folder):
    """From a hub folder, in Python and from the command."""
    (folder / "config.json").write_text(
        json.dumps({"architecture": "vim", "pretrained_cfg": {**HALF, "crop_pct": 0.9}})
    )
    with pytest.raises(ConversionError, match=re.escape(f"{folder / 'config.json'} says mean=[0.5, 0.5, 0.5], ")):
        from_torch("vim_tiny", folder, **VIM_A)
    told = from_torch("vim_tiny", folder, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, **VIM_A)
    other = from_torch("vim_tiny", folder, preprocessing=model_config("deit_tiny").preprocessing, **VIM_A)
    assert (told.config.preprocessing.mean, other.config.preprocessing.crop_pct) == ((0.5, 0.5, 0.5), 0.9)


def test_said_preprocessing_is_settled_by_the_command_that_the_message_shows(folder, tmp_path, capsys):
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {**HALF, "crop_pct": 0.9}}))
    command = ["convert", "vim_tiny", str(folder), str(tmp_path / "out")]
    command += [part for name, value in VIM_A.items() for part in ("--set", f"{name}={value}")]
    assert main(command) != 0
    options = re.search(r"\((--set .*?)\)", capsys.readouterr().err)[1].split()
    assert main(command + options) == 0


def test_said_settings_in_records_are_read(tmp_path):
    """A training file's OmegaConf, Namespace or dict of a class that is not known, with NumPy's numbers among them."""
    weights = load_tensors(GOLDEN / "model.safetensors")
    views = {key: contiguous(str(i), value) for i, (key, value) in enumerate(weights.items())}

    def node(kind: str, **state) -> Call:
        return Call(Name("omegaconf", kind), (), state, b"\x81")

    def file(settings) -> Path:
        storages = {view.key: weights[key] for key, view in views.items()}
        return write(tmp_path / "a.pth", {"state_dict": views, "hyper_parameters": settings}, storages)

    mean = node("listconfig.ListConfig", _content=[node("nodes.AnyNode", _val=0.5, _parent=None) for _ in range(3)])
    content = {"crop_pct": node("nodes.AnyNode", _val=0.9), "mean": mean}
    attributes = Call(Name("lightning.fabric.utilities.data", "AttributeDict"), (), None, b"\x81")
    items = b"(" + encode("crop_pct") + encode(0.9) + encode("mean") + encode([0.5] * 3) + b"u"
    for settings in (
        node("dictconfig.DictConfig", _content=content, _parent=None),
        Call(Name("argparse", "Namespace"), (), {"crop_pct": 0.9, "mean": [0.5] * 3}, b"\x81"),
        Raw(encode(attributes) + items),
        Raw(encode(Call(Name("my.settings", "Settings"), (), None, b"\x81")) + items),
    ):
        path = file(settings)
        with pytest.raises(ConversionError, match=r"crop_pct=0\.9, mean=\[0\.5, 0\.5, 0\.5\], but vim_tiny has"):
            from_torch("vim_tiny", path, **VIM_A)
        from_torch("vim_tiny", path, crop_pct=0.9, mean=(0.5,) * 3, **VIM_A)
