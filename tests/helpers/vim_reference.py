"""The published Vim forward pass (VisionMamba, "bimamba v2") in plain NumPy float64, on its own weights and layouts."""

import math

import numpy as np
from reference_layers import Weights, conv, draw, linear, scan, silu, softplus


def random_weights(
    rng: np.random.Generator, *, patch: int, patches: int, dim: int, depth: int, states: int, classes: int,
    expand: int = 2, taps: int = 4, class_tokens: tuple[str, ...] = ("cls_token",), positions: bool = True,
) -> Weights:  # fmt: skip
    """Weights of the published names and shapes, none of them at its initial value."""
    e, r = expand * dim, math.ceil(dim / 16)
    shapes: dict[str, tuple[int, ...]] = {name: (1, 1, dim) for name in class_tokens}
    if positions:
        shapes["pos_embed"] = (1, patches + len(class_tokens), dim)
    shapes |= {
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm_f.weight": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    for i in range(depth):
        mixer = f"layers.{i}.mixer"
        shapes |= {
            f"layers.{i}.norm.weight": (dim,),
            f"{mixer}.in_proj.weight": (2 * e, dim),
            f"{mixer}.out_proj.weight": (dim, e),
        }
        for b in ("", "_b"):
            shapes |= {
                f"{mixer}.A{b}_log": (e, states),
                f"{mixer}.D{b}": (e,),
                f"{mixer}.conv1d{b}.weight": (e, 1, taps),
                f"{mixer}.conv1d{b}.bias": (e,),
                f"{mixer}.x_proj{b}.weight": (r + 2 * states, e),
                f"{mixer}.dt_proj{b}.weight": (e, r),
                f"{mixer}.dt_proj{b}.bias": (e,),
            }
    return draw(rng, shapes)


def forward(
    weights: Weights, images: np.ndarray, *, stride: int, first: bool = False, halve: bool = True, pool: str = "mean"
) -> tuple[np.ndarray, list[np.ndarray], list[tuple]]:
    """(logits, the mixers' outputs, their scans' y) of images (B, 3, H, W).

    The weights tell one class token, which stands first or in the middle, from two and from none.
    Of every mixer: its output (B, L, D), and y (B, L, E) of the forward and the backward scan, each in scan order.
    """
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    maps = conv(w, "patch_embed.proj", images.astype(np.float64), stride=stride, border=0)
    patches = maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2)
    rows = [list(image) for image in patches]
    place = 0 if first else patches.shape[1] // 2
    for row in rows:
        if "cls_token" in w:
            row.insert(place, w["cls_token"][0, 0])
        elif "cls_token_head" in w:
            row.insert(0, w["cls_token_head"][0, 0])
            row.append(w["cls_token_tail"][0, 0])
    hidden = np.array(rows) + w.get("pos_embed", 0.0)
    residual = np.zeros_like(hidden)
    updates, scans = [], []
    while f"layers.{len(updates)}.norm.weight" in w:
        name = f"layers.{len(updates)}"
        residual = hidden + residual
        hidden, ys = _mixer(w, f"{name}.mixer", _rms_norm(w, f"{name}.norm", residual), halve)
        updates.append(hidden)
        scans.append(ys)
    tokens = _rms_norm(w, "norm_f", hidden + residual)
    if "cls_token" in w:
        features = tokens[:, place]
    elif "cls_token_head" in w:
        features = (tokens[:, 0] + tokens[:, -1]) / 2
    else:
        features = tokens[:, -1] if pool == "none" else tokens.mean(axis=1)
    return linear(w, "head", features), updates, scans


def _mixer(w: Weights, name: str, x: np.ndarray, halve: bool) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    x, z = np.split(linear(w, f"{name}.in_proj", x), 2, axis=2)
    ahead = _direction(w, name, "", x)
    back = _direction(w, name, "_b", x[:, ::-1])
    gated = ahead * silu(z), (back * silu(z[:, ::-1]))[:, ::-1]
    return linear(w, f"{name}.out_proj", sum(gated) / (2 if halve else 1)), (ahead, back)


def _direction(w: Weights, name: str, b: str, x: np.ndarray) -> np.ndarray:
    u = silu(_causal_conv(w, f"{name}.conv1d{b}", x))
    rank, states = w[f"{name}.dt_proj{b}.weight"].shape[1], w[f"{name}.A{b}_log"].shape[1]
    dt, B, C = np.split(linear(w, f"{name}.x_proj{b}", u), [rank, rank + states], axis=2)
    delta = softplus(linear(w, f"{name}.dt_proj{b}", dt))
    return scan(u, delta, -np.exp(w[f"{name}.A{b}_log"]), B, C, w[f"{name}.D{b}"])


def _causal_conv(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Depthwise over the tokens (B, L, E); the last tap sees the token itself."""
    taps = w[f"{name}.weight"][:, 0]
    padded = np.pad(x, ((0, 0), (taps.shape[1] - 1, 0), (0, 0)))
    return sum(padded[:, k : k + x.shape[1]] * tap for k, tap in enumerate(taps.T)) + w[f"{name}.bias"]


def _rms_norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=2, keepdims=True) + 1e-5) * w[f"{name}.weight"]
