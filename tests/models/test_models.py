"""The models and the registry: sizes, orders, traces, and what a functional user does with `pure`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from tiny_models import random_model
from tolerances import BFLOAT16_LOGITS, REORDERED

from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.models import ScanOrder, config_class, create_model, list_models, model_config, pure
from ouromamba_jax.models.convolution import Conv3x3, DepthwiseConv1d, HalvingConv, extract_patches
from ouromamba_jax.models.layers import RMSNorm

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
TINY = dict(img_size=16, patch_size=4, stride=4, embed_dim=20, depth=1, d_state=5, num_classes=7)


def manifests() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(MANIFESTS.glob("vim_*.json"))]


def name_of(manifest: dict) -> str:
    size = manifest["variant"].split("_")[1]
    return f"vim_{size}_stride8" if manifest["kwargs"]["stride"] == 8 else f"vim_{size}"


def images(batch: int = 3, size: tuple[int, int] = (16, 16), key: int = 0) -> jax.Array:
    return normal(key, (batch, *size, 3))


@pytest.fixture(scope="module")
def tiny() -> nnx.Module:
    return create_model("vim_micro", rngs=nnx.Rngs(4), **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    """(jitted fn, state, the shapes of the images it was traced for)."""
    fn, state = pure(tiny)
    traces = []

    def counted(state, x):
        traces.append(x.shape)
        return fn(state, x)

    return jax.jit(counted), state, traces


@pytest.mark.parametrize("manifest", manifests(), ids=name_of)
def test_parameter_counts(manifest):
    """Every published variant has the size of its checkpoint, and its config is what the manifest says."""
    name = name_of(manifest)
    model = nnx.eval_shape(lambda: create_model(name))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == manifest["n_params"]
    for field in ("img_size", "patch_size", "stride", "embed_dim", "depth", "d_state", "num_classes"):
        assert getattr(model.config, field) == manifest["kwargs"][field], field
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_five_published_variants():
    assert len(manifests()) == 5
    assert set(list_models("vim_*")) == {name_of(m) for m in manifests()} | {"vim_micro"}


def test_no_dead_branch(run):
    """Every parameter reaches the logits: each one perturbed alone moves them."""
    (fn, state, _), x = run, images()
    clean = fn(state, x)
    flat = nnx.to_flat_state(state)
    assert len(flat) == 4 + (3 + 3 + 2 * 4) + 3
    for i, (path, leaf) in enumerate(flat):
        noise = 0.1 * normal(i, leaf.shape)
        changed = [(p, v.replace(v[...] + noise) if p == path else v) for p, v in flat]
        moved = jnp.abs(fn(nnx.from_flat_state(changed), x) - clean)
        assert float(moved.min(axis=-1).max()) > 0, path
        assert bool(jnp.isfinite(moved).all()), path


def test_gradients_reach_every_entry(tiny):
    """jax.grad through `pure`: every entry of every leaf, and every pixel, moves some logit."""
    fn, state = pure(tiny)
    x = images(4)
    weights = normal(9, (4, 7))
    grads, pixels = jax.jit(jax.grad(lambda s, x: jnp.sum(fn(s, x) * weights), argnums=(0, 1)))(state, x)
    for path, leaf in nnx.to_flat_state(grads):
        assert bool((leaf[...] != 0).all()), path
        assert bool(jnp.isfinite(leaf[...]).all()), path
    assert bool((pixels != 0).all())


def test_no_retrace(tiny, run):
    fn, state, traces = run
    for seed in range(3):
        fn(state, images(key=seed))
    fn(jax.tree.map(lambda leaf: leaf * 1.5, state), images())
    fn(pure(tiny)[1], images())
    assert traces.count((3, 16, 16, 3)) == 1


def test_vmap(tiny, run):
    """A batch of batches, and an ensemble of weights: both equal a Python loop."""
    (one, state, _), fn = run, pure(tiny)[0]
    x = jnp.stack([images(key=1), images(key=2)])
    rows = jnp.stack([one(state, part) for part in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn, (None, 0)))(state, x), rows, rtol=0, atol=REORDERED)
    other = jax.tree.map(lambda leaf: leaf * 1.25, state)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), state, other)
    rows = jnp.stack([one(state, x[0]), one(other, x[0])])
    assert float(jnp.abs(rows[0] - rows[1]).max()) > 1e-3
    np.testing.assert_allclose(jax.jit(jax.vmap(fn, (0, None)))(both, x[0]), rows, rtol=0, atol=REORDERED)


def test_samples_do_not_see_each_other(run):
    (fn, state, _), x = run, images()
    np.testing.assert_allclose(fn(state, x[::-1])[::-1], fn(state, x), rtol=0, atol=REORDERED)
    changed = fn(state, x.at[1].multiply(3.0))
    np.testing.assert_array_equal(np.delete(changed, 1, 0), np.delete(fn(state, x), 1, 0))


def test_trace_computes_the_same_logits():
    tiny, x = create_model("vim_micro", rngs=nnx.Rngs(4), **{**TINY, "depth": 2}), images()
    logits, trace = tiny.trace(x)
    np.testing.assert_array_equal(logits, tiny(x))
    np.testing.assert_array_equal(tiny.head.proj(trace.features), logits)
    assert len(trace.layers) == 2
    stream = trace.tokens
    np.testing.assert_array_equal(stream, tiny.stem(x))
    for block, layer in zip(tiny.blocks, trace.layers, strict=True):
        np.testing.assert_array_equal(layer.mixer_in, block.norm(stream))
        stream = stream + layer.mixer_out
        forward, backward = layer.scans
        assert forward.states is None
        assert (forward.order.reverse, backward.order.reverse) == (False, True)
        assert bool((forward.delta > 0).all())
        assert bool((forward.A < 0).all())
    np.testing.assert_array_equal(tiny.head(stream), logits)


def test_trace_operands_give_the_trace_outputs(tiny):
    """The traced operands, run through the plain recurrence in numpy, give the traced y and states."""
    trace = jax.jit(lambda x: tiny.trace(x, collect=lambda h: h)[1])(images())
    for layer in trace.layers:
        for scan in layer.scans:
            u, delta, A, B, C, D = (
                np.asarray(v, np.float64) for v in (scan.u, scan.delta, scan.A, scan.B, scan.C, scan.D)
            )
            h = np.zeros((3, *A.shape))
            for t in range(17):
                h = np.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * B[:, t, None]
                np.testing.assert_allclose(scan.states[:, t], h, rtol=0, atol=REORDERED)
                y = np.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t]
                np.testing.assert_allclose(scan.y[:, t], y, rtol=0, atol=REORDERED)


def test_collect_reduces_inside_the_scan(tiny):
    x = images(2)
    full = jax.jit(lambda x: tiny.trace(x, collect=lambda h: h)[1])(x)

    def summary(h):
        return {"mean": h.mean(axis=(1, 2)), "last": h[:, :, -1]}

    reduced = jax.jit(lambda x: tiny.trace(x, collect=summary)[1])(x)
    for one, other in zip(full.layers, reduced.layers, strict=True):
        for a, b in zip(one.scans, other.scans, strict=True):
            assert a.states.shape == (2, 17, 40, 5)
            np.testing.assert_allclose(b.states["last"], a.states[..., -1], rtol=0, atol=REORDERED)
            np.testing.assert_allclose(b.states["mean"], a.states.mean(axis=(2, 3)), rtol=0, atol=REORDERED)


def test_the_directions_are_mirror_images():
    """With the two directions' parameters swapped, the model sees the reversed token stream."""
    model = create_model("vim_micro", rngs=nnx.Rngs(4), **{**TINY, "img_size": (12, 20), "depth": 1})
    mixer = model.blocks[0].mixer
    x = normal(3, (2, 16, 20))
    expected = jnp.flip(mixer(x), 1)
    mixer.directions = nnx.List(list(mixer.directions)[::-1])
    for name in ("A_log", "D", "dt_bias"):
        leaf = getattr(mixer.scan, name)
        leaf.set_value(jnp.concatenate(jnp.split(leaf[...], 2)[::-1]))
    np.testing.assert_allclose(mixer(jnp.flip(x, 1)), expected, rtol=0, atol=REORDERED)


