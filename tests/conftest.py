"""Strict JAX for every test: no silent dtype or rank promotion, float32 matmuls in full precision."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import pytest

from ouromamba_jax.ops.cpu_miscompile import mend_miscompile

mend_miscompile()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption(
        "--emulate",
        choices=("sm80", "sm89", "sm90"),
        help="with -m gpu: compile the kernels for this architecture and run their PTX on the CPU (tests/ptx); needs "
        "what scripts/compile_kernels.py needs",
    )


def pytest_configure(config):
    """Every program is compiled once, for both workers and for later runs; `--cache-clear` forgets them."""
    if config.getoption("emulate") and importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise pytest.UsageError(
            f"--emulate compiles for GPUs: pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}"
        )
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Half of the time would go into LLVM's passes: they run where bits, official numbers or GPUs are at stake.

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 or 1 in the environment decides for all tests instead.
    """
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        return
    quick = not any(item.get_closest_marker(name) for name in ("optimized", "gpu"))
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # they do not know how a program was compiled
        jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Linux lets a process map 65,530 pieces of memory, and the programs of a quantised model take two thousand."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _emulated(request):
    target = request.config.getoption("emulate")
    if target is None or request.node.get_closest_marker("gpu") is None:
        yield
    elif "triton" in request.node.name:
        pytest.skip("the emulator compiles Pallas kernels only")
    else:
        from ptx.device import emulated

        with emulated(target):
            yield
