"""ViT and DeiT: variants against a float64 reference, conversion, generation, quantisation."""

import json
import re
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
from safetensors.numpy import save_file
from tolerances import PARITY, REORDERED
from vit_reference import forward, random_weights

from ouromamba_jax import GenConfig, QuantConfig, generate_images, quantize
from ouromamba_jax.convert import ConversionError, from_torch, load_tensors, matching_models
from ouromamba_jax.convert.vit import fill_vit
from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.models import create_model, list_models, model_config, pure
from ouromamba_jax.models.layers import Operand
from ouromamba_jax.quantize.sites import iter_sites

ROOT = Path(__file__).parents[1] / "golden"
DEIT3_A = dict(img_size=32, patch_size=8, embed_dim=40, depth=2, num_heads=5, num_classes=7)
DEIT3_A |= dict(no_embed_class=True, init_values=1e-6)
PUBLISHED = {
    f"{family}_{size}{distilled}": f"{family}_{size}{distilled}_patch16_224"
    for family in ("deit", "deit3", "vit")
    for size in ("tiny", "small", "base")
    for distilled in ("", "_distilled")
    if (family, size) != ("deit3", "tiny") and not (distilled and family != "deit")
}
SHAPE = dict(img_size=(12, 16), patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=7, mlp_ratio=2.3)
"""Maps of 3 x 4 patches; 27 hidden channels, of 27.6."""
# Config fields, and what the reference must be told of the same; its names follow from the fields.
UNSEEN = {
    "distilled": dict(distilled=True),
    "registers without positions": dict(reg_tokens=3, no_embed_class=True, init_values=1e-5, num_heads=2),
    "distilled with registers": dict(distilled=True, reg_tokens=2, qk_norm=True),
    "mean of the patches": dict(global_pool="avg", reg_tokens=2, qkv_bias=False),
    "mean of all tokens": dict(global_pool="avg", pool_include_prefix=True, reg_tokens=1),
    "norm before the mean": dict(global_pool="avg", fc_norm=False, pre_norm=True, norm_eps=1e-5),
    "norm after the token": dict(fc_norm=True, num_heads=1),
    "no class token": dict(global_pool="avg", class_token=False, qk_norm=True, img_size=(20, 4)),
}


def manifest(name: str) -> dict:
    return json.loads((ROOT / "manifests" / f"{PUBLISHED[name]}.json").read_text())


