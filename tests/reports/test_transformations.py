"""Every public function under JAX's transformations, on float and quantised models of all families."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import heavy_tailed
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from tiny_models import FAMILIES
from transformed import (
    CASES,
    check_close,
    flat_floats,
    images_of,
    loss,
    model_of,
    ops,
    ops_inputs,
    program,
)

import ouromamba_jax as om
from ouromamba_jax.evaluation.evaluate import predict

EVERY = pytest.mark.parametrize(("family", "kind"), CASES)
QUANTISED = pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[1] == "float" or case[0] == "vit" else case for case in CASES],
)


@pytest.mark.parametrize(
    ("family", "kind"),
    [case if case == ("vim", "quantised") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_transformations_vmap_and_scan_inside_jit(family, kind):
    fn, state, images, expected = program(family, kind)

    def one_by_one(state, images):
        step = lambda carry, image: (carry, fn(state, image[None])[0])  # noqa: E731
        return jax.vmap(lambda row: jax.lax.scan(step, 0, row)[1])(images.reshape(2, 2, *images.shape[1:]))

    check_close(jax.jit(one_by_one)(state, images).reshape(expected.shape), expected)


@QUANTISED
def test_transformations_gradients_with_debug_nans(family, kind):
    """To the images and to every float of the state; the state is donated."""
    fn, state, images, _ = program(family, kind)
    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss(fn), argnums=(0, 1), allow_int=True), donate_argnums=0)
        to_state, to_images = gradient(jax.tree.map(jnp.copy, state), images)
    assert jax.tree.structure(to_state) == jax.tree.structure(state)
    assert bool((jnp.abs(to_images).max(axis=(1, 2, 3)) > 0).all())
    for (path, leaf), value in zip(jax.tree.leaves_with_path(to_state), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(value.dtype, jnp.floating):
            is_threshold = "'theta'" in jax.tree_util.keystr(path)
            assert bool(jnp.isfinite(leaf).all()), path
            assert bool((leaf != 0).any()) != is_threshold, path
        else:
            assert leaf.dtype == jax.dtypes.float0, path


@EVERY
def test_tabulate(family, kind):
    """Flax's summary has a row for the stem, every block and the classifier, and leaves the classes as they were."""
    model, images = model_of(family, kind), images_of(family)[:1]
    before = {type(module): type(module).__call__ for _, module in nnx.iter_modules(model)}
    rows = nnx.tabulate(model, images, depth=2, console_kwargs=dict(force_terminal=False, width=200)).splitlines()
    paths = {row.split("│")[1].strip() for row in rows if row.startswith("│")}
    assert {"stem", "head/proj", *(f"blocks/{index}" for index in range(len(model.blocks)))} <= paths
    assert before == {type(module): type(module).__call__ for _, module in nnx.iter_modules(model)}


@EVERY
def test_transformations_donated_images_and_predict(family, kind):
    fn, state, images, expected = program(family, kind)
    donated = jax.tree.map(jnp.copy, (state, images))
    logits, *kept = jax.jit(lambda state, images: (fn(state, images), state, images), donate_argnums=(0, 1))(*donated)
    check_close(logits, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    jax.tree.map(np.testing.assert_array_equal, tuple(kept), (state, images))
    check_close(predict(model_of(family, kind), images, batch_size=np.int64(3)), expected)


@EVERY
def test_transformations_symbolic_batch(family, kind):
    fn, state, images, expected = program(family, kind)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    exported = jax.export.export(jax.jit(fn))(state, shape)
    check_close(exported.call(state, images[:3]), expected[:3])


@EVERY
def test_transformations_64_bit_mode(family, kind, tmp_path):
    """What was saved without it is loaded with it, computes in the same types, and gives the same."""
    model, (_, _, images, expected) = model_of(family, kind), program(family, kind)
    om.save(tmp_path / "a", model)
    with jax.enable_x64(True):
        loaded = om.load(tmp_path / "a")
        fn, state = om.pure(loaded)
        shape = jax.eval_shape(fn, state, images)
        om.save(tmp_path / "b", loaded)
        logits = jax.jit(fn)(state, images) if family == "vim" else expected  # the others' types say it
    assert shape.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, om.pure(model)[1])
    check_close(logits, expected)


