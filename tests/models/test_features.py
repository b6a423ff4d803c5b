"""Feature maps of every family: what the stages give by hand, at other sizes, quantised, under jit and grad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from draws import normal
from flax import nnx
from tiny_models import random_model

import ouromamba_jax as om
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.models import build_model
from ouromamba_jax.models.base import apply_stage
from ouromamba_jax.models.positions import resize_positions

# No map is square, a stage has two blocks; MambaVision's maps are padded to windows of 4.
FIELDS = {
    "vim": {**tiny_models.TINY, "depth": 2},
    "vmamba": dict(img_size=(20, 12), dims=(8, 12), depths=(2, 1), num_classes=3),
    "mambavision": tiny_models.FAMILIES["mambavision"],
    "vit": {**tiny_models.FAMILIES["vit"], "depth": 2, "reg_tokens": 2},
}
ENDS = {"vim": (0, 1), "vmamba": (1, 2), "mambavision": (0, 2), "vit": (0, 1)}
OTHER_SIZE = {"vim": (22, 13), "vmamba": (13, 26), "mambavision": (28, 70), "vit": (20, 12)}


@pytest.fixture(scope="module", params=FIELDS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return random_model(f"{family}_micro", **FIELDS[family])


@pytest.fixture(scope="module")
def images(model):
    return normal(0, (2, *model.config.img_size, 3))


def by_hand(model, images):
    """The outputs of all blocks as maps."""
    maps, x = [], images
    for _, stage in model.stages[:-1]:
        x = apply_stage(*nnx.split(stage), x)
        maps.append(x if x.ndim == 4 else patches(model.config, x))
    return maps[1:]


def patches(config, x):
    kept = [t for t in range(x.shape[1]) if t not in config.class_indices]
    return x[:, np.asarray(kept)].reshape(len(x), *config.grid, -1)


def features(model, images, indices=None):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state).features(x, indices))(state, images)


def check_close(maps, expected):
    assert [x.dtype for x in maps] == [jnp.float32] * len(expected)
    for a, b in zip(maps, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_maps_are_the_outputs_of_the_stages(model, images, family):
    """In the order of their indices; by default all of them, of a Vim the last."""
    expected = by_hand(model, images)
    check_close(features(model, images, (-1, 0)), [expected[end] for end in (ENDS[family][-1], ENDS[family][0])])
    program = {i: str(jax.make_jaxpr(lambda x, i=i: model.features(x, i))(images)) for i in (None, (-1,), (0, 1), (0,))}
    assert program[None] == program[(-1,) if family in ("vim", "vit") else (0, 1)]
    assert len(program[(0,)]) < len(program[(0, 1)])  # later blocks are not computed
    for indices in ((2,), (0, -3)):
        with pytest.raises(ValueError, match=r"this model has maps 0 to 1\."):
            model.features(images, indices)


def for_size(model, size):
    """A model made for images of `size` with the parameters of `model`, its positions resized in float64."""
    other = nnx.eval_shape(lambda: build_model(dataclasses.replace(model.config, img_size=size)))
    state = nnx.state(model)
    if model.family in ("vim", "vit"):
        state["stem"]["positions"] = state["stem"]["positions"].replace(resized(model.config, other.config, model))
    return nnx.merge(nnx.graphdef(other), state)


def resized(before, after, model):
    if model.family == "vit":  # recorded in tests/golden
        return after.resize_positions(model.stem.positions[...], before.grid)
    positions, places = np.asarray(model.stem.positions[...], np.float64), (before.class_indices, after.class_indices)
    return jnp.asarray(resize_positions(positions, before.grid, after.grid, places).astype(np.float32))


def test_another_size_is_that_of_a_model_made_for_it(model, family):
    """MambaVision keeps its windows."""
    size = OTHER_SIZE[family]
    other, x = for_size(model, size), normal(1, (2, *size, 3))
    expected = by_hand(other, x)
    check_close(features(model, x, (0, 1)), [expected[end] for end in ENDS[family]])
    assert model.config.img_size == FIELDS[family]["img_size"]


def test_gradients_at_another_size_reach_parameters_and_images():
    """Of a Vim, its positions among them: the gradient at the other grid, brought back by the transposed resizing."""
    model, size = tiny_models.natural_model("vim_micro", **tiny_models.TINY), OTHER_SIZE["vim"]
    other, x = for_size(model, size), normal(1, (1, *size, 3))

    def loss(state, x, graphdef):
        model = nnx.merge(graphdef, state)
        if model.config.img_size != size:
            return jnp.sum(jnp.sin(model.features(x)[0]))
        return jnp.sum(jnp.sin(patches(model.config, model.blocks[0](model.stem(x)))))

    def gradients(model):
        graphdef, state = nnx.split(model)
        return jax.jit(jax.grad(lambda *args: loss(*args, graphdef), (0, 1)))(state, x)

    (got, to_images), (expected, expected_images) = gradients(model), gradients(other)
    check_close([to_images], [expected_images])
    places = model.config.class_indices, other.config.class_indices
    resizing = resize_positions(np.eye(model.config.num_tokens), model.config.grid, other.config.grid, places)
    positions = expected["stem"]["positions"]
    expected["stem"]["positions"] = positions.replace(jnp.asarray(resizing.T.astype(np.float32) @ positions[...]))
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True):
        assert path[0] == "head" or float(jnp.abs(b[...]).max()) > 0, path
        np.testing.assert_allclose(a[...], b[...], rtol=0, atol=1e-4 * float(jnp.abs(b[...]).max()), err_msg=str(path))


@pytest.mark.parametrize("class_token", ["first", "ends", "none"])
def test_class_tokens_are_left_out_wherever_they_stand(class_token):
    fields = {**tiny_models.TINY, "class_token": class_token, "positions": class_token == "ends"}
    model, x = random_model("vim_micro", **fields), normal(0, (1, 12, 16, 3))
    check_close(features(model, x), by_hand(model, x))
    assert jax.eval_shape(model.features, normal(0, (1, 20, 8, 3)))[0].shape == (1, 5, 2, 20)


@pytest.mark.parametrize(
    "family", ["vim", *(pytest.param(family, marks=pytest.mark.slow) for family in ("vmamba", "mambavision"))]
)
def test_quantised_models_give_maps_where_their_tokens_agree(family):
    low = tiny_models.quantised(om.QuantConfig(), family)
    size = low.config.img_size
    x = normal(0, (1, *size, 3))
    expected = by_hand(low, x)
    for a, b in zip(features(low, x), [expected[0], *expected[2:]], strict=True):
        # An entry on the edge between two levels may take either.
        assert np.isclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max())).mean() > 0.9
    turned = jax.eval_shape(low.features, x.swapaxes(1, 2))
    assert [y.shape for y in turned] == [y.swapaxes(1, 2).shape for y in (expected[0], *expected[2:])]
    if family != "mambavision":  # whose windows have as many tokens at any size
        with pytest.raises(ValueError, match="calibrated at"):
            jax.eval_shape(low.features, normal(0, (1, size[0] + 8, size[1] + 16, 3)))


def test_models_without_classes_give_their_features(family):
    model = random_model(f"{family}_micro", **{**FIELDS[family], "num_classes": 0})
    x = normal(0, (2, *model.config.img_size, 3))
    tokens = x
    for _, stage in model.stages[:-1]:
        tokens = apply_stage(*nnx.split(stage), tokens)
    out = predict(model, x)
    assert out.shape == (2, tokens.shape[-1])
    check_close([out], [model.head.features(tokens)])
    assert jax.eval_shape(model, x).shape == out.shape
    assert [y.shape[-1] for y in jax.eval_shape(model.features, x)][-1] == tokens.shape[-1]


@pytest.mark.slow
def test_models_without_classes_are_quantised():
    model = random_model("vim_micro", **{**tiny_models.TINY, "num_classes": 0})
    x = normal(0, (2, *model.config.img_size, 3))
    config = om.QuantConfig(scale_search="max", detection="none", tune_epochs=0)
    low, report = om.quantize(model, x, config)
    assert not any(site.path.startswith("head") for site in report.sites)
    assert predict(low, x).shape == (2, 20)


def test_images_that_are_none_are_refused(model, images, family):
    for wrong in (images[0], jnp.moveaxis(images, -1, 1)):
        with pytest.raises(ValueError, match="but this model takes"):
            model.features(wrong)
    if family == "vim":
        with pytest.raises(ValueError, match="smaller than one patch"):
            model.features(images[:, :3])
