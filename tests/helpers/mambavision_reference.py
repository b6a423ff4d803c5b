"""The published MambaVision forward pass in plain NumPy float64, on its own weights, BatchNorms and layouts."""

import math

import numpy as np
from reference_layers import Weights, conv, draw, gelu, linear, scan, silu, softplus

STATES = 8


def random_weights(
    rng: np.random.Generator, *, dim: int, in_dim: int, depths: tuple[int, ...], mlp_ratio: float, classes: int,
    layer_scale: bool = False, conv_levels: int = 2,
) -> Weights:  # fmt: skip
    """Weights of the published names and shapes, none of them at its initial value, and BatchNorms' statistics."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int, *, batch: bool = False) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
        if batch:
            shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
            shapes[f"{name}.num_batches_tracked"] = ()

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    layer("patch_embed.conv_down.0", in_dim, 3, 3, 3, bias=False)
    norm("patch_embed.conv_down.1", in_dim, batch=True)
    layer("patch_embed.conv_down.3", dim, in_dim, 3, 3, bias=False)
    norm("patch_embed.conv_down.4", dim, batch=True)
    for level, depth in enumerate(depths):
        c = dim * 2**level
        for index in range(depth):
            block = f"levels.{level}.blocks.{index}"
            for i in (1, 2):
                norm(f"{block}.norm{i}", c, batch=level < conv_levels)
                if level < conv_levels:
                    layer(f"{block}.conv{i}", c, c, 3, 3)
                elif layer_scale:
                    shapes[f"{block}.gamma_{i}"] = (c,)
            if level < conv_levels:
                continue
            if index < (depth + 1) // 2:
                e, r = c // 2, math.ceil(c / 16)
                layer(f"{block}.mixer.in_proj", c, c, bias=False)
                layer(f"{block}.mixer.conv1d_x", e, 1, 3, bias=False)
                layer(f"{block}.mixer.conv1d_z", e, 1, 3, bias=False)
                layer(f"{block}.mixer.x_proj", r + 2 * STATES, e, bias=False)
                layer(f"{block}.mixer.dt_proj", e, r)
                shapes |= {f"{block}.mixer.A_log": (e, STATES), f"{block}.mixer.D": (e,)}
                layer(f"{block}.mixer.out_proj", c, c, bias=False)
            else:
                layer(f"{block}.mixer.qkv", 3 * c, c)
                layer(f"{block}.mixer.proj", c, c)
            layer(f"{block}.mlp.fc1", int(mlp_ratio * c), c)
            layer(f"{block}.mlp.fc2", c, int(mlp_ratio * c))
        if level + 1 < len(depths):
            layer(f"levels.{level}.downsample.reduction.0", 2 * c, c, 3, 3, bias=False)
    norm("norm", dim * 2 ** (len(depths) - 1), batch=True)
    layer("head", classes, dim * 2 ** (len(depths) - 1))

    return draw(rng, shapes, step_bias_uses=2)


def forward(
    weights: Weights, images: np.ndarray, *, windows: tuple[int, ...], heads: tuple[int, ...]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(logits, map after every level, what a block shows) of images (B, 3, H, W).

    Maps are (B, C, H, W), before the downsampling. Blocks show the y (B*windows, L, E) of their scan, or their
    attention (B*windows, heads, L, L).
    """
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    x = images.astype(np.float64)
    for i in (0, 3):
        x = conv(w, f"patch_embed.conv_down.{i}", x, stride=2)
        x = np.maximum(_batch_norm(w, f"patch_embed.conv_down.{i + 1}", x, eps=1e-4), 0)
    maps, shown = {}, {}
    level = 0
    while f"levels.{level}.blocks.0.norm1.weight" in w:
        height, width = x.shape[2:]
        side = windows[level]
        is_conv = f"levels.{level}.blocks.0.conv1.weight" in w
        if not is_conv:
            x = np.pad(x, ((0, 0), (0, 0), (0, -height % side), (0, -width % side)))
            padded = x.shape[2:]
            x = _split(x, side)
        index = 0
        while f"levels.{level}.blocks.{index}.norm1.weight" in w:
            block = f"levels.{level}.blocks.{index}"
            if is_conv:
                y = _gelu_tanh(_batch_norm(w, f"{block}.norm1", conv(w, f"{block}.conv1", x, stride=1), eps=1e-5))
                x = x + _batch_norm(w, f"{block}.norm2", conv(w, f"{block}.conv2", y, stride=1), eps=1e-5)
            else:
                normed = _layer_norm(w, f"{block}.norm1", x)
                if f"{block}.mixer.qkv.weight" in w:
                    update, shown[block] = _attention(w, f"{block}.mixer", normed, heads[level])
                else:
                    update, shown[block] = _mamba(w, f"{block}.mixer", normed)
                x = x + w.get(f"{block}.gamma_1", 1.0) * update
                y = gelu(linear(w, f"{block}.mlp.fc1", _layer_norm(w, f"{block}.norm2", x)))
                x = x + w.get(f"{block}.gamma_2", 1.0) * linear(w, f"{block}.mlp.fc2", y)
            index += 1
        if not is_conv:
            x = _join(x, side, padded)[:, :, :height, :width]
        maps[level] = x
        if f"levels.{level}.downsample.reduction.0.weight" in w:
            x = conv(w, f"levels.{level}.downsample.reduction.0", x, stride=2)
        level += 1
    pooled = _batch_norm(w, "norm", x, eps=1e-5).mean(axis=(2, 3))
    return linear(w, "head", pooled), maps, shown


