"""The selective scan against a float64 loop: values, every gradient, and no sample depending on its batch.

Tests that take `implementation` run for XLA, for the GPU kernels in interpret mode, and on a GPU where there is one.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import mosaic_gpu as plgpu
from scan_inputs import make_inputs

from ouromamba_jax.ops import scan, scan_mosaic
from ouromamba_jax.ops.dispatch import Backend
from ouromamba_jax.ops.scan import selective_scan
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.pallas.tiles import ScanTiles


@pytest.fixture
def implementation(request, monkeypatch, capfd):
    """A backend's name. The interpreter raises (jax 0.12) or reports (0.11) accesses that no barrier orders."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = partial(scan_mosaic.run, tiles=ScanTiles(piece=2, chunk=4), interpret=interpret)
    monkeypatch.setitem(scan.BACKENDS, "interpreted", Backend(kernel.unsuitable, run))
    yield request.param
    assert "RACE" not in "".join(capfd.readouterr())


def for_backends(names, cases, interpreted=()):
    """Every case for XLA and a GPU; those of `interpreted` in interpret mode, which takes seconds for each."""
    marks = {"mosaic_gpu": pytest.mark.gpu}
    everywhere = [
        pytest.param(name, *case, marks=marks.get(name, ())) for name, case in product(("xla", "mosaic_gpu"), cases)
    ]
    everywhere += [pytest.param("interpreted", *case, marks=pytest.mark.kernels) for case in interpreted]
    return pytest.mark.parametrize(("implementation", *names), everywhere, indirect=["implementation"])


def value_tolerance(implementation):
    """By dtype, as is the next."""
    return tolerances.SCAN_VALUE_GPU if implementation == "mosaic_gpu" else tolerances.SCAN_VALUE


def gradient_tolerance(implementation):
    return tolerances.SCAN_GRADIENT_GPU if implementation == "mosaic_gpu" else tolerances.SCAN_GRADIENT


def python_scan(step, h, xs):
    """What `jax.lax.scan` computes, in numpy."""
    outputs = []
    for x in zip(*xs, strict=True):
        h, output = step(h, x)
        outputs.append(output)
    return h, tuple(np.stack(output) for output in zip(*outputs, strict=True))


def loop(inputs, *, xp=np, softplus=True, reverse=False, collect=lambda h: h, transform=lambda h, t: h):
    """The recurrence as it is written, one token after the other, in its inputs' dtype; xp=jnp is differentiable."""
    u, A = inputs["u"], inputs["A"]
    (batch, length, channels), d_state = u.shape, A.shape[1]
    delta = inputs["delta"] + (inputs["delta_bias"][None, None] if "delta_bias" in inputs else 0.0)
    if softplus:
        delta = xp.logaddexp(delta, xp.zeros_like(delta))
    B, C = (x if x.ndim == 4 else x[:, :, None] for x in (inputs["B"], inputs["C"]))
    B, C = (xp.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))

    def step(h, x):
        u, delta, B, C, t = x
        h = transform(xp.exp(delta[..., None] * A[None]) * h + (delta * u)[..., None] * B, t)
        return h, ((C * h).sum(-1), collect(h))

    h0 = inputs["h0"] if "h0" in inputs else xp.zeros((batch, channels, d_state), u.dtype)
    xs = tuple(xp.moveaxis(xp.flip(x, 1) if reverse else x, 1, 0) for x in (u, delta, B, C))
    h_last, (y, states) = (python_scan if xp is np else jax.lax.scan)(step, h0, (*xs, xp.arange(length)))
    y = xp.moveaxis(xp.flip(y, 0) if reverse else y, 0, 1)
    if "D" in inputs:
        y = y + inputs["D"][None, None] * u
    if "z" in inputs:
        y = y * inputs["z"] / (1 + xp.exp(-inputs["z"]))
    return y, h_last, xp.moveaxis(states, 0, 1)


def to_float64(inputs, xp=np):
    """Through numpy, so that float32 and bfloat16 values are kept exactly."""
    wide = {name: np.asarray(value.astype(jnp.float32)).astype(np.float64) for name, value in inputs.items()}
    return {name: xp.asarray(value) for name, value in wide.items()}


def assert_close(actual, expected, tolerance, name=""):
    actual, expected = np.asarray(actual.astype(jnp.float32)), np.asarray(expected)
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{name}: relative error {error:.1e} is over {tolerance:.0e}"


def run(inputs, *, softplus=True, **options):
    return jax.jit(lambda x: selective_scan(**x, delta_softplus=softplus, **options))(inputs)


def pull_back(function, inputs, cotangents):
    return jax.jit(lambda x, ct: jax.vjp(function, x)[1](ct)[0])(inputs, cotangents)


