"""VMamba: the official numbers against a float64 reference; conversion; quantisation."""

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
from tiers import slow
from tolerances import BATCHED_FLOAT, PARITY, REORDERED, VMAMBA_SCAN
from vssm_reference import forward, random_weights

from ouromamba_jax import quantize
from ouromamba_jax.checkpoint import load, save
from ouromamba_jax.convert import ConversionError, from_torch, load_tensors
from ouromamba_jax.convert.keymap import fill
from ouromamba_jax.convert.vmamba import vmamba_rules
from ouromamba_jax.models import ScanOrder, create_model, list_models, model_config, pure
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.coverage import check_coverage
from ouromamba_jax.quantize.sites import iter_sites

ROOT = Path(__file__).parents[1] / "golden"
GOLDEN = ROOT / "models" / "vmamba_a"
VMAMBA_A = dict(img_size=64, dims=8, depths=(1, 1, 2, 1), num_classes=10)
MANIFESTS = {
    "vmamba_tiny_s1l8": "vssm1_tiny_0230s",
    "vmamba_small_s1l20": "vssm1_small_0229s",
    "vmamba_base_s1l20": "vssm1_base_0229s",
    "vmamba_tiny_s2l5": "vssm_tiny_0230",
    "vmamba_small_s2l15": "vssm_small_0229",
    "vmamba_base_s2l15": "vssm_base_0229",
}
# (height, width), dims, depths, ssm_ratio, d_state, mlp_ratio; maps of every stage odd on some axis, down to one row.
UNSEEN = {
    "wide scans": ((20, 27), (8, 18), (1, 2), 2.0, 1, 4.0),
    "several states": ((33, 9), (12, 20), (1, 1), 1.0, 3, 2.5),
    "one row": ((3, 64), (34,), (1,), 1.5, 2, 4.0),
}


def manifest(name: str) -> dict:
    return json.loads((ROOT / "manifests" / f"{MANIFESTS[name]}.json").read_text())


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def as_tokens(x: np.ndarray) -> np.ndarray:
    return channels_last(x).reshape(len(x), -1, x.shape[1])


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_tensors(GOLDEN / "checkpoint.pth")


def test_both_files_hold_the_same(tensors):
    stored = load_tensors(GOLDEN / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(stored[key], value)


@pytest.mark.parametrize("case", ["several states", *slow("wide scans", "one row")])
def test_what_the_golden_does_not_show(case):
    """Wide scans, several states, maps that are not square and not even, other depths: against float64 loops."""
    size, dims, depths, ratio, states, mlp_ratio = UNSEEN[case]
    rng = np.random.default_rng(len(case))
    fields = dict(dims=dims, depths=depths, mlp_ratio=mlp_ratio)
    weights = random_weights(rng, ratio=ratio, states=states, classes=7, **fields)
    images = rng.standard_normal((2, 3, *size)).astype(np.float32)
    expected, maps, scans = forward(weights, images)
    model = from_torch(
        "vmamba_tiny_s1l8", weights, img_size=size, ssm_ratio=ratio, d_state=states, num_classes=7, **fields
    )
    x = jnp.asarray(channels_last(images))
    logits, trace = jax.jit(lambda x: model.trace(x))(x)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=PARITY)
    assert {map_.shape[2:] for map_ in maps} == set(model.config.grids)
    for map_, layer, ys in zip(maps, trace.layers, scans, strict=True):
        for k, scan in enumerate(layer.scans):
            order = ScanOrder(*map_.shape[2:], transpose=k % 2 == 1, reverse=k >= 2)
            assert scan.order == order
            np.testing.assert_allclose(
                order.to_image(scan.y), as_tokens(ys[k]), rtol=0, atol=VMAMBA_SCAN * np.abs(ys[k]).max()
            )


