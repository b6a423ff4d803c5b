"""Image generation: losses against plain loops, every switch, determinism, resumption and what goes wrong."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tolerances
from compiling import compilations
from draws import normal
from flax import nnx

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.gen import (
    GenConfig,
    contrastive_loss,
    generate_images,
    output_loss,
    patch_similarity_entropy,
    prior,
    run,
    total_variation,
)
from ouromamba_jax.gen.network import image_losses, patch_losses, split
from ouromamba_jax.models import create_model
from ouromamba_jax.quantize import QuantConfig

SMALL = GenConfig(
    num_images=4, batch_size=2, iterations=12, neighbourhood=3, positives=3, contrastive=0.5, checkpoint_every=5
)


@pytest.fixture(scope="module")
def model():
    model = create_model("vim_micro", rngs=nnx.Rngs(3), img_size=12, embed_dim=16, depth=2, d_state=4, num_classes=5)
    # At initialisation delta hardly depends on the token, and B and C are small; larger ones make the scans matter.
    for block in model.blocks:
        for direction in block.mixer.directions:
            direction.x_proj.kernel[...] = 5.0 * direction.x_proj.kernel[...]
            direction.dt_proj.kernel[...] = 5.0 * direction.dt_proj.kernel[...]
    return model


@pytest.fixture(scope="module")
def reference(model):
    return generate_images(model, SMALL, jax.random.key(1))


def naive_contrastive(features, grid, neighbourhood, positives, negatives, temperature):
    """The loss of one image as loops over tokens, float64; features (M, F)."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = unit @ unit.T
    per_token = []
    for t in range(len(features)):
        row, column = divmod(t, grid[1])
        near = [
            k
            for k in range(len(features))
            if k != t and max(abs(k // grid[1] - row), abs(k % grid[1] - column)) <= neighbourhood // 2
        ]
        chosen = sorted(near, key=lambda k: -similar[t, k])[:positives]  # stable: the first of equals
        pool = near if negatives == "neighbourhood" else [k for k in range(len(features)) if k != t]
        pushed = [np.exp(similar[t, k] / temperature) for k in pool if k not in chosen]
        if pushed:
            pulled = [np.exp(similar[t, k] / temperature) for k in chosen]
            losses = [-np.log(p / (p + sum(pushed))) for p in pulled]
            per_token.append(np.mean(losses) / np.log(1 + len(pushed)))
    return np.mean(per_token)


@pytest.mark.parametrize("negatives", ["neighbourhood", "all"])
@pytest.mark.parametrize(("grid", "neighbourhood", "positives"), [((3, 4), 3, 2), ((4, 5), 5, 12), ((2, 5), 3, 4)])
def test_contrastive_loss_equals_a_loop(grid, neighbourhood, positives, negatives):
    features = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], 3))
    options = {"neighbourhood": neighbourhood, "positives": positives, "negatives": negatives, "temperature": 0.3}
    loss = contrastive_loss(jnp.asarray(features, jnp.float32), grid=grid, **options)
    expected = [naive_contrastive(image, grid, *options.values()) for image in features]
    np.testing.assert_allclose(loss, expected, rtol=tolerances.CONTRASTIVE_LOSS)


@pytest.mark.parametrize("negatives", ["neighbourhood", "all"])
def test_ties_go_to_the_first_token(negatives):
    """Features of four directions only: most similarities tie, and who is chosen decides who is pushed away."""
    features = np.random.default_rng(0).integers(0, 2, size=(1, 12, 2)) * 2.0 - 1.0
    options = {"neighbourhood": 3, "positives": 3, "negatives": negatives, "temperature": 0.5}
    loss = contrastive_loss(jnp.asarray(features, jnp.float32), grid=(3, 4), **options)
    expected = naive_contrastive(features[0], (3, 4), *options.values())
    np.testing.assert_allclose(loss[0], expected, rtol=tolerances.CONTRASTIVE_LOSS)