def check_gradients(inputs, *, dtype="float32", implementation=None, **options):
    """Random cotangents for all outputs, against autodiff of the loop in float64."""
    names = {"softplus": "delta_softplus", "transform": "state_transform"}
    ours = {"delta_softplus": True, "implementation": implementation} | {
        names.get(name, name): value for name, value in options.items()
    }
    count = 3 if "collect" in options else 2

    def outputs(x):
        return tuple(selective_scan(**x, **ours))[:count]

    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(outputs, inputs)
    cotangents = tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes)
    actual = pull_back(outputs, inputs, cotangents)
    with jax.enable_x64(True):
        wide = to_float64(dict(enumerate(cotangents)), jnp)
        reference = pull_back(
            lambda x: loop(x, xp=jnp, **options)[:count], to_float64(inputs, jnp), tuple(wide.values())
        )
        reference = {name: np.asarray(gradient) for name, gradient in reference.items()}
    assert actual.keys() == inputs.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype
        assert reference[name].dtype == np.float64
        assert_close(gradient, reference[name], gradient_tolerance(implementation)[dtype], f"gradient of {name}")


VALUES = [
    (*case, dtype)
    for case in (
        (1, 4, 8, None, False),
        (17, 24, 16, None, True),
        (50, 12, 1, 4, True),
        (50, 8, 8, 1, False),
        (197, 16, 16, 4, True),
    )
    for dtype in ("float32", "bfloat16")
]


@for_backends(
    ("length", "channels", "d_state", "groups", "reverse", "dtype"),
    VALUES,
    [(1, 4, 8, None, False, "bfloat16"), (17, 24, 16, 1, True, "float32"), (6, 256, 1, 2, True, "bfloat16")],
)
def test_values_match_a_float64_loop(implementation, length, channels, d_state, groups, reverse, dtype):
    inputs = make_inputs(2, length, channels, d_state, groups=groups, dtype=dtype)
    out = run(inputs, reverse=reverse, collect=lambda h: h, implementation=implementation)
    y, h_last, states = loop(to_float64(inputs), reverse=reverse)
    assert out.y.dtype == jnp.dtype(dtype)
    assert out.h_last.dtype == out.states.dtype == jnp.float32
    tolerance = value_tolerance(implementation)
    assert_close(out.y, y, tolerance[dtype], "y")
    assert_close(out.h_last, h_last, tolerance["float32"], "h_last")
    assert_close(out.states, states, tolerance["float32"], "states")


@pytest.mark.parametrize(
    ("drop", "softplus"),
    [("D", True), ("z", False), ("delta_bias", True), ("h0", False), ("D z delta_bias h0", False), ("D z", True)],
)
def test_each_option_can_be_left_out(drop, softplus):
    inputs = make_inputs(2, 17, 12, 8, drop=drop.split())
    if not softplus:  # step sizes then have to be positive by themselves, or the state explodes
        inputs["delta"] = jnp.abs(inputs["delta"])
        inputs |= {"delta_bias": jnp.abs(inputs["delta_bias"])} if "delta_bias" in inputs else {}
    out = run(inputs, softplus=softplus)
    y, h_last, _ = loop(to_float64(inputs), softplus=softplus)
    assert out.states is None
    assert_close(out.y, y, tolerances.SCAN_VALUE["float32"], "y")
    assert_close(out.h_last, h_last, tolerances.SCAN_VALUE["float32"], "h_last")


@for_backends(
    ("length", "channels", "d_state", "groups", "reverse", "drop", "dtype"),
    [
        (17, 24, 16, None, False, (), "float32"),
        (50, 12, 1, 4, True, (), "float32"),
        (33, 16, 8, 4, False, ("D", "z"), "float32"),
        (9, 6, 8, 1, True, ("delta_bias", "h0"), "float32"),
        (17, 12, 8, None, True, (), "bfloat16"),
        (9, 8, 1, 4, False, (), "bfloat16"),
    ],
    [
        (7, 24, 16, None, False, (), "float32"),
        (9, 256, 8, 1, True, ("delta_bias", "h0"), "bfloat16"),
        (5, 12, 1, 2, True, ("D", "z"), "float32"),
    ],
)
def test_every_gradient_matches_float64_autodiff(
    implementation, length, channels, d_state, groups, reverse, drop, dtype
):
    inputs = make_inputs(2, length, channels, d_state, groups=groups, dtype=dtype, drop=drop)
    check_gradients(inputs, dtype=dtype, reverse=reverse, implementation=implementation)


