"""On a GPU the models take the kernels, though nothing in them names a backend; elsewhere XLA."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from draws import normal
from flax import nnx
from tiny_models import FAMILIES, quantised, random_model

from ouromamba_jax import GenConfig, generate_images, quantize
from ouromamba_jax.data.preprocessing import height_width
from ouromamba_jax.evaluation import bench
from ouromamba_jax.models import create_model, pure
from ouromamba_jax.ops import matmul, producers, scan
from ouromamba_jax.ops import split as outliers
from ouromamba_jax.ops.dispatch import choose
from ouromamba_jax.ops.qtensor import quantize_array
from ouromamba_jax.ops.split import OutlierConfig
from ouromamba_jax.pallas.device import int4_reason
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.kinds import prepare_weights

OPERATIONS = {
    "split": outliers.BACKENDS,
    "producer": producers.BACKENDS,
    "matmul": matmul.BACKENDS,
    "scan": scan.BACKENDS,
}


@pytest.mark.parametrize(
    ("platform", "capability", "devices", "expected"),
    [
        ("gpu", "8.0", 1, "mosaic_gpu"),
        ("gpu", "8.9", 1, "mosaic_gpu"),
        ("gpu", "9.0", 1, "mosaic_gpu"),
        ("gpu", "9.0", 8, "xla"),
        ("gpu", "7.0", 1, "xla"),
        ("gpu", "gfx90a", 1, "xla"),
        ("tpu", None, 1, "xla"),
    ],
)
def test_the_device_decides(platform, capability, devices, expected, monkeypatch):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr("ouromamba_jax.pallas.device.default_device", lambda: device)
    monkeypatch.setattr(jax, "devices", lambda: [device] * devices)
    x = normal(0, (2, 5, 8))
    config = OutlierConfig()
    split = outliers.split_outliers(x, jnp.ones(5), config, implementation="xla")
    calls = {
        "split": ((x, config), {}),
        "producer": ((producers.gelu, (x,), {"approximate": True}, jnp.ones(5), config), {"keep": True}),
        "matmul": ((split, quantize_array(x[0].T, 4), None, jnp.dtype("float32")), {}),
        "scan": ((), {"A": x[0]}),
    }
    for operation, (arguments, options) in calls.items():
        backends = OPERATIONS[operation]
        assert choose(operation, backends, None, *arguments, **options) is backends[expected], operation


def test_kernels_leave_64_bit_programs_to_xla(monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr("ouromamba_jax.pallas.device.default_device", lambda: device)
    A, x = jnp.ones((8, 4)), jnp.ones((2, 5, 8))
    for enabled, expected in ((False, "mosaic_gpu"), (True, "xla")):
        with jax.enable_x64(enabled):
            assert choose("scan", scan.BACKENDS, None, A=A) is scan.BACKENDS[expected]
            assert choose("split", outliers.BACKENDS, None, x, OutlierConfig()) is outliers.BACKENDS[expected]


def control_flow(jaxpr) -> Counter[str]:
    """Kernels, and what XLA decides or repeats around them on a GPU."""
    found = Counter()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("core_map", "mpmd_map"):  # in jax 0.11 and 0.12
            found["kernel"] += 1
            continue
        if parameters.get("branches_platforms") is not None:
            *_, elsewhere = parameters["branches"]  # than on a CPU
            parameters = {"branches": elsewhere}
        else:
            found[name] += name in ("cond", "scan", "while")
        for parameter in jax.tree.leaves(tuple(parameters.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            found += control_flow(inner) if hasattr(inner, "eqns") else Counter()
    return found


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] if family != "vim" else []) for family in FAMILIES]
)
def test_a_quantised_model_never_waits_for_the_host(family, bits, monkeypatch):
    """XLA reads a condition back before it launches what follows, so a model takes none: nor does it loop."""
    device = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    for module in ("device", "outlier_matmul"):
        monkeypatch.setattr(f"ouromamba_jax.pallas.{module}.default_device", lambda: device)
    model = quantised(QuantConfig.preset(bits), family)
    function, state = pure(model)
    images = jax.ShapeDtypeStruct((3, *height_width(model.config.img_size), 3), jnp.float32)
    found = control_flow(jax.make_jaxpr(function)(state, images).jaxpr)
    jax.clear_caches()  # or models of the same shapes would be taken for traced on a CPU
    assert found.pop("kernel") > 6
    assert not +found


def recorded(monkeypatch) -> set[tuple[str, str]]:
    """Fills with the backends that are taken from here on."""
    seen = set()

    def recording(backend, *key):
        def run(*arguments, **options):
            seen.add(key)
            return backend.run(*arguments, **options)

        return backend._replace(run=run)

    for operation, backends in OPERATIONS.items():
        for name, backend in list(backends.items()):
            monkeypatch.setitem(backends, name, recording(backend, operation, name))
    return seen


def without(family: str) -> set[str]:
    """Operations that a family does not have."""
    return {"scan"} if family == "vit" else set()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["float32", "w4a4", "w8a8"])
def test_models_take_the_kernels(bits, family, monkeypatch):
    if bits == "float32":
        model = random_model(f"{family}_micro", **FAMILIES[family])
    else:
        model = quantised(QuantConfig.preset(bits), family)
    function, state = pure(model)
    images = normal(0, (3, *height_width(model.config.img_size), 3))
    with bench.preferring("xla"):
        expected = jax.jit(function)(state, images)
    seen = recorded(monkeypatch)
    prepare_weights(model)
    function, state = pure(model)
    logits = jax.jit(function)(state, images)
    taken = {"scan"} if bits == "float32" else {*OPERATIONS}
    assert seen == {(operation, "mosaic_gpu") for operation in taken - without(family)}
    tolerance = tolerances.LOGITS_GPU["float" if bits == "float32" else "quantised"]
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 10 * tolerance * np.abs(expected).max()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_models_take_4_bit_products_if_told_to(family, monkeypatch):
    """In their layers of 4 bits; 8-bit ones at either end stay with the dense kernel."""
    if reason := int4_reason():
        pytest.skip(reason)
    model = quantised(QuantConfig.preset("w4a4"), family)
    images = normal(0, (3, *height_width(model.config.img_size), 3))
    dense = jax.jit(pure(model)[0])(pure(model)[1], images)
    with bench.preferring("mosaic_gpu_int4"):
        seen = recorded(monkeypatch)
        function, state = pure(model)
        logits = jax.jit(function)(state, images)
    dense_ones = {(operation, "mosaic_gpu") for operation in {*OPERATIONS} - without(family)}
    assert seen == {("matmul", "mosaic_gpu_int4"), *dense_ones}
    np.testing.assert_array_equal(logits, dense)


@pytest.mark.gpu
def test_generation_takes_the_kernels(monkeypatch):
    """Gradients through the scan, and the hidden states that the contrastive loss sees."""
    model = create_model("vim_micro", rngs=nnx.Rngs(1), **FAMILIES["vim"])
    config = GenConfig(num_images=4, batch_size=2, iterations=3, contrastive=1.0, neighbourhood=3, positives=3)
    with bench.preferring("xla"):
        expected = generate_images(model, config, jax.random.key(2)).images
    seen = recorded(monkeypatch)
    images = generate_images(model, config, jax.random.key(2)).images
    assert seen == {("scan", "mosaic_gpu")}
    assert np.abs(images - expected).mean() < tolerances.SHARDED_PIXELS_MEAN
    assert np.abs(expected[0] - expected[1]).mean() > 100 * tolerances.SHARDED_PIXELS_MEAN


@pytest.mark.gpu
def test_quantising_takes_the_kernels(monkeypatch):
    """Gradients through a quantised block while its scales are tuned."""
    model = random_model("vim_micro", **FAMILIES["vim"])
    config = QuantConfig.preset("w4a4", tune_epochs=2, batch_size=2)
    images = normal(0, (4, *FAMILIES["vim"]["img_size"], 3))

    def result():
        quantised_model, report = quantize(model, images, config)
        return quantised_model(images), {site.path: site.sqnr_db for site in report.sites}

    with bench.preferring("xla"):
        expected, expected_sqnr = result()
    seen = recorded(monkeypatch)
    logits, sqnr = result()
    assert seen == {(operation, "mosaic_gpu") for operation in OPERATIONS}
    assert np.abs(logits - expected).max() <= tolerances.LOGITS_GPU["quantised"] * np.abs(expected).max()
    assert sqnr == pytest.approx(expected_sqnr, abs=tolerances.SITE_SQNR_GPU)