@pytest.mark.parametrize("negatives", ["neighbourhood", "all"])
@pytest.mark.parametrize("grid", [(3, 4), (9, 8)])
def test_equal_similarities_cost_one_whatever_the_number_of_tokens(grid, negatives):
    features = jnp.tile(normal(0, (1, 1, 6)), (1, grid[0] * grid[1], 1))
    loss = contrastive_loss(features, grid=grid, neighbourhood=3, positives=2, negatives=negatives)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e8])
@pytest.mark.parametrize("loss", [lambda x: contrastive_loss(x, grid=(6, 6)), patch_similarity_entropy])
def test_patch_losses_have_finite_gradients_at_any_scale(loss, scale):
    features = scale * normal(0, (2, 36, 3))
    features = features.at[0, 5].set(0.0)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(loss(x)))(features)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert scale == 0.0 or np.any(gradient != 0)


def test_the_loss_alone_has_the_defaults_of_the_config():
    own = {name: p.default for name, p in inspect.signature(contrastive_loss).parameters.items()}
    names = ("neighbourhood", "positives", "negatives", "temperature")
    assert [own[name] for name in names] == [getattr(GenConfig(), name) for name in names]


def test_a_grid_without_negatives_is_refused():
    with pytest.raises(ValueError, match="no negatives"):
        contrastive_loss(jnp.ones((1, 4, 2)), grid=(2, 2), negatives="neighbourhood")
    with pytest.raises(ValueError, match="no negatives"):
        contrastive_loss(jnp.ones((1, 1, 2)), grid=(1, 1), negatives="all")


def test_patch_similarity_entropy_equals_a_loop():
    features = np.random.default_rng(2).normal(size=(5, 3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = (unit @ unit.T).ravel()
    at = np.linspace(similar.min(), similar.max(), 10)
    density = [np.mean(np.exp(-0.5 * ((x - similar) / 0.05) ** 2)) / (0.05 * np.sqrt(2 * np.pi)) for x in at]
    expected = sum(p * np.log(p) for p in density) * (at[1] - at[0])
    loss = patch_similarity_entropy(jnp.asarray(features, jnp.float32)[None])
    np.testing.assert_allclose(loss, [expected], rtol=1e-3)


def test_total_variation_by_hand():
    images = jnp.asarray([[0.0, 1.0], [3.0, 7.0]])[None, :, :, None] * jnp.ones((1, 1, 1, 3))
    np.testing.assert_allclose(total_variation(images), [(3 + 6) / 2 + (1 + 4) / 2])


def test_output_loss_is_the_cross_entropy():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]))
    np.testing.assert_allclose(output_loss(logits, jnp.asarray([0, 2])), -np.log([0.7, 0.3]), rtol=1e-5)


@pytest.fixture(scope="module")
def layer(model):
    images = normal(0, (2, 12, 12, 3))
    return jax.jit(lambda x: model.trace(x, collect=lambda h: h)[1].layers[1])(images)


@pytest.mark.parametrize(
    "switch",
    [
        {"pse": 1.0},
        {"contrastive": 0.0, "pse": 1.0},
        {"weighting": "uniform"},
        {"features": "attention"},
        {"neighbourhood": 5},
        {"positives": 2},
        {"negatives": "neighbourhood"},
        {"temperature": 0.5},
    ],
    ids=str,
)
def test_every_switch_changes_the_patch_losses(layer, switch):
    def total(layer, config):
        return sum(jnp.sum(value) * getattr(config, name) for name, value in patch_losses(layer, config, 2).items())

    config = dataclasses.replace(SMALL, **switch)
    value, gradient = jax.value_and_grad(total)(layer, config)
    assert abs(value - total(layer, SMALL)) > 1e-4 * abs(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient.scans[0].delta != 0) or np.any(gradient.scans[0].states != 0)


