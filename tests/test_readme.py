"""The numbers of the tables in README and docs are the committed results', rounded once."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
from script_modules import load_script

from ouromamba_jax import list_models

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "study" / "vim_micro_cifar10"


def table(first_header: str, page: str = "docs/benchmarks.md") -> list[list[str]]:
    """Body rows of the table whose header line starts so, as cells without bold."""
    lines = iter((ROOT / page).read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first_header}"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def same(written: str, value: float) -> bool:
    """Whether `written` is `value` to as many decimals as it shows."""
    decimals = len(written.partition(".")[2])
    return written == f"{value:.{decimals}f}"


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/benchmarks.md", 8)])
def test_the_comparison_with_other_methods(page, count):
    runs = load_script("study_runs")
    done = runs.read_runs(STUDY / "runs.jsonl")
    every = [run for name in ("methods", "calibration") for run in runs.tables(128, batch_size=64)[name]]
    rows = table("top-1, % / SQNR", page)
    assert len(rows) == count
    for title, source, *cells in rows:
        assert len(cells) == len(runs.BITS)
        for bits, cell in zip(runs.BITS, cells, strict=True):
            run = next(r for r in every if (r.title, r.source, r.bits) == (title, source, bits))
            found = runs.finished(run, done)
            assert len(found) == 3, (title, source, bits)
            top1, sqnr = cell.split(" / ")
            assert same(top1, 100 * mean(e["top1"] for e in found)), (title, source, bits)
            assert same(sqnr, mean(e["sqnr_db"] for e in found)), (title, source, bits)


def test_the_memory_traffic():
    files = {"Vim-B": "", "MambaVision-T": "_mambavision", "VMamba-T": "_vmamba"}
    rows = table("memory traffic, MB", "docs/gpu.md")
    assert [row[0] for row in rows] == list(files)
    for model, *cells in rows:
        result = json.loads((ROOT / "scripts" / "results" / f"gpu_traffic{files[model]}.json").read_text())
        assert (result["depth"], result["batch"], result["target"]) == (1, 32, "h100")
        assert [row[0] for row in result["rows"]] == ["bf16", "w8a8", "w8a8o8", "w4a4"]
        assert all(same(cell, row[1]) for cell, row in zip(cells, result["rows"], strict=True)), model


def test_the_speed_on_cpus():
    files = {"Vim-B": "vim_base", "MambaVision-T": "mambavision_t", "VMamba-T": "vmamba_tiny_s1l8"}
    kinds = {"float": "float", "W8A8": "w8a8", "W8A8, O8": "w8a8, 8-bit outliers", "W4A4": "w4a4"}
    speeds, blocks = table("model | float, images/s"), table("model | | products")
    assert [row[0] for row in speeds] == list(files)
    assert [tuple(row[:2]) for row in blocks] == [(model, kind) for model in files for kind in kinds]
    for model, rate, *cells in speeds:
        whole, *parts = json.loads((ROOT / "scripts" / "results" / f"bench_{files[model]}.json").read_text()).values()
        whole = {row["model"]: row for row in whole}
        assert same(rate, whole["float"]["images/s"])
        for kind, cell in zip(list(kinds)[1:], cells, strict=True):
            speed_up, of_limit = cell.split(", ")
            assert same(speed_up, whole[kinds[kind]]["speed-up"]), (model, kind)
            assert same(of_limit, whole[kinds[kind]]["of limit"]), (model, kind)
        of_model = [row[2:] for row in blocks if row[0] == model]
        for (products, scan, splitting, block, limit), part in zip(of_model, parts, strict=True):
            ms = {row["part"].split(":")[0]: row["ms"] for row in part}
            not_products = ("block", "rest", "limit", "mixer.scan")
            assert same(products, sum(value for name, value in ms.items() if name not in not_products))
            assert same(block, ms["block"])
            assert not scan or same(scan, ms["mixer.scan"])
            assert not limit or same(limit, ms["limit"])
            of_it = next(row["of it splitting, ms"] for row in part if row["part"] == "block")
            assert not splitting or same(splitting, of_it)


def test_the_time_to_compile():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = re.search(
        r"takes ([\d.]+) times \(W8A8\), ([\d.]+) times \(O8\) and ([\d.]+) times \(W4A4\)", text
    ).groups()
    rows = json.loads((ROOT / "scripts" / "results" / "bench_compile.json").read_text())["rows"]
    assert all(same(number, row[3]) for number, row in zip(shown, rows[1:], strict=True))


def test_the_digits():
    columns = [
        ("w8a8", "dynamic"),
        ("w8a8", "outlier_bits 8"),
        ("w6a6", "dynamic"),
        ("w4a8", "dynamic"),
        ("w4a4", "dynamic"),
        ("w4a4", "detection static"),
        ("w4a4", "detection none"),
    ]
    rows = table("model (float top-1)")
    for start in range(0, len(rows), 3):
        model, top1 = re.fullmatch(r"`(\w+)` \(([\d.]+) %\)", rows[start][0]).groups()
        name = "digits_table" if model == "vim_micro" else f"digits_table_{model}"
        result = json.loads((ROOT / "scripts" / "results" / f"{name}.json").read_text())
        assert same(top1, 100 * result["float_top1"])
        found = {(row["calibration"], row["bits"], row["setting"]): row for row in result["rows"]}
        shown = [row[1:] for row in rows[start : start + 3]]
        assert [row[0].split()[0] for row in shown] == ["real", "synthetic", "Gaussian"]
        for label, *cells in shown:
            source = "noise" if label.startswith("Gaussian") else label.split()[0]
            for (bits, setting), cell in zip(columns, cells, strict=True):
                sqnr, top1 = re.fullmatch(r"([\d.]+) dB, ([\d.]+) %", cell).groups()
                row = found[source, bits, setting]
                assert same(sqnr, row["SQNR dB"]), (label, bits, setting)
                assert same(top1, row["top-1 %"]), (label, bits, setting)


@pytest.mark.parametrize(("section", "study"), [("Generation", f"{STUDY.name}_train"), ("Quantisation", STUDY.name)])
def test_the_effects_of_what_differs_from_the_paper(section, study):
    """Every "`setting`: number dB" is the study's, at W4A4 with synthetic images."""
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "differences.md").read_text(), flags=re.MULTILINE)
    text = next(text for text in sections if text.startswith(section))
    shown = re.findall(r"`([^`]+)`: ([\d.]+) dB", text)
    assert len(shown) > 2
    tables = json.loads((STUDY.with_name(study) / "study.json").read_text())["tables"].values()
    ours = ("OuroMamba", "128 synthetic", "W4A4")
    rows = (row for table in tables for row in table if (row["method"], row["calibration"], row["bits"]) == ours)
    found = {row["setting"]: row["SQNR dB"] for row in rows}
    assert {setting: number for setting, number in shown if not same(number, found[setting])} == {}


def test_the_readme_is_short_and_begins_with_its_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    commands = re.findall(r"^pip install .*$", text, re.MULTILINE)
    assert commands == ["pip install -e '.[demo]' && ouromamba demo", "pip install -e '.[test]' && pytest"]


def test_every_link_of_the_pages_leads_somewhere():
    """mkdocs checks those between the pages of docs/ again; here are README, CONTRIBUTING and the pictures, too."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = []
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        broken += [f"{page.relative_to(ROOT)}: {link}" for link in missing]
    assert broken == []


def test_the_readme_names_every_model():
    text = (ROOT / "README.md").read_text()
    assert [name for name in list_models() if f"`{name}`" not in text] == []