def test_gradients_without_softplus():
    inputs = make_inputs(2, 17, 8, 4)
    inputs |= {name: jnp.abs(inputs[name]) for name in ("delta", "delta_bias")}
    check_gradients(inputs, softplus=False)


def test_gradients_over_197_tokens():
    check_gradients(make_inputs(1, 197, 4, 4))


@for_backends(("length", "d_state", "reverse"), [(19, 4, False), (19, 4, True)], [(7, 1, True)])
def test_gradients_flow_through_collected_states(implementation, length, d_state, reverse):
    inputs = make_inputs(2, length, 8, d_state, groups=2)
    check_gradients(inputs, collect=lambda h: h * h, reverse=reverse, implementation=implementation)


def test_gradients_flow_through_a_state_transform():
    def transform(h, t):
        return h * (1 + 0.05 * t.astype(h.dtype)) - 0.1 * h * h

    inputs = make_inputs(2, 19, 8, 4)
    inputs["h0"] = inputs["h0"] * 0.1
    check_gradients(inputs, transform=transform, collect=lambda h: h)


def test_a_state_transform_sees_the_scan_step_and_not_the_padding():
    inputs = make_inputs(2, 19, 8, 4)
    seen = []

    def transform(h, t):
        assert t.dtype == jnp.int32
        jax.debug.callback(lambda t: seen.append(int(t)), t, ordered=True)
        return jnp.round(h * 8) / 8

    out = run(inputs, reverse=True, state_transform=transform)
    jax.effects_barrier()
    assert seen[:19] == list(range(19))
    assert np.array_equal(out.h_last, np.round(np.asarray(out.h_last) * 8) / 8)
    _, h_last, _ = loop(to_float64(inputs), reverse=True, transform=lambda h, t: np.round(h * 8) / 8)
    assert (
        np.abs(np.asarray(out.h_last) - h_last).max() <= 1 / 8
    )  # a state on a rounding boundary may fall to either side


@for_backends((), [()])
def test_collect_returns_any_pytree_and_may_close_over_what_is_differentiated(implementation):
    inputs = make_inputs(2, 19, 8, 4)

    def collected(weight):
        out = selective_scan(
            **inputs,
            delta_softplus=True,
            collect=lambda h: {"a": (h.mean(1), h[:, :, 0] * weight)},
            implementation=implementation,
        )
        return out.states["a"]

    weight = jnp.float32(0.7)
    _, _, states = loop(to_float64(inputs))
    mean, first = jax.jit(collected)(weight)
    assert_close(mean, states.mean(2), value_tolerance(implementation)["float32"])
    assert_close(first, states[..., 0] * 0.7, value_tolerance(implementation)["float32"])
    gradient = jax.grad(lambda w: collected(w)[1].sum())(weight)
    assert_close(gradient, states[..., 0].sum(), gradient_tolerance(implementation)["float32"])


def test_collecting_does_not_change_the_result():
    inputs = make_inputs(3, 50, 24, 16, groups=4)
    plain = run(inputs)
    collecting = run(inputs, collect=lambda h: h)
    assert_close(collecting.y, plain.y, tolerances.SCAN_VALUE["float32"])
    assert_close(collecting.states[:, -1], collecting.h_last, tolerances.SCAN_VALUE["float32"])