ORDERS = [
    (ScanOrder(2, 3), [0, 1, 2, 3, 4, 5]),
    (ScanOrder(2, 3, transpose=True), [0, 3, 1, 4, 2, 5]),
    (ScanOrder(2, 3, reverse=True), [5, 4, 3, 2, 1, 0]),
    (ScanOrder(2, 3, transpose=True, reverse=True), [5, 2, 4, 1, 3, 0]),
    (ScanOrder(2, 3, class_index=3), [0, 1, 2, None, 3, 4, 5]),
    (ScanOrder(2, 3, class_index=0), [None, 0, 1, 2, 3, 4, 5]),
    (ScanOrder(2, 3, class_index=6), [0, 1, 2, 3, 4, 5, None]),
    (ScanOrder(2, 3, class_index=2, reverse=True), [5, 4, 3, 2, None, 1, 0]),
    (ScanOrder(2, 3, class_index=1, transpose=True), [0, None, 3, 1, 4, 2, 5]),
    (ScanOrder(3, 2, class_index=2, transpose=True, reverse=True), [5, 3, 1, 4, None, 2, 0]),
]


@pytest.mark.parametrize(("order", "tokens"), ORDERS, ids=lambda v: str(v) if isinstance(v, ScanOrder) else "")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scan_order(order, tokens, axis):
    """`tokens` lists by hand which image token each step of the scan reads; None is the class token."""
    rng = np.random.default_rng(len(tokens))
    image = rng.standard_normal((4, 6, 3))
    scanned = np.stack([rng.standard_normal((4, 3)) if t is None else image[:, t] for t in tokens], axis=1)
    assert order.length == len(tokens)
    scanned, image = np.moveaxis(scanned, 1, axis), np.moveaxis(image, 1, axis)
    np.testing.assert_array_equal(order.to_image(jnp.asarray(scanned, jnp.float32), axis), image.astype(np.float32))
    grid, class_tokens = order.to_map(jnp.asarray(scanned, jnp.float32), axis)
    axis %= image.ndim
    shape = (*image.shape[:axis], order.height, order.width, *image.shape[axis + 1 :])
    np.testing.assert_array_equal(grid, image.astype(np.float32).reshape(shape))
    places = [i for i, token in enumerate(tokens) if token is None]
    np.testing.assert_array_equal(class_tokens, scanned.take(places, axis).astype(np.float32))
    with pytest.raises(ValueError, match=f"this scan has {len(tokens)}"):
        order.to_image(jnp.asarray(scanned).take(jnp.arange(5), axis), axis)


