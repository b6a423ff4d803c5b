"""What the documentation shows runs: the examples of the reference, and the Python of the guides."""

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ouromamba_jax

DOCS = Path(__file__).parents[2] / "docs"
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