def test_every_published_vmamba_has_its_manifest():
    assert set(list_models("vmamba_*")) - {"vmamba_micro"} == set(MANIFESTS)
    for name in MANIFESTS:
        config, published = model_config(name), manifest(name)
        kwargs = published["kwargs"]
        assert (config.img_size, config.dims, list(config.depths)) == (224, kwargs["dims"], kwargs["depths"])
        assert (config.ssm_ratio, config.d_state, config.mlp_ratio, config.num_classes) == (
            kwargs["ssm_ratio"], kwargs["ssm_d_state"], kwargs["mlp_ratio"], kwargs["num_classes"],
        )  # fmt: skip
        state = nnx.state(nnx.eval_shape(lambda name=name: create_model(name)))
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == published["n_params"]


def synthesised(name: str) -> dict[str, np.ndarray]:
    """Small random weights of a manifest's shapes."""
    rng = np.random.default_rng(3)
    return {
        key: rng.standard_normal(shape, np.float32) * np.float32(0.05)
        for key, (shape, _) in manifest(name)["state_dict"].items()
    }


def problems_of(name: str, tensors: dict[str, np.ndarray], **overrides) -> set[str]:
    """What the refusal lists."""
    with pytest.raises(ConversionError) as caught:
        from_torch(name, tensors, **overrides)
    return listed(caught.value)


def listed(error: ConversionError) -> set[str]:
    """The problems that a refusal names; a tensor that fills several leaves may be named once for each."""
    return set(str(error).removesuffix(".").split("another copy: ")[1].split("; "))


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", *slow(*list(MANIFESTS)[1:])])
def test_every_key_of_every_manifest(name):
    tensors = synthesised(name)
    model = from_torch(name, tensors)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == manifest(name)["n_params"]
    last = len(model.blocks) - 1
    np.testing.assert_array_equal(model.blocks[last].mlp.fc1.bias[...], tensors["layers.3.blocks.1.mlp.fc1.bias"])


@pytest.mark.slow
def test_every_key_is_needed_and_no_other():
    fields = dict(dims=(4, 6), depths=(1, 2), mlp_ratio=2.0)
    tensors = random_weights(np.random.default_rng(1), ratio=1.0, states=1, classes=5, **fields)
    model = nnx.eval_shape(lambda: create_model("vmamba_micro", num_classes=5, **fields))
    rules = vmamba_rules(model.config)

    def problems(tensors: dict[str, np.ndarray]) -> set[str]:
        with pytest.raises(ConversionError) as caught:
            fill(model, tensors, rules)
        return listed(caught.value)

    for key, value in tensors.items():
        assert problems({k: v for k, v in tensors.items() if k != key}) == {f"{key} is missing"}
        for shape in {(*value.shape[:-1], value.shape[-1] + 1), (value.shape[0] + 1, *value.shape[1:])}:
            (problem,) = problems({**tensors, key: np.zeros(shape, np.float32)})
            assert problem.startswith(f"{key} has shape {shape}")
    for key in (
        "layers.0.blocks.1.norm.weight",
        "layers.1.blocks.2.norm.weight",
        "layers.1.downsample.1.bias",
        "layers.1.blocks.0.op.in_proj.bias",
        "layers.2.blocks.0.norm.weight",
        "layers.0.blocks.0.op.conv2d.bias",
        "pos_embed",
        "patch_embed.1.weight",
    ):
        extra = {**tensors, key: tensors["classifier.head.bias"]}
        assert problems(extra) == {f"{key} is not part of this model"}