def test_attention_features_see_the_weighting(layer):
    config = dataclasses.replace(SMALL, features="attention")
    uniform = dataclasses.replace(config, weighting="uniform")
    delta, equal = (patch_losses(layer, c, 2)["contrastive"] for c in (config, uniform))
    assert np.all(np.abs(delta - equal) > 1e-4 * np.abs(delta))


@pytest.mark.parametrize(
    "switch",
    [
        {"contrastive": 1.0},
        pytest.param({"contrastive": 1.0, "features": "attention"}, marks=pytest.mark.slow),
        {"output": 1.0},
        {"pse": 1.0},
        {"total_variation": 1.0},
    ],
    ids=str,
)
def test_each_loss_alone_reaches_the_pixels_of_every_image(model, switch):
    off = dict.fromkeys(["contrastive", "output", "pse", "total_variation"], 0.0)
    config = dataclasses.replace(SMALL, **{**off, **switch})
    network, (stem, blocks, head) = split(model)
    network, weights = network._replace(blocks=network.blocks[:1]), (stem, blocks[:1], head)

    def total(images):
        losses = image_losses(network, weights, images, jnp.asarray([1, 4]), config)
        assert set(losses) == set(config.loss_names)
        return sum(jnp.sum(value) for value in losses.values())

    gradient = jax.jit(jax.grad(total))(normal(0, (2, 12, 12, 3)))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.mean(np.asarray(gradient) != 0, axis=(1, 2, 3)) > 0.5)


