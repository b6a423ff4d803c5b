"""The kernels' benchmark: what it can say without a GPU, and that every contender computes the same."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from script_modules import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("bench_kernels")


def test_limits_of_the_largest_layer(script):
    """Vim-B's in_proj at batch 32 on an H100: 2 * 6304 * 768 * 3072 int8 operations, 39 MB of bfloat16 outputs."""
    layer = script.Layer("vim_base", "linear", 197, 768, 3072)
    work = layer.work(32)
    assert layer.shape(32) == "(6304, 768) x (768, 3072)"
    assert work.int8 / 1979e12 == pytest.approx(15.0e-6, rel=0.01)
    assert script.DEVICES["H100"].limit(work) == (pytest.approx(15.2e-6, rel=0.01), "bytes")
    levels = script.Layer("vim_base", "matmul", 197, 768, 3072).work(32)
    assert levels.bytes == 6304 * 768 + 768 * 3072 + 6304 * 3072 * 2  # levels, weight, y: no far matrix, no mask


def test_limits_of_a_scan(script):
    """One exponential per state of every channel and token; the backward pass takes them again."""
    forward, backward = (script.Scan("vim_tiny", 197, 384, 16, 1, backward=b).work(32) for b in (False, True))
    assert forward.exponentials == 32 * 197 * 384 * 16
    assert backward.exponentials == 2 * forward.exponentials
    assert forward.bytes == 2 * 32 * 197 * (3 * 384 + 2 * 16)
    assert script.DEVICES["H100"].limit(forward) == (pytest.approx(9.3e-6, rel=0.01), "exponentials")


def test_the_devices_are_told_apart(script):
    kinds = [device.kind for device in script.DEVICES.values()]
    assert len(set(kinds)) == len(kinds)
    assert script.DEVICES["H100"].bytes > 1.6 * script.DEVICES["H100 PCIe"].bytes


def test_a_dry_run_names_every_case(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--dry-run"])
    monkeypatch.setenv("COLUMNS", "200")
    assert script.main() == 0
    printed = capsys.readouterr().out
    for text in ("(6304, 768) x (768, 3072)", "backward (32, 197, 3072, 16) in 2", "(32, 3136, 384, 1) in 4"):
        assert text in printed
    assert all(value > 0 for row in script.dry_run(script.CASES, 2) for value in row[-len(script.DEVICES) :])


def test_only_some_cases(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--dry-run", "--only", "split", "--model", "vim_base"])
    assert script.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "(6304" in line]
    assert len(rows) == sum(case.operation == "split" and case.model == "vim_base" for case in script.CASES) > 0
    assert all("split" in row and "vim_base" in row for row in rows)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--dry-run", "--model", "resnet"])
    with pytest.raises(SystemExit):
        script.main()
    assert "no case of a model named 'resnet'" in capsys.readouterr().err


def test_results_are_compared_with_the_reference(script):
    """Integers by the number that differ, floats by millionths of the largest; NaN must be in the same places."""
    levels, values = np.array([1, 2, 3], np.int8), np.array([1.0, -4.0, np.nan], np.float32)
    reference = levels, values, np.array([True, False])
    assert script.difference(reference, reference) == (0, 0)
    ours = levels + np.array([0, 1, -1], np.int8), values * np.float32(1.5), np.array([False, False])
    assert script.difference(ours, reference) == (3, 5e5)
    assert script.difference(np.array([1.0, -4.0, 0.0]), values) == (1, 0)
    assert script.difference(jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)) == (0, 0)


def test_a_failed_case_is_recorded_and_the_next_one_starts(script, capsys, monkeypatch, tmp_path):
    """And the numbers so far are written after every case."""
    path, written = tmp_path / "results.json", []

    def bench(case, *_):
        written.append(json.loads(path.read_text()) if path.exists() else None)
        if case.model == "mambavision_t":
            raise RuntimeError("illegal address")
        return [case.model, case.operation, *[1.0] * (len(script.HEADERS) - 2)]

    gpu = SimpleNamespace(platform="gpu", device_kind="a GPU")
    monkeypatch.setattr(script.jax, "devices", lambda: [gpu])
    monkeypatch.setattr(script, "bench", bench)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--only", "split", "--json", str(path)])
    cases = [case for case in script.CASES if case.operation == "split"]
    assert cases[-1].model == "mambavision_t"
    monkeypatch.setattr(script, "CASES", [cases[-1], *cases[:-1]])
    assert script.main() == 1
    results = json.loads(path.read_text())
    assert results["failed"] == [{"case": "mambavision_t split (6272, 320)", "error": "RuntimeError: illegal address"}]
    assert [row[0] for row in results["rows"]] == [case.model for case in cases[:-1]]
    assert [w and len(w["rows"]) for w in written] == [None, *range(len(cases) - 1)]
    assert "1 of 6 cases failed: mambavision_t split" in capsys.readouterr().err


def test_a_row_has_what_its_headers_say(script, monkeypatch):
    """With XLA in the place of the kernels, on a device of known limits."""
    monkeypatch.setattr(script, "OURS", "xla")
    monkeypatch.setattr(script.jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 PCIe")])
    row = script.bench(script.Layer("tiny", "split", 7, 12), 2, 2, 2)
    named = dict(zip(script.HEADERS, row, strict=True))
    assert (named["model"], named["operation"], named["cublas us"]) == ("tiny", "split", None)
    assert (named["unequal"], named["off by ppm"], named["xla / ours"]) == (0, 0, 1)
    assert named["limit us"] == pytest.approx(1e6 * (3 * 14 * 12) / 2.039e12)  # two bytes read, one written


def test_without_a_gpu_it_says_so(script, capsys, monkeypatch):
    monkeypatch.setattr(script.jax, "devices", lambda: [SimpleNamespace(platform="cpu")])
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    assert script.main() == 1
    assert "need an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [
        ("Scan", "tiny", 5, 8, 2, 2, True),
        ("Layer", "tiny", "split", 7, 12),
        ("Layer", "tiny", "matmul", 7, 12, 6),
        ("Layer", "tiny", "linear", 7, 12, 6),
    ],
    ids=str,
)
def test_contenders_run_and_repeating_changes_nothing(script, case, monkeypatch):
    """With XLA in the place of the kernels."""
    monkeypatch.setattr(script, "OURS", "xla")
    kind, *fields = case
    calls = getattr(script, kind)(*fields).calls(2)
    for operation, inputs in calls.values():
        once = jax.tree.leaves(jax.jit(operation)(*inputs))
        again = jax.tree.leaves(script.repeated(operation, 3)(inputs))
        assert once
        for a, b in zip(once, again, strict=True):
            np.testing.assert_array_equal(a, b)
    if script.CUBLAS in calls:
        exact, rough = (np.asarray(op(*x).astype("float32")).reshape(14, 6) for op, x in calls.values())
        assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > tolerances.SAME_PRODUCT
