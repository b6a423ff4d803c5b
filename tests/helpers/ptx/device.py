"""A GPU that is none: while it is there, Pallas kernels are compiled for it and their PTX is run on the CPU."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from script_modules import load_script

from .program import parse, parse_host
from .threads import Threads

TARGETS = {"sm80": ("a100", "8.0"), "sm89": ("l40s", "8.9"), "sm90": ("h100", "9.0")}
CORES = 3
"""So few that a program of the Hopper kernel has several tiles."""


@contextlib.contextmanager
def emulated(target: str, *, late: bool = True, seed: int = 0) -> Iterator[None]:
    """The default device, to the package, is a GPU of architecture `target`; a process can have one of them only.

    Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version, and ptxas.
    """
    os.environ.update(dict.fromkeys(("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_HOST_LLVM"), "1"))
    device = SimpleNamespace(platform="gpu", compute_capability=TARGETS[target][1], core_count=CORES)
    real = plgpu.kernel

    def kernel(body: Any, *, out_type: Any, **options: Any) -> Any:
        def call(*arguments):
            compiled = real(body, out_type=out_type, **options)
            text = _compile(target, compiled, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments))

            def run(*arrays):
                arrays = [np.asarray(x) for x in arrays]
                results = [_garbage(x, seed) for x in jax.tree.leaves(out_type)]
                host = parse_host(text[text.index("; ModuleID") :])
                results = Threads(parse(text), host, arrays, results, late=late, seed=seed).run()
                return jax.tree.unflatten(jax.tree.structure(out_type), results)

            return jax.pure_callback(run, out_type, *arguments, vmap_method="sequential")

        return call

    with (
        mock.patch.object(plgpu, "kernel", kernel),
        mock.patch("ouromamba_jax.pallas.device.default_device", return_value=device),
        mock.patch("ouromamba_jax.pallas.outlier_matmul.default_device", return_value=device),
    ):
        yield
    jax.clear_caches()  # or a traced call would run the emulator later


def _garbage(result: jax.ShapeDtypeStruct, seed: int) -> np.ndarray:
    """What a kernel's output holds before it is written."""
    size = int(np.prod(result.shape)) * result.dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(result.dtype).reshape(result.shape)


_PRINTED: dict[tuple[str, str], str] = {}


def _compile(target: str, function: Any, *shapes: jax.ShapeDtypeStruct) -> str:
    """What Mosaic prints while it compiles: PTX and host code. It prints once for a kernel."""
    with load_script("compile_kernels").compiling_for(TARGETS[target][0]) as sharding, _output() as output:
        lowered = jax.jit(function).lower(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes),
        )
        key = target, lowered.as_text()
        if key not in _PRINTED:
            lowered.compile()
            sys.stdout.flush()
            output.seek(0)
            _PRINTED[key] = output.read().decode(errors="replace")
    return _PRINTED[key]


@contextlib.contextmanager
def _output() -> Iterator[Any]:
    """A file that takes what the compiler prints, which Python does not see."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield file
        finally:
            os.dup2(saved, 1)
            os.close(saved)
