"""The study script: its runs are possible, it resumes, and its tables are means over seeds."""

import json

import numpy as np
import pytest
from script_modules import load_script

from ouromamba_jax import GenConfig, QuantConfig
from ouromamba_jax.baselines import BASELINES


@pytest.fixture(scope="module")
def study():
    return load_script("study")


def test_every_run_is_one_that_can_be_configured(study):
    tables = study.tables(128, 50)
    assert {run.method for run in tables["methods"]} == {study.OURS, *BASELINES}
    for runs in tables.values():
        for run in runs:
            config = GenConfig(num_images=run.images, **dict(run.gen))
            assert run.source != "synthetic" or config.iterations == 50
            if run.method == study.OURS:
                QuantConfig.preset(run.bits, **dict(run.settings))
            else:
                assert run.source == "real"
    assert {run.source for run in tables["calibration"]} == {"synthetic", "real", "noise"}
    assert {dict(run.settings)["detection"] for run in tables["detection"]} == {"none", "static", "dynamic"}


def test_keys_tell_runs_and_seeds_apart(study):
    runs = {run for table in study.tables(64, 10).values() for run in table}
    keys = {study.key_of(run, seed) for run in runs for seed in (0, 1)}
    assert len(keys) == 2 * len(runs)


def entry(study, run, seed, rng):
    values = dict(zip(("top1", "agreement", "sqnr_db", "outlier_rate"), rng.random(4).tolist(), strict=True))
    return dict(key=study.key_of(run, seed), sites={}, **values)


def test_a_line_that_was_cut_off_is_unfinished(study, tmp_path):
    rng, (first, second, *_) = np.random.default_rng(0), study.tables(64, 10)["methods"]
    lines = [json.dumps(entry(study, run, 0, rng)) for run in (first, second)]
    path = tmp_path / "runs.jsonl"
    assert study.read_runs(path) == {}
    path.write_text(lines[0] + "\n" + lines[1][:-9])
    assert list(study.read_runs(path)) == [study.key_of(first, 0)]


def test_rows_are_means_over_the_finished_seeds(study):
    rng, (first, second, *_) = np.random.default_rng(1), study.tables(64, 10)["methods"]
    entries = [entry(study, first, seed, rng) for seed in range(3)]
    ((table, rows),) = study.summarise({"methods": [first, second, first]}, {e["key"]: e for e in entries})
    assert table == "methods"
    (row,) = rows
    found = dict(zip(study.HEADERS, row, strict=True))
    assert found["seeds"] == 3
    assert found["top-1 %"] == pytest.approx(100 * np.mean([e["top1"] for e in entries]), abs=0.005)
    assert found["SQNR dB"] == pytest.approx(np.mean([e["sqnr_db"] for e in entries]), abs=0.005)
    assert found["top-1 +-"] == pytest.approx(100 * np.std([e["top1"] for e in entries]), abs=0.005)
    assert found["SQNR +-"] == pytest.approx(np.std([e["sqnr_db"] for e in entries]), abs=0.005)


def test_a_folder_belongs_to_one_model_and_data_set(study, tmp_path):
    study._check_identity(tmp_path / "identity.json", dict(model="a", data="b"))
    study._check_identity(tmp_path / "identity.json", dict(model="a", data="b"))
    with pytest.raises(ValueError, match="another model or data; choose another --out"):
        study._check_identity(tmp_path / "identity.json", dict(model="c", data="b"))
