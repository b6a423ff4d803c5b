"""The kernels' benchmark: what it can say without a GPU, and that every contender computes the same."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tolerances
from script_modules import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("bench_kernels")


def test_limits_of_the_largest_layer(script):
    """Vim-B's in_proj at batch 32 on an H100: 2 * 6304 * 768 * 3072 int8 operations, 77 MB of float32 outputs."""
    layer = script.Layer("vim_base", "linear", 197, 768, 3072)
    work = layer.work(32)
    assert layer.shape(32) == "(6304, 768) x (768, 3072)"
    assert work.int8 / 1979e12 == pytest.approx(15.0e-6, rel=0.01)
    assert script.DEVICES["H100"].limit(work) == (pytest.approx(26.7e-6, rel=0.01), "bytes")


def test_limits_of_a_scan(script):
    """One exponential per state of every channel and token; the backward pass takes them again."""
    forward, backward = (script.Scan("vim_tiny", 197, 384, 16, 1, backward=b).work(32) for b in (False, True))
    assert forward.exponentials == 32 * 197 * 384 * 16
    assert backward.exponentials == 2 * forward.exponentials
    assert forward.bytes == 2 * 32 * 197 * (3 * 384 + 2 * 16)
    assert script.DEVICES["H100"].limit(forward) == (pytest.approx(9.3e-6, rel=0.01), "exponentials")


def test_a_dry_run_names_every_case(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--dry-run"])
    monkeypatch.setenv("COLUMNS", "200")
    assert script.main() == 0
    printed = capsys.readouterr().out
    for text in ("(6304, 768) x (768, 3072)", "backward (32, 197, 3072, 16) in 2", "(32, 3136, 384, 1) in 4"):
        assert text in printed
    assert all(value > 0 for row in script.dry_run(2) for value in row[-4:])


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