def weights_of(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights with the published names for a model of this config."""
    return random_weights(
        np.random.default_rng(seed),
        patch=config.patch_size,
        patches=config.grid[0] * config.grid[1],
        dim=config.embed_dim,
        depth=config.depth,
        heads=config.num_heads,
        classes=config.num_classes,
        hidden=config.hidden_dim,
        tokens=(int(config.class_token), int(config.distilled), config.reg_tokens),
        no_embed_class=config.no_embed_class,
        pre_norm=config.pre_norm,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        layer_scale=config.init_values is not None,
        last_norm="norm" if config.norm_before_pooling else "fc_norm",
    )


def refusal(name: str, source, **options) -> str:
    with pytest.raises(ConversionError) as caught:
        from_torch(name, source, **options)
    return str(caught.value)


@pytest.mark.parametrize("case", UNSEEN)
def test_what_the_goldens_do_not_show(case):
    fields = {**SHAPE, **UNSEEN[case]}
    config = model_config("deit_tiny", **fields)
    weights = weights_of(config, seed=len(case))
    images = np.random.default_rng(1).standard_normal((2, 3, *config.img_size)).astype(np.float32)
    expected, blocks, attention = forward(
        weights,
        images,
        heads=config.num_heads,
        pool=config.global_pool,
        pool_prefix=config.pool_include_prefix,
        no_embed_class=config.no_embed_class,
        eps=config.norm_eps,
    )
    model = from_torch("deit_tiny", weights, **fields)
    logits, trace = jax.jit(lambda x: model.trace(x))(jnp.asarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=PARITY * max(1.0, np.abs(expected).max()))
    assert len(trace.layers) == len(blocks) == 2
    for layer, (update, probs) in zip(trace.layers, attention, strict=True):
        np.testing.assert_allclose(layer.attention, probs, rtol=0, atol=PARITY)
        np.testing.assert_allclose(layer.mixer_out, update, rtol=0, atol=PARITY * max(1.0, np.abs(update).max()))
        patches = layer.order.to_image(layer.mixer_out)
        np.testing.assert_array_equal(patches, layer.mixer_out[:, -(config.grid[0] * config.grid[1]) :])
    assert (trace.features.ndim == 3) == config.distilled


@pytest.mark.parametrize("case", UNSEEN)
def test_tensors_tell_the_fields(case):
    """All but these, and of maps that are not square also the input size and whose the positions are."""
    config = model_config("deit_tiny", **{**SHAPE, **UNSEEN[case]})
    weights = weights_of(config)
    untold = ("img_size", "no_embed_class", "num_heads", "norm_eps", "pool_include_prefix", "fc_norm")
    nearest, found = matching_models(weights)[0]
    model = from_torch(nearest, weights, **{**found, **{field: getattr(config, field) for field in untold}})
    assert "embed_dim" in found
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == sum(w.size for w in weights.values())


def test_every_published_name_has_its_manifest():
    assert set(PUBLISHED) | {"vit_micro"} == {n for n in list_models() if n.startswith(("deit", "vit"))}
    assert len(PUBLISHED) == 11
    for name in PUBLISHED:
        published, config = manifest(name), model_config(name)
        kwargs = published["kwargs"]
        for field in set(kwargs) & set(vars(config)):
            assert getattr(config, field) == kwargs[field], (name, field)
        evaluation = list(published["pretrained_cfg"].values())
        used = config.preprocessing
        means = {(tuple(e["mean"]), tuple(e["std"]), e["interpolation"]) for e in evaluation}
        assert (used.mean, used.std, used.interpolation) in means
        assert used.crop_pct in {e["crop_pct"] for e in evaluation}
        state = nnx.state(nnx.eval_shape(lambda name=name: create_model(name)))
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == published["n_params"]


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "base" not in n])
def test_every_key_of_every_manifest(name):
    """Tensors of one value each, so that large models take no memory."""
    rng = np.random.default_rng(3)
    shapes = manifest(name)["state_dict"]
    tensors = {key: np.broadcast_to(np.float32(rng.uniform(0.01, 0.1)), shape) for key, (shape, _) in shapes.items()}
    model = from_torch(name, tensors)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert len(leaves) == len(tensors)
    for path, key in (
        ("blocks.11.mixer.qkv.kernel", "blocks.11.attn.qkv.weight"),
        ("blocks.3.mlp.fc2.bias", "blocks.3.mlp.fc2.bias"),
        ("head.norm.scale", "norm.weight"),
    ):
        assert {float(leaves[path].min()), float(leaves[path].max())} == {float(tensors[key].flat[0])}
    found = matching_models(tensors)
    twin = {"deit": "vit", "vit": "deit"}.get(name.split("_")[0], "deit3")  # same tensors, other pixels
    assert {found[0][0], *(n for n, fields in found if not fields)} <= {name, f"{twin}_{name.split('_', 1)[1]}"}
    assert found[0][1] == {}
    some = [key for key in tensors if key.startswith("blocks.7.")]
    message = refusal(name, {key: value for key, value in tensors.items() if key not in some})
    assert all(f"{key} is missing" in message for key in some)


TINY = dict(SHAPE, distilled=True, reg_tokens=1, init_values=1e-5, qk_norm=True)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return weights_of(model_config("vit_micro", **TINY), seed=6)


@pytest.fixture(scope="module")
def tiny(weights) -> nnx.Module:
    return from_torch("vit_micro", weights, **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    return jax.jit(pure(tiny)[0])


def images(count: int = 3, size: tuple[int, int] = (12, 16)) -> jax.Array:
    return normal(0, (count, *size, 3))


def test_deit3_files_and_timms_are_the_same_model():
    tensors = load_tensors(ROOT / "models" / "deit3_a" / "checkpoint.pth")
    renamed = {re.sub(r"gamma_(\d)", r"ls\1.gamma", key): value for key, value in tensors.items()}
    assert set(renamed) != set(tensors)
    one, other = (from_torch("deit3_small", source, **DEIT3_A) for source in (tensors, renamed))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))
    twice = {**tensors, "blocks.1.ls1.gamma": tensors["blocks.1.gamma_1"]}
    message = refusal("deit3_small", twice, **DEIT3_A)
    assert "blocks.1.ls1.gamma and blocks.1.gamma_1 are the same parameter" in message


def test_every_key_is_needed_and_no_other(weights):
    model = nnx.eval_shape(lambda: create_model("vit_micro", **TINY))

    def problems(tensors: dict[str, np.ndarray]) -> set[str]:
        with pytest.raises(ConversionError) as caught:
            fill_vit(model, tensors)
        return set(str(caught.value).removesuffix(".").split("another copy: ")[1].split("; "))

    keys = [*weights]
    for start in range(0, len(keys), 20):  # a refusal lists that many
        some = keys[start : start + 20]
        without = {key: value for key, value in weights.items() if key not in some}
        assert {p for p in problems(without) if "interpolate" not in p} == {f"{key} is missing" for key in some}
        wrong = {key: np.zeros((*weights[key].shape[:-1], weights[key].shape[-1] + 1), np.float32) for key in some}
        assert {problem.split(" has shape ")[0] for problem in problems({**weights, **wrong})} == set(some)
    unknown = ("blocks.2.norm1.bias", "fc_norm.bias", "norm_pre.bias", "blocks.0.attn.qkv.scale", "pre_logits.fc.bias")
    assert problems({**weights, **dict.fromkeys(unknown, weights["norm.bias"])}) == {
        f"{key} is not part of this model" for key in unknown
    }


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("attn_pool.latent", "attention pooling"),
        ("blocks.0.attn.norm.weight", "another attention"),
        ("blocks.1.mlp.norm.weight", "another MLP"),
        ("blocks.1.attn.relative_position_bias_table", "relative positions"),
    ],
)
def test_other_transformers_are_refused_by_name(weights, key, what):
    message = refusal("vit_micro", {**weights, key: weights["norm.bias"]}, **TINY)
    assert what in message
    assert "this library does not build" in message


def test_other_families_are_named(weights):
    for prefix in ("", "module.", "_orig_mod.", "encoder."):
        wrapped = {prefix + key: value for key, value in weights.items()}
        assert "of the vit family" in refusal("vim_micro", wrapped, depth=1)
    assert "of the vim family" in refusal("deit_tiny", {"layers.0.mixer.D": np.zeros(3, np.float32)}, depth=1)


def test_the_difference_that_explains_most(weights):
    """Another number of tokens, and what a checkpoint's files say of what its tensors do not show."""
    message = refusal("vit_micro", weights, **{**TINY, "distilled": False})
    assert "distilled=True where vit_micro has distilled=False" in message
    message = refusal("vit_micro", weights, **{**TINY, "img_size": (24, 16)})
    assert "pass interpolate_positions=True" in message
    message = refusal("vit_micro", weights, **{**TINY, "depth": 3})
    assert "depth=2 where vit_micro has depth=3" in message


def test_what_a_hub_folder_says(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    says = tmp_path / "config.json"
    says.write_text(json.dumps({"architecture": "deit_tiny_distilled_patch16_224", "global_pool": "token"}))
    fields = {**TINY, "preprocessing": Preprocessing()}
    from_torch("vit_micro", tmp_path, **fields)  # which has three heads, as DeiT-Tiny
    message = refusal("vit_micro", tmp_path, **{**fields, "num_heads": 4})
    assert "architecture=deit_tiny_distilled_patch16_224, but vit_micro has num_heads=4" in message
    says.write_text(json.dumps({"model_args": {"global_pool": "map"}}))
    assert "global_pool=map, which this library does not build" in refusal("vit_micro", tmp_path, **TINY)


def test_heads_fresh_and_absent(weights, tiny):
    """A distilled model has two; without them it gives the mean of both tokens."""
    fresh = from_torch("vit_micro", weights, head="fresh", **{**TINY, "num_classes": 3})
    assert fresh.head.proj.kernel.shape == fresh.head.proj_dist.kernel.shape == (12, 3)
    assert np.std(fresh.head.proj.kernel[...] - fresh.head.proj_dist.kernel[...]) > 0.01
    without = from_torch("vit_micro", weights, **{**TINY, "num_classes": 0})
    x = images()
    features = jax.jit(without)(x)
    tokens = jax.jit(tiny.trace)(x)[1].features
    np.testing.assert_allclose(features, tokens.mean(1), rtol=0, atol=REORDERED)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(img_size=(224, 220)), "no multiple of patch_size 16"),
        (dict(num_heads=5), "no multiple of num_heads 5"),
        (dict(mlp_ratio=0.001), "leave a layer without channels"),
        (dict(class_token=False), "no token to classify"),
        (dict(distilled=True, global_pool="avg"), "classifies its first two tokens"),
        (dict(global_pool="map"), "it must be one of 'token', 'avg'"),
        (dict(fc_norm=3), "it must be True, False or None"),
        (dict(reg_tokens=-1), "whole numbers from 0"),
    ],
)
def test_configs_that_cannot_be(fields, says):
    with pytest.raises(ValueError, match=says):
        model_config("deit_tiny", **fields)


