"""Timing, the breakdown of a block, and what a quantised model weighs by its shapes."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from draws import normal
from flax import nnx
from tiny_models import TINY

from ouromamba_jax.evaluation import bench, breakdown
from ouromamba_jax.models import create_model
from ouromamba_jax.models.layers import Operand
from ouromamba_jax.ops import matmul, producers, scan
from ouromamba_jax.ops import split as outliers
from ouromamba_jax.ops.dispatch import Backend
from ouromamba_jax.ops.split import OutlierConfig
from ouromamba_jax.quantize import QuantConfig, memory_report
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.kinds import apply_specs, quantized_specs
from ouromamba_jax.quantize.sites import iter_sites


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return create_model("vim_micro", **TINY)


@pytest.fixture(scope="module")
def quantised() -> nnx.Module:
    return tiny_models.quantised(QuantConfig.preset("w4a4"))


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = bench.time_interleaved(calls, repeats=3)
    assert order == ["a", "b"] * 4  # the first round is not timed
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


def test_the_ratio_is_that_of_the_work():
    calls = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}
    timings = bench.time_interleaved(calls, repeats=7)
    assert timings["slow"].median >= 0.03
    ratio = bench.time_ratio(timings["slow"], timings["fast"])
    assert 1.2 < ratio < 8  # other work on the machine may stretch a sleep
    np.testing.assert_allclose(bench.time_ratio(timings["fast"], timings["slow"]), 1 / ratio)


def test_a_slow_round_does_not_move_the_ratio():
    slow, fast = bench.Timing((2.0, 20.0, 2.0), (9.0, 9.0, 3.0)), bench.Timing((1.0, 10.0, 1.0), (3.0, 3.0, 3.0))
    assert bench.time_ratio(slow, fast) == 2.0
    assert bench.time_ratio(slow, fast, cpu=True) == 3.0
    assert bench.Timing((1.0, 2.0, 3.0, 4.0, 5.0), ()).spread == pytest.approx(2 / 3)


def test_sleeping_takes_no_processor_time():
    timing = bench.time_interleaved({"sleep": lambda: time.sleep(0.05)}, repeats=3)["sleep"]
    assert max(timing.cpu_seconds) < 0.5 * min(timing.seconds)


def test_asynchronous_work_is_waited_for():
    work = jax.jit(lambda x: jnp.linalg.matrix_power(x, 40))
    x = normal(0, (256, 256)) / 16
    timings = bench.time_interleaved({"result": lambda: (work(x), None)}, repeats=2)
    start = time.perf_counter()
    work(x).block_until_ready()
    assert timings["result"].median > 0.1 * (time.perf_counter() - start)


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        bench.time_interleaved({"f": lambda: None}, repeats=0)


def test_results_name_the_machine_but_no_folder_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/scripts/bench_x.py", "--data", f"{tmp_path}/{{split}}.npz"])
    path = tmp_path / "new" / "results.json"
    bench.write_results(path, {"rows": [["float", 1.5]]})
    written = json.loads(path.read_text())
    assert written["command"] == "python scripts/bench_x.py --data '{split}.npz'"
    assert written["rows"] == [["float", 1.5]]
    assert written["machine"]["jax"] == jax.__version__
    assert written["machine"]["cpu"]
    assert str(tmp_path) not in path.read_text()


@pytest.mark.slow
def test_a_float_model_is_compared_with_quantised_ones(model):
    models = bench.models_to_compare(model, {"w4a4": QuantConfig.preset("w4a4")})
    rows = bench.compare_speed(models, 2, repeats=2)
    assert [row[0] for row in rows] == ["float", "w4a4"]
    assert all(len(row) == len(bench.HEADERS) for row in rows)
    for _, ms, spread, cpu_ms, rate, *_ in rows:
        assert ms > 0
        assert cpu_ms > 0
        assert spread >= 0
        assert rate == pytest.approx(2 / (ms / 1e3))
    assert rows[0][-3:] == [1.0, 1.0, None]
    assert rows[1][-1] > 0
    assert not quantized_specs(model)  # the model itself stays as it is


def test_a_limit_is_no_row_of_its_own():
    timings = {
        name: bench.Timing((seconds,) * 3, (seconds,) * 3) for name, seconds in (("a", 4.0), ("b", 2.0), ("c", 1.0))
    }
    rows = bench.speed_rows(timings, 1, limits={"b": "c"})
    assert [(row[0], row[-1]) for row in rows] == [("a", None), ("b", 0.5)]


def test_a_quantised_model_is_compared_with_a_float_one(quantised):
    timed = bench.models_to_compare(quantised)
    assert list(timed) == ["float", "quantised"]
    assert timed["quantised"] is quantised
    assert timed["float"].config == quantised.config
    assert not quantized_specs(timed["float"])


def block_of_a_model() -> tuple[Callable, tuple]:
    block = tiny_models.random_model("vim_micro", embed_dim=32, depth=1).blocks[0]
    graphdef, state = nnx.split(block)
    return lambda state, x: nnx.merge(graphdef, state)(x), (state, normal(0, (1, 65, 32)))


def int8(seed: int, *shape: int) -> jax.Array:
    return (30 * normal(seed, shape)).astype(jnp.int8)


OPERATIONS = {
    "elementwise": (lambda x: jnp.exp(x) + x, (normal(0, (400, 400)),)),
    "matmul": (jnp.matmul, (normal(0, (128, 256)), normal(1, (256, 128)))),
    "int8": (partial(jax.lax.dot, preferred_element_type=jnp.int32), (int8(0, 128, 256), int8(1, 256, 128))),
    "mask": (lambda x: x ^ jnp.roll(x, 1, axis=0), (normal(0, (2000, 1000)) > 1,)),
    "scan": (lambda x: jax.lax.scan(lambda h, u: (0.9 * h + u,) * 2, jnp.zeros(400), x)[1], (normal(0, (400, 400)),)),
    "weights": (lambda x, w: x @ jnp.exp(w), (normal(0, (1, 400)), normal(1, (400, 400)))),
    "block": block_of_a_model(),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_twice_the_repeats_take_twice_the_processor_time(name):
    """So none is hoisted, merged or skipped; "weights": nor what depends on one of the inputs alone."""
    operation, inputs = OPERATIONS[name]
    single = bench.repeated(operation, 1)
    results = jax.tree.leaves(jax.block_until_ready(single(inputs)))
    times = 20 if name == "block" else 200
    calls = {str(n): partial(bench.repeated(operation, n), inputs) for n in (times, 2 * times)}
    timings = bench.time_interleaved(calls, repeats=3)
    few, many = (min(t.cpu_seconds) for t in timings.values())
    assert 1.6 < many / few < 2.5
    for got, expected in zip(jax.tree.leaves(calls[str(times)]()), results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["float", pytest.param("quantised", marks=pytest.mark.slow)])
def test_the_breakdown_names_every_part(kind, model, quantised):
    chosen = model if kind == "float" else quantised
    before = jax.tree.leaves(nnx.state(chosen))
    rows = breakdown.block_breakdown(chosen, repeats=2)
    if kind == "quantised":
        assert rows.pop()[0].startswith("limit")
    *parts, rest, block = rows
    names = {f"mixer.directions.{i}.{layer}_proj" for i in (0, 1) for layer in ("x", "dt")}
    assert {row[0] for row in parts} == names | {"mixer.in_proj", "mixer.out_proj", "mixer.scan"}
    assert rest[0] == "rest"
    assert sum(row[1] for row in (*parts, rest)) == pytest.approx(block[1])
    assert all((row[3] is None) == (kind == "float") for row in parts)
    assert all(row[3] is None or row[3] > 0 for row in parts)
    after = jax.tree.leaves(nnx.state(chosen))  # recorders went into a copy
    assert all(jnp.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["float", "quantised"])
def test_the_breakdown_of_a_model_counts_equal_blocks(kind, monkeypatch):
    """Every call takes 20 ms, so that the sums count calls: a block has 6 linear layers and a scan, stem and head 1."""
    config = QuantConfig.preset("w4a4")
    model = create_model("vim_micro", **(TINY | {"depth": 3})) if kind == "float" else tiny_models.quantised(config)
    blocks = len(model.blocks)
    timed = []

    def time_interleaved(calls, *, repeats):
        timed.extend(calls)
        for call in calls.values():
            jax.eval_shape(call)
        return {name: bench.Timing((0.02,) * repeats, (0.02,) * repeats) for name in calls}

    monkeypatch.setattr(breakdown, "time_interleaved", time_interleaved)
    said = []
    times = breakdown.model_breakdown(model, 2, inner=2, repeats=1, progress=said.append)
    assert tuple(times) == breakdown.KINDS
    assert sum(times.values()) == pytest.approx(10 * (blocks + 2))  # 10 ms per stage
    assert said == ["timing stem, one of 1", f"timing blocks.0, one of {blocks}", "timing head, one of 1"]
    layers = 6 * blocks + 2
    split = {"float": 0, "quantised": 10 * (layers + blocks)}[kind]
    whole = {"detection + split": 0, "product": 10 * layers, "scan": 10 * blocks}
    if kind == "quantised":  # what remains of a part that takes as long as its splitting
        whole = {"detection + split": split, "product": 0, "scan": 0}
    assert {name: times[name] for name in whole} == pytest.approx(whole)
    assert len([name for name in timed if name.endswith("splitting")]) == (0 if kind == "float" else layers + blocks)


def test_a_preferred_backend_is_taken_where_it_supports_the_call(monkeypatch):
    x = normal(0, (1, 2, 3))
    xla = outliers.BACKENDS["xla"].run

    def run(*arguments, **call):
        split = xla(*arguments, **call)
        return dataclasses.replace(split, low=split.low + 1)

    marked = Backend(lambda x, config, **_: None if x.shape[1] == 2 else "it wants two tokens", run)
    monkeypatch.setitem(outliers.BACKENDS, "marked", marked)
    before = list(outliers.BACKENDS)
    low = jax.jit(lambda x: outliers.split_outliers(x, jnp.ones(x.shape[1]), OutlierConfig()).low)
    plain, first = low(x), low(x[:, :1])
    with bench.preferring("marked"):
        np.testing.assert_array_equal(low(x), plain + 1)
        np.testing.assert_array_equal(low(x[:, :1]), first)
        compiled = low.lower(x).compile()
    np.testing.assert_array_equal(low(x), plain)
    np.testing.assert_array_equal(compiled(x), plain + 1)
    assert list(outliers.BACKENDS) == before


def test_whole_models_prefer_a_backend_of_every_operation():
    """Producers are operations, too: else "xla" would leave kernels in a model."""
    tables = (outliers.BACKENDS, producers.BACKENDS, matmul.BACKENDS, scan.BACKENDS)
    with bench.preferring("xla"):
        assert [next(iter(table)) for table in tables] == ["xla"] * 4
    assert [next(iter(table)) for table in tables] == ["mosaic_gpu"] * 4


def test_an_unknown_preferred_backend_is_refused():
    with pytest.raises(ValueError, match=r"'cuda'; choose one of .*mosaic_gpu"), bench.preferring("cuda"):
        pass


@pytest.mark.parametrize(("name", "least"), [("vim_small", 3.5), ("vim_base", 3.7)])
def test_w4a4_memory_by_shapes(name, least):
    """Without the compression of files; scripts/memory.py counts the bytes on disk."""
    config = QuantConfig.preset("w4a4")

    def quantised():
        model = create_model(name)
        tokens = {"stem": model.config.num_tokens - 1, "head": 1}
        specs = {
            path: SiteSpec(config.resolve(path), tokens.get(path.split(".")[0], model.config.num_tokens), 0)
            for path, site in iter_sites(model)
            if not isinstance(site, Operand)
        }
        model = apply_specs(model, specs)
        for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            leaf.set_value(leaf[...].astype(config.float_dtype))
        return model

    report = memory_report(nnx.eval_shape(quantised))
    assert least < report.compression < 4
    assert report.levels > 10 * (report.scales + report.float_parameters)