def test_scan_directions_have_names():
    orders = [ScanOrder(2, 3, transpose=t, reverse=r) for t in (False, True) for r in (False, True)]
    names = ["forwards", "backwards", "forwards by columns", "backwards by columns"]
    assert [order.direction for order in orders] == names


def test_trace_orders_lead_back_to_the_image():
    """Patches that hold their own index travel through the model's token order and come back in image order."""
    model = create_model("vim_micro", **{**TINY, "img_size": (12, 20), "depth": 1})
    trace = model.trace(images(2, (12, 20)))[1]
    patches = trace.tokens - model.stem.positions[...][None]
    expected = model.stem.proj(extract_patches(images(2, (12, 20)), 4, 4)[0])
    for scan in trace.layers[0].scans:
        tokens = jnp.flip(patches, 1) if scan.order.reverse else patches
        np.testing.assert_allclose(scan.order.to_image(tokens), expected, rtol=0, atol=REORDERED)


@pytest.mark.parametrize(
    ("size", "patch", "stride", "grid"),
    [
        ((16, 16), 4, 4, (4, 4)),
        ((8, 20), 4, 4, (2, 5)),
        ((15, 10), 6, 3, (4, 2)),
        ((13, 18), 5, 4, (3, 4)),  # the last row and column of pixels belong to no patch
        ((10, 7), 4, 4, (2, 1)),
        ((9, 9), 2, 3, (3, 3)),  # gaps between the patches
        ((5, 5), 5, 5, (1, 1)),
    ],
)
def test_any_grid(size, patch, stride, grid):
    model = random_model("vim_micro", **{**TINY, "img_size": size, "patch_size": patch, "stride": stride, "depth": 1})
    assert model.config.grid == grid
    x = images(2, size)
    patches, found = extract_patches(x, patch, stride)
    assert found == grid
    pixels, patches = np.asarray(x), np.asarray(patches)  # a slice of a JAX array compiles
    for i in range(grid[0]):
        for j in range(grid[1]):
            expected = pixels[:, i * stride : i * stride + patch, j * stride : j * stride + patch]
            np.testing.assert_array_equal(patches[:, i * grid[1] + j], expected.reshape(2, -1))
    logits, trace = jax.jit(lambda x: model.trace(x))(x)
    assert logits.shape == (2, 7)
    assert bool(jnp.isfinite(logits).all())
    assert trace.tokens.shape[1] == grid[0] * grid[1] + 1 == model.config.num_tokens


