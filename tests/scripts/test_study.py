"""The study script: its runs are possible, it resumes, and its tables are means over seeds."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from script_modules import load_script
from tiny_models import quantised

from ouromamba_jax import GenConfig, QuantConfig
from ouromamba_jax.baselines import BASELINES


@pytest.fixture(scope="module")
def runs():
    return load_script("study_runs")


def test_every_run_is_one_that_can_be_configured(runs):
    tables = runs.tables(128, iterations=50)
    assert {run.method for run in tables["methods"]} == {runs.OURS, *BASELINES}
    for table, rows in tables.items():
        for run in rows:
            assert table == "iterations" or run.gen_config.iterations == 50
            assert run.gen_config.num_images == run.images
            if run.method == runs.OURS:
                QuantConfig.preset(run.bits, **dict(run.settings))
            else:
                assert run.source == "real" or (table, run.method) == ("calibration", "ptq4vm")
    assert {run.source for run in tables["calibration"]} == {"synthetic", "real", "noise"}
    configs = [QuantConfig.preset(run.bits, **dict(run.settings)) for run in tables["detection"]]
    assert {config.detection for config in configs} == {"none", "static", "dynamic"}


def test_equal_runs_have_one_key_and_others_their_own(runs):
    def described(run):
        quant = QuantConfig.preset(run.bits, **dict(run.settings)) if run.method == runs.OURS else run.settings
        return (
            run.method,
            run.source,
            run.bits,
            run.images,
            quant,
            run.gen_config if run.source == "synthetic" else None,
        )

    every = [run for rows in runs.tables(64, iterations=10).values() for run in rows]
    for seed in (0, 1):
        assert len({run.key(seed) for run in every}) == len({described(run) for run in every})
    assert not {run.key(0) for run in every} & {run.key(1) for run in every}
    default = runs.Run(images=64)
    explicit = dataclasses.replace(
        default, gen=(("contrastive", GenConfig.contrastive),), settings=(("n_refresh", QuantConfig.n_refresh),)
    )
    assert default.key(3) == explicit.key(3)
    assert json.loads(default.key(3))["settings"] == json.loads(default.key(3))["gen"] == {}


def entry(run, seed, rng):
    names = ("top1", "agreement", "sqnr_db", "outlier_rate", "mean_bits")
    values = dict(zip(names, rng.random(5).tolist(), strict=True))
    return dict(key=run.key(seed), sites={}, **values)


def test_a_line_that_was_cut_off_is_unfinished_and_spoils_no_other(runs, tmp_path):
    rng, (first, second, third, *_) = np.random.default_rng(0), runs.tables(64)["methods"]
    lines = [json.dumps(entry(run, 0, rng)) for run in (first, second, third)]
    path = tmp_path / "runs.jsonl"
    assert runs.read_runs(path) == {}
    path.write_text(lines[0] + "\n" + lines[1][:-9])
    assert list(runs.read_runs(path)) == [first.key(0)]
    with path.open("a") as file:  # as the study goes on
        file.write(lines[2] + "\n")
    assert list(runs.read_runs(path)) == [first.key(0), third.key(0)]


def test_rows_are_means_over_the_finished_seeds(runs):
    rng, (first, second, other, *_) = np.random.default_rng(1), runs.tables(64)["calibration"][::4]
    entries = [entry(first, seed, rng) for seed in range(3)] + [entry(second, 1, rng)]
    ((table, rows),) = runs.summarise({"calibration": [first, second, first, other]}, {e["key"]: e for e in entries})
    assert table == "calibration"
    row, single = (dict(zip(runs.HEADERS, row, strict=True)) for row in rows)
    assert (row["seeds"], single["seeds"], single["SQNR +-"]) == (3, 1, None)
    of_first = entries[:3]
    assert row["top-1 %"] == pytest.approx(100 * np.mean([e["top1"] for e in of_first]), abs=0.005)
    assert row["SQNR dB"] == pytest.approx(np.mean([e["sqnr_db"] for e in of_first]), abs=0.005)
    assert row["top-1 +-"] == pytest.approx(100 * np.std([e["top1"] for e in of_first]), abs=0.005)
    assert row["SQNR +-"] == pytest.approx(np.std([e["sqnr_db"] for e in of_first]), abs=0.005)


def test_a_table_of_one_row_compares_nothing(runs):
    rng, (first, *_) = np.random.default_rng(2), runs.tables(64)["refresh"]
    found = entry(first, 0, rng)
    assert not list(runs.summarise({"refresh": [first]}, {found["key"]: found}))


def test_a_table_without_a_run_of_its_own_is_left_out(runs):
    """The rows of "tuning" at the default number of epochs are those of "calibration"."""
    rng, every = np.random.default_rng(3), runs.tables(64)
    both = {name: every[name] for name in ("calibration", "tuning")}
    done = {e["key"]: e for e in (entry(run, 0, rng) for run in every["calibration"])}
    assert [table for table, _ in runs.summarise(both, done)] == ["calibration"]
    untuned = entry(every["tuning"][0], 0, rng)
    assert [table for table, _ in runs.summarise(both, done | {untuned["key"]: untuned})] == ["calibration", "tuning"]


def test_a_folder_belongs_to_one_model_and_data_set(tmp_path):
    study = load_script("study")
    study.check_identity(tmp_path / "identity.json", dict(model="a", data="b"))
    study.check_identity(tmp_path / "identity.json", dict(model="a", data="b"))
    with pytest.raises(ValueError, match="another model; choose another --out"):
        study.check_identity(tmp_path / "identity.json", dict(model="c", data="b"))


def test_seeds_are_a_count(monkeypatch, capsys):
    study, table = load_script("study"), load_script("digits_table")
    required = ["--model", "vim_micro", "--data", "digits", "--out", "out"]
    assert (study.parse(required).seeds, study.parse([*required, "--seeds", "2"]).seeds) == (3, 2)
    monkeypatch.setattr(sys, "argv", ["digits_table.py", "--seeds", "0"])
    for refused in (lambda: study.parse([*required, "--seeds", "0"]), table.main):
        with pytest.raises(SystemExit):
            refused()
        assert "--seeds is 0, but it is how many there are; use at least 1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "drawn"),
    [
        ([5], {("real", 5), ("synthetic", 5), ("noise", 5)}),
        ([0, 1, 2], {("real", 0), ("synthetic", 0), ("noise", 0), ("real", 1)}),
    ],
)
def test_activations_are_of_the_seeds_that_were_run(seeds, drawn, runs, tmp_path, monkeypatch):
    figures, low, asked, panels = load_script("study_figures"), quantised(QuantConfig.preset("w4a4")), set(), {}

    def images(run, seed):
        asked.add((run.source, seed))

    study = SimpleNamespace(out=tmp_path, model_name="tiny", images=images, quantize=lambda run, _: (low, None))
    monkeypatch.setattr(figures, "line_panels", lambda path, found, **_: panels.update(found))
    figures.draw_activations(study, runs.tables(64)["calibration"], seeds)
    assert asked == drawn
    assert all(len(curves) == len(drawn) for curves in panels.values())


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    study, runs = load_script("study"), load_script("study_runs")
    arguments = ["--model", "vim_micro", "--data", "digits", "--limit", "20", "--out", str(tmp_path), "--images", "4"]
    arguments += ["--iterations", "2", "--batch-size", "4", "--tables", "refresh", "--seeds", "1"]
    few = runs.tables(4, iterations=2, batch_size=4)
    monkeypatch.setattr(study, "tables", lambda images, **common: dict(few, refresh=few["refresh"][:4]))
    monkeypatch.setattr(study, "draw_activations", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()
    whole = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(whole) == 4
    (tmp_path / "runs.jsonl").write_text("\n".join(whole[:3]) + whole[3][:20])
    study.main()
    again = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in whole]
    assert [{**e, "seconds": 0} for e in again] == [{**e, "seconds": 0} for e in before]
    assert {p.name for p in tmp_path.iterdir()} >= {"study.json", "study.md", "generated.png", "outliers.png"}
    assert "n_refresh 5" in (tmp_path / "study.md").read_text()