def test_no_mixing_of_samples_and_no_other_size(tiny, run):
    check_that_samples_do_not_mix(tiny, run, images())
    with pytest.raises(ValueError, match="another img_size"):
        tiny(images(1, (16, 16)))


def test_every_weight_is_used(tiny, run):
    """Any leaf of the model, changed, changes the logits; but what it adds to all keys, softmax takes away again."""
    x, state = images(), nnx.state(tiny)
    logits = run(state, x)
    leaves, structure = jax.tree.flatten(state)
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        changed = jax.tree.unflatten(
            structure, [*leaves[:i], leaves[i] + 0.5 * normal(i, leaf.shape), *leaves[i + 1 :]]
        )
        moved = float(jnp.abs(run(changed, x) - logits).max())
        assert (moved > 10 * REORDERED) != (path[-2:] == ("k_norm", "bias")), path


def test_saved_and_loaded(tiny, tmp_path):
    check_saved_and_loaded(tiny, tmp_path / "tiny")


def test_every_operand_of_attention_is_marked(tiny):
    points = {path for path, site in iter_sites(tiny) if isinstance(site, Operand)}
    assert points == {f"blocks.{i}.mixer.attention.{name}" for i in range(2) for name in ("q", "k", "v", "probs")}


def test_generated_quantised_and_saved(tmp_path):
    """Two iterations of generation, then W4A4 with every product covered, through a save and a load."""
    fields = {**TINY, "depth": 1}
    model = from_torch("vit_micro", weights_of(model_config("vit_micro", **fields)), **fields)
    settings = GenConfig(num_images=2, batch_size=2, iterations=2, positives=2, neighbourhood=3)
    made = generate_images(model, settings, jax.random.key(0))
    assert {"contrastive", "output"} <= set(made.history)
    assert bool(jnp.isfinite(made.images).all())
    low, report = quantize(model, made.images, QuantConfig.preset("w4a4", tune_epochs=0, scale_search="max"))
    sites = {site.path: site for site in report.sites}
    assert set(sites) == sites_of(model)
    assert not sites_of(low)
    for name in ("qkv", "proj", "attention.q", "attention.k", "attention.v", "attention.probs"):
        assert sites[f"blocks.0.mixer.{name}"].act_bits == 4
    assert sites["head.proj_dist"].weight_bits == sites["head.proj"].weight_bits == 8
    assert bool(jnp.isfinite(jax.jit(pure(low)[0])(nnx.state(low), made.images)).all())
    check_saved_and_loaded(low, tmp_path / "low")


@pytest.mark.slow
def test_no_block_is_skipped(weights, tiny):
    check_that_no_block_is_skipped(tiny, weights, images(2))


@pytest.mark.slow
def test_other_types(weights):
    check_other_types("vit_micro", weights, TINY, images())
