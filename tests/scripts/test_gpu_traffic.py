"""The bytes that a compiled program moves, read from its text."""

import json
import subprocess
import sys

import pytest
from script_modules import FOLDER, load_script
from tiny_models import quantised

from ouromamba_jax.quantize import QuantConfig

PROGRAM = """HloModule jit_fn

%fused_add (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %inside = f32[4,8]{1,0} fusion(%p, %p), kind=kLoop, calls=%other
}

ENTRY %main (x: f32[4,8], w: s8[8,16]) -> bf16[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = s8[8,16]{1,0} parameter(1)
  %seen = pred[] constant(true)
  %loop_add_fusion.12 = f32[4,8]{1,0} fusion(%x, %x), kind=kLoop, calls=%fused_add
  %flat = f32[32]{0} bitcast(%loop_add_fusion.12)
  %mpmd_map.3 = (s8[4,8]{1,0}, s8[4,8]{1,0}, /*index=2*/f32[4]{0}) custom-call(%flat), custom_call_target="mosaic_gpu"
  %get-tuple-element.1 = s8[4,8]{1,0} get-tuple-element(%mpmd_map.3), index=0
  %mpmd_map.4 = (s8[4,8]{1,0}, s8[4,8]{1,0}, /*index=2*/f32[4]{0}) custom-call(%flat), custom_call_target="mosaic_gpu"
  ROOT %cublas.5 = bf16[4,16]{1,0} custom-call(%get-tuple-element.1, %w), custom_call_target="__cublas$gemm"
}
"""


@pytest.fixture(scope="module")
def script():
    return load_script("gpu_traffic")


def test_every_operation_reads_its_operands_and_writes_its_results(script):
    found = script.operations(PROGRAM)
    split = 4 * 32 + 2 * 32 + 4 * 4
    assert [(o.name, o.bytes, o.is_kernel) for o in found] == [
        ("loop_add_fusion.12", 3 * 4 * 32, False),
        ("mpmd_map.3", split, True),
        ("mpmd_map.4", split, True),
        ("cublas.5", 32 + 8 * 16 + 2 * 4 * 16, False),
    ]
    total = 3 * 4 * 32 + 2 * split + 32 + 8 * 16 + 2 * 4 * 16
    assert script.row("w4a4", found, 1e3, 2 * total) == [
        "w4a4", total / 1e6, 0.5, 2 * split / 1e6, 2, 2, pytest.approx(total),
    ]  # fmt: skip
    (most, size, many), *rest = script.largest(found, 2)
    assert (most.split()[0], size, many) == ("kernel", 2 * split / 1e6, 2)
    assert rest == [["loop_add_fusion f32[4,8]{1,0}", 3 * 4 * 32 / 1e6, 1]]


def test_it_compiles_what_it_was_asked_for(script, monkeypatch, capsys, tmp_path):
    """With the compiler and the models' making left out."""
    asked = []
    model = quantised(QuantConfig.preset("w4a4"))

    def models(name, presets, **fields):
        asked.append((name, presets, fields))
        return {"bf16": model}

    def compiled(found, target, batch):
        assert found is model
        asked.append((target, batch))
        return PROGRAM

    monkeypatch.setattr(script, "gpu_models", models)
    monkeypatch.setattr(script, "sites", lambda model: {})
    monkeypatch.setattr(script, "quantised", lambda model, bits, like: asked.append((bits, like)) or model)
    monkeypatch.setattr(script, "compiled", compiled)
    path = tmp_path / "traffic.json"
    arguments = ["--depth", "1", "--bits", "bf16", "w4a4", "--target", "a100", "--top", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["scripts/gpu_traffic.py", *arguments])
    script.main()
    assert asked == [("vim_base", [], {"depth": 1}), ("a100", 32), ("w4a4", {}), ("a100", 32)]
    written = json.loads(path.read_text())
    assert [row[0] for row in written["rows"]] == ["bf16", "w4a4"]
    assert all(len(row) == len(written["headers"]) for row in written["rows"])
    assert "vim_base, depth 1, batch 32, a100" in capsys.readouterr().out


def test_it_takes_no_device(monkeypatch):
    """JAX reads the variables that say so when it is imported, which is before the neighbours that set them, too."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code = "import gpu_traffic, jax; print(jax.config.jax_platforms)"
    out = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True).stdout
    assert out == "cpu\n"


def test_bytes_of_shapes(script):
    assert script.shape_bytes("(bf16[2,3]{1,0}, pred[], s8[5])") == 12 + 1 + 5
    assert script.shape_bytes("token[]") == 0
