"""The published forward pass of ViT and DeiT (timm's) in plain NumPy float64, on its own weights and layouts."""

import math

import numpy as np
from reference_layers import Weights, draw, gelu, linear

TOKENS = ("cls_token", "dist_token", "reg_token")
"""In the order in which they stand before the patches."""


def random_weights(
    rng: np.random.Generator, *, patch: int, patches: int, dim: int, depth: int, heads: int, classes: int, hidden: int,
    tokens: tuple[int, int, int] = (1, 0, 0), no_embed_class: bool = False, pre_norm: bool = False,
    qkv_bias: bool = True, qk_norm: bool = False, layer_scale: bool = False, last_norm: str = "norm",
) -> Weights:  # fmt: skip
    """Weights of the published names and shapes, none of them at its initial value; `tokens` of each of `TOKENS`."""
    shapes: dict[str, tuple[int, ...]] = {
        name: (1, count, dim) for name, count in zip(TOKENS, tokens, strict=True) if count
    }

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    shapes["pos_embed"] = (1, patches + (0 if no_embed_class else sum(tokens)), dim)
    layer("patch_embed.proj", dim, 3, patch, patch, bias=not pre_norm)
    if pre_norm:
        layer("norm_pre", dim)
    for i in range(depth):
        block = f"blocks.{i}"
        layer(f"{block}.norm1", dim)
        layer(f"{block}.attn.qkv", 3 * dim, dim, bias=qkv_bias)
        if qk_norm:
            layer(f"{block}.attn.q_norm", dim // heads)
            layer(f"{block}.attn.k_norm", dim // heads)
        layer(f"{block}.attn.proj", dim, dim)
        layer(f"{block}.norm2", dim)
        layer(f"{block}.mlp.fc1", hidden, dim)
        layer(f"{block}.mlp.fc2", dim, hidden)
        if layer_scale:
            shapes |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
    layer(last_norm, dim)
    layer("head", classes, dim)
    if tokens[1]:
        layer("head_dist", classes, dim)
    return draw(rng, shapes)


def layer_norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w: Weights, name: str, x: np.ndarray, heads: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(output, probabilities), head after head."""
    dim = x.shape[-1]
    qkv, width = linear(w, f"{name}.qkv", x), dim // heads
    outs, maps = [], []
    for h in range(heads):
        q, k, v = (qkv[..., part * dim + h * width : part * dim + (h + 1) * width] for part in range(3))
        if f"{name}.q_norm.weight" in w:
            q, k = layer_norm(w, f"{name}.q_norm", q, eps), layer_norm(w, f"{name}.k_norm", k, eps)
        scores = q @ k.swapaxes(1, 2) / math.sqrt(width)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(scores / scores.sum(-1, keepdims=True))
        outs.append(maps[-1] @ v)
    return linear(w, f"{name}.proj", np.concatenate(outs, -1)), np.stack(maps, 1)


def forward(
    weights: Weights, images: np.ndarray, *, heads: int, pool: str = "token", pool_prefix: bool = False,
    no_embed_class: bool = False, eps: float = 1e-6,
) -> tuple[np.ndarray, list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """(logits, every block's output, every block's attention: what it adds before layer scale, its probabilities).

    Args:
      images: (B, 3, H, W).
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    kernel = w["patch_embed.proj.weight"]
    side = kernel.shape[2]
    patches = [
        np.tensordot(images[:, :, i : i + side, j : j + side], kernel, ((1, 2, 3), (1, 2, 3)))
        for i in range(0, images.shape[2], side)
        for j in range(0, images.shape[3], side)
    ]
    x = np.stack(patches, 1) + w.get("patch_embed.proj.bias", 0)
    prefix = [np.broadcast_to(w[name], (len(x), *w[name].shape[1:])) for name in TOKENS if name in w]
    count = sum(token.shape[1] for token in prefix)
    if no_embed_class:
        x = np.concatenate([*prefix, x + w["pos_embed"]], 1)
    else:
        x = np.concatenate([*prefix, x], 1) + w["pos_embed"]
    if "norm_pre.weight" in w:
        x = layer_norm(w, "norm_pre", x, eps)
    blocks, shown = [], []
    while f"blocks.{len(blocks)}.norm1.weight" in w:
        block = f"blocks.{len(blocks)}"
        update, probs = attention(w, f"{block}.attn", layer_norm(w, f"{block}.norm1", x, eps), heads, eps)
        shown.append((update, probs))
        x = x + update * w.get(f"{block}.ls1.gamma", 1)
        update = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, eps))
        x = x + linear(w, f"{block}.mlp.fc2", gelu(update)) * w.get(f"{block}.ls2.gamma", 1)
        blocks.append(x)
    if "norm.weight" in w:
        x = layer_norm(w, "norm", x, eps)
    if "head_dist.weight" in w:
        return (linear(w, "head", x[:, 0]) + linear(w, "head_dist", x[:, 1])) / 2, blocks, shown
    x = x[:, 0] if pool == "token" else x[:, 0 if pool_prefix else count :].mean(1)
    if "fc_norm.weight" in w:
        x = layer_norm(w, "fc_norm", x, eps)
    return linear(w, "head", x), blocks, shown
