"""A tiny Vim, heavy-tailed images, and every rival's version of that model, made once."""

from functools import cache

import jax
import numpy as np
from draws import heavy_tailed
from flax import nnx
from tiny_models import TINY, natural_model

from ouromamba_jax.baselines import quantize_baseline
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.capture import capture
from ouromamba_jax.quantize.sites import iter_sites

SCAN = "blocks.0.mixer.scan"
QUICK = {"ptq4vm": dict(epochs=6)}
# Besides Vim: a pyramid with four scan directions and one state, and one with attention; both downsample in a block.
FAMILIES = {
    "vim": ("vim_micro", TINY),
    "vmamba": ("vmamba_micro", dict(img_size=16, dims=8, depths=(1, 1), mlp_ratio=2.0, num_classes=5)),
    "mambavision": (
        "mambavision_micro",
        dict(
            img_size=16,
            dim=8,
            in_dim=4,
            depths=(1, 2),
            window_size=(4, 2),
            num_heads=(1, 2),
            mlp_ratio=2.0,
            num_classes=5,
        ),
    ),
}


def images(key: int = 0, count: int = 6) -> jax.Array:
    return heavy_tailed(key, (count, 12, 16, 3))


@cache
def float_model(family: str = "vim") -> nnx.Module:
    name, fields = FAMILIES[family]
    return natural_model(name, **fields)


@cache
def baseline(name: str, bits: int = 4):
    return quantize_baseline(
        float_model(), images(), name, weight_bits=bits, act_bits=bits, float_dtype="float32", **QUICK.get(name, {})
    )


@cache
def logits_of(name: str, bits: int = 4) -> np.ndarray:
    """Of the test images; "float" is the model itself."""
    return predict(float_model() if name == "float" else baseline(name, bits)[0], images(1))


@cache
def captured_block():
    """(the block, its input, its output, what entered its sites, their settings)."""
    model = float_model()
    block, x = model.blocks[0], model.stem(images())
    configs = {path: QuantConfig(detection="none", outlier_bits=8) for path, _ in iter_sites(block) if path[-1] != "z"}
    return block, x, *capture(block, x, configs, 6), configs


def scan_operands() -> tuple[SelectiveScan, list[jax.Array]]:
    block, _, _, captured, _ = captured_block()
    return block.mixer.scan, [captured["mixer.scan"][name] for name in ("u", "delta", "B", "C")]


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def bits_of(model: nnx.Module) -> dict[tuple, bytes]:
    return {path: np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def in_numpy(scan: SelectiveScan, operands: list[jax.Array]) -> list[np.ndarray]:
    """(u, delta after softplus, A (G, E, N), B, C) in float64."""
    u, delta, B, C = (np.asarray(x, np.float64) for x in operands)
    bias = np.asarray(scan.dt_bias[...], np.float64).reshape(u.shape[2:])
    A = -np.exp(np.asarray(scan.A_log[...], np.float64)).reshape(*u.shape[2:], -1)
    return [u, np.log1p(np.exp(delta + bias)), A, B, C]
