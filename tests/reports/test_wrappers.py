"""Checkpoints inside other things: prefixes, training files with several entries, mmengine files, hub folders."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_file_writer import Call, Name, Raw, contiguous, encode, write

from ouromamba_jax.cli.checkpoints import parse_field
from ouromamba_jax.cli.main import main
from ouromamba_jax.convert import CheckpointNote, ConversionError, TorchFileError, from_torch, load_tensors, read_torch
from ouromamba_jax.convert.unpickle import Inert

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
VIM_A = dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3, num_classes=10)
SIZES = tuple(part for name, value in VIM_A.items() for part in ("--set", f"{name}={value}"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / "model.safetensors")


def prefixed(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in tensors.items()}


def convert(source, **options):
    """(the model, what was said)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_torch("vim_tiny", source, **options, **VIM_A)
    assert all(warning.category is CheckpointNote for warning in caught)
    return model, [str(warning.message) for warning in caught]


def views(tensors: dict[str, np.ndarray], storage: str) -> tuple[dict, dict]:
    views = {key: contiguous(f"{storage}{i}", value) for i, (key, value) in enumerate(tensors.items())}
    return views, {view.key: tensors[key] for key, view in views.items()}


# --- Prefixes


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "backbone.", "encoder.", "net.", "model.module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_and_said_once(tensors, prefix):
    model, said = convert(prefixed(tensors, prefix))
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    (note,) = said
    assert f"the prefix {prefix!r} was taken off {len(tensors)} names." in note


def test_prefixes_leave_what_is_no_part_of_the_model_and_say_so(tensors):
    beside = {"n_averaged": np.zeros((), np.int64), "criterion.weight": np.zeros(3, np.float32)}
    _, (note,) = convert({**prefixed(tensors, "model."), **beside})
    assert note.endswith("and 2 others are left out (n_averaged, criterion.weight).")
    _, said = convert(prefixed(tensors, "module."))
    assert said == []


def test_prefixes_that_differ_are_not_guessed(tensors):
    both = prefixed(tensors, "teacher.backbone.") | prefixed(tensors, "student.backbone.")
    with pytest.raises(ConversionError, match="is not part of this model"):
        from_torch("vim_tiny", both, **VIM_A)
    both["student.backbone.head.bias"] = tensors["head.bias"] + 1
    for prefix in ("student.backbone.", "module.student.backbone"):
        model, (note,) = convert(both, prefix=prefix)
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"] + 1)
    assert f"{len(tensors)} others are left out" in note
    mixed = prefixed(tensors, "model.") | {"backbone.head.bias": tensors["head.bias"]}
    with pytest.raises(ConversionError, match=r"model\.layers|model\.cls_token"):
        from_torch("vim_tiny", mixed, **VIM_A)
    with pytest.raises(ConversionError, match=re.escape("'teachers.'; the names start with student., teacher., so")):
        from_torch("vim_tiny", both, prefix="teachers.", **VIM_A)


# --- Keys that do not match


def refusal(name: str, source, **fields) -> str:
    with pytest.raises(ConversionError) as caught:
        from_torch(name, source, **fields)
    return str(caught.value)


def test_unmatched_keys_show_first_what_explains_most(tensors):
    message = refusal("vim_tiny", tensors, **{**VIM_A, "num_classes": 1000})
    assert message.startswith("the checkpoint has num_classes=10 where vim_tiny has num_classes=1000: pass num_classes")
    assert 'or head="fresh"' in message
    message = refusal("vim_tiny", tensors, **{**VIM_A, "depth": 2})
    assert message.startswith("the checkpoint has depth=3 where vim_tiny has depth=2: pass depth=3 (--set")
    ends = {k: v for k, v in tensors.items() if k != "cls_token"}
    ends |= {f"cls_token_{end}": tensors["cls_token"] for end in ("head", "tail")}
    message = refusal("vim_tiny", ends, **VIM_A)
    assert message.startswith("the checkpoint has class_token=ends where vim_tiny has class_token=middle")
    small = {"norm_f.weight": np.zeros(384), "layers.23.norm.weight": np.zeros(384), "cls_token": np.zeros((1, 1, 384))}
    small |= {"pos_embed": np.zeros((1, 197, 384)), "head.weight": np.zeros((1000, 384))}
    small |= {"layers.0.mixer.A_b_log": np.zeros((768, 16)), "layers.0.mixer.conv1d_b.bias": np.zeros(768)}
    assert "has embed_dim=384 where vim_tiny has embed_dim=192: take vim_small" in refusal("vim_tiny", small)
    headless = {k: v for k, v in tensors.items() if not k.startswith("head")}
    assert refusal("vim_tiny", headless, **VIM_A).startswith('the checkpoint has no head: pass head="fresh"')


