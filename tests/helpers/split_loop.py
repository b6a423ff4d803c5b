"""Algorithm 2 on one grid and its calibration as plain loops, written from the rule."""

import numpy as np


def largest_levels(config) -> tuple[int, int]:
    """q of inliers and Q of outliers."""
    return 2 ** (config.act_bits - 1) - 1, 32639 if config.outlier_bits == 16 else 2 ** (config.outlier_bits - 1) - 1


def loop_split(x, scale, config, *, theta=None, shift=None, channels=None) -> tuple[np.ndarray, np.ndarray]:
    """(levels int64 (B, L, C), which entries are listed), token by token, in float32 as the library divides."""
    q, Q = largest_levels(config)
    B, L, C = x.shape
    levels, listed = np.zeros((B, L, C), np.int64), np.zeros((B, L, C), bool)
    for b in range(B):
        for t in range(L):
            if t % config.n_refresh == 0:
                found = channels.copy() if config.detection == "static" else np.zeros(C, bool)
            limit = np.float32(q) * scale[t] if theta is None else max(theta[t], np.float32(q) * scale[t])
            if config.detection == "dynamic":
                found = found | (np.abs(x[b, t]) > limit)
            unit = 1 if shift is None else 2 ** int(shift[t])
            outliers = unit * np.clip(np.round(x[b, t] / (scale[t] * np.float32(unit))), -Q, Q)
            levels[b, t] = np.where(found, outliers, np.clip(np.round(x[b, t] / scale[t]), -q, q))
            listed[b, t] = found
    return levels, listed


def loop_theta(x, config) -> np.ndarray:
    """(L,): the mean over samples of mean + sigma * std of magnitudes, what was listed before counted as zero."""
    B, L, C = x.shape
    theta = np.zeros((B, L))
    for b in range(B):
        for t in range(L):
            if t % config.n_refresh == 0:
                listed = np.zeros(C, bool)
            free = np.where(listed, 0, np.abs(x[b, t].astype(np.float64)))
            theta[b, t] = free.mean() + config.sigma * free.std(ddof=1)
            listed |= free > theta[b, t]
    return theta.mean(0)


def loop_step(values, q) -> float:
    """The step, of 100 candidates up to the whole range, that loses least in the 2.4 norm."""
    values = values.astype(np.float64)
    tried = np.abs(values).max() * np.arange(1, 101) / 100 / q
    return tried[np.argmin([np.mean(np.abs(values - s * np.clip(np.round(values / s), -q, q)) ** 2.4) for s in tried])]


def loop_loss(x, scale, config, **found) -> np.ndarray:
    """(L,): what rounding loses at every token, in the 2.4 norm over samples and channels."""
    levels, _ = loop_split(x, scale, config, **found)
    return (np.abs(x.astype(np.float64) - levels * scale[:, None].astype(np.float64)) ** 2.4).sum((0, 2))