def test_an_image_has_the_losses_that_it_has_alone(model):
    images = normal(0, (2, 12, 12, 3))
    network, weights = split(model)
    config = dataclasses.replace(SMALL, pse=1.0)
    losses = jax.jit(lambda x, targets: image_losses(network, weights, x, targets, config))
    both = losses(images, jnp.asarray([1, 4]))
    alone = losses(images[1:], jnp.asarray([4]))
    for name, values in both.items():
        np.testing.assert_allclose(values[1:], alone[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "fields", "equal"),
    [
        ("vim_micro", dict(tiny_models.TINY, depth=3), [3]),
        pytest.param(
            "vmamba_micro",
            dict(tiny_models.FAMILIES["vmamba"], img_size=(24, 24), dims=(8, 16), depths=(2, 3)),
            [2, 1, 2],  # the first block of a stage halves the map
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equal_blocks_are_one_part_and_lose_what_each_does(name, fields, equal):
    model = tiny_models.natural_model(name, **fields)
    network, weights = split(model)
    assert [len(jax.tree.leaves(states)[0]) for states in weights[1]] == equal
    images = normal(0, (2, *image_shape(model.config)))
    config = dataclasses.replace(SMALL, pse=1.0)
    _, trace = model.trace(images, collect=lambda h: h)
    layers = [patch_losses(layer, config, 2) for layer in trace.layers]
    losses = image_losses(network, weights, images, jnp.asarray([1, 4]), config)
    for loss in ("contrastive", "pse"):
        by_hand = np.mean([layer[loss] for layer in layers if loss in layer], axis=0)
        np.testing.assert_allclose(losses[loss], by_hand, rtol=1e-4)


PLAIN = dataclasses.replace(SMALL, scales=1, chroma=1.0)
SHAPE = (64, 16, 24, 3)


def test_one_scale_and_full_chroma_are_white_noise_and_plain_adam():
    images = prior.noise(jax.random.key(0), SHAPE, PLAIN)
    assert abs(jnp.std(images) - 1) < 0.01
    assert abs(jnp.mean(images[..., 0] * images[..., 1])) < 0.02
    optimiser = prior.optimiser(PLAIN)
    gradient = normal(1, SHAPE)
    update, _ = optimiser.update(gradient, optimiser.init(images))
    np.testing.assert_allclose(update, -PLAIN.learning_rate * jnp.sign(gradient), rtol=1e-3)  # Adam's first step


def test_noise_and_updates_are_smooth_and_their_colours_agree():
    assert [shape[1:3] for shape in prior.pyramid_shapes(SHAPE, None)] == [(16, 24), (8, 12), (4, 6)]
    images = prior.noise(jax.random.key(0), SHAPE, SMALL)
    optimiser = prior.optimiser(SMALL)
    update, _ = optimiser.update(normal(1, SHAPE), optimiser.init(images))
    for x in (images, update):
        assert jnp.corrcoef(x[..., 0].ravel(), x[..., 1].ravel())[0, 1] > 0.8
        assert jnp.corrcoef(x[:, :, 1:].ravel(), x[:, :, :-1].ravel())[0, 1] > 0.5


@pytest.mark.parametrize(("scales", "chroma"), [(1, 1.0), (None, 0.2), (3, 0.0)])
def test_updates_descend(scales, chroma):
    config = dataclasses.replace(SMALL, scales=scales, chroma=chroma)
    optimiser = prior.optimiser(config)
    gradient = normal(1, (2, 9, 14, 3))
    update, _ = optimiser.update(gradient, optimiser.init(gradient))
    assert jnp.sum(update * gradient) < 0


def test_images_targets_and_history(model, reference):
    assert reference.images.shape == (4, 12, 12, 3)
    assert reference.images.dtype == jnp.float32
    assert reference.targets.tolist() == [0, 3, 1, 4]
    assert reference.targets.dtype == jnp.int32
    assert set(reference.history) == {"contrastive", "output", "total_variation", "total", "gradient"}
    assert all(values.shape == (2, 12) for values in reference.history.values())
    assert np.all(reference.history["total"][:, -1] < reference.history["total"][:, 0])
    weighted = sum(getattr(SMALL, name) * reference.history[name] for name in SMALL.loss_names)
    np.testing.assert_allclose(reference.history["total"], weighted, rtol=1e-5)


def test_pixels_stay_in_the_normalised_range_of_real_ones(reference):
    assert np.min(reference.images) == -1.0  # vim_micro: mean 0.5, std 0.5; some noise starts beyond the ends
    assert np.max(reference.images) == 1.0


def test_the_same_key_gives_the_same_bits_and_another_key_does_not(model, reference):
    again = generate_images(model, SMALL, jax.random.key(1))
    np.testing.assert_array_equal(again.images, reference.images)
    other = generate_images(model, SMALL, jax.random.key(2))
    assert np.all(np.any(np.asarray(other.images != reference.images), axis=(1, 2, 3)))


def test_a_full_batch_depends_on_the_key_alone(model):
    fewer, more = (
        generate_images(model, dataclasses.replace(SMALL, num_images=count), jax.random.key(1)) for count in (5, 6)
    )
    np.testing.assert_array_equal(fewer.images[:4], more.images[:4])


@pytest.mark.parametrize("committed", [False, True])
def test_one_compilation_serves_all_dispatches_batches_and_calls(model, reference, committed):
    if committed:  # as weights are that come from a checkpoint
        model = nnx.clone(model)
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    generate_images(model, SMALL, jax.random.key(0))
    with compilations() as compiled:
        generate_images(model, dataclasses.replace(SMALL, num_images=6), jax.random.key(1))
    assert not compiled


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("when", [5, 10, 12, 20])
def test_an_interrupted_run_continues_bit_for_bit(model, reference, tmp_path, when):
    def interrupt(iteration, total, losses):
        if iteration >= when:
            raise Interrupt

    with pytest.raises(Interrupt):
        generate_images(model, SMALL, jax.random.key(1), progress=interrupt, checkpoint_dir=tmp_path)
    seen = []
    report = lambda iteration, total, losses: seen.append(iteration)  # noqa: E731
    resumed = generate_images(model, SMALL, jax.random.key(1), progress=report, checkpoint_dir=tmp_path)
    assert seen[0] > when - 5  # what came before the last checkpoint was not done again
    np.testing.assert_array_equal(resumed.images, reference.images)
    for name, values in reference.history.items():
        np.testing.assert_array_equal(resumed.history[name], values, err_msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["generation.npz"]


def test_a_checkpoint_of_another_run_is_refused(model, tmp_path):
    generate_images(model, SMALL, jax.random.key(1), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another model, config or key"):
        generate_images(model, SMALL, jax.random.key(2), checkpoint_dir=tmp_path)
    other = nnx.clone(model)
    other.head.proj.bias[...] = other.head.proj.bias[...] + 1.0
    with pytest.raises(ValueError, match="another model, config or key"):
        generate_images(other, SMALL, jax.random.key(1), checkpoint_dir=tmp_path)
    (tmp_path / "generation.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz .* replace or delete it"):
        generate_images(model, SMALL, jax.random.key(1), checkpoint_dir=tmp_path)


def test_progress_sees_iterations_and_losses(model):
    seen = []
    generate_images(model, SMALL, jax.random.key(1), progress=lambda *report: seen.append(report))
    assert [(iteration, total) for iteration, total, _ in seen] == [(i, 24) for i in (5, 10, 12, 17, 22, 24)]
    assert all(np.isfinite(losses["total"]) for _, _, losses in seen)


def test_the_progress_bar_prints(model, capsys):
    generate_images(model, SMALL, jax.random.key(1), progress=True)
    assert "generating" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_its_iteration(model, monkeypatch):
    shifted = run._shifted

    def poisoned(images, key, config):
        # The key of iteration 7 of every batch: nothing else tells the iterations apart in here.
        iteration = jnp.argmax(jnp.all(keys == jax.random.key_data(key)[None], axis=1))
        return jnp.where(iteration == 7, jnp.nan, 1.0) * shifted(images, key, config)

    config = dataclasses.replace(SMALL, contrastive=0.0, temperature=0.11)  # a config that no other test compiles
    batch_key = jax.random.split(jax.random.fold_in(jax.random.key(1), 1))[1]
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(batch_key, i)) for i in range(12)])
    monkeypatch.setattr(run, "_shifted", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at iteration 7 of batch 0"):
        generate_images(model, config, jax.random.key(1))


def test_weights_that_are_not_finite_stop_at_once(model):
    broken = nnx.clone(model)
    broken.head.proj.bias[...] = broken.head.proj.bias[...] * jnp.nan
    with pytest.raises(FloatingPointError, match="output is not finite at iteration 0 of batch 0"):
        generate_images(broken, SMALL, jax.random.key(1))


def test_a_quantised_model_has_no_gradient():
    with pytest.raises(ValueError, match="the model is quantised, so its images have no gradient: generate them from"):
        generate_images(tiny_models.quantised(QuantConfig.preset("w4a4")), SMALL, jax.random.key(1))


def test_jitter_covers_all_shifts(model):
    images = normal(0, (2, 12, 12, 3))
    config = dataclasses.replace(SMALL, jitter=0.2)
    keys = jax.random.split(jax.random.key(1), 1000)
    augmented = jax.jit(jax.vmap(lambda key: run._shifted(images, key, config)))(keys)
    seen = {image.tobytes() for image in np.asarray(augmented)}
    assert len(seen) == 25  # 5 x 5
    still = dataclasses.replace(SMALL, jitter=0.0)
    np.testing.assert_array_equal(run._shifted(images, jax.random.key(0), still), images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"features": "states"}, "'readout' or 'attention'"),
        ({"contrastive": -1.0}, "contrastive is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chroma": 1.5}, "chroma is 1.5"),
        ({"jitter": -0.1}, "jitter is -0.1"),
        ({"scales": 0}, "scales is 0"),
        ({"neighbourhood": 4}, "odd side"),
        ({"neighbourhood": 3, "positives": 8, "negatives": "neighbourhood"}, "leave no negatives"),
        ({"contrastive": 0.0, "output": 0.0, "pse": 0.0, "total_variation": 0.0}, "every loss has weight 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GenConfig(**fields)
