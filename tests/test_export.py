"""Exported programs: they run without this package, and what lies beside them says what they compute."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from draws import heavy_tailed, normal
from flax import nnx
from quantising import module_at
from safetensors.numpy import load_file
from split_loop import loop_split
from tiers import slow
from tiny_models import FAMILIES, TINY, quantised, random_model
from tolerances import EPILOGUE, REORDERED

from ouromamba_jax import export, pure
from ouromamba_jax.cli.main import main
from ouromamba_jax.export import ExportNote
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.linear import QuantLinear

# A program of its own: calls every exported one in a folder on the images beside it, with as many as the arguments say.
RUNNER = """
import sys
ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "scipy", "opt_einsum", "flatbuffers", "safetensors"}
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        known = root in ALLOWED or root in sys.stdlib_module_names or root.startswith("_")
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = map(Only, sys.meta_path)
for name in ("ouromamba_jax", "flax"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported")
from pathlib import Path
import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file
folder = Path(sys.argv[1])
for file in sorted(folder.glob("*.stablehlo")):
    call = jax.jit(export.deserialize(bytearray(file.read_bytes())).call)
    beside = file.with_suffix(".safetensors")
    arrays = (load_file(beside),) if beside.exists() else ()
    images = np.load(file.with_suffix(".images.npy"))
    for batch in map(int, sys.argv[2:]):
        np.save(file.with_suffix(f".{batch}.npy"), call(*arrays, images[:batch]))
"""


def run_elsewhere(folder: Path, batches: tuple[int, ...]) -> None:
    """All programs of a folder, in a process that can import JAX and what it needs, and nothing else."""
    (folder / "run.py").write_text(RUNNER)
    quick = str(jax.config.read("jax_disable_most_optimizations"))
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": quick, "JAX_PLATFORMS": "cpu"}
    if (cache := jax.config.jax_compilation_cache_dir) is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    command = [sys.executable, str(folder / "run.py"), str(folder), *map(str, batches)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("family", "batches"), [("vim", (3,)), *slow(*((family, (1, 3, 8)) for family in FAMILIES))])
def test_programs_run_without_this_package(family, batches, tmp_path):
    models = {
        "float": random_model(f"{family}_micro", **FAMILIES[family]),
        "quantised": quantised(QuantConfig.preset("w4a4"), family),
    }
    images = heavy_tailed(3, (max(batches), *FAMILIES[family]["img_size"], 3))
    for name, model in models.items():
        export(tmp_path / f"{name}.stablehlo", model, weights="inside" if name == "float" else "beside")
        np.save(tmp_path / f"{name}.images.npy", images)
    run_elsewhere(tmp_path, batches)
    for name, model in models.items():
        fn, state = pure(model)
        expected = np.asarray(jax.jit(fn)(state, images))
        for batch in batches:
            logits = np.load(tmp_path / f"{name}.{batch}.npy")
            np.testing.assert_allclose(logits, expected[:batch], rtol=0, atol=REORDERED * np.abs(expected).max())


def read(path: Path) -> jax.export.Exported:
    return jax.export.deserialize(bytearray(path.read_bytes()))


def custom_calls(program: jax.export.Exported) -> set[str]:
    return set(re.findall(r"stablehlo.custom_call @(\w+)", program.mlir_module())) - {"shape_assertion"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(a quantised model, its program, its arrays and what their file says)."""
    path = tmp_path_factory.mktemp("export") / "model.stablehlo"
    config = QuantConfig.preset("w4a4", float_dtype="bfloat16", operands=("delta", "A", "h"))
    model = quantised(config, two_bytes={"blocks.0.mixer.in_proj": ("input",)})
    export(path, model, weights="beside")
    with safetensors.safe_open(path.with_suffix(".safetensors"), "numpy") as file:
        said = file.metadata()
    return (
        model,
        jax.export.deserialize(bytearray(path.read_bytes())),
        load_file(path.with_suffix(".safetensors")),
        said,
    )


def test_programs_multiply_integers_and_hold_no_kernel(written):
    model, program, _, _ = written
    products = [line for line in program.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    shapes = {module.levels.shape for _, module in nnx.iter_modules(model) if isinstance(module, QuantLinear)}
    assert len(shapes) > 4
    for rows, columns in shapes:
        weight = f"tensor<{rows}x{columns}x"
        assert any(f"{weight}i8>) ->" in line and line.count("xi8>") == 2 and "xi32>" in line for line in products)
        assert not any(f"{weight}f" in line for line in products)
    assert custom_calls(program) == set()
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [str(x.shape[0]) for x in (program.in_avals[-1], *program.out_avals)] == ["b", "b"]


def test_every_array_lies_beside_the_program(written):
    model, _, arrays, said = written
    state = {".".join(map(str, key)): np.asarray(leaf[...]) for key, leaf in nnx.to_flat_state(nnx.state(model))}
    assert arrays.keys() == state.keys()
    assert {x.dtype for x in state.values()} > {jnp.dtype(jnp.bfloat16)}
    for name, value in state.items():
        expected = value.astype(np.float32) if value.dtype == jnp.bfloat16 else value
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected)
    assert said["family"] == "vim"
    assert json.loads(said["config"])["img_size"] == list(TINY["img_size"])
    rules = json.loads(said["quantization"])
    assert {path for path in rules if "weight_bits" in rules[path]} == {k for k in arrays if "levels" in k}
    steps = {name.removesuffix(".scale") for name in arrays if re.search(r"\.act(\.\w+\.\d)?\.scale$", name)}
    assert {path for path in rules if "act_bits" in rules[path]} == steps


def test_arrays_beside_are_enough_to_compute_a_layer(written):
    """docs/guides/export.md, written out in NumPy."""
    model, _, arrays, said = written
    path = "blocks.0.mixer.in_proj"
    rules = json.loads(said["quantization"])
    rule = rules[f"{path}.act"]
    x = np.asarray(normal(1, (2, arrays[f"{path}.act.scale"].shape[0], arrays[f"{path}.levels"].shape[0])))
    found = {name: arrays.get(f"{path}.act.{name}") for name in ("theta", "shift", "channels")}
    scale = arrays[f"{path}.act.scale"]
    levels, _ = loop_split(x, scale, SimpleNamespace(**rule), **found)
    groups, outputs = arrays[f"{path}.weight_scale"].shape
    weight = arrays[f"{path}.levels"].reshape(groups, -1, outputs) * arrays[f"{path}.weight_scale"][:, None]
    y = scale[:, None] * (levels @ weight.reshape(-1, outputs))
    y += arrays.get(f"{path}.bias", 0)
    layer = module_at(model, path)
    np.testing.assert_allclose(layer(jnp.asarray(x)), y, rtol=0, atol=EPILOGUE * np.abs(y).max())
    assert rules[f"{path}.levels"] == {"weight_bits": 4}


def test_a_fixed_batch_stays_what_it_is(tmp_path):
    model = random_model("vim_micro", **TINY)
    export(tmp_path / "two.stablehlo", model, 2)
    assert read(tmp_path / "two.stablehlo").in_avals[0].shape == (2, *TINY["img_size"], 3)


def test_kernels_that_a_gpu_would_run_are_left_out_and_this_is_said(monkeypatch, tmp_path):
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr("ouromamba_jax.pallas.device.default_device", lambda: jax.config.jax_default_device or gpu)
    with pytest.warns(ExportNote, match="leaves the kernels for this GPU out and computes the same through XLA"):
        export(tmp_path / "model.stablehlo", quantised(QuantConfig.preset("w4a4")))
    assert custom_calls(read(tmp_path / "model.stablehlo")) == set()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.hlo", {}, r"model\.hlo must end in \.stablehlo\."),
        ("m.stablehlo", dict(batch=0), "batch is 0; give a number of images, or a name such as 'b' for any number"),
        ("m.stablehlo", dict(batch="b + 1"), r"batch is 'b \+ 1'; give a number"),
        ("m.stablehlo", dict(weights="outside"), "weights is 'outside'; choose 'inside' or 'beside'"),
        ("old.stablehlo", {}, r"old\.stablehlo already exists; choose another path"),
        ("arrays.stablehlo", dict(weights="beside"), r"arrays\.safetensors already exists; choose another path"),
        ("old.stablehlo/m.stablehlo", {}, "cannot be written in .*it is not a folder"),
    ],
)
def test_nothing_is_written_where_a_program_cannot_be(name, options, message, tmp_path):
    for taken in ("old.stablehlo", "arrays.safetensors"):
        (tmp_path / taken).write_text("taken")
    with pytest.raises((ValueError, OSError), match=message):
        export(tmp_path / name, random_model("vim_micro", **TINY), **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["arrays.safetensors", "old.stablehlo"]


def test_the_command_exports_what_its_help_says(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    example = capsys.readouterr().out.split("example: ouromamba ")[1].split()
    assert main([*example, "--weights", "beside", "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.endswith("for cpu, cuda, tpu, batch 2, its weights in vim_micro.safetensors\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vim_micro.safetensors", "vim_micro.stablehlo"]
    assert main(example) == 1
    assert "vim_micro.stablehlo already exists" in capsys.readouterr().err