def test_bfloat16(tiny):
    """Computing in bfloat16 keeps the residual stream and the logits in float32 and stays close to float32."""
    low = create_model("vim_micro", rngs=nnx.Rngs(4), dtype=jnp.bfloat16, **TINY)
    x = images(8)
    exact, (logits, trace) = jax.jit(lambda x: tiny(x))(x), jax.jit(lambda x: low.trace(x))(x)
    assert logits.dtype == trace.tokens.dtype == jnp.float32
    assert trace.layers[0].mixer_out.dtype == jnp.bfloat16
    error = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
    assert 0 < error < BFLOAT16_LOGITS
    stored = create_model("vim_micro", rngs=nnx.Rngs(4), param_dtype=jnp.bfloat16, **TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(lambda x: stored(x), x).dtype == jnp.float32


def test_rms_norm_and_convolution_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 6)).astype(np.float32)
    norm = RMSNorm(6, dtype=jnp.float32, param_dtype=jnp.float32)
    scale = rng.standard_normal(6).astype(np.float32)
    norm.scale.set_value(jnp.asarray(scale))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=0, atol=REORDERED)
    for causal, left in ((True, 3), (False, 1)):
        conv = DepthwiseConv1d(6, 4, causal=causal, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
        conv.bias.set_value(jnp.asarray(scale))
        padded = np.pad(x, ((0, 0), (left, 3 - left), (0, 0)))
        kernel = np.asarray(conv.kernel[...])
        expected = np.stack([(padded[:, t : t + 4] * kernel).sum(1) for t in range(9)], 1) + scale
        np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=0, atol=REORDERED)


def test_initialisation():
    """dt_bias is the inverse softplus of a step in [1e-3, 1e-1], A is -1..-N, and the key decides the weights."""
    config = {**TINY, "depth": 2}
    one, two, other = (create_model("vim_micro", rngs=nnx.Rngs(k), **config) for k in (1, 1, 2))
    scan = one.blocks[1].mixer.scan
    step = np.log1p(np.exp(np.asarray(scan.dt_bias[...], np.float64)))
    assert 0.99e-3 < step.min() < 3e-3
    assert 0.03 < step.max() < 1.01e-1
    np.testing.assert_allclose(scan.A_log[...], np.log(np.tile(np.arange(1, 6), (80, 1))), rtol=1e-6)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(one), nnx.state(two))
    assert all(jax.tree.leaves(same))
    assert bool((one.blocks[0].mixer.in_proj.kernel[...] != other.blocks[0].mixer.in_proj.kernel[...]).all())
    assert bool((one.blocks[0].mixer.in_proj.kernel[...] != one.blocks[1].mixer.in_proj.kernel[...]).all())


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 16, 16, 1), (16, 16, 3), (2, 3, 16, 16)])
def test_wrong_images(tiny, shape):
    x = normal(0, shape)
    with pytest.raises(ValueError, match=r"images have shape .* but this model takes \(batch, 16, 16, 3\)"):
        tiny(x)
    with pytest.raises(ValueError, match="images have shape"):
        tiny.trace(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patches_are_cut_in_the_dtype_of_their_layer(dtype, monkeypatch):
    """Not of the map, which may be wider, and whose every entry they hold several times."""
    types = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    models = Conv3x3(3, 5, **types), HalvingConv(3, 5, **types)
    stem = create_model("vim_micro", dtype=dtype, rngs=nnx.Rngs(4), **TINY).stem
    seen = []
    multiply = nnx.Linear.__call__
    monkeypatch.setattr(nnx.Linear, "__call__", lambda layer, x: seen.append(x.dtype) or multiply(layer, x))
    for module in (*models, stem):
        module(images())
    assert seen == [jnp.dtype(dtype)] * 3


def test_registry_errors_name_the_way_out():
    with pytest.raises(ValueError, match=r"no model named 'qqq'; choose one of deit3_base, .*, vmamba_tiny_s2l5\.$"):
        create_model("qqq")
    with pytest.raises(ValueError, match=r"no model named 'vim_tinny'; did you mean vim_tiny"):
        create_model("vim_tinny")
    with pytest.raises(ValueError, match=r"no model named 'resnet50'.*vim_base"):
        create_model("resnet50")
    with pytest.raises(ValueError, match=r"vim_tiny has no config field embed_dims, foo; its fields are .*embed_dim"):
        create_model("vim_tiny", embed_dims=3, foo=1)
    with pytest.raises(ValueError, match=r"smaller than one patch of 16 pixels"):
        create_model("vim_tiny", img_size=(224, 8))
    with pytest.raises(ValueError, match="no model family 'swin'; known: vim"):
        config_class("swin")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("vim_tiny", "depth", 3.0),
        ("vim_tiny", "stride", 0),
        ("vim_tiny", "embed_dim", (2, 3)),
        ("mambavision_t", "in_dim", "10"),
    ],
)
def test_sizes_are_positive_whole_numbers(name, field, value):
    with pytest.raises(ValueError, match=f"{field} is .*, but sizes and counts are whole numbers from 1; change it"):
        model_config(name, **{field: value})


