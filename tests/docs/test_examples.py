"""What the documentation shows runs: the examples of the reference, the Python of the guides, and examples/."""

import doctest
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from script_modules import load_script
from tiny_models import TINY, natural_model

import ouromamba_jax

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
REFERENCE = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
GUIDES = sorted(DOCS.glob("guides/*.md"))


def resolve(path: str) -> tuple[Any, ModuleType]:
    """The object at a dotted path of the reference, and its module; `convert` is installed inside the package."""
    path = re.sub(r"^convert\b", "ouromamba_jax.convert", path)
    module = importlib.import_module(path.rpartition(".")[0])
    return getattr(module, path.rpartition(".")[2]), module


def test_the_reference_has_every_public_name():
    shown = {path.rpartition(".")[2]: resolve(path)[0] for path in REFERENCE}
    assert len(shown) == len(REFERENCE)
    public = {name: getattr(ouromamba_jax, name) for name in ouromamba_jax.__all__}
    assert {name for name, value in public.items() if shown.get(name) is not value} == set()


@pytest.mark.examples
@pytest.mark.parametrize("path", REFERENCE)
def test_reference(path):
    value, module = resolve(path)
    (example,) = doctest.DocTestFinder(recurse=False).find(value, path, module=module, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    report: list[str] = []
    found = runner.run(example, out=report.append)
    assert found.attempted
    assert not found.failed, "".join(report)


@pytest.mark.examples
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guide(page, tmp_path, monkeypatch):
    """The blocks that begin with ```python, one after the other; what needs a reader's file begins with ```py."""
    monkeypatch.chdir(tmp_path)
    source, inside = [], False
    for line in page.read_text().splitlines():
        is_fence = line.startswith("```")
        inside = line == "```python" if is_fence else inside
        source.append(line if inside and not is_fence else "")  # so that an error has the page's line number
    exec(compile("\n".join(source), str(page), "exec"), {})


def cells_of(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_it_made(notebook):
    """It was run from its first cell to its last, and is small; the site says what is in it."""
    cells = cells_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert notebook.stat().st_size < 150_000
    assert f"examples/{notebook.name}" in (DOCS / "guides" / "examples.md").read_text()


@pytest.mark.examples
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path, monkeypatch):
    """Its cells, one after the other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells_of(notebook), start=1):
        exec(compile("".join(cell["source"]), f"{notebook.name}[{number}]", "exec"), names)


@pytest.mark.examples
def test_fine_tuning(tmp_path, capsys):
    """A few steps: of the head in float, which leaves the rest alone, then of everything, quantised, and saved."""
    script = load_script("finetune", "examples")
    before = natural_model("vim_micro", **TINY)
    ouromamba_jax.save(tmp_path / "before", before)
    short = ["--model", str(tmp_path / "before"), "--limit", "16", "--batch-size", "8", "--epochs", "2"]
    head, scores = script.run(script.parse([*short, "--what", "head", "--dtype", "bfloat16", "--remat"]))
    assert head.head.proj.kernel.shape == (20, 10)
    assert scores.keys() == {"head in bfloat16"}
    for part in ("stem", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(getattr(head, part)), nnx.state(getattr(before, part)))
    options = ["--quantise", "w4a4", "--drop-path", "0.2", "--out", str(tmp_path / "after")]
    low, scores = script.run(script.parse([*short, *options]))
    assert list(scores) == ["all in float32", "w4a4", "w4a4, fine-tuned"]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ouromamba_jax.load(tmp_path / "after")), nnx.state(low))
    assert capsys.readouterr().out.count("of 16 test images") == 4
