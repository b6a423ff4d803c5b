"""Strict JAX for every test: no silent dtype or rank promotion, float32 matmuls in full precision."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
    """Every program is compiled once, for both workers and for later runs; `--cache-clear` forgets them."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Linux lets a process map 65,530 pieces of memory, and the programs of a quantised model take two thousand."""
    yield
    jax.clear_caches()
