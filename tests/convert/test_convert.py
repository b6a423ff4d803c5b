"""Conversion: the official numbers come out, and a checkpoint that does not fit is refused by name."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from draws import normal
from flax import nnx
from positions_reference import bicubic
from tolerances import INTERPOLATION, PARITY

from ouromamba_jax.convert import ConversionError, from_torch, load_tensors
from ouromamba_jax.convert.keymap import Rule, fill
from ouromamba_jax.convert.vim import vim_rules
from ouromamba_jax.models import create_model, list_models, pure

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
VIM_A = dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3, num_classes=10)
MANIFESTS = {
    "vim_tiny": "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_small": "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_base": "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
    "vim_tiny_stride8": "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_small_stride8": "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
}


def manifest(name: str) -> dict:
    path = Path(__file__).parents[1] / "golden" / "manifests" / f"{MANIFESTS[name]}.json"
    return json.loads(path.read_text())


def synthesised(name: str, depth: int | None = None) -> dict[str, np.ndarray]:
    """Small random weights of a manifest's shapes, up to some depth."""
    rng = np.random.default_rng(3)
    return {
        key: rng.standard_normal(shape, np.float32) * np.float32(0.05)
        for key, (shape, dtype) in manifest(name)["state_dict"].items()
        if depth is None or not key.startswith("layers.") or int(key.split(".")[1]) < depth
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.mark.optimized
@pytest.mark.parametrize("file", ["checkpoint.pth", "model.safetensors"])
def test_vim_computes_the_official_numbers(golden, file):
    model = from_torch("vim_tiny", GOLDEN / file, **VIM_A)
    images = jnp.asarray(golden["input"]).transpose(0, 2, 3, 1)
    graphdef, state = nnx.split(model)
    logits, trace = jax.jit(lambda state, images: nnx.merge(graphdef, state).trace(images))(state, images)
    fn, state = pure(model)
    close = dict(rtol=0, atol=PARITY)
    np.testing.assert_allclose(jax.jit(fn)(state, images), golden["logits"], **close)
    np.testing.assert_allclose(logits, golden["logits"], **close)
    np.testing.assert_allclose(trace.features, golden["features"], **close)
    np.testing.assert_allclose(trace.tokens, golden["tokens_in"], **close)
    for i, layer in enumerate(trace.layers):
        np.testing.assert_allclose(layer.mixer_out, golden[f"block_{i}"], **close)
    for k, scan in enumerate(trace.layers[0].scans):
        for field, name in dict(u="x", delta="delta", A="A", B="B", C="C", y="y").items():
            np.testing.assert_allclose(getattr(scan, field), golden[f"mixer0_dir{k}_{name}"], **close)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_of_every_manifest(name):
    """Published shapes; two blocks stand for all here."""
    tensors = synthesised(name, depth=2)
    model = from_torch(name, tensors, depth=2)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == sum(v.size for v in tensors.values())
    rng = np.random.default_rng(len(name))
    for key in rng.choice(sorted(tensors), 4, replace=False):
        wrong = {k: v for k, v in tensors.items() if k != key}
        assert refusal(name, wrong, depth=2) == [f"{key} is missing"]
        shape = (*tensors[key].shape[:-1], tensors[key].shape[-1] + 1)
        wrong = {**tensors, key: np.zeros(shape, np.float32)}
        (problem,) = refusal(name, wrong, depth=2)
        assert problem.startswith(f"{key} has shape {shape}")
    for key in ("layers.2.norm.weight", "layers.0.mixer.D_c", "norm_f.weightx", "x\ny"):
        (problem,) = refusal(name, {**tensors, key: tensors["norm_f.weight"]}, depth=2)
        assert problem == f"{key.encode('unicode_escape').decode()} is not part of this model"


def refusal(name: str, tensors: dict[str, np.ndarray], **overrides) -> list[str]:
    """The problems that the error lists, after checking that it is one sentence with the right count."""
    with pytest.raises(ConversionError) as caught:
        from_torch(name, tensors, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    count = int(re.search(r"\((\d+) problems?\)", message)[1])
    listed = message.removesuffix(".").split("another copy: ")[1].split("; ")
    if count > 20:
        assert listed.pop() == f"and {count - 20} more"
        assert len(listed) == 20
    else:
        assert len(listed) == count
    return listed


@pytest.mark.parametrize("name", sorted(set(MANIFESTS) - {"vim_base"}))
def test_every_manifest_at_full_depth(name):
    model = from_torch(name, synthesised(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == manifest(name)["n_params"]


@pytest.mark.slow
def test_vim_base_runs_under_jit():
    fn, state = pure(from_torch("vim_base", synthesised("vim_base")))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == manifest("vim_base")["n_params"]
    images = normal(0, (1, 224, 224, 3))
    logits = jax.jit(fn)(state, images)
    assert logits.shape == (1, 1000)
    assert bool(jnp.isfinite(logits).all())


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / "checkpoint.pth")


def test_all_problems_come_at_once(tensors):
    wrong = dict(tensors)
    del wrong["cls_token"], wrong["layers.1.mixer.A_b_log"]
    wrong["extra"] = tensors["head.bias"]
    wrong["head.bias"] = np.zeros(11, np.float32)
    wrong["head.weight"] = tensors["head.weight"][None]
    wrong["pos_embed"] = tensors["pos_embed"][0]
    wrong["norm_f.weight"] = tensors["norm_f.weight"].astype(np.int64)
    wrong["layers.0.mixer.D_b"] = np.where(np.arange(96) == 5, np.nan, tensors["layers.0.mixer.D_b"])
    wrong["layers.0.mixer.D"] = tensors["layers.0.mixer.D"].astype(np.float64) * 1e300
    problems = refusal("vim_tiny", wrong, **VIM_A)
    expected = ["cls_token is missing", "layers.1.mixer.A_b_log is missing", "extra is not part of this model"]
    expected += [f"{k} has shape" for k in ("head.bias", "head.weight", "pos_embed")]
    expected += ["norm_f.weight has type int64", "layers.0.mixer.D_b has values", "layers.0.mixer.D has values"]
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start


def test_many_problems_are_counted(tensors):
    assert len(refusal("vim_tiny", tensors, **{**VIM_A, "embed_dim": 64})) == 20


def test_leaves_hold_the_weights_in_our_layout(tensors):
    """Kernels hold the transposed weight, value by value, and both directions keep their own half of the scan."""
    model = from_torch("vim_tiny", tensors, **VIM_A)
    mixer = model.blocks[1].mixer
    np.testing.assert_array_equal(mixer.in_proj.kernel[...], tensors["layers.1.mixer.in_proj.weight"].T)
    halves = [tensors["layers.1.mixer.A_log"], tensors["layers.1.mixer.A_b_log"]]
    np.testing.assert_array_equal(mixer.scan.A_log[...], np.concatenate(halves))
    np.testing.assert_array_equal(
        mixer.directions[1].conv.kernel[...], tensors["layers.1.mixer.conv1d_b.weight"][:, 0].T
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_are_cast(tensors, dtype):
    cast = {key: value.astype(dtype) for key, value in tensors.items()}
    model = from_torch("vim_tiny", cast, **VIM_A)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    expected = cast["head.bias"].astype(np.float32)
    np.testing.assert_array_equal(model.head.proj.bias[...], expected)


def test_param_dtype(tensors):
    model = from_torch("vim_tiny", tensors, param_dtype=jnp.bfloat16, **VIM_A)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


def test_the_model_keeps_its_own_copy(tensors):
    mine = {key: value.copy() for key, value in tensors.items()}
    model = from_torch("vim_tiny", mine, **VIM_A)
    for value in mine.values():
        value[...] = 0
    np.testing.assert_array_equal(model.head.proj.bias[...], tensors["head.bias"])
    np.testing.assert_array_equal(model.blocks[0].norm.scale[...], tensors["layers.0.norm.weight"])


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("vmamba", "layers.0.blocks.0.op.in_proj.weight"),
        ("mambavision", "levels.0.blocks.0.conv1.weight"),
        ("vit", "blocks.0.attn.qkv.weight"),
    ],
)
def test_another_family_is_named(family, key):
    with pytest.raises(ConversionError, match=f"of the {family} family"):
        from_torch("vim_tiny", {key: np.zeros((2, 3), np.float32), "head.weight": np.zeros((2, 3), np.float32)})


def test_names_and_fields_are_checked_first():
    with pytest.raises(ValueError, match="vim_tiny"):
        from_torch("vim_tinny", "no-such-file.pth")
    with pytest.raises(ValueError, match="widht"):
        from_torch("vim_tiny", "no-such-file.pth", widht=3)


def test_the_table_is_checked_too(tensors):
    """A leaf without a rule, a part without a rule, and two alternatives at once are errors, not zeros."""
    model = nnx.eval_shape(lambda: create_model("vim_tiny", **VIM_A))
    rules = vim_rules(model.config)
    without_bias = [rule for rule in rules if rule.key != "head.bias"]
    with pytest.raises(ConversionError, match=re.escape("no rule fills head.proj.bias")):
        fill(model, tensors, without_bias)
    half = [rule for rule in rules if rule.key != "layers.{i}.mixer.D_b"]
    with pytest.raises(ConversionError, match=re.escape("no rule fills blocks.2.mixer.scan.D of")):
        fill(model, tensors, half)
    alternatives = [*rules, Rule("classifier.bias", "head.proj.bias")]
    fill(model, tensors, alternatives)
    renamed = {("classifier.bias" if key == "head.bias" else key): value for key, value in tensors.items()}
    fill(model, renamed, alternatives)
    with pytest.raises(ConversionError, match=re.escape("head.bias and classifier.bias are the same parameter")):
        fill(model, {**tensors, "classifier.bias": tensors["head.bias"]}, alternatives)


def test_every_published_vim_has_a_manifest():
    assert set(list_models("vim_*")) - {"vim_micro"} == set(MANIFESTS)


def test_overlapping_patches_of_a_wide_image(tensors):
    """The patch matrix is the published convolution, also where patches overlap and the image is not square."""
    config = {**VIM_A, "img_size": (24, 40), "stride": 4}
    rng = np.random.default_rng(5)
    positions = rng.standard_normal((1, 5 * 9 + 1, 48), np.float32)
    model = from_torch("vim_tiny", {**tensors, "pos_embed": positions}, **config)
    images = jnp.asarray(rng.standard_normal((2, 24, 40, 3), np.float32))
    weight = jnp.asarray(tensors["patch_embed.proj.weight"])
    layout = ("NHWC", "OIHW", "NHWC")
    patches = jax.lax.conv_general_dilated(images, weight, (4, 4), "VALID", dimension_numbers=layout)
    expected = np.asarray(patches).reshape(2, 45, 48) + tensors["patch_embed.proj.bias"]
    expected = np.insert(expected, 22, tensors["cls_token"][0], axis=1) + positions
    np.testing.assert_allclose(model.stem(images), expected, rtol=0, atol=PARITY)


# --- positions of another input size


def with_positions(tensors: dict, patches: np.ndarray, class_position: np.ndarray) -> dict:
    rows = patches.reshape(-1, 48)
    return {**tensors, "pos_embed": np.insert(rows, len(rows) // 2, class_position, axis=0)[None]}


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("img_size", [32, (24, 40)])
def test_positions_of_the_same_size_are_kept(tensors, img_size, interpolate):
    rng = np.random.default_rng(6)
    source = tensors["pos_embed"] if img_size == 32 else rng.standard_normal((1, 3 * 5 + 1, 48), np.float32)
    config = {**VIM_A, "img_size": img_size}
    model = from_torch("vim_tiny", {**tensors, "pos_embed": source}, interpolate_positions=interpolate, **config)
    np.testing.assert_array_equal(model.stem.positions[...], source[0])


@pytest.mark.parametrize(
    ("source", "target"),
    [((3, 3), (5, 5)), ((6, 6), (4, 4)), ((4, 4), (3, 7)), ((2, 3), (4, 6)), ((3, 2), (9, 6)), ((1, 1), (2, 3))],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_positions_are_interpolated_as_torch_does(tensors, source, target, dtype):
    """Bicubic, a = -0.75, no antialiasing, from its definition; the class token's position moves only."""
    rng = np.random.default_rng(7)
    class_position, field = rng.standard_normal(48).astype(dtype), rng.standard_normal((*source, 48)).astype(dtype)
    wrong = with_positions(tensors, field, class_position)
    config = {**VIM_A, "img_size": (8 * target[0], 8 * target[1])}
    model = from_torch("vim_tiny", wrong, interpolate_positions=True, **config)
    positions = np.asarray(model.stem.positions[...])
    middle = target[0] * target[1] // 2
    np.testing.assert_array_equal(positions[middle], class_position.astype(np.float32))
    grid = np.delete(positions, middle, axis=0).reshape(*target, 48)
    np.testing.assert_allclose(grid, bicubic(field, target), rtol=0, atol=INTERPOLATION)


def test_interpolated_positions_keep_rows_and_columns_apart(tensors):
    """A field that varies along rows only stays constant along columns, also where the grid becomes wide."""
    field = np.random.default_rng(9).standard_normal((4, 1, 48), np.float32)
    wrong = with_positions(tensors, np.broadcast_to(field, (4, 4, 48)), np.zeros(48, np.float32))
    model = from_torch("vim_tiny", wrong, interpolate_positions=True, **{**VIM_A, "img_size": (40, 64)})
    grid = np.delete(np.asarray(model.stem.positions[...]), 20, axis=0).reshape(5, 8, 48)
    np.testing.assert_allclose(grid, np.broadcast_to(grid[:, :1], grid.shape), rtol=0, atol=INTERPOLATION)
    assert np.std(grid[:, 0], axis=0).min() > 0.1


def test_positions_are_not_interpolated_silently(tensors):
    """The refusal names the flag, but only where the flag helps."""
    config = {**VIM_A, "img_size": 48}
    hint = r"pos_embed has shape.*; pass interpolate_positions=True \(--interpolate-positions .*\) to resize"
    with pytest.raises(ConversionError, match=hint) as caught:
        from_torch("vim_tiny", tensors, **config)
    assert str(caught.value).count(". ") == 0
    assert "(1 problem)" in str(caught.value)
    model = from_torch("vim_tiny", tensors, interpolate_positions=True, **config)
    assert model(jnp.asarray(np.random.default_rng(1).standard_normal((1, 48, 48, 3), np.float32))).shape == (1, 10)
    for wrong in (tensors["pos_embed"][0], tensors["pos_embed"][..., :-1], tensors["pos_embed"].astype(np.int32)):
        (problem,) = refusal("vim_tiny", {**tensors, "pos_embed": wrong}, interpolate_positions=True, **config)
        assert problem.startswith("pos_embed has")
    without = {key: value for key, value in tensors.items() if key != "pos_embed"}
    assert refusal("vim_tiny", without, **config) == ["pos_embed is missing"]
    assert refusal("vim_tiny", without, interpolate_positions=True, **config) == ["pos_embed is missing"]


@pytest.mark.parametrize(
    ("patches", "img_size"), [(12, 32), (20, 32), (13, (24, 40)), (30, (24, 72)), (0, 32), (2, 48)]
)
def test_positions_of_an_unknown_grid(tensors, patches, img_size):
    positions = np.random.default_rng(4).standard_normal((1, patches + 1, 48), np.float32)
    with pytest.raises(ConversionError, match=rf"pos_embed has {patches} positions beside the class token.*img_size"):
        from_torch(
            "vim_tiny",
            {**tensors, "pos_embed": positions},
            interpolate_positions=True,
            **{**VIM_A, "img_size": img_size},
        )


def test_positions_that_are_not_finite_are_refused_after_interpolation(tensors):
    positions = tensors["pos_embed"].astype(np.float64)
    positions[0, 3, 5] = 1e300
    wrong = {**tensors, "pos_embed": positions}
    (problem,) = refusal("vim_tiny", wrong, interpolate_positions=True, **{**VIM_A, "img_size": 40})
    assert problem.startswith("pos_embed has values that are not finite")
