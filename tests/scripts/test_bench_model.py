"""The models' benchmark on a GPU: its tables with XLA in the place of the kernels, and what it says without one."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from script_modules import load_script
from tiny_models import TINY

from ouromamba_jax.models import create_model, list_models, model_config
from ouromamba_jax.quantize import QuantConfig


@pytest.fixture
def script(monkeypatch):
    script = load_script("bench_model")
    monkeypatch.setattr(script, "create_model", lambda name, **types: create_model("vim_micro", **TINY, **types))
    return script


@pytest.fixture
def gpu(script, monkeypatch):
    monkeypatch.setattr(script.jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a GPU")])


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scripts/bench_model.py", "--device", "gpu", *arguments])
    return script.main()


def test_the_models_exist(script):
    assert set(script.GPU_MODELS) <= set(list_models())


def test_without_a_gpu_it_says_so_in_one_sentence(script, capsys, monkeypatch):
    monkeypatch.setattr(script.jax, "devices", lambda: [SimpleNamespace(platform="cpu")])
    assert run(script, monkeypatch) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "need an NVIDIA GPU" in said.err
    assert said.err.count("\n") == said.err.count(". ") + 1 == 1


def test_on_a_cpu_the_scan_stands_beside_associative_scan(script, monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    assert run(script, monkeypatch, "--device", "cpu", "--batch", "1", "--repeats", "1", "--json", str(path)) == 0
    assert [row[0] for row in json.loads(path.read_text())["rows"]] == ["associative_scan", "ours"]


def test_models_are_quantised_to_what_the_kernels_take(script, monkeypatch):
    asked = []

    def quantize(model, preset):
        asked.append(QuantConfig.preset(preset))
        return model

    monkeypatch.setattr(script, "quantize_untuned", quantize)
    models = script.gpu_models("vim_tiny", ["w8a8", "w4a4"])
    assert list(models) == ["bf16", "w8a8", "w4a4"]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(script.pure(models["bf16"])[1]))
    assert [(c.weight_bits, c.act_bits, c.outlier_bits) for c in asked] == [(8, 8, 16), (4, 4, 8)]


def test_its_tables_and_results(script, gpu, capsys, monkeypatch, tmp_path):
    other = create_model("vim_micro", **TINY)  # stands for a quantised model
    pure = script.pure
    monkeypatch.setattr(script, "pure", lambda model: pure(model.stem))  # compiles in no time
    monkeypatch.setattr(script, "OURS", "xla also")
    monkeypatch.setattr(script, "int4_reason", lambda: None)
    monkeypatch.setattr(script, "INT4_KERNEL", "HloModule")  # in any program
    monkeypatch.setattr(script, "quantize_untuned", lambda model, preset, **_: other)
    preferred = []

    def preferring(backend):
        preferred.append(backend)
        return nullcontext()

    monkeypatch.setattr(script, "preferring", preferring)
    broken_down = []

    def model_breakdown(model, batch, **_):
        broken_down.append((model is other, batch))
        return dict(zip(script.KINDS, (1.0, 2.0, 3.0, 4.0), strict=True))

    monkeypatch.setattr(script, "model_breakdown", model_breakdown)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "results.json"
    arguments = ("--model", "vim_tiny", "--batch", "2", "--bits", "w4a4", "--repeats", "2", "--json", str(path))
    assert run(script, monkeypatch, *arguments) == 0
    backends = ["xla", "xla also", "mosaic_gpu_int4"]
    assert preferred == [*backends, "xla also"]
    assert broken_down == [(False, 2), (True, 2)]
    written = json.loads(path.read_text())
    assert written["machine"]["devices"].endswith("a GPU")
    assert written["machine"]["jax"] == jax.__version__
    rows = written["models"]["vim_tiny"]["rows"]
    assert [row[:2] for row in rows] == [[bits, b] for b in backends for bits in ("bf16", "w4a4")]
    assert all(len(row) == len(written["headers"]) for row in rows)
    named = [dict(zip(written["headers"], row, strict=True)) for row in rows]
    assert all(row["images/s"] == pytest.approx(2 / (row["ms"] / 1e3)) for row in named)
    assert all(row["bf16 / this"] == 1 for row in named if row["bits"] == "bf16" and row["backend"] != script.INT4)
    assert all(row["xla / this"] == 1 for row in named if row["backend"] == "xla")
    assert all(row["kernels"] == 0 for row in named)
    assert written["models"]["vim_tiny"]["shares"] == [[bits, 10, 10, 20, 30, 40] for bits in ("bf16", "w4a4")]
    printed = capsys.readouterr().out
    assert "where the time goes" in printed
    assert "detection + split %" in printed


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vim_tiny", {"depth": 2}),
        ("vim_micro", {"depth": 2}),
        ("vmamba_base_s1l20", {"depths": (2, 2, 2, 2)}),
        ("mambavision_t", {"depths": (1, 2, 2, 2)}),
    ],
)
def test_a_shorter_model_of_every_family(script, name, fields):
    assert script.shortened(name, None) == {}
    assert script.shortened(name, 2) == fields
    assert script.shortened(name, 99) == {field: getattr(model_config(name), field) for field in fields}
    model_config(name, **fields)


def test_a_failed_model_is_recorded_and_the_next_one_starts(script, gpu, capsys, monkeypatch, tmp_path):
    asked = []

    def models(name, bits, **overrides):
        asked.append((name, overrides))
        if name == "vim_small":
            raise RuntimeError("out of memory")
        return {}

    monkeypatch.setattr(script, "gpu_models", models)
    row = ["w4a4", "xla", *[1.0] * 6]
    monkeypatch.setattr(script, "bench_gpu", lambda *_: ([row], [["w4a4", *[1.0] * 5]]))
    path = tmp_path / "results.json"
    assert run(script, monkeypatch, "--depth", "2", "--json", str(path)) == 1
    assert [name for name, _ in asked] == list(script.GPU_MODELS)
    assert asked[3] == ("vmamba_tiny_s1l8", {"depths": (2, 2, 2, 2)})
    written = json.loads(path.read_text())["models"]
    assert written["vim_small"] == {"error": "RuntimeError: out of memory"}
    assert all(written[name]["rows"] == [row] for name in script.GPU_MODELS if name != "vim_small")
    assert capsys.readouterr().err.endswith("failed: vim_small\n")