def test_reverse_is_the_flipped_scan():
    inputs = make_inputs(2, 21, 8, 4)
    flipped = {name: jnp.flip(x, 1) if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    ours = run(inputs, reverse=True, collect=lambda h: h)
    other = run(flipped, collect=lambda h: h)
    assert np.array_equal(ours.y, jnp.flip(other.y, 1))
    assert np.array_equal(ours.h_last, other.h_last)
    assert np.array_equal(ours.states, other.states)


def test_a_scan_continues_from_h_last():
    inputs = make_inputs(2, 30, 8, 4)
    whole = run(inputs)

    def tokens(part):
        return {name: x[:, part] if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}

    first = run(tokens(slice(13)))
    second = run(tokens(slice(13, None)) | {"h0": first.h_last})
    assert_close(jnp.concatenate([first.y, second.y], 1), whole.y, tolerances.SCAN_VALUE["float32"])
    assert_close(second.h_last, whole.h_last, tolerances.SCAN_VALUE["float32"])


def test_a_sample_does_not_depend_on_its_batch():
    inputs = make_inputs(4, 17, 24, 8)
    per_sample = ("u", "delta", "B", "C", "z", "h0")
    whole = run(inputs)
    for part in ([2], [3, 0, 1]):
        index = np.array(part)
        alone = run({name: x[index] if name in per_sample else x for name, x in inputs.items()})
        assert_close(alone.y, whole.y[index], tolerances.SCAN_VALUE["float32"], "y")
        assert_close(alone.h_last, whole.h_last[index], tolerances.SCAN_VALUE["float32"], "h_last")


def test_vmap_and_jit_agree_with_a_loop_of_calls():
    stacked = [make_inputs(2, 19, 8, 4, seed=seed) for seed in range(3)]
    batched = jax.tree.map(lambda *x: jnp.stack(x), *stacked)

    def loss(x):
        out = selective_scan(**x, delta_softplus=True)
        return (out.y**2).sum() + out.h_last.sum()

    differentiate = jax.value_and_grad(loss)
    values, gradients = jax.jit(jax.vmap(differentiate))(batched)
    differentiate = jax.jit(differentiate)
    for i, inputs in enumerate(stacked):
        value, gradient = differentiate(inputs)
        assert_close(values[i], value, tolerances.SCAN_VALUE["float32"])
        for name in inputs:
            assert_close(gradients[name][i], gradient[name], tolerances.SCAN_GRADIENT["float32"], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": (2, 9)}, r"u must be \(B, L, D\)"),
        ({"A": (12,)}, r"A must be \(D, N\), but"),
        ({"A": (11, 4)}, r"A must be \(12, 4\)"),
        ({"delta": (2, 9, 1)}, r"delta must be \(2, 9, 12\)"),
        ({"B": (2, 9, 5, 4), "C": (2, 9, 5, 4)}, "G dividing the 12 channels"),
        ({"B": (2, 9, 3, 4)}, r"C must be \(2, 9, 3, 4\)"),
        ({"C": (2, 9, 5)}, r"C must be \(2, 9, 4\)"),
        ({"D": (1,)}, r"D must be \(12,\)"),
        ({"z": (2, 8, 12)}, r"z must be \(2, 9, 12\)"),
        ({"delta_bias": (2, 12)}, r"delta_bias must be \(12,\)"),
        ({"h0": (2, 4, 12)}, r"h0 must be \(2, 12, 4\)"),
    ],
)
def test_wrong_shapes_raise(change, message):
    rng = np.random.default_rng(3)
    wrong = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make_inputs(2, 9, 12, 4) | wrong))


def test_integer_inputs_raise():
    inputs = make_inputs(2, 9, 12, 4)
    with pytest.raises(TypeError, match="B must be of a floating dtype"):
        selective_scan(**(inputs | {"B": jnp.round(inputs["B"]).astype(jnp.int8)}))


def test_dispatch(monkeypatch):
    inputs = make_inputs(2, 9, 12, 4)
    expected = selective_scan(**inputs).y

    def supports(*, u, B, collect, **_):
        assert B.shape == (2, 9, 1, 4)  # always grouped
        return "it cannot collect states" if collect else None

    backends = {"fast": Backend(supports, lambda *, u, **_: ScanOutput(u, u, None)), **scan.BACKENDS}
    monkeypatch.setattr(scan, "BACKENDS", backends)
    assert selective_scan(**inputs).y is inputs["u"]
    assert np.array_equal(selective_scan(**inputs, implementation="xla").y, expected)
    assert selective_scan(**inputs, collect=lambda h: h).states.shape == (2, 9, 12, 4)
    with pytest.raises(ValueError, match="'fast' cannot run this call: it cannot collect states"):
        selective_scan(**inputs, collect=lambda h: h, implementation="fast")
    with pytest.raises(ValueError, match="unknown scan implementation 'triton'; choose one of fast, mosaic_gpu, xla"):
        selective_scan(**inputs, implementation="triton")


def test_reasons_against_the_kernel():
    inputs = make_inputs(2, 9, 12, 4)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run this call: it needs an NVIDIA GPU"):
        selective_scan(**inputs, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="a state transform runs between the steps"):
        selective_scan(**inputs, state_transform=lambda h, t: h, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="17 states of a channel do not fit"):
        selective_scan(**make_inputs(2, 9, 12, 17), implementation="mosaic_gpu")


def test_floats_are_differentiated_by_the_backend_that_ran_them(monkeypatch):
    calls = []

    def run(u, **call):
        calls.append(u.shape)
        return scan.BACKENDS["xla"].run(u=u, **call)

    monkeypatch.setattr(scan, "BACKENDS", {"first": Backend(lambda **call: None, run), **scan.BACKENDS})
    inputs = make_inputs(1, 5, 4, 2)

    def loss(inputs, implementation=None):
        return jnp.sum(selective_scan(**inputs, implementation=implementation).y ** 2)

    gradients = jax.grad(loss)(inputs)
    assert calls == [(1, 5, 4)]
    jax.tree.map(np.testing.assert_array_equal, gradients, jax.grad(partial(loss, implementation="xla"))(inputs))
