"""The jax-triton backend: when it refuses, and its kernel compiled to machine code without a GPU.

Its integers are checked with those of all backends, in test_outlier_matmul.py.
"""

import importlib.metadata
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split import Split
from ouromamba_jax.pallas import triton_matmul
from ouromamba_jax.pallas.tiles import matmul_tiles
from ouromamba_jax.pallas.triton_matmul_kernel import matmul

SHARED_MEMORY = {"sm80": 166912, "sm89": 101376, "sm90": 232448}
POINTERS = {
    "low_ptr": "*i8",
    "high_ptr": "*i8",
    "row_scale_ptr": "*fp32",
    "weight_ptr": "*i8",
    "column_scale_ptr": "*fp32",
    "bias_ptr": "*fp16",
    "out_ptr": "*fp32",
}


def split_of(shape, *, two_bytes=False):
    """The shapes of a split activation."""
    levels, scale = jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[1:2], jnp.float32)
    return Split(levels, levels if two_bytes else None, scale, levels, shape[1])


def weight_of(inputs, outputs):
    """The shapes of a quantised weight."""
    values, scale = jax.ShapeDtypeStruct((inputs, outputs), jnp.int8), jax.ShapeDtypeStruct((1, outputs), jnp.float32)
    return QTensor(values, scale, 4)


@pytest.mark.parametrize("installed", ["none", "0.4.1", triton_matmul.VERSION])
def test_the_reason_without_the_right_jax_triton(installed, monkeypatch):
    def version(name):
        assert name == "jax-triton"
        if installed == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(triton_matmul.mosaic, "supports", lambda split, weight, bias, dtype: None)
    call = split_of((2, 5, 8)), weight_of(8, 6), None, jnp.float32
    reason = triton_matmul.supports(*call)
    assert (reason is None) == (installed == triton_matmul.VERSION)
    assert reason is None or (installed in reason and "ouromamba_jax[triton]" in reason)
    monkeypatch.setattr(triton_matmul.mosaic, "supports", lambda split, weight, bias, dtype: "no GPU")
    assert triton_matmul.supports(*call) == "no GPU"


@pytest.mark.parametrize(
    ("shape", "outputs", "fits"),
    [
        ((1023, 2048, 1000), 64, True),
        ((1024, 2048, 1000), 64, False),  # 2^31 inputs, padded to blocks of 128
        ((1024, 2048, 64), 1024, False),  # 2^31 outputs
    ],
)
def test_no_more_entries_than_its_indices_count(shape, outputs, fits, monkeypatch):
    monkeypatch.setattr(triton_matmul.mosaic, "supports", lambda split, weight, bias, dtype: None)
    monkeypatch.setattr(triton_matmul, "_missing", lambda: None)
    reason = triton_matmul.supports(split_of(shape), weight_of(shape[2], outputs), None, jnp.float32)
    assert (reason is None) == fits
    assert fits or "indices are int32" in reason


@pytest.mark.kernels
@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("outputs", "inputs", "out"),
    [(3072, 768, "*bf16"), (768, 1536, "*fp32"), (384, 192, "*fp32"), (56, 384, "*bf16")],
)
def test_it_compiles_without_a_gpu(target, outputs, inputs, out, tmp_path):
    """At the layers of Vim: int8 tensor cores, no spill, no call, no more shared memory than there is."""
    tiles = matmul_tiles(target, outputs, 8)
    split = split_of((32, 197, inputs), two_bytes=outputs == 768)
    constants = triton_matmul.constants(split, outputs, tiles, bias=outputs == 3072)
    source = ASTSource(
        matmul,
        signature=POINTERS | {"out_ptr": out} | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))},
    )
    options = {"num_warps": triton_matmul.warps(tiles), "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[2:]), 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    ptx = compiled.asm["ptx"]
    instruction = r"wgmma\.mma_async\.sync\S*s32\.s8\.s8" if target == "sm90" else r"mma\.sync\S*s32\.s8\.s8"
    assert re.search(instruction, ptx)
    assert not re.search(r"^\s*call", ptx, re.MULTILINE)
    path = tmp_path / "kernel.ptx"
    path.write_text(ptx)
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={architecture}", path, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes (?:stack|spill)", said) == ["0"] * 3
