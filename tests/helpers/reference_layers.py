"""What the float64 references of the three families share: random weights by published name, and plain layers."""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], *, step_bias_uses: int = 1) -> Weights:
    """Weights of the published names and shapes, none of them at its initial value, and BatchNorms' statistics.

    Steps are softplus of something around -2; a family that adds their bias several times gets a part of it.
    """

    def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("num_batches_tracked"):
            return np.asarray(rng.integers(1, 10**6), np.int64)
        value = rng.standard_normal(shape)
        if name.endswith("running_var"):
            value = 0.5 + value**2
        elif "dt_proj" in name and name.endswith("bias"):
            value = (value - 2) / step_bias_uses
        elif "gamma" in name or (len(shape) == 1 and name.endswith("weight")):  # a layer scale's, a norm's
            value = 1 + 0.3 * value
        elif name.endswith("weight"):
            fan_in = shape[-1] if len(shape) < 4 else math.prod(shape[1:])
            value = value / math.sqrt(fan_in)
        else:
            value = 0.5 * value
        return np.asarray(value, np.float32)

    return {name: value_of(name, shape) for name, shape in shapes.items()}


def conv(w: Weights, name: str, x: np.ndarray, *, stride: int, border: int = 1) -> np.ndarray:
    """Square convolution of maps (B, C, H, W), `border` zeros around them."""
    weight = w[f"{name}.weight"]
    side = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
    height, width = ((n - side) // stride + 1 for n in padded.shape[2:])
    y = np.zeros((len(x), len(weight), height, width))
    for i in range(height):
        for j in range(width):
            patch = padded[:, :, stride * i : stride * i + side, stride * j : stride * j + side]
            y[:, :, i, j] = np.tensordot(patch, weight, ((1, 2, 3), (1, 2, 3))) + w.get(f"{name}.bias", 0)
    return y


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def scan(u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray) -> np.ndarray:
    """y (B, L, E) of the recurrence: u and delta (B, L, E), A (E, N), B and C (B, L, N), D (E,)."""
    h = np.zeros((len(u), *A.shape))
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = np.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        y[:, t] = (h * C[:, t, None]).sum(2) + D * u[:, t]
    return y


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
