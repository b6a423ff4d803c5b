"""The command line: every verb on a tiny model, and errors as one sentence."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ouromamba_jax import __version__, create_model, load, save
from ouromamba_jax.cli import demo
from ouromamba_jax.cli.main import command, main
from ouromamba_jax.ops.cpu_miscompile import MENDING_FLAG
from ouromamba_jax.quantize import run as quantizing

VERBS = ("convert", "generate", "quantize", "evaluate", "compare", "inspect", "bench", "export", "demo")
QUANTIZE = ("quantize", "vim_micro", "--images", "nowhere", "--bits", "w4a4", "out")
GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
FIELDS = ("patch_size=8", "stride=8", "embed_dim=48", "depth=3", "num_classes=10")
SIZES = tuple(part for field in FIELDS for part in ("--set", field))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model for 32x32 digits, and calibration images."""
    path = tmp_path_factory.mktemp("cli")
    save(path / "tiny", create_model("vim_micro", embed_dim=16, depth=1, patch_size=8, stride=8, rngs=nnx.Rngs(3)))
    images = np.asarray(jax.random.uniform(jax.random.key(0), (6, 32, 32, 3), minval=-1.0), np.float32)
    np.savez(path / "images.npz", images=images, labels=np.arange(6))
    return path


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: ouromamba {verb} " in text
    assert not any(default in text for default in ("(default: None)", "(default: False)"))
    assert verb != "quantize" or all(f"(default: {value})" in text for value in ("dynamic", 10, 3.7))


def test_an_interrupted_demo_waits_for_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    go_on, ended, left = threading.Event(), [], []
    monkeypatch.setattr(demo, "predict", lambda model, images, **_: np.zeros((len(images), 10), np.float32))
    monkeypatch.setattr(demo, "generate_images", lambda *_: ended.append(go_on.wait(20)))
    monkeypatch.setattr(demo, "quantize", interrupted)
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["ouromamba", "demo", "--out", str(tmp_path / "demo")])
    try:
        with pytest.raises(SystemExit):  # since the faked exit returns
            command()
        assert ended == []
    finally:
        go_on.set()
    assert left == [130]
    assert "interrupted" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ouromamba {__version__}\n"


def test_convert_writes_a_model_that_loads(folder, capsys):
    options = ("--set", "img_size=32", *SIZES)
    out = folder / "converted"
    status, text, _ = run(capsys, "convert", "vim_tiny", GOLDEN / "checkpoint.pth", out, *options)
    assert status == 0
    assert "87,418 parameters" in text
    assert load(out).config.embed_dim == 48
    status, _, error = run(capsys, "convert", "vim_tiny", GOLDEN / "checkpoint.pth", out, *options)
    assert status == 1
    assert "already exists" in error


def test_the_pipeline_from_images_to_scores(folder, capsys):
    made, low = folder / "made.npz", folder / "low"
    status, text, _ = run(
        capsys, "generate", folder / "tiny", made, "--num-images", 3, "--batch-size", 3, "--iterations", 2,
        "--contrastive", 0, "--figure", folder / "made.png",
    )  # fmt: skip
    assert status == 0
    assert "3 images" in text
    with np.load(made) as file:
        assert file["images"].shape == (3, 32, 32, 3)
        assert file["labels"].tolist() == [0, 6, 2]  # of ten classes
    assert (folder / "made.png").stat().st_size > 1000

    status, text, _ = run(
        capsys, "quantize", folder / "tiny", "--images", made, "--bits", "w4a8", low, "--tune-epochs", 1
    )
    assert status == 0
    assert "blocks.0.mixer" in text
    matmuls = text.removeprefix(f"{low}: ").split()[0]
    assert "FP16" in text

    status, text, _ = run(capsys, "evaluate", low, "--data", folder / "images.npz", "--batch-size", 3)
    assert status == 0
    assert "top-5" in text
    compare = "compare", folder / "tiny", low, "--data", folder / "images.npz", "--batch-size", 3
    status, text, _ = run(capsys, *compare)
    assert status == 0
    assert "SQNR" in text
    status, text, _ = run(capsys, *compare, "--json")
    ((title, rows),) = json.loads(text).items()
    assert "agreement" in title
    assert [row["model"] for row in rows] == [str(folder / "tiny"), str(low)]
    assert (rows[0]["agreement %"], rows[0]["SQNR dB"]) == (100, None)
    assert 0 < rows[1]["MB"] < rows[0]["MB"]
    assert rows[1]["SQNR dB"] > 5
    assert "toprule" in run(capsys, *compare, "--format", "latex")[1]
    status, text, _ = run(capsys, "inspect", low)
    assert status == 0
    assert f"quantised: {matmuls} matmuls, 1 scans" in text


