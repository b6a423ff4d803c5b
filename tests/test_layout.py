"""The package's layout: who may import whom, how long a file may get, and that every public name is documented."""

import ast
import fnmatch
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ouromamba_jax

ROOT = Path(__file__).parent.parent
PACKAGE = "ouromamba_jax"
NAMED_MODELS = tuple(f"{PACKAGE}.models.{name}" for name in ("vim", "vmamba", "mambavision"))

# Who (module pattern) must not import whom (dotted prefix); the design's table and what follows from it.
FORBIDDEN = {
    "*": ("torch", "torchvision", "tensorflow", f"{PACKAGE}.cli"),
    f"{PACKAGE}": ("PIL", "matplotlib", "sklearn"),
    f"{PACKAGE}.cpu_barrier": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.fixed_order": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.sharding": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.scan": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.scan_types": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.scan_xla": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.scan_mosaic": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.split_operand": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.attention": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.outliers": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.outlier_types": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.outlier_detection": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.outlier_calibration": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.released": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.token_windows": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.matmul": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.triton_matmul*": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.quantize"),
    f"{PACKAGE}.qtensor": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.pallas"),
    f"{PACKAGE}.gen*": (f"{PACKAGE}.quantize", f"{PACKAGE}.pallas", *NAMED_MODELS),
    f"{PACKAGE}.quantize*": (f"{PACKAGE}.gen", f"{PACKAGE}.convert", f"{PACKAGE}.pallas", *NAMED_MODELS),
    f"{PACKAGE}.quantize.config": ("jax", "flax"),
    f"{PACKAGE}.quantize.rounding": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.quantize.sites": (f"{PACKAGE}.quantize.modules", f"{PACKAGE}.quantize.scan"),
    f"{PACKAGE}.baselines*": (*(f"{PACKAGE}.{name}" for name in ("gen", "convert", "pallas")), *NAMED_MODELS),
    f"{PACKAGE}.convert*": tuple(f"{PACKAGE}.{name}" for name in ("gen", "quantize", "checkpoint", "pallas")),
    f"{PACKAGE}.convert.torch_file": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.convert.unpickle": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.checkpoint": (f"{PACKAGE}.pallas", *NAMED_MODELS),
    f"{PACKAGE}.preprocessing": ("PIL", "jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.data*": ("flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.evaluate": (f"{PACKAGE}.quantize", f"{PACKAGE}.gen", f"{PACKAGE}.data", *NAMED_MODELS),
    f"{PACKAGE}.metrics": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.tables": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.figures": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.charts": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.files": ("jax", "flax", f"{PACKAGE}.models"),
    f"{PACKAGE}.models*": tuple(f"{PACKAGE}.{name}" for name in ("quantize", "gen", "convert", "pallas")),
    f"{PACKAGE}.pallas*": ("flax", f"{PACKAGE}.models", f"{PACKAGE}.quantize"),
    # No family knows another, and what they share knows none.
    **{family: tuple(other for other in NAMED_MODELS if other != family) for family in NAMED_MODELS},
    **{f"{PACKAGE}.models.{name}": NAMED_MODELS for name in ("base", "layers", "convolution", "trace", "windows")},
}
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


def ruled() -> Iterator[tuple[str, tuple[str, ...]]]:
    for module in sorted(MODULES):
        for pattern, prefixes in FORBIDDEN.items():
            if fnmatch.fnmatchcase(module, pattern):
                # A module may of course name its own siblings.
                yield module, tuple(p for p in prefixes if not under(module, p))


@pytest.mark.parametrize(("module", "prefixes"), list(ruled()))
def test_direct_imports(module, prefixes):
    assert violations(imported(module), prefixes) == []


PURE = """cpu_barrier fixed_order sharding scan scan_types scan_xla scan_mosaic split_operand attention matmul
    triton_matmul qtensor outliers outlier_types outlier_detection outlier_calibration token_windows released
    preprocessing data metrics tables figures charts files"""


@pytest.mark.parametrize("module", PURE.split())
def test_pure_modules_stay_pure_all_the_way_down(module):
    """What a pure module imports from the package must not bring Flax or a model in through the back door."""
    name = f"{PACKAGE}.{module}"
    prefixes = [p for pattern, found in FORBIDDEN.items() if fnmatch.fnmatchcase(name, pattern) for p in found]
    assert violations(reachable(name), tuple(prefixes)) == []


@pytest.mark.parametrize(
    ("module", "prefixes"),
    [
        ("gen", ("quantize", "convert")),
        ("models", ("quantize", "gen", "convert", "checkpoint")),
        ("quantize", ("gen", "convert", "checkpoint", "cli")),
        ("checkpoint", ("gen", "convert", "cli")),
        ("convert", ("gen", "quantize", "cli")),
    ],
)
def test_no_way_round_either(module, prefixes):
    assert violations(reachable(f"{PACKAGE}.{module}"), tuple(f"{PACKAGE}.{p}" for p in prefixes)) == []


def test_the_rules_can_fail():
    """The table names modules that exist, and the parser sees what is there."""
    assert f"{PACKAGE}.quantize.run" in MODULES
    assert f"{PACKAGE}.convert.torch_file" in MODULES
    assert violations(imported(f"{PACKAGE}.models.vim"), ("flax", "jax.nowhere"))
    assert violations(imported(f"{PACKAGE}.data.transform"), ("PIL",))
    assert violations(reachable(f"{PACKAGE}.quantize"), (f"{PACKAGE}.qtensor",))
    for pattern in FORBIDDEN:
        assert fnmatch.filter(MODULES, pattern), pattern


def test_importing_the_package_stays_light():
    """Figures, images and data sets are loaded by those who ask for them."""
    heavy = ("torch", "tensorflow", "PIL", "matplotlib", "sklearn", "tensorflow_datasets", "pandas", "scipy")
    code = f"import sys, {PACKAGE}; print(*(m for m in {heavy} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(out) <= {"scipy"}  # JAX itself imports scipy


def test_importing_starts_no_backend():
    """A user may still choose the platform after the import: nothing is computed at import time."""
    code = f"import {PACKAGE}; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


SOURCE_FILES = sorted([*MODULES.values(), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


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
        is_all = isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_all or is_docstring or isinstance(node, ast.ImportFrom), ast.unparse(node)
    designed = """create_model list_models from_torch save load pure selective_scan ScanOutput Trace generate_images
        GenConfig Generated quantize QuantConfig QuantRule QuantReport QTensor split_outliers OutlierSplit
        outlier_matmul implicit_attention memory_report MemoryReport"""
    assert set(designed.split()) <= set(ouromamba_jax.__all__)


def test_every_public_name_exists_and_is_documented():
    undocumented = []
    packages = [m.name for m in pkgutil.walk_packages(ouromamba_jax.__path__, PACKAGE + ".") if m.ispkg]
    for name in (PACKAGE, f"{PACKAGE}.convert", *packages):
        module = importlib.import_module(name)
        assert sorted(module.__all__) == sorted(set(module.__all__)), name
        for public in module.__all__:
            value = getattr(module, public)
            text = value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)
            generated = (text or "").startswith(f"{public}(")  # what a dataclass or named tuple gets by itself
            if callable(value) and (not text or generated):
                undocumented.append(f"{name}.{public}")
    assert undocumented == []