def test_weights_of_another_rank(tensors):
    """Linear layers over maps may be stored as 1x1 convolutions, as the official loader allows; nothing else may."""
    linear2d = [k for k in tensors if re.search(r"(in_proj|out_proj|fc1|fc2)\.weight", k)]
    assert len(linear2d) == 20
    mixed = {k: v[:, :, None, None] if k in linear2d else v for k, v in tensors.items()}
    loaded, model = (from_torch("vmamba_tiny_s1l8", source, **VMAMBA_A) for source in (mixed, tensors))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    for key in ("classifier.head.weight", "layers.0.blocks.0.op.x_proj_weight"):
        wrong = {**tensors, key: tensors[key][..., None, None]}
        (problem,) = problems_of("vmamba_tiny_s1l8", wrong, **VMAMBA_A)
        assert problem.startswith(f"{key} has shape")
    key = linear2d[0]
    for pad in ([(0, 0), (0, 0), (1, 1), (1, 1)], [(0, 1), (0, 0), (0, 0), (0, 0)]):
        (problem,) = problems_of("vmamba_tiny_s1l8", {**mixed, key: np.pad(mixed[key], pad)}, **VMAMBA_A)
        assert problem.startswith(f"{key} has shape")


def test_older_names_and_prefixes(tensors):
    """The names that VSSM's loader renames, and the prefix of data-parallel training."""
    old = {}
    for key, value in tensors.items():
        for new, name in (
            ("patch_embed.0.", "patch_embed.proj."),
            ("patch_embed.2.", "patch_embed.norm."),
            ("classifier.", ""),
        ):
            if key.startswith(new):
                key = name + key.removeprefix(new)
        key = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", key)
        old["module." + re.sub(r"(blocks\.\d+)\.op\.", r"\1.self_attention.", key)] = value
    assert {"module.head.bias", "module.norm.weight", "module.layers.2.blocks.1.ln_1.bias"} < set(old)
    renamed, model = (from_torch("vmamba_tiny_s1l8", source, **VMAMBA_A) for source in (old, tensors))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(renamed), nnx.state(model))
    both = {**tensors, "layers.1.blocks.0.ln_1.bias": tensors["layers.1.blocks.0.norm.bias"]}
    (problem,) = problems_of("vmamba_tiny_s1l8", both, **VMAMBA_A)
    assert "layers.1.blocks.0.norm.bias and layers.1.blocks.0.ln_1.bias are the same parameter" in problem


def test_another_family_is_named(tensors):
    with pytest.raises(ConversionError, match="of the vmamba family"):
        from_torch("vim_tiny", tensors)
    with pytest.raises(ConversionError, match="of the vim family"):
        from_torch("vmamba_micro", {"layers.0.mixer.D": np.zeros(3, np.float32)})


def test_directions_keep_their_own_weights(tensors):
    model = from_torch("vmamba_tiny_s1l8", tensors, **VMAMBA_A)
    mixer, name = model.blocks[3].mixer, "layers.2.blocks.1.op"  # the fourth block is the second of the third stage
    for k, direction in enumerate(mixer.directions):
        np.testing.assert_array_equal(direction.x_proj.kernel[...], tensors[f"{name}.x_proj_weight"][k].T)
        np.testing.assert_array_equal(direction.dt_proj.kernel[...], tensors[f"{name}.dt_projs_weight"][k].T)
    np.testing.assert_array_equal(mixer.scan.dt_bias[...], tensors[f"{name}.dt_projs_bias"].reshape(-1))


TINY = dict(img_size=(9, 20), dims=(6, 10), depths=(1, 1), num_classes=5)
"""Grids of 3 x 5 and 2 x 3: two windows of the outlier list, and less than one."""


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return random_weights(rng, dims=(6, 10), depths=(1, 1), ratio=1.0, states=1, mlp_ratio=4.0, classes=5)


