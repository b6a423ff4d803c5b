"""MambaVision: the official numbers against a float64 reference; windows; conversion."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from family_checks import (
    check_other_types,
    check_saved_and_loaded,
    check_that_no_block_is_skipped,
    check_that_samples_do_not_mix,
    sites_of,
)
from flax import nnx
from mambavision_reference import forward, random_weights
from tiers import slow
from tiny_models import natural_model
from tolerances import BATCHED_FLOAT, MAMBAVISION_SCAN, PARITY, REORDERED

from ouromamba_jax import GenConfig, QuantConfig, generate_images, quantize
from ouromamba_jax.convert import ConversionError, from_torch, load_tensors
from ouromamba_jax.convert.mambavision import fill_mambavision
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models import AttentionTrace, WindowOrder, create_model, list_models, model_config, pure
from ouromamba_jax.models.layers import DotProductAttention, Operand, SelectiveScan
from ouromamba_jax.models.mambavision import ConvBlock, HybridBlock
from ouromamba_jax.models.windows import split_windows
from ouromamba_jax.quantize import linear
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.coverage import check_coverage
from ouromamba_jax.quantize.sites import iter_sites, named_modules, set_module

ROOT = Path(__file__).parents[1] / "golden"
GOLDEN = ROOT / "models" / "mambavision_a"
MAMBAVISION_A = dict(
    img_size=64, dim=10, in_dim=8, depths=(1, 1, 2, 2), window_size=(8, 8, 4, 2), num_heads=(1, 2, 4, 8),
    mlp_ratio=2, num_classes=10,
)  # fmt: skip
PUBLISHED = {f"mambavision_{name.lower()}": f"mamba_vision_{name}" for name in ("T", "T2", "S", "B", "L", "L2")}
PUBLISHED["mambavision_l2_512"] = "mamba_vision_L2_512_21k"
PRETRAINED = {"mamba_vision_B_21k": "mambavision_b", "mamba_vision_L_21k": "mambavision_l"}  # files of the same shapes
UNRECORDED = {"mambavision_micro", "mambavision_l3_256", "mambavision_l3_512"}
# (height, width), dim, in_dim, depths, window_size, num_heads, mlp_ratio, layer_scale
UNSEEN = {
    # Hybrid maps of 3 x 5 and 2 x 3 tokens: padded to 2 x 3 and 1 x 2 windows.
    "several padded windows": ((40, 72), 8, 5, (1, 1, 3, 1), (8, 8, 2, 2), (1, 1, 4, 2), 2.5, False),
    # 2 x 4 and 1 x 2 tokens: a window larger than the map, padding below only.
    "layer scale": ((18, 58), 6, 4, (1, 2, 2, 1), (8, 8, 4, 3), (1, 1, 2, 3), 4.0, True),
}


def manifest(name: str) -> dict:
    return json.loads((ROOT / "manifests" / f"{name}.json").read_text())


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def as_tokens(x: np.ndarray) -> np.ndarray:
    return channels_last(x).reshape(len(x), -1, x.shape[1])


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / "checkpoint.pth.tar")


@pytest.fixture(scope="module")
def official(tensors) -> nnx.Module:
    return from_torch("mambavision_t", tensors, **MAMBAVISION_A)


@pytest.mark.parametrize("file", ["checkpoint.pth.tar", "model.safetensors"])
def test_any_source_gives_the_same_model(official, file):
    model = from_torch("mambavision_t", GOLDEN / file, **MAMBAVISION_A)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(official))


@pytest.mark.parametrize("case", ["layer scale", *slow("several padded windows")])
def test_what_the_golden_does_not_show(case):
    """Maps that are not square, padding, several windows, layer scale, odd depths: against float64 loops."""
    size, dim, in_dim, depths, windows, heads, mlp_ratio, layer_scale = UNSEEN[case]
    rng = np.random.default_rng(len(case))
    fields = dict(dim=dim, in_dim=in_dim, depths=depths, mlp_ratio=mlp_ratio)
    weights = random_weights(rng, classes=7, layer_scale=layer_scale, **fields)
    images = rng.standard_normal((2, 3, *size)).astype(np.float32)
    expected, maps, shown = forward(weights, images, windows=windows, heads=heads)
    fields |= dict(img_size=size, window_size=windows, num_heads=heads, num_classes=7)
    model = from_torch("mambavision_t", weights, layer_scale=1e-5 if layer_scale else None, **fields)
    x = jnp.asarray(channels_last(images))
    logits, trace = jax.jit(lambda x: model.trace(x))(x)
    # Random weights give the last maps values up to 15; the golden's tolerance is for values around 5.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=PARITY * max(1.0, np.abs(expected).max() / 5))
    assert tuple(map_.shape[2:] for map_ in maps.values()) == model.config.grids
    names = [f"levels.{level}.blocks.{i}" for level, depth in enumerate(depths) for i in range(depth)]
    seen = 0
    for name, layer in zip(names, trace.layers, strict=True):
        if name not in shown:
            assert not layer.scans
            assert not isinstance(layer, AttentionTrace)
            continue
        seen += 1
        level = int(name.split(".")[1])
        order = WindowOrder(
            windows[level], windows[level], map_height=maps[level].shape[2], map_width=maps[level].shape[3]
        )
        if isinstance(layer, AttentionTrace):
            assert layer.order == order
            np.testing.assert_allclose(layer.attention, shown[name], rtol=0, atol=PARITY)
        else:
            assert layer.scans[0].order == order
            atol = MAMBAVISION_SCAN * np.abs(shown[name]).max()
            np.testing.assert_allclose(layer.scans[0].y, shown[name], rtol=0, atol=atol)
    assert seen == depths[2] + depths[3] == len(shown)


def test_windows_and_back():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((2, 5, 7, 3)), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 2), (0, 0)))
    windows = split_windows(padded, 3)
    assert windows.shape == (2 * 2 * 3, 9, 3)
    np.testing.assert_array_equal(windows[6 + 4].reshape(3, 3, 3), padded[1, 3:6, 3:6])  # second image, second row
    order = WindowOrder(3, 3, map_height=5, map_width=7)
    np.testing.assert_array_equal(order.join(windows), x.reshape(2, 35, 3))
    np.testing.assert_array_equal(order.join(windows[..., None])[..., 0], x.reshape(2, 35, 3))
    np.testing.assert_array_equal(order.to_image(windows), windows)


def test_attention_comes_second():
    for depths, expected in (((1, 1, 4, 5), "mmaammmaa"), ((1, 1, 1, 8), "mmmmmaaaa")):
        config = model_config("mambavision_t", depths=depths)
        kinds = [config.is_attention(level, i) for level in (2, 3) for i in range(depths[level])]
        assert "".join("ma"[kind] for kind in kinds) == expected


def test_every_published_mambavision_has_its_manifest():
    assert set(list_models("mambavision_*")) - UNRECORDED == set(PUBLISHED)
    variants = {**{source: name for name, source in PUBLISHED.items()}, **PRETRAINED}
    assert len(variants) == 9
    for source, name in variants.items():
        config, published = model_config(name), manifest(source)
        kwargs = published["kwargs"]
        assert (config.img_size, config.img_size) == tuple(kwargs["img_size"])
        for field in ("dim", "in_dim", "mlp_ratio", "num_classes"):
            assert getattr(config, field) == kwargs[field]
        for field in ("depths", "window_size", "num_heads"):
            assert list(getattr(config, field)) == kwargs[field]
        assert config.layer_scale == kwargs.get("layer_scale")
        assert kwargs.get("layer_scale_conv") is None
        if source in PUBLISHED.values():
            evaluation, used = published["default_cfg"], config.preprocessing
            for field in ("crop_pct", "interpolation", "crop_mode"):
                assert getattr(used, field) == evaluation[field]
            assert (list(used.mean), list(used.std)) == (evaluation["mean"], evaluation["std"])
        else:
            assert published["state_dict"] == manifest(PUBLISHED[name])["state_dict"]
            continue
        # A folded BatchNorm takes its weight and bias with it, and leaves a bias where the stem's had none.
        folded = config.in_dim + config.dim + sum(4 * config.widths[i] * config.depths[i] for i in range(2))
        state = nnx.state(nnx.eval_shape(lambda name=name: create_model(name)))
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == published["n_params"] - folded


def synthesised(source: str) -> dict[str, np.ndarray]:
    """Tensors of a manifest's shapes and types, each of one random value: large models without their memory."""
    rng = np.random.default_rng(3)
    tensors = {}
    for key, (shape, dtype) in manifest(source)["state_dict"].items():
        value = rng.uniform(0.01, 0.1) if dtype == "float32" else rng.integers(1, 99)
        tensors[key] = np.broadcast_to(np.asarray(value, dtype), shape)
    return tensors


