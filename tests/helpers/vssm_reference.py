"""The published VSSM forward pass (VMamba, v05_noz) in plain NumPy float64, on its own weights and layouts."""

import math

import numpy as np
from reference_layers import Weights, conv, draw, gelu, linear, scan, silu, softplus


def random_weights(
    rng: np.random.Generator, *, dims: tuple[int, ...], depths: tuple[int, ...], ratio: float, states: int,
    mlp_ratio: float, classes: int,
) -> Weights:  # fmt: skip
    """Weights of the published names and shapes, none of them at its initial value."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("patch_embed.0", dims[0] // 2, 3, 3, 3)
    norm("patch_embed.2", dims[0] // 2)
    layer("patch_embed.5", dims[0], dims[0] // 2, 3, 3)
    norm("patch_embed.7", dims[0])
    for s, (d, depth) in enumerate(zip(dims, depths, strict=True)):
        e, r = int(ratio * d), math.ceil(d / 16)
        for b in range(depth):
            block = f"layers.{s}.blocks.{b}"
            norm(f"{block}.norm", d)
            norm(f"{block}.norm2", d)
            norm(f"{block}.op.out_norm", e)
            shapes |= {
                f"{block}.op.in_proj.weight": (e, d),
                f"{block}.op.conv2d.weight": (e, 1, 3, 3),
                f"{block}.op.x_proj_weight": (4, r + 2 * states, e),
                f"{block}.op.dt_projs_weight": (4, e, r),
                f"{block}.op.dt_projs_bias": (4, e),
                f"{block}.op.A_logs": (4 * e, states),
                f"{block}.op.Ds": (4 * e,),
                f"{block}.op.out_proj.weight": (d, e),
            }
            layer(f"{block}.mlp.fc1", int(mlp_ratio * d), d)
            layer(f"{block}.mlp.fc2", d, int(mlp_ratio * d))
        if s + 1 < len(dims):
            layer(f"layers.{s}.downsample.1", dims[s + 1], d, 3, 3)
            norm(f"layers.{s}.downsample.3", dims[s + 1])
    norm("classifier.norm", dims[-1])
    layer("classifier.head", classes, dims[-1])

    return draw(rng, shapes)


def forward(weights: Weights, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[dict]]:
    """Logits of images (B, 3, H, W), the map after every block, and of every mixer {direction: y (B, E, H, W)}."""
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    x = images.astype(np.float64)
    x = gelu(_norm(w, "patch_embed.2", conv(w, "patch_embed.0", x, stride=2)))
    x = _norm(w, "patch_embed.7", conv(w, "patch_embed.5", x, stride=2))
    maps, scans = [], []
    stage = 0
    while f"layers.{stage}.blocks.0.norm.weight" in w:
        block = 0
        while f"layers.{stage}.blocks.{block}.norm.weight" in w:
            name = f"layers.{stage}.blocks.{block}"
            update, ys = _ss2d(w, f"{name}.op", _norm(w, f"{name}.norm", x))
            x = x + update
            hidden = gelu(_linear2d(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x)))
            x = x + _linear2d(w, f"{name}.mlp.fc2", hidden)
            maps.append(x)
            scans.append(ys)
            block += 1
        if f"layers.{stage}.downsample.1.weight" in w:
            x = _norm(w, f"layers.{stage}.downsample.3", conv(w, f"layers.{stage}.downsample.1", x, stride=2))
        stage += 1
    pooled = _norm(w, "classifier.norm", x).mean(axis=(2, 3))
    return linear(w, "classifier.head", pooled), maps, scans


def _ss2d(w: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, dict]:
    x = np.einsum("oc,bchw->bohw", w[f"{name}.in_proj.weight"], x)
    _, e, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    u = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            u[:, :, i, j] = (padded[:, :, i : i + 3, j : j + 3] * w[f"{name}.conv2d.weight"][None, :, 0]).sum((2, 3))
    u = silu(u)
    rank, states = w[f"{name}.dt_projs_weight"].shape[2], w[f"{name}.A_logs"].shape[1]
    by_row = [(i, j) for i in range(height) for j in range(width)]
    by_column = [(i, j) for j in range(width) for i in range(height)]
    ys = {}
    for k, route in enumerate((by_row, by_column, by_row[::-1], by_column[::-1])):
        own = slice(k * e, (k + 1) * e)
        tokens = np.stack([u[:, :, i, j] for i, j in route], axis=1)
        dt, B, C = np.split(tokens @ w[f"{name}.x_proj_weight"][k].T, [rank, rank + states], axis=2)
        delta = softplus(dt @ w[f"{name}.dt_projs_weight"][k].T + w[f"{name}.dt_projs_bias"][k])
        y = scan(tokens, delta, -np.exp(w[f"{name}.A_logs"][own]), B, C, w[f"{name}.Ds"][own])
        ys[k] = np.zeros_like(u)
        for t, (i, j) in enumerate(route):
            ys[k][:, :, i, j] = y[:, t]
    merged = _norm(w, f"{name}.out_norm", sum(ys.values()))
    return np.einsum("oc,bchw->bohw", w[f"{name}.out_proj.weight"], merged), ys


def _linear2d(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("oc,bchw->bohw", w[f"{name}.weight"], x) + w[f"{name}.bias"][None, :, None, None]


def _norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"][None, :, None, None] + w[f"{name}.bias"][None, :, None, None]
