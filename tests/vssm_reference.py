"""The published VSSM forward pass (VMamba, v05_noz) in plain NumPy float64, on its own weights and layouts."""

import math

import numpy as np


def random_weights(
    rng: np.random.Generator, *, dims: tuple[int, ...], depths: tuple[int, ...], ratio: float, states: int,
    mlp_ratio: float, classes: int,
) -> dict[str, np.ndarray]:  # fmt: skip
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

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = rng.standard_normal(shape)
        if "dt_projs_bias" in name:
            value = value - 2
        elif len(shape) == 1 and name.endswith("weight"):  # a norm's
            value = 1 + 0.3 * value
        elif name.endswith("weight"):
            fan_in = shape[-1] if len(shape) < 4 else math.prod(shape[1:])
            value = value / math.sqrt(fan_in)
        else:
            value = 0.5 * value
        return value.astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def forward(weights: dict[str, np.ndarray], images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[dict]]:
    """Logits of images (B, 3, H, W), the map after every block, and of every mixer {direction: y (B, E, H, W)}."""
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    x = images.astype(np.float64)
    x = _gelu(_norm(w, "patch_embed.2", _conv(w, "patch_embed.0", x)))
    x = _norm(w, "patch_embed.7", _conv(w, "patch_embed.5", x))
    maps, scans = [], []
    stage = 0
    while f"layers.{stage}.blocks.0.norm.weight" in w:
        block = 0
        while f"layers.{stage}.blocks.{block}.norm.weight" in w:
            name = f"layers.{stage}.blocks.{block}"
            update, ys = _ss2d(w, f"{name}.op", _norm(w, f"{name}.norm", x))
            x = x + update
            hidden = _gelu(_linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x)))
            x = x + _linear(w, f"{name}.mlp.fc2", hidden)
            maps.append(x)
            scans.append(ys)
            block += 1
        if f"layers.{stage}.downsample.1.weight" in w:
            x = _norm(w, f"layers.{stage}.downsample.3", _conv(w, f"layers.{stage}.downsample.1", x))
        stage += 1
    pooled = _norm(w, "classifier.norm", x).mean(axis=(2, 3))
    return pooled @ w["classifier.head.weight"].T + w["classifier.head.bias"], maps, scans


def _ss2d(w: dict, name: str, x: np.ndarray) -> tuple[np.ndarray, dict]:
    x = np.einsum("oc,bchw->bohw", w[f"{name}.in_proj.weight"], x)
    batch, e, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    u = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            u[:, :, i, j] = (padded[:, :, i : i + 3, j : j + 3] * w[f"{name}.conv2d.weight"][None, :, 0]).sum((2, 3))
    u = u / (1 + np.exp(-u))
    rank = w[f"{name}.dt_projs_weight"].shape[2]
    states = w[f"{name}.A_logs"].shape[1]
    by_row = [(i, j) for i in range(height) for j in range(width)]
    by_column = [(i, j) for j in range(width) for i in range(height)]
    ys = {}
    for k, route in enumerate((by_row, by_column, by_row[::-1], by_column[::-1])):
        own = slice(k * e, (k + 1) * e)
        A, D = -np.exp(w[f"{name}.A_logs"][own]), w[f"{name}.Ds"][own]
        h = np.zeros((batch, e, states))
        y = np.zeros_like(u)
        for i, j in route:
            token = u[:, :, i, j]
            made = token @ w[f"{name}.x_proj_weight"][k].T
            dt, B, C = made[:, :rank], made[:, rank : rank + states], made[:, rank + states :]
            delta = np.log1p(np.exp(dt @ w[f"{name}.dt_projs_weight"][k].T + w[f"{name}.dt_projs_bias"][k]))
            h = np.exp(delta[..., None] * A) * h + (delta * token)[..., None] * B[:, None]
            y[:, :, i, j] = (h * C[:, None]).sum(2) + D * token
        ys[k] = y
    merged = _norm(w, f"{name}.out_norm", sum(ys.values()))
    return np.einsum("oc,bchw->bohw", w[f"{name}.out_proj.weight"], merged), ys


def _conv(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    """3x3, stride 2, one border of zeros."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    y = np.zeros((len(x), len(w[f"{name}.weight"]), height, width))
    for i in range(height):
        for j in range(width):
            patch = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            y[:, :, i, j] = np.einsum("bcij,ocij->bo", patch, w[f"{name}.weight"]) + w[f"{name}.bias"]
    return y


def _linear(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("oc,bchw->bohw", w[f"{name}.weight"], x) + w[f"{name}.bias"][None, :, None, None]


def _norm(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"][None, :, None, None] + w[f"{name}.bias"][None, :, None, None]


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