@pytest.fixture(scope="module")
def tiny(weights):
    return from_torch("vmamba_micro", weights, **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    """Logits of `tiny` for given weights, compiled once."""
    return jax.jit(pure(tiny)[0])


def images(count: int = 3, size: tuple[int, int] = (9, 20), seed: int = 0) -> jax.Array:
    return normal(seed, (count, *size, 3))


def test_the_micro_preset():
    config = model_config("vmamba_micro")
    assert config.grids == ((8, 8), (4, 4))
    state = nnx.state(nnx.eval_shape(lambda: create_model("vmamba_micro")))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 250_000


def test_any_size_and_no_mixing_of_samples(tiny, run):
    check_that_samples_do_not_mix(tiny, run, images())
    fn, state = pure(tiny)
    assert bool(jnp.isfinite(run(state, images(1, (1, 1)))).all())
    for size in ((4, 31), (17, 6)):
        assert jax.eval_shape(fn, state, images(2, size)).shape == (2, 5)
    with pytest.raises(ValueError, match=re.escape("(3, 9, 20, 4)")):
        tiny(jnp.zeros((3, 9, 20, 4)))


@pytest.mark.slow
def test_every_weight_is_used(weights, tiny, run):
    """Any tensor of the checkpoint, changed, changes the logits."""
    x = images()
    logits = run(nnx.state(tiny), x)
    rng = np.random.default_rng(8)
    for key, value in weights.items():
        changed = {**weights, key: value + rng.standard_normal(value.shape, np.float32) * np.float32(0.5)}
        moved = jnp.abs(run(nnx.state(from_torch("vmamba_micro", changed, **TINY)), x) - logits)
        assert float(moved.max()) > 10 * REORDERED, key


@pytest.mark.slow
def test_other_types(weights):
    check_other_types("vmamba_micro", weights, TINY, images())


def test_lists_are_as_good_as_tuples_and_nonsense_is_refused():
    assert model_config("vmamba_micro", depths=[1, 2], dims=[8, 24]).widths == (8, 24)
    assert hash(model_config("vmamba_micro", depths=[1, 2])) == hash(model_config("vmamba_micro", depths=(1, 2)))
    for wrong, match in ((dict(depths=(2, 0)), "depths"), (dict(dims=(8,)), "dims"), (dict(img_size=0), "img_size")):
        with pytest.raises(ValueError, match=match):
            model_config("vmamba_micro", **wrong)


def test_saved_and_loaded(tiny, tmp_path):
    check_saved_and_loaded(tiny, tmp_path / "tiny")


def test_every_matmul_is_a_site(tiny):
    """Nothing multiplies matrices outside of linear layers and scans, so `quantize` covers the model without help."""
    x = jax.ShapeDtypeStruct((1, 9, 20, 3), jnp.float32)
    for name, stage in tiny.stages:
        check_coverage(stage, x, name)
        x = jax.eval_shape(stage, x)
    kinds = [type(site) for _, site in iter_sites(tiny)]
    assert kinds.count(nnx.Linear) == 2 + 2 * (4 + 4 * 2) + 1 + 1
    assert kinds.count(SelectiveScan) == 2


@pytest.mark.slow
def test_no_block_is_skipped():
    fields = dict(dims=(6,), depths=(2,), mlp_ratio=2.0)
    weights = random_weights(np.random.default_rng(9), ratio=1.0, states=1, classes=5, **fields)
    model = from_torch("vmamba_micro", weights, img_size=(9, 20), num_classes=5, **fields)
    check_that_no_block_is_skipped(model, weights, images(2))


@pytest.mark.slow
def test_quantised_whole(tmp_path):
    """No branch for this family: every matmul and scan is a site, none is left out, and samples do not mix."""
    x = images(4)
    tiny = create_model("vmamba_micro", rngs=nnx.Rngs(4), **TINY)
    low, report = quantize(tiny, x, QuantConfig.preset("w4a4", tune_epochs=1))
    assert {site.path for site in report.sites} == sites_of(tiny)
    assert not [path for path, _, reason in report.kept_float if reason != "not a matmul"]
    expected, logits = tiny(x), low(x)
    noise = jnp.sum((logits - expected) ** 2) / jnp.sum(expected**2)
    assert 0 < float(noise) < 0.3
    np.testing.assert_allclose(low(x[2:3]), logits[2:3], rtol=0, atol=BATCHED_FLOAT * float(jnp.abs(logits).max()))
    with pytest.raises(ValueError, match="calibrated at"):
        low(images(1, (20, 20)))
    save(tmp_path / "low", low)
    np.testing.assert_array_equal(load(tmp_path / "low")(x), logits)