def _split(x: np.ndarray, side: int) -> np.ndarray:
    """(B, C, H, W) to windows (B * windows, side^2, C), one by one."""
    parts = [
        image[:, i : i + side, j : j + side].reshape(len(image), -1).T
        for image in x
        for i in range(0, x.shape[2], side)
        for j in range(0, x.shape[3], side)
    ]
    return np.stack(parts)


def _join(parts: np.ndarray, side: int, size: tuple[int, int]) -> np.ndarray:
    per_image = (size[0] // side) * (size[1] // side)
    x = np.zeros((len(parts) // per_image, parts.shape[2], *size))
    remaining = iter(parts)
    for image in x:
        for i in range(0, size[0], side):
            for j in range(0, size[1], side):
                image[:, i : i + side, j : j + side] = next(remaining).T.reshape(-1, side, side)
    return x


def _mamba(w: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, z = np.split(linear(w, f"{name}.in_proj", x), 2, axis=2)
    u, z = silu(_conv1d(w[f"{name}.conv1d_x.weight"], u)), silu(_conv1d(w[f"{name}.conv1d_z.weight"], z))
    rank = w[f"{name}.dt_proj.weight"].shape[1]
    dt, B, C = np.split(linear(w, f"{name}.x_proj", u), [rank, rank + STATES], axis=2)
    delta = softplus(linear(w, f"{name}.dt_proj", dt) + w[f"{name}.dt_proj.bias"])  # the bias a second time
    y = scan(u, delta, -np.exp(w[f"{name}.A_log"]), B, C, w[f"{name}.D"])
    return linear(w, f"{name}.out_proj", np.concatenate([y, z], axis=2)), y


def _attention(w: Weights, name: str, x: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    qkv = linear(w, f"{name}.qkv", x)
    batch, length, channels = x.shape
    q, k, v = qkv.reshape(batch, length, 3, heads, channels // heads).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(channels // heads)
    probs = np.exp(scores - scores.max(axis=3, keepdims=True))
    probs = probs / probs.sum(axis=3, keepdims=True)
    out = (probs @ v).transpose(0, 2, 1, 3).reshape(batch, length, channels)
    return linear(w, f"{name}.proj", out), probs


def _conv1d(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Depthwise over the tokens (B, L, E), one zero on either side."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    return sum(padded[:, k : k + x.shape[1]] * weight[:, 0, k] for k in range(3))


def _batch_norm(w: Weights, name: str, x: np.ndarray, *, eps: float) -> np.ndarray:
    mean, var, weight, bias = (
        w[f"{name}.{leaf}"][None, :, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def _layer_norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=2, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=2, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