@pytest.mark.parametrize(
    ("name", "field", "value", "rule"),
    [
        ("vim_tiny", "img_size", (224, -1), "it must be a whole number from 1, or two of them"),
        ("vim_tiny", "img_size", 0, "or two of them"),
        ("vim_tiny", "img_size", (224,), "or two of them"),
        ("vim_tiny", "img_size", (224, 224, 7), "or two of them"),
        ("vim_tiny", "preprocessing", 3, "it must be a Preprocessing"),
        ("vmamba_tiny_s1l8", "dims", 96.5, "it must be a whole number from 1, or a tuple of them"),
        ("vmamba_tiny_s1l8", "depths", (2, 0), "it must be a tuple of whole numbers from 1"),
        ("vmamba_tiny_s1l8", "depths", (), "a tuple of whole numbers"),
        ("vmamba_tiny_s1l8", "depths", 2, "a tuple of whole numbers"),
        ("vmamba_tiny_s1l8", "ssm_ratio", 0, "it must be a positive number"),
        ("vmamba_tiny_s1l8", "mlp_ratio", (4.0, 4.0), "it must be a positive number"),
        ("vmamba_tiny_s1l8", "mlp_ratio", float("nan"), "it must be a positive number"),
        ("mambavision_t", "window_size", (8, 8, 0, 7), "a tuple of whole numbers"),
        ("mambavision_t", "layer_scale", (1, 2), "it must be a positive number or None"),
        ("mambavision_t", "conv_levels", -1, "sizes and counts are whole numbers from 0"),
    ],
)
def test_fields_are_what_they_are_declared_to_be(name, field, value, rule):
    with pytest.raises(ValueError, match=f"{field} is .*, but .*{rule}.*; change it"):
        model_config(name, **{field: value})


def test_numbers_of_numpy_and_lists_are_as_good():
    """The config is the same, so that it is hashed, compared and written as JSON like any other."""
    sizes = dict(img_size=np.int64(224), embed_dim=np.int32(192))
    assert json.dumps(dataclasses.asdict(model_config("vim_tiny", **sizes))) == json.dumps(
        dataclasses.asdict(model_config("vim_tiny"))
    )
    wide = model_config("vmamba_tiny_s1l8", img_size=[np.int64(8), 16], dims=np.int64(96), ssm_ratio=np.float32(1))
    assert wide == model_config("vmamba_tiny_s1l8", img_size=(8, 16))
    assert hash(wide) == hash(model_config("vmamba_tiny_s1l8", img_size=(8, 16)))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vmamba_tiny_s1l8", dict(dims=1)),
        ("vmamba_tiny_s1l8", dict(ssm_ratio=0.01)),
        ("vmamba_tiny_s1l8", dict(dims=(96, 3), depths=(1, 1), mlp_ratio=0.3)),
        ("mambavision_t", dict(mlp_ratio=0.01)),
    ],
)
def test_every_layer_has_channels(name, sizes):
    with pytest.raises(ValueError, match=r"dims? .* and mlp_ratio .* leave a layer without channels; use larger ones"):
        model_config(name, **sizes)


def test_predictions_of_no_images_are_none(tiny):
    logits = predict(tiny, np.zeros((0, 16, 16, 3), np.float32))
    assert (logits.shape, logits.dtype) == ((0, tiny.config.num_classes), np.float32)


def test_registry():
    assert list_models("vim_*8") == ("vim_small_stride8", "vim_tiny_stride8")
    assert list_models("nothing*") == ()
    assert model_config("vim_base", num_classes=10).num_classes == 10
    assert model_config("vim_base").num_classes == 1000
    with pytest.raises(AttributeError):
        model_config("vim_base").depth = 3