@pytest.mark.slow
def test_transformations_quantising_in_64_bit_mode_with_debug_nans():
    images = heavy_tailed(0, (3, *FAMILIES["vim"]["img_size"], 3))
    config = om.QuantConfig(scale_search="max", tune_epochs=1, batch_size=np.int64(2), act_bits=np.int32(4))
    with jax.enable_x64(True), jax.debug_nans(True):
        low, report = om.quantize(model_of("vim", "float"), images, config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(om.pure(low)[1])} == {"int8", "float32", "bfloat16", "float16"}
    assert min(site.sqnr_db for site in report.sites) > 5


@pytest.mark.parametrize("x64", [False, True])
def test_transformations_of_functions_of_arrays(x64):
    """jit, vmap, scan and grad at once of what they make."""
    inputs = ops_inputs()
    expected, weights = ops(inputs), inputs.pop("weight")

    def stacked(inputs):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), inputs)

    def total(inputs):
        body = lambda carry, each: (carry, jax.vmap(lambda i: ops({**i, "weight": weights}))(each))  # noqa: E731
        out = jax.lax.scan(body, 0, stacked(inputs))[1]
        return out.sum(), out

    with jax.enable_x64(x64), jax.debug_nans(True):
        gradient, out = jax.jit(jax.grad(total, has_aux=True))(stacked(inputs))
    np.testing.assert_allclose(out, jnp.broadcast_to(expected, out.shape), rtol=1e-4, atol=1e-4)
    for name, leaf in gradient.items():
        assert leaf.dtype == jnp.float32, name
        assert bool((leaf != 0).any()), name


@pytest.mark.parametrize("x64", [False, True])
def test_transformations_of_a_trace(x64):
    """Gradients of attention maps to the images, mapped over images."""
    model, image = model_of("vim", "float"), images_of("vim", 2)

    def attention(images):
        _, trace = model.trace(images[None], collect=lambda h: h.sum(2))
        maps = om.implicit_attention(trace.layers[0], neighbourhood=np.int64(3))
        return jnp.sum(maps**2) + jnp.sum(trace.layers[0].scans[0].states ** 2)

    with jax.enable_x64(x64), jax.debug_nans(True):
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(attention)))(image)
    assert values.dtype == gradients.dtype == jnp.float32
    np.testing.assert_allclose(values[1], attention(image[1]), rtol=1e-4)
    assert bool((jnp.abs(gradients).max(axis=(1, 2, 3)) > 0).all())


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.array, jnp.int32])
def test_transformations_numbers_of_numpy_in_configs(kind):
    """They become Python's: configs are hashed, compared and stored."""
    rules = (om.QuantRule("head", weight_bits=kind(8)),)
    numpy = om.QuantConfig(act_bits=kind(4), weight_bits=kind(4), outlier_bits=kind(8), n_refresh=kind(10), rules=rules)
    plain = om.QuantConfig(act_bits=4, outlier_bits=8, rules=(om.QuantRule("head", weight_bits=8),))
    assert repr(numpy) == repr(plain)
    assert hash(numpy) == hash(plain)
    assert repr(om.OutlierConfig(act_bits=kind(4), sigma=np.float32(3))) == repr(
        om.OutlierConfig(act_bits=4, sigma=3.0)
    )
    assert repr(om.GenConfig(num_images=kind(4))) == repr(om.GenConfig(num_images=4))
    assert dataclasses.replace(numpy, weight_bits=kind(6)).resolve("blocks").weight_bits == 6