def listed(error: ConversionError) -> set[str]:
    return set(str(error).removesuffix(".").split("another copy: ")[1].split("; "))


_LARGE = ("mambavision_b", "mambavision_l", "mambavision_l2", "mambavision_l2_512")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in _LARGE else []) for n in PUBLISHED],
)
def test_every_key_of_every_manifest(name):
    tensors = synthesised(PUBLISHED[name])
    model = from_torch(name, tensors)
    config = model.config
    last = f"levels.3.blocks.{config.depths[3] - 1}"
    for path, key in (("mlp.fc1.bias", "mlp.fc1.bias"), ("mixer.qkv.kernel", "mixer.qkv.weight")):
        leaf = dict(nnx.to_flat_state(nnx.state(model.blocks[-1])))[tuple(path.split("."))][...]
        assert {float(leaf.min()), float(leaf.max())} == {float(tensors[f"{last}.{key}"].flat[0])}
    first_scan = model.blocks[sum(config.depths[:2])].mixer.scan
    bias = tensors["levels.2.blocks.0.mixer.dt_proj.bias"]
    np.testing.assert_array_equal(first_scan.dt_bias[...], 2 * bias)


@pytest.mark.slow
def test_the_largest_model_runs_within_8_gib():
    """MambaVision-L2, 242 M parameters, from float32 tensors in memory to the logits of one image under jit."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_mambavision as t; t.run_the_largest()"
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child so far; Linux: KiB
    assert 4 * 242e6 < peak < 8 * 2**30


def run_the_largest() -> None:
    """Runs in a process of its own."""
    tensors = {key: value.copy() for key, value in synthesised("mamba_vision_L2").items()}
    fn, state = pure(from_torch("mambavision_l2", tensors))
    logits = jax.jit(fn)(state, images(1, (224, 224)))
    assert logits.shape == (1, 1000)
    assert bool(jnp.isfinite(logits).all())


FIELDS = dict(dim=6, in_dim=4, depths=(1, 3), mlp_ratio=2.0)
TINY = dict(img_size=(20, 28), window_size=(8, 2), num_heads=(1, 3), num_classes=5, layer_scale=1e-5, **FIELDS)
"""A hybrid level of 3 x 4 tokens in 2 x 2 windows: two scans, then attention."""


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(np.random.default_rng(6), classes=5, layer_scale=True, conv_levels=1, **FIELDS)


@pytest.fixture(scope="module")
def tiny(weights):
    return from_torch("mambavision_micro", weights, **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    """Logits of `tiny` for given weights, compiled once."""
    return jax.jit(pure(tiny)[0])


def images(count: int = 3, size: tuple[int, int] = (20, 28), seed: int = 0) -> jax.Array:
    return normal(seed, (count, *size, 3))


def test_every_key_is_needed_and_no_other(weights):
    model = nnx.eval_shape(lambda: create_model("mambavision_micro", **TINY))

    def problems(tensors: dict[str, np.ndarray]) -> set[str]:
        with pytest.raises(ConversionError) as caught:
            fill_mambavision(model, tensors)
        return listed(caught.value)

    needed = [key for key in weights if not key.endswith("num_batches_tracked")]
    counters = sorted(set(weights) - set(needed))
    assert len(counters) == 5
    for start in range(0, len(needed), 20):  # a refusal lists that many
        some = needed[start : start + 20]
        without = {key: value for key, value in weights.items() if key not in some}
        assert problems(without) == {f"{key} is missing" for key in some}
        wider = {key: np.zeros((*weights[key].shape[:-1], weights[key].shape[-1] + 1), np.float32) for key in some}
        taller = {key: np.zeros((weights[key].shape[0] + 1, *weights[key].shape[1:]), np.float32) for key in some}
        for wrong in (wider, taller):
            found = problems({**weights, **wrong})
            assert {problem.split(" has shape ")[0] for problem in found} == set(some)
    for wrong in (np.zeros(1, np.int64), np.asarray(3, np.float32)):
        found = problems({**weights, **dict.fromkeys(counters, wrong)})
        assert found == {f"{key} is not part of this model" for key in counters}
    unknown = (
        "levels.0.blocks.1.norm1.weight",
        "levels.0.blocks.0.gamma_1",
        "levels.0.blocks.0.mixer.D",
        "levels.1.blocks.3.norm1.weight",
        "levels.1.blocks.0.norm1.running_mean",
        "levels.1.blocks.0.norm1.num_batches_tracked",
        "levels.0.blocks.1.norm1.num_batches_tracked",
        "levels.1.blocks.0.mixer.in_proj.bias",
        "levels.1.blocks.0.mixer.conv1d_x.bias",
        "levels.1.blocks.0.mixer.qkv.bias",
        "levels.1.blocks.2.mixer.D",
        "levels.1.blocks.2.mixer.relative_position_index",
        "levels.1.downsample.reduction.0.weight",
        "levels.0.downsample.reduction.0.bias",
        "levels.2.blocks.0.norm1.weight",
        "patch_embed.conv_down.0.bias",
        "encoder.head.bias",
        "pos_embed",
    )
    extra = {key: weights["norm.num_batches_tracked" if key.endswith("tracked") else "head.bias"] for key in unknown}
    assert problems({**weights, **extra}) == {f"{key} is not part of this model" for key in unknown}


def test_what_must_not_matter(weights, tiny):
    """Counters of training steps, which older files lack, and the prefix of data-parallel training."""
    bare = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert len(bare) == len(weights) - 5
    for source in (bare, {f"module.{k}": v for k, v in weights.items()}):
        model = from_torch("mambavision_micro", source, **TINY)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(tiny))


def test_statistics_that_cannot_be(weights):
    """A BatchNorm's variance below zero, and one that makes a folded weight too large for its type, are named."""
    for key in ("patch_embed.conv_down.4", "levels.0.blocks.0.norm2", "norm"):
        negative = {**weights, f"{key}.running_var": -weights[f"{key}.running_var"]}
        with pytest.raises(ConversionError, match=re.escape(f"{key}.running_var")):
            from_torch("mambavision_micro", negative, **TINY)
    large = {**weights, "norm.weight": weights["norm.weight"] * np.float32(1e5)}
    with pytest.raises(ConversionError, match=re.escape("norm.running_var")):
        from_torch("mambavision_micro", large, param_dtype=jnp.float16, **TINY)


