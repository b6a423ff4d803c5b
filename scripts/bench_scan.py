"""Time the selective scan against the two usual JAX formulations, and measure the memory of its backward pass.

    python scripts/bench_scan.py                                # (8, 197, 384, 16): one direction of Vim-Small, batch 8
    python scripts/bench_scan.py --shape 64 17 96 16            # a micro model
    python scripts/bench_scan.py --shape 2 196 768 1 --groups 4 # a VMamba stage

Takes a quarter of a minute on two CPU cores. Measured at the default shape: forward 13x faster than the associative
scan (goal: 5x), backward 3.1x the forward (goal: at most 3.5x), and about half the memory that all states would take.
With --json PATH the numbers go to a file as well.

All functions are timed in turn, round after round, and each reports its fastest: the ratios hold on a busy machine.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax import selective_scan
from ouromamba_jax.evaluation.bench import time_interleaved, write_results
from ouromamba_jax.report.tables import print_table


def ours(u, delta, A, B, C):
    return selective_scan(u, delta, A, B, C).y


def per_channel(projection, channels):
    """(B, L, G, N) to (B, L, D, N)."""
    return jnp.repeat(projection, channels // projection.shape[2], axis=2)


def associative(u, delta, A, B, C):
    """All states at once: the usual JAX formulation."""
    decay = jnp.exp(delta[..., None] * A)
    drive = (delta * u)[..., None] * per_channel(B, u.shape[2])
    _, h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (decay, drive), axis=1)
    return jnp.sum(h * per_channel(C, u.shape[2]), axis=-1)


def plain(u, delta, A, B, C):
    """One token per step of `lax.scan`, state (B, D, N), differentiated by JAX."""

    def step(h, x):
        u, delta, B, C = x
        B, C = (jnp.repeat(x, u.shape[1] // x.shape[1], axis=1) for x in (B, C))
        h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B
        return h, jnp.sum(h * C, axis=-1)

    h0 = jnp.zeros((u.shape[0], *A.shape), jnp.float32)
    _, y = jax.lax.scan(step, h0, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, delta, B, C)))
    return jnp.swapaxes(y, 0, 1)


TIME_HEADERS = ("formulation", "forward ms", "backward ms", "backward / forward", "forward / ours", "backward / ours")
MEMORY_HEADERS = ("L", "ours", "lax.scan + autodiff", "all states (L, B, D, N)")
FORMULATIONS = {"ours": ours, "associative_scan": associative, "lax.scan + autodiff": plain}


def make_inputs(batch, length, channels, d_state, groups):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    u, delta = normal(batch, length, channels), jax.nn.softplus(normal(batch, length, channels) - 2)
    projections = normal(batch, length, groups, d_state), normal(batch, length, groups, d_state)
    return u, delta, -jnp.exp(0.5 * normal(channels, d_state)), *projections


def pull_back(function, inputs):
    """The backward pass alone, compiled: the residuals of the forward pass are its arguments."""
    y, pullback = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
    return jax.jit(lambda pullback, dy: pullback(dy)), (pullback, y)


def time_rows(shape, groups, rounds):
    """(formulation, forward ms, backward ms, backward / forward, forward / ours, backward / ours)."""
    inputs = make_inputs(*shape, groups)
    calls = {}
    for name, function in FORMULATIONS.items():
        backward, residuals = pull_back(function, inputs)
        calls[f"{name}, forward"] = partial(jax.jit(function), *inputs)
        calls[f"{name}, backward"] = partial(backward, *residuals)
    seconds = {name: min(timing.seconds) for name, timing in time_interleaved(calls, repeats=rounds).items()}
    rows = []
    for name in FORMULATIONS:
        forward, backward = seconds[f"{name}, forward"], seconds[f"{name}, backward"]
        ratios = backward / forward, forward / seconds["ours, forward"], backward / seconds["ours, backward"]
        rows.append((name, forward * 1e3, backward * 1e3, *ratios))
    return rows


def memory_rows(shape, groups):
    """(tokens, temporary MB of forward and backward: ours, lax.scan, and all states for comparison)."""
    batch, length, channels, d_state = shape
    rows = []
    for tokens in (length, 2 * length, 4 * length):
        inputs = make_inputs(batch, tokens, channels, d_state, groups)
        sizes = []
        for function in (ours, plain):
            gradient = jax.jit(lambda *x, function=function: jax.vjp(function, *x)[1](x[0]))
            sizes.append(gradient.lower(*inputs).compile().memory_analysis().temp_size_in_bytes)
        sizes.append(4 * batch * tokens * channels * d_state)
        rows.append((str(tokens), *(size / 1e6 for size in sizes)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 197, 384, 16), metavar=("B", "L", "D", "N"))
    parser.add_argument("--groups", type=int, default=1, help="groups of B and C; 4 in VMamba")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()
    shape, groups = tuple(arguments.shape), arguments.groups
    times = time_rows(shape, groups, arguments.rounds)
    title = f"(B, L, D, N) = {shape}, {groups} group(s), {jax.default_backend()}"
    print_table(times, TIME_HEADERS, title=title)
    memory = memory_rows(shape, groups)
    print_table(memory, MEMORY_HEADERS, title="Forward and backward, temporary memory in MB")
    if arguments.json is not None:
        tables = {
            "time": dict(headers=TIME_HEADERS, rows=times),
            "memory_mb": dict(headers=MEMORY_HEADERS, rows=memory),
        }
        write_results(arguments.json, {"shape": shape, "groups": groups, **tables})
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
