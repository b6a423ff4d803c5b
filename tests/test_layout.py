"""The package's layout: who may import whom, how long a file may get, and that every public name is documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import ouromamba_jax

ROOT = Path(__file__).parent.parent
PACKAGE = "ouromamba_jax"
# Which package must not import what, itself or through others (a dotted prefix).
FORBIDDEN = {
    "ops": ("flax", "models", "quantize", "gen", "convert"),
    "pallas": ("flax", "models", "quantize", "gen", "convert"),
    "models": ("quantize", "gen", "convert", "pallas", "checkpoint"),
    "gen": ("quantize", "pallas", "convert"),
    "quantize": (
        "gen", "convert", "pallas", "checkpoint", "models.vim", "models.vmamba", "models.mambavision", "models.vit",
    ),
    "baselines": ("gen", "convert", "pallas"),
    "data": ("flax", "models"),
    "report": ("models",),
    "checkpoint": ("gen", "convert", "cli"),
    "export": ("gen", "convert", "cli", "checkpoint"),
    "convert": ("torch", "gen", "quantize", "checkpoint", "cli"),
    "evaluation": ("cli", "gen", "convert"),
}  # fmt: skip
MAX_LINES = 500


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name; the top-level `convert` is installed inside it."""
    files = {}
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "convert", f"{PACKAGE}.convert")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((name, *(p for p in parts if p != "__init__")))] = path
    return files


MODULES = sources()


@cache
def imported(module: str) -> frozenset[str]:
    """Dotted names that a module imports, anywhere in the file: `from a import b` counts as a and as a.b."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*stem, *([base] if base else [])])
            names.update((base, *(f"{base}.{alias.name}" for alias in node.names)))
    return frozenset(names)


@cache
def reachable(module: str) -> frozenset[str]:
    """What a module imports, itself or through modules of the package; a package's `__init__` runs, too."""
    seen, waiting = set(), [module]
    while waiting:
        for name in imported(waiting.pop()):
            parents = [".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)]
            # The top package re-exports everything: whoever names a module below it means that module.
            for found in (p for p in parents if p != PACKAGE and p not in seen):
                seen.add(found)
                if found in MODULES:
                    waiting.append(found)
    return frozenset(seen)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(names: frozenset[str], prefixes: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if any(under(name, prefix) for prefix in prefixes))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_room_imports_what_it_must_not(package):
    inside = [module for module in MODULES if under(module, f"{PACKAGE}.{package}")]
    assert inside
    forbidden = tuple(name if name in ("torch", "flax") else f"{PACKAGE}.{name}" for name in FORBIDDEN[package])
    assert {module: found for module in inside if (found := violations(imported(module), forbidden))} == {}


@pytest.mark.parametrize(
    ("module", "prefixes"),
    [
        ("ops", ("flax", "models", "quantize")),
        ("gen", ("quantize", "convert")),
        ("models", ("quantize", "gen", "convert", "checkpoint")),
        ("quantize", ("gen", "convert", "checkpoint", "cli")),
    ],
)
def test_no_way_round_either(module, prefixes):
    """What a package imports from the others must not bring the rest in through the back door."""
    forbidden = tuple(name if name == "flax" else f"{PACKAGE}.{name}" for name in prefixes)
    reached = {name for inside in MODULES if under(inside, f"{PACKAGE}.{module}") for name in reachable(inside)}
    assert violations(frozenset(reached), forbidden) == []


def test_the_rules_can_fail():
    """The table names modules that exist, and the parser sees what is there."""
    assert f"{PACKAGE}.quantize.run" in MODULES
    assert f"{PACKAGE}.convert.torch_file" in MODULES
    assert violations(imported(f"{PACKAGE}.models.vim"), ("flax", "jax.nowhere"))
    assert violations(imported(f"{PACKAGE}.data.transform"), ("PIL",))
    assert violations(reachable(f"{PACKAGE}.quantize"), (f"{PACKAGE}.ops.qtensor",))


def test_importing_the_package_stays_light():
    """Figures, images and data sets are loaded by those who ask for them."""
    heavy = ("torch", "tensorflow", "PIL", "matplotlib", "sklearn", "tensorflow_datasets", "pandas", "scipy", "orbax")
    code = f"import sys, {PACKAGE}; print(*(m for m in {heavy} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(out) <= {"scipy"}  # JAX itself imports scipy


def test_importing_takes_less_than_two_seconds():
    """Of this process's time: of the machine's, others may take any share."""
    code = f"import time, {PACKAGE}; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 2


def test_importing_starts_no_backend():
    """A user may still choose the platform after the import: nothing is computed at import time."""
    code = f"import {PACKAGE}; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


OTHERS = [path for folder in ("examples", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
SOURCE_FILES = sorted([*MODULES.values(), *OTHERS])


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_self_contained_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module docstring says what the file holds"
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for outside in ("/".join(("..", "shared")), f"{ROOT.parent}/"):
        assert not any(outside in s for s in strings), f"{outside} is not part of the project"
    roots = {name.split(".")[0] for node in ast.walk(tree) for name in _names(node)}
    assert "torch" not in roots


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_the_top_level_exports_names_and_nothing_else():
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        targets = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_named = targets in (["__all__"], ["__version__"])
        assert is_named or is_docstring or isinstance(node, ast.ImportFrom), ast.unparse(node)
    designed = """create_model list_models from_torch save load export pure selective_scan ScanOutput Trace
        generate_images GenConfig Generated quantize QuantConfig QuantRule QuantReport QTensor split_outliers Split
        outlier_matmul implicit_attention memory_report MemoryReport"""
    assert set(designed.split()) <= set(ouromamba_jax.__all__)


def test_every_public_name_exists_and_is_documented():
    undocumented = []
    packages = [m.name for m in pkgutil.walk_packages(ouromamba_jax.__path__, PACKAGE + ".") if m.ispkg]
    for name in (PACKAGE, f"{PACKAGE}.convert", *packages):
        module = importlib.import_module(name)
        names = getattr(module, "__all__", [])
        assert sorted(names) == sorted(set(names)), name
        for public in names:
            value = getattr(module, public)
            text = value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)
            generated = (text or "").startswith(f"{public}(")  # what a dataclass or named tuple gets by itself
            if callable(value) and (not text or generated):
                undocumented.append(f"{name}.{public}")
    assert undocumented == []


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]\n" in (ROOT / "CHANGELOG.md").read_text()