def test_another_family_is_named(tensors):
    for prefix in ("", "encoder."):
        with pytest.raises(ConversionError, match="of the mambavision family"):
            from_torch("vim_tiny", {prefix + key: value for key, value in tensors.items()})
    with pytest.raises(ConversionError, match="of the vim family"):
        from_torch("mambavision_micro", {"layers.0.mixer.D": np.zeros(3, np.float32)})


def test_a_quantised_models_halved_map_is_not_rounded_to_bfloat16():
    """Nor written twice: it is the float32 map between blocks."""
    model = create_model("mambavision_micro", rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    block, x = model.blocks[1], jax.random.normal(jax.random.key(0), (1, 12, 12, 32))
    rounded = block._enter(x)
    layer = block.downsample.proj
    spec = SiteSpec(QuantConfig.preset("w8a8"), 36, 288)
    found = linear.empty(layer, spec) | {"weight": jnp.full((1, 64), 0.01)}
    found["input"] = replace(found["input"], scale=jnp.full(36, 0.1))
    set_module(block.downsample, "proj", linear.make(layer, spec, found))
    for y, share in ((rounded, 1), (block._enter(x), 0)):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(np.mean(y == y.astype(jnp.bfloat16).astype(jnp.float32)), share, atol=0.1)


def test_the_micro_preset():
    config = model_config("mambavision_micro")
    assert config.grids == ((12, 12), (6, 6))
    assert config.preprocessing.mean == config.preprocessing.std == (0.5, 0.5, 0.5)
    model = nnx.eval_shape(lambda: create_model("mambavision_micro"))
    assert {type(block) for block in model.blocks} == {ConvBlock, HybridBlock}
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) < 250_000
    fn, state = pure(model)
    assert jax.eval_shape(fn, state, jax.ShapeDtypeStruct((2, 48, 48, 3), jnp.float32)).shape == (2, 10)


