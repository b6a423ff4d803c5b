"""The miscompile of XLA on CPUs: what tells of it, and what mends it."""

import os
import subprocess
import sys

import pytest

from ouromamba_jax.ops import cpu_miscompile
from ouromamba_jax.ops.cpu_miscompile import MENDING_FLAG, mend_miscompile

TELL = """
import os, warnings
flags = os.environ["XLA_FLAGS"]
import ouromamba_jax
assert os.environ["XLA_FLAGS"] == flags  # importing leaves them alone
from ouromamba_jax.ops.cpu_miscompile import is_miscompiled, warn_if_miscompiled
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warn_if_miscompiled(); warn_if_miscompiled()
print(is_miscompiled(), [str(w.message) for w in caught])
"""


@pytest.mark.parametrize("flags", ["", MENDING_FLAG], ids=["without", "with"])
def test_a_process_knows_whether_it_is_affected(flags):
    environment = {**os.environ, "XLA_FLAGS": flags}
    told = subprocess.run([sys.executable, "-c", TELL], env=environment, capture_output=True, text=True, check=True)
    if flags:
        assert told.stdout == "False []\n"
    else:
        assert told.stdout.startswith("True ['this version of XLA computes some")
        assert told.stdout.count("XLA_FLAGS=--xla") == 1  # warned once


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, MENDING_FLAG),
        ("--xla_dump_to=x", f"--xla_dump_to=x {MENDING_FLAG}"),
        (MENDING_FLAG, MENDING_FLAG),
        ("--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
    ],
)
def test_the_flag_is_added_to_the_users(before, after, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    mend_miscompile()
    mend_miscompile()
    assert os.environ["XLA_FLAGS"] == after


def test_the_tests_are_not_affected():
    assert not cpu_miscompile.is_miscompiled()