def in_two_devices(cases):
    """Runs `on_devices` in a process of its own, whose programs go to this one's cache."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    if cache := jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    folder = Path(__file__).parent
    paths = [str(path) for path in (folder, folder.parent, folder.parent / "helpers")]
    code = f"import sys; sys.path[:0] = {paths}; import conftest, test_transformations as t; t.on_devices({cases})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformations_over_two_devices():
    in_two_devices([("vim", "quantised")])


@pytest.mark.slow
def test_transformations_over_two_devices_of_every_model():
    in_two_devices(CASES[2:] + CASES[:1])


def on_devices(cases):
    """`jax.shard_map` with its defaults and an explicit mesh agree; then functions of arrays and traces."""
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 2
    auto, explicit = (jax.make_mesh((2,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))
    for case in cases:
        fn, state, images, expected = program(*case)
        floats, rest = nnx.split_state(state, nnx.Param, ...)

        def logits_and_gradients(floats, rest, images, fn=fn):
            logits, pull = jax.vjp(lambda floats, images: fn(nnx.merge_state(floats, rest), images), floats, images)
            return logits, *pull(jnp.full_like(logits, 1e-3))

        whole, parts = PartitionSpec(), PartitionSpec("data")
        specs = dict(in_specs=(whole, whole, parts), out_specs=(parts, whole, parts))
        mapped = jax.jit(jax.shard_map(logits_and_gradients, mesh=auto, **specs))(floats, rest, images)
        with jax.set_mesh(explicit):
            split = jax.jit(logits_and_gradients)(floats, rest, jax.device_put(images, parts))
            assert jax.typeof(split[0]).sharding.spec[0] == jax.typeof(split[2]).sharding.spec[0] == "data"
        check_close(split[0], expected)
        check_close(mapped[0], expected)
        for one, other in zip(mapped[1:], split[1:], strict=True):
            check_close(flat_floats(one), flat_floats(other))
    expected = ops(ops_inputs()), attention(images_of("vim", 2))
    with jax.set_mesh(explicit), jax.debug_nans(True):
        with_an_explicit_axis(*expected)
    jobs_leave_the_mesh_of_their_caller(explicit)


def jobs_leave_the_mesh_of_their_caller(explicit):
    model, images = model_of("vim", "quantised"), images_of("vim", 2)
    expected = predict(model, images, batch_size=2)
    generation = om.GenConfig(num_images=2, iterations=1, contrastive=0.0)
    made = om.generate_images(model_of("vim", "float"), generation, jax.random.key(3)).images
    with jax.set_mesh(explicit):
        np.testing.assert_array_equal(predict(model, images, batch_size=2), expected)
        again = om.generate_images(model_of("vim", "float"), generation, jax.random.key(3)).images
    np.testing.assert_array_equal(again, made)


def attention(images):
    _, trace = model_of("vim", "float").trace(images, collect=lambda h: h.sum(2))
    return trace, om.implicit_attention(trace.layers[0])


def with_an_explicit_axis(expected_of_ops, expected_attention):
    inputs = ops_inputs()
    batched = {name: inputs[name] for name in ("x", "delta", "B", "C")}
    placed = {**inputs, **jax.device_put(batched, PartitionSpec("data"))}
    np.testing.assert_allclose(jax.jit(ops)(placed), expected_of_ops, rtol=1e-5, atol=1e-5)
    images = images_of("vim", 2)

    placed = jax.device_put(images, PartitionSpec("data"))
    model = model_of("vim", "float")
    model.drop_path = 0.5
    (map_,) = jax.jit(lambda x: model.features(x, rngs=jax.random.key(0)))(placed)
    assert jax.typeof(map_).sharding.spec[0] == "data"
    model.drop_path = 0.0
    trace, maps = jax.jit(attention)(placed)
    assert jax.typeof(maps).sharding.spec[0] == jax.typeof(trace.layers[0].scans[0].states).sharding.spec[0] == "data"
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), (trace, maps), expected_attention)