def test_no_mixing_of_samples_and_no_other_size(tiny, run):
    check_that_samples_do_not_mix(tiny, run, images())
    for size in ((24, 28), (20, 32)):
        with pytest.raises(ValueError, match="another img_size"):
            tiny(images(1, size))


def test_the_trace_is_the_forward_pass(tiny, run):
    x = images()
    logits, trace = jax.jit(tiny.trace)(x)
    np.testing.assert_allclose(logits, run(nnx.state(tiny), x), rtol=0, atol=REORDERED)
    attention = trace.layers[-1]
    assert attention.attention.shape == (3 * 4, 3, 4, 4)
    np.testing.assert_allclose(attention.attention.sum(axis=-1), 1, rtol=0, atol=REORDERED)
    assert attention.order.join(attention.mixer_out).shape == (3, 12, 12)
    assert trace.layers[1].scans[0].order == attention.order


def test_every_weight_is_used(tiny, run):
    """Any leaf of the model, changed, changes the logits."""
    x, state = images(), nnx.state(tiny)
    logits = run(state, x)
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(8)
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        noise = jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) * 0.5
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + noise, *leaves[i + 1 :]])
        assert float(jnp.abs(run(changed, x) - logits).max()) > 10 * REORDERED, path


@pytest.mark.slow
def test_other_types(weights):
    check_other_types("mambavision_micro", weights, TINY, images())