def test_unmatched_keys_show_both_sides(tensors):
    """Also where there are more than a message lists."""
    renamed = {key.replace("mixer", "mamba") if key.startswith("layers.0") else key: v for key, v in tensors.items()}
    renamed = {key.replace(".2.", ".7.") if "A_b" not in key else key: value for key, value in renamed.items()}
    message = refusal("vim_tiny", renamed, **VIM_A)
    assert message.count("is missing") == message.count("is not part of this model") == 10
    assert "; and " in message


@pytest.mark.parametrize("prefix", ["student.", "vision_tower.trunk."])
def test_prefixes_of_unknown_wrappers_are_named(tensors, prefix):
    wrapped = {prefix + key: value for key, value in tensors.items()}
    message = refusal("vim_tiny", wrapped, **VIM_A)
    assert message.startswith(f"every name in the checkpoint begins with {prefix!r}: pass prefix={prefix!r} (--prefix)")
    with pytest.warns(CheckpointNote, match="was taken off 58 names"):
        from_torch("vim_tiny", wrapped, prefix=prefix, **VIM_A)
    assert "is not part of this model" in refusal("vim_tiny", {**tensors, ".odd": tensors["head.bias"]}, **VIM_A)


# --- Entries


def test_entries_that_were_taken_and_left_are_said_once(tmp_path, tensors, capsys):
    ema = {**tensors, "head.bias": tensors["head.bias"] + 1}
    (model, ours), (shadow, theirs) = views(tensors, "a"), views(ema, "b")
    tree = {"model": model, "state_dict_ema": shadow, "optimizer": {"state": {}}, "epoch": 3}
    path = write(tmp_path / "a.pth", tree, ours | theirs)
    model, (note,) = convert(path)
    assert "entry 'model' was taken, and state_dict_ema (entry=, --entry) can be taken instead." in note
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    model, said = convert(path, entry="state_dict_ema")
    assert said == []
    np.testing.assert_array_equal(model.head.proj.bias[...], ema["head.bias"])
    with pytest.warns(CheckpointNote, match="entry 'model' was taken"):
        load_tensors(path)
    assert main(["convert", "vim_tiny", str(path), str(tmp_path / "out"), *SIZES]) == 0
    assert capsys.readouterr().out.count("entry 'model' was taken") == 1


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema_model"])
def test_entries_of_averages_alone_are_found(tmp_path, tensors, entry):
    tree, storages = views(tensors, "a")
    model, said = convert(write(tmp_path / "a.pth", {entry: tree, "epoch": 3}, storages))
    assert said == []
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda model: {"weights": model, "epoch": 1}, None),
        (lambda model: {"checkpoint": {"model": model, "step": 7}}, None),
        (lambda model: {"checkpoint": {"model": model}, "teacher": dict(list(model.items())[:2])}, "checkpoint.model"),
        (lambda model: {"model": {"state_dict": model}}, None),
    ],
)
def test_entries_of_any_name_and_inside_others(tmp_path, tensors, wrap, entry):
    tree, storages = views(tensors, "a")
    model, said = convert(write(tmp_path / "a.pth", wrap(tree), storages), entry=entry)
    assert said == []
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    with pytest.raises(TorchFileError, match=r"no entry 'ema' that holds tensors; pick one of: .*(weights|model)"):
        convert(write(tmp_path / "b.pth", wrap(tree), storages), entry="ema")


def test_entries_of_mmengine_load_and_their_logs_are_inert(tmp_path, tensors):
    """HistoryBuffer holds its own methods, which pickle writes as getattr(HistoryBuffer, name)."""
    buffer = Name("mmengine.logging.history_buffer", "HistoryBuffer")
    methods = {name: Call(Name("builtins", "getattr"), (buffer, name)) for name in ("min", "max", "current")}
    byte = Call(Name("_codecs", "encode"), ("b", "latin1"))
    array = Call(Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), byte))
    log = Call(buffer, (), {"_max_length": 10, "_log_history": array, "_statistics_methods": methods}, b"\x81")
    tree, storages = views(prefixed(tensors, "backbone."), "a")
    hub = {"log_scalars": Call(Name("collections", "OrderedDict"), ()), "loss": log, "resumed_keys": {}}
    path = write(
        tmp_path / "a.pth", {"meta": {"cfg": "x", "epoch": 1}, "state_dict": tree, "message_hub": hub}, storages
    )
    model, _ = convert(path)
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    assert type(read_torch(path)["message_hub"]["loss"].state["_statistics_methods"]["min"]) is Inert