def test_bench_names_the_models_and_the_parts_of_a_block(folder, capsys, monkeypatch):
    monkeypatch.setattr("ouromamba_jax.cli.measurement.models_to_compare", lambda model: {"float": model})
    status, text, _ = run(capsys, "bench", folder / "tiny", "--batch-size", 2)
    assert status == 0
    assert "batch 2 on 1 of 1 cpu devices" in text
    assert all(part in text for part in ("float", "mixer.in_proj", "mixer.scan", "rest", "block"))


LOOK = """
import sys
from ouromamba_jax.cli.main import main
main(["evaluate", sys.argv[1], "--data", sys.argv[2]])
import jax, os
print(jax.device_count(), os.environ["XLA_FLAGS"])
"""


@pytest.mark.parametrize("chosen", [False, True], ids=["by-itself", "as-the-user-chose"])
def test_the_command_prepares_jax(chosen, folder, tmp_path):
    """A device per core, the flag against miscompiled products, programs kept in the user's cache folder."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    environment.pop("JAX_NUM_CPU_DEVICES")
    if chosen:
        environment |= {"JAX_NUM_CPU_DEVICES": "3", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine" / "a" / "b")}
    code = [sys.executable, "-c", LOOK, str(folder / "tiny"), str(folder / "images.npz")]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    devices, first, second = done.stdout.splitlines()[-1].split()
    assert int(devices) == (3 if chosen else len(os.sched_getaffinity(0)))
    assert (first, second) == ("--xla_cpu_enable_fast_math=false", MENDING_FLAG)
    programs = list((tmp_path / "ouromamba" / "xla").glob("*"))
    assert bool(programs) != chosen
    assert "Warning" not in done.stderr


def test_inspect_lists_a_pytorch_file(capsys):
    status, text, _ = run(capsys, "inspect", GOLDEN / "checkpoint.pth")
    assert status == 0
    assert "cls_token" in text
    assert "(1, 17, 48)" in text
    line = text.splitlines()[-1].split()
    assert line[:3] == ["ouromamba", "convert", "vim_micro"]
    assert "embed_dim=48" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evaluate", "no-such-model", "--data", "digits"), "there is no checkpoint at no-such-model"),
        (("convert", "vim_tinny", GOLDEN / "checkpoint.pth", "out"), "did you mean"),
        (("convert", "vim_tiny", GOLDEN / "absent.pth", "out"), "absent.pth"),
        (("convert", "vim_tiny", GOLDEN / "checkpoint.pth", "out"), "does not fit the model"),
        (
            ("convert", "vmamba_micro", GOLDEN / "checkpoint.pth", "out", "--set", "depths=2"),
            "depths is 2, but it must be a tuple of whole numbers from 1",
        ),
        (
            ("convert", "vim_tiny", GOLDEN / "checkpoint.pth", "out", *SIZES, "--set", "img_size=40"),
            "interpolate_positions=True (--interpolate-positions on the command line)",
        ),
        (("convert", "qqq", GOLDEN / "checkpoint.pth", "out"), "no model named 'qqq'; choose one of deit3_base"),
        (("generate", "vim_micro", "out.txt"), "must end in .npz"),
        (("generate", "vim_micro", "out.npz", "--figure", "out.jpg"), "out.jpg must end in .png"),
        (("generate", "vim_tiny", "out.npz"), "vim_tiny is a model's name; convert its checkpoint first"),
        (("inspect", "vim_tiny"), "vim_tiny is a model's name; convert its checkpoint first"),
        (("demo", "--out", __file__), "it is not a folder"),
        (("quantize", "vim_micro", "--images", "nowhere", "--bits", "w4a4", "out"), "nowhere"),
        (("quantize", "vim_micro", "out", "--bits", "w4a9"), "cannot have 9 bits; give 2 to 8, or 16"),
        (("quantize", "vim_micro", "out"), "the bits are missing"),
        (("quantize", "vim_micro", "--model", "vim_micro", "--bits", "w4a4", "out"), "leave out --model vim_micro"),
        ((*QUANTIZE, "--seed", 1), "--seed needs no --images"),
        (("quantize", "vim_micro", "out", "--bits", "w4a4", "--limit", 4), "--limit needs --images"),
        (("quantize", "vim_micro", "out", "--bits", "w4a4", "--entry", "model"), "--entry needs --model"),
        (("quantize", "vim_micro", "out", "--bits", "w4a4", "--rule", "typo:act_bits=8"), "typo"),
        ((*QUANTIZE, "--n-refresh", 0), "n_refresh must be at least 1"),
        ((*QUANTIZE, "--sigma", 0), "sigma must be positive"),
        ((*QUANTIZE, "--weight-group", 0), "weight_group must be a positive number"),
        ((*QUANTIZE, "--batch-size", 0), "batch_size at least 1"),
        (("generate", "vim_micro", "out.npz", "--batch-size", 0), "batch_size is 0; use at least 1"),
        (("evaluate", "vim_micro", "--data", "digits", "--batch-size", 0), "batch_size is 0; use at least 1"),
        (("evaluate", "vim_micro", "--data", GOLDEN, "--split", "val"), "has no splits; leave out --split val"),
        (("bench", "vim_micro", "--batch-size", 0), "batch_size is 0; use at least 1"),
    ],
)
def test_an_error_is_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = run(capsys, *arguments)
    assert status == 1
    assert says in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "vim_tiny", GOLDEN / "checkpoint.pth", "{}"),
        ("generate", "vim_micro", "{}.npz"),
        ("generate", "vim_micro", "a.npz", "--figure", "{}.png"),
        ("quantize", "vim_micro", "--images", "digits", "--bits", "w4a4", "{}"),
        ("demo", "--out", "{}"),
    ],
    ids=lambda a: f"{a[0]} {a[-1]}",
)
@pytest.mark.parametrize("place", ["file/out", "/proc/x"])
def test_a_place_that_cannot_be_written_is_refused_at_the_start(arguments, place, tmp_path, capsys, monkeypatch):
    if place.startswith("/proc") and not Path("/proc").exists():
        pytest.skip("there is no /proc")
    for work in ("checkpoints.from_torch", "generate.load", "quantize.load", "demo.load"):
        monkeypatch.setattr(f"ouromamba_jax.cli.{work}", lambda *_, **__: pytest.fail("it was begun"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    status, out, error = run(capsys, *(str(a).format(place) for a in arguments))
    assert status == 1
    assert error.startswith(f"ouromamba: {place}")
    assert " cannot be written in " in error
    assert out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1", "one"])
@pytest.mark.parametrize("verb", [("generate", "vim_micro", "out.npz"), ("demo",)], ids=lambda v: v[0])
def test_a_seed_is_a_whole_number_of_32_bits(verb, seed, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb, f"--seed={seed}"])
    assert stop.value.code == 2
    assert f"'{seed}' is not a seed; give a whole number from 0 to 4294967295" in capsys.readouterr().err


def test_a_figure_that_cannot_be_drawn_is_refused_at_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ouromamba_jax.cli.generate.generate_images", lambda *_, **__: pytest.fail("it was generated"))
    (tmp_path / "old.png").touch()
    status, _, error = run(capsys, "generate", "vim_micro", tmp_path / "a.npz", "--figure", tmp_path / "old.png")
    assert status == 1
    assert "old.png already exists" in error
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # importing it now fails
    status, _, error = run(capsys, "generate", "vim_micro", tmp_path / "a.npz", "--figure", tmp_path / "a.png")
    assert status == 1
    assert "figures need Matplotlib" in error


def test_debug_raises(capsys):
    with pytest.raises(ValueError, match="no checkpoint"):
        main(["inspect", "no-such-model", "--debug"])


def test_an_interrupted_write_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")  # of a write, which names no file

    monkeypatch.setattr(np, "savez_compressed", fail)
    out = tmp_path / "images.npz"
    status, _, error = run(
        capsys, "generate", folder / "tiny", out, "--num-images", 3, "--batch-size", 3, "--iterations", 2,
        "--contrastive", 0,
    )  # fmt: skip
    assert status == 1
    assert error.endswith("ouromamba: no space left on device.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz.unfinished"]


@pytest.mark.parametrize("options", [(), ("--resume", "run")])
def test_an_interruption_says_how_to_go_on(options, folder, capsys, tmp_path, monkeypatch):
    def interrupt(*args, checkpoint_dir, **kwargs):
        checkpoint_dir.mkdir()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ouromamba_jax.cli.generate.generate_images", interrupt)
    status, _, error = run(capsys, "generate", folder / "tiny", "images.npz", *options)
    assert status == 130
    place = "run" if options else "images.npz.unfinished"
    assert error == f"ouromamba: interrupted; the same command goes on from {place}.\n"


DATA_FREE = ("--num-images", 4, "--iterations", 2, "--tune-epochs", 1, "--bits", "W4A8")


def test_a_checkpoint_is_quantised_without_data(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "quantize", GOLDEN / "checkpoint.pth", "low/", "--model", "vim_tiny", *SIZES, "--set", "img_size=32"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantizing, "tune_scales", interrupt)
        status, _, error = run(capsys, *source, *DATA_FREE)
    assert status == 130
    assert "the same command goes on from low.unfinished" in error
    made = list((tmp_path / "low.unfinished" / "images").iterdir())
    assert made
    status, text, _ = run(capsys, *source, *DATA_FREE)
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["low"]
    lines = text.splitlines()
    assert lines[0].startswith("low/: ")
    assert "bits on average" in lines[0]
    assert lines[1].startswith("lowest SQNR: ")
    assert "on the 4 calibration images" in lines[2]
    assert "FP16" in lines[3]
    assert len(lines) == 5

    report = json.loads((tmp_path / "low" / "report.json").read_text())
    assert f"{report['mean_bits']:.2f} bits" in lines[0]
    assert report["calibration_images"] == 4
    assert 0 <= report["agreement"] <= 1
    assert report["sites"][0]["path"] in (tmp_path / "low" / "report.md").read_text()
    assert report["sites"][0]["path"] in run(capsys, "inspect", "low")[1]
    with np.load(tmp_path / "low" / "images.npz") as file:
        assert file["images"].shape == (4, 32, 32, 3)
    load("low")

    again = "quantize", GOLDEN / "checkpoint.pth", "again", *source[3:], *DATA_FREE, "--no-keep-images", "--json"
    status, text, _ = run(capsys, *again)
    assert status == 0
    assert json.loads(text) == report
    assert not (tmp_path / "again" / "images.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((GOLDEN / "checkpoint.pth", "low"), "is not converted yet; say with --model which model it is of"),
        (("FOLDER", "low", "--model", "vim_tiny"), "is converted already and knows its model; leave out --model"),
    ],
)
def test_whether_a_source_needs_a_name(arguments, says, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [folder / "tiny" if a == "FOLDER" else a for a in arguments]
    status, _, error = run(capsys, "quantize", *arguments, "--bits", "w4a4")
    assert status == 1
    assert says in error


# --- demo


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro", "mambavision_micro"])
def test_the_demo_of_every_family(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("ouromamba_jax.cli.demo.BITS", ("w4a4",))  # the other bit widths take as long again, each
    status, text, _ = run(capsys, "demo", "--model", name, "--num-images", 16, "--out", tmp_path)
    assert status == 0
    table = text[text.index(f"{name}: float top-1") :]
    assert table.count("w4a4") == 4
    assert "generated.png, outliers.png, sqnr.png" in table
    assert all((tmp_path / f"{figure}.png").stat().st_size > 1000 for figure in ("sqnr", "outliers"))