def test_lists_are_as_good_as_tuples_and_nonsense_is_refused():
    fields = dict(depths=[1, 2], window_size=[8, 4], num_heads=[1, 2])
    config = model_config("mambavision_micro", **fields)
    assert hash(config) == hash(model_config("mambavision_micro", **{k: tuple(v) for k, v in fields.items()}))
    for wrong, match in (
        (dict(depths=(2, 0)), "depths"),
        (dict(depths=(1, 2, 3)), "one entry per level"),
        (dict(img_size=0), "img_size"),
        (dict(num_heads=(1, 5)), "5 heads"),
        (dict(window_size=(8, 0)), "window_size is"),
        (dict(dim=3, conv_levels=0, num_heads=(3, 3)), "even"),
    ):
        with pytest.raises(ValueError, match=match):
            model_config("mambavision_micro", **wrong)


def test_saved_and_loaded(tiny, tmp_path):
    check_saved_and_loaded(tiny, tmp_path / "tiny")


class WithoutProducts(nnx.Module):
    """Stands for `DotProductAttention`."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return q + k + v


def test_every_matmul_is_a_site(tiny):
    """Outside of linear layers and scans, only attention multiplies matrices; its four operands are marked."""
    x = jax.ShapeDtypeStruct((1, 20, 28, 3), jnp.float32)
    for name, stage in tiny.stages:
        after = jax.eval_shape(stage, x)
        bare = nnx.clone(stage)
        for path, module in list(named_modules(bare)):
            if isinstance(module, DotProductAttention):
                set_module(bare, path, WithoutProducts())
        check_coverage(bare, x, name)
        x = after
    sites = dict(iter_sites(tiny))
    kinds = [type(site) for site in sites.values()]
    assert kinds.count(nnx.Linear) == 2 + 2 + 1 + 2 * (4 + 2) + (2 + 2) + 1
    assert kinds.count(SelectiveScan) == 2
    points = {path for path, site in sites.items() if isinstance(site, Operand)}
    attention = {f"blocks.3.mixer.attention.{name}" for name in ("q", "k", "v", "probs")}
    assert points == {"blocks.1.mixer.z", "blocks.2.mixer.z"} | attention


@pytest.mark.slow
def test_no_block_is_skipped():
    fields = {**FIELDS, "depths": (1, 2)}
    weights = random_weights(np.random.default_rng(9), classes=5, layer_scale=True, conv_levels=1, **fields)
    model = from_torch("mambavision_micro", weights, **{**TINY, "depths": (1, 2)})
    check_that_no_block_is_skipped(model, weights, images(2))


@pytest.mark.slow
def test_the_whole_pipeline_with_several_windows_per_map():
    """Generation and quantisation need nothing of the family: windows, attention and convolutions are covered."""
    config = dict(img_size=48, dim=8, in_dim=8, depths=(1, 2, 2), num_heads=(2, 2, 2), conv_levels=1)
    model = natural_model("mambavision_micro", window_size=(2, 2, 2), **config)
    settings = GenConfig(num_images=3, batch_size=3, iterations=2, contrastive=1.0, positives=2, neighbourhood=3)
    images = generate_images(model, settings, jax.random.key(0)).images
    assert bool(jnp.isfinite(images).all())
    low, report = quantize(model, images, QuantConfig.preset("w8a8", tune_epochs=0, batch_size=2))
    assert {site.path for site in report.sites} == sites_of(model)
    assert all(np.isfinite(site.sqnr_db) and 0 <= site.outlier_rate < 1 for site in report.sites)
    assert sqnr_db(model(images), low(images)) > 15
    whole, alone = jax.jit(low.__call__)(images)[1:2], jax.jit(low.__call__)(images[1:2])
    np.testing.assert_allclose(alone, whole, rtol=0, atol=BATCHED_FLOAT * float(jnp.abs(whole).max()))