CANARY = "canary"
GETATTR = {
    "of a module": (Name("argparse", "Namespace"), "__init__"),
    "of nothing": (),
    "with a default": (Name("collections", "OrderedDict"), "__class__", 3),
    "of a tensor's reader": (contiguous("0", np.zeros(4, np.float32)), "reader"),
    "of lists": ([1], {"a": 2}, (3,)),
    "of itself": (Name("builtins", "getattr"), "__self__"),
}


@pytest.mark.parametrize("case", GETATTR)
def test_entries_with_getattr_are_inert_whatever_its_arguments(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    weight = np.zeros(4, np.float32)
    found = Call(Name("builtins", "getattr"), GETATTR[case])
    tree = {"model": {"w": contiguous("0", weight)}, "meta": found}
    path = write(tmp_path / "a.pth", tree, {"0": weight})
    read = read_torch(path)["meta"]
    assert type(read) is Inert
    assert (read.type.module, read.type.name) == ("builtins", "getattr")
    np.testing.assert_array_equal(load_tensors(path)["w"], weight)
    called = Raw(encode(found) + encode((f"touch {CANARY}",)) + b"R")
    with pytest.raises(TorchFileError, match="nothing was executed"):
        read_torch(write(tmp_path / "b.pth", {"model": {"w": contiguous("0", weight)}, "meta": called}, {"0": weight}))
    with pytest.raises(TorchFileError, match="not a named tensor"):
        load_tensors(write(tmp_path / "c.pth", {"model": {"w": found}}, {"0": weight}))
    assert not (tmp_path / CANARY).exists()


# --- Hub folders


def test_hub_folders_load_whole_and_in_shards(tmp_path, tensors):
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    names = sorted(tensors)
    for i, part in enumerate((names[:20], names[20:])):
        save_file(prefixed({key: tensors[key] for key in part}, "model."), tmp_path / f"model-{i}-of-2.safetensors")
    index = {f"model.{key}": f"model-{int(i >= 20)}-of-2.safetensors" for i, key in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded, (note,) = convert(tmp_path)
    assert "'model.'" in note
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    whole, said = convert(tmp_path)
    assert said == []
    for model in (sharded, whole):
        np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(
        TorchFileError, match=r"no model\.safetensors, no model\.safetensors\.index\.json, and no \.pth"
    ):
        load_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_hub_folders_name_files_beside_their_index_only(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(TorchFileError, match="names no files beside it"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\x00"])
def test_hub_folders_with_a_damaged_config_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TorchFileError, match=re.escape("config.json")):
        load_tensors(tmp_path)


# --- The command


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("img_size=384", ("img_size", 384)),
        ("img_size=224,448", ("img_size", (224, 448))),
        ("depths=2,", ("depths", (2,))),
        ("mean=0.5,0.5,0.5", ("mean", (0.5, 0.5, 0.5))),
        ("class_token=first", ("class_token", "first")),
        ("class_token=none", ("class_token", "none")),
        ("halve_directions=false", ("halve_directions", False)),
        ("layer_scale=None", ("layer_scale", None)),
        ("layer_scale=1e-5", ("layer_scale", 1e-5)),
    ],
)
def test_command_fields_are_numbers_flags_names_and_tuples(text, expected):
    name, value = parse_field(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


def test_command_takes_every_field(tmp_path, capsys, tensors):
    path = tmp_path / "a.safetensors"
    save_file(prefixed(tensors, "a.b."), path)
    options = ("--set", "class_token=first", "--set", "halve_directions=false", "--set", "mean=0.5,0.4,0.3")
    out = tmp_path / "out"
    assert main(["convert", "vim_tiny", str(path), str(out), *SIZES, *options, "--prefix", "a.b."]) == 0
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["class_token"], config["halve_directions"]) == ("first", False)
    assert config["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert "the prefix 'a.b.' was taken off" in capsys.readouterr().out
    for wrong in ("img_size", "=3", "img_size=", "mean=a,b"):
        with pytest.raises(SystemExit):
            main(["convert", "vim_tiny", str(path), str(out), "--set", wrong])
