"""The training script on a tiny model, and the checkpoint that it left in the package."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from script_modules import load_script

from ouromamba_jax.checkpoint import load, resolve
from ouromamba_jax.data import load_images
from ouromamba_jax.evaluation.metrics import top1
from ouromamba_jax.models import create_model, model_config, pure


@pytest.fixture(scope="module")
def script():
    return load_script("train")


@pytest.fixture(scope="module")
def striped(tmp_path_factory):
    """Two classes that a glance tells apart, as .npz of pixels; returns the path with {split}."""
    folder = tmp_path_factory.mktemp("striped")
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 40)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
        images[labels == 1, :, ::2] += 120
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return str(folder / "{split}.npz")


def tiny(script, striped, **changes):
    fields = {
        "data": striped,
        "epochs": 6,
        "batch_size": 16,
        "ema": 0.5,
        "dtype": "bfloat16",
        "overrides": (("img_size", 8), ("embed_dim", 16), ("depth", 1), ("d_state", 4), ("num_classes", 2)),
        "augmentation": script.Augmentation(shift=1, rotate=0, scale=0, flip=True, erase=0.2, fill="mirror"),
    }
    return script.TrainConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def trained(script, striped):
    return script.train(tiny(script, striped), progress=False)


def test_the_loss_falls(trained):
    model, metrics = trained
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.1
    assert min(metrics["train"], metrics["validation"], metrics["test"]) > 0.9
    assert model.dtype == jnp.bfloat16


def test_the_command_line_trains_the_same_model_again(trained, script, striped, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = f"train.py --data {striped} --out {out} --epochs 6 --batch-size 16 --ema 0.5 --dtype bfloat16"
    command += " --set img_size=8 embed_dim=16 depth=1 d_state=4 num_classes=2"
    command += " --shift 1 --rotate 0 --scale 0 --flip --erase 0.2 --fill mirror"
    monkeypatch.setattr("sys.argv", command.split())
    script.main()
    model, metrics = trained
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load(out)), nnx.state(model))
    record = json.loads((out / "training.json").read_text())
    assert record["metrics"]["test"] == metrics["test"]
    assert record["config"]["overrides"][1] == ["embed_dim", 16]
    assert record["command"].startswith("python train.py --data")
    assert f"test {metrics['test']:.2%}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already exists"):
        script.main()


SMALL = {
    "vim_micro": (("img_size", 8), ("embed_dim", 16), ("depth", 1), ("num_classes", 2)),
    "vmamba_micro": (("img_size", 16), ("dims", 8), ("depths", (1,)), ("num_classes", 2)),
    "mambavision_micro": (
        *(("img_size", 24), ("dim", 8), ("in_dim", 4), ("depths", (1, 2)), ("num_classes", 2)),
        *(("window_size", (8, 2)), ("num_heads", (1, 2))),
    ),
    "vit_micro": (("img_size", 8), ("embed_dim", 16), ("depth", 1), ("num_heads", 2), ("num_classes", 2)),
}
"""One block of every kind of each family."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmamba_micro", "mambavision_micro", "vit_micro"])
def test_other_families_learn_with_all_their_parameters(name, script, striped):
    config = tiny(
        script, striped, model=name, overrides=SMALL[name], limit=20, batch_size=9, epochs=1, weight_decay=0.0,
        dtype="float32", ema=0.0,
    )  # fmt: skip
    model, metrics = script.train(config, progress=False)  # two steps; the first has a learning rate of 0
    assert np.isfinite(metrics["loss"]).all()
    assert all(0 <= metrics[split] <= 1 for split in ("train", "validation", "test"))
    fresh = dict(nnx.to_flat_state(nnx.state(create_model(name, **dict(SMALL[name])))))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert np.abs(leaf[...] - fresh[path][...]).max() > 0, path


def test_sizes_of_stages_are_set_from_the_command_line(script, capsys):
    config, _ = script.parse(["--out", "out", "--model", "vmamba_micro", "--set", "dims=8", "--set", "depths=1,2"])
    assert config.overrides == (("dims", 8), ("depths", (1, 2)))
    with pytest.raises(SystemExit):
        script.parse(["--out", "out", "--set", "depths=1,two"])
    assert "--set depths=1,two is not FIELD=INT" in capsys.readouterr().err


@pytest.mark.parametrize("name", SMALL)
def test_only_matrices_and_convolutions_decay(name, script):
    state = nnx.state(nnx.eval_shape(lambda: create_model(name, **dict(SMALL[name]))))
    names = [".".join(map(str, key)) for key, _ in nnx.to_flat_state(state)]
    mask = dict(zip(names, jax.tree.leaves(script.decayed(state)), strict=True))
    kept = {name.rsplit(".", 1)[-1] for name, decays in mask.items() if not decays}
    extra = {"positions", "class_token"} if name in ("vim_micro", "vit_micro") else set()
    extra |= {"A_log", "D", "dt_bias"} if name != "vit_micro" else set()
    assert kept == {"bias", "scale"} | extra
    assert sum(mask.values()) == sum(name.endswith(".kernel") for name in mask) > 5


def test_augmentation_moves_pictures_and_keeps_their_range(script):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)), jnp.float32)
    black = jnp.full((3,), -1.0)
    still = script.Augmentation(shift=0, rotate=0, scale=0)
    np.testing.assert_allclose(script.augment(jax.random.key(0), images, still, black), images, atol=1e-6)
    moved = script.augment(jax.random.key(0), images, script.Augmentation(), black)
    assert moved.min() >= -1.0001
    assert moved.max() <= 1.0001
    assert float(jnp.mean(jnp.abs(moved - images))) > 0.1
    flipped = script.augment(
        jax.random.key(1), images, script.Augmentation(shift=0, rotate=0, scale=0, flip=True), black
    )
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    mirrored = [np.allclose(a, b[:, ::-1], atol=1e-5) for a, b in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < 8


def test_a_shift_moves_by_whole_pixels_and_fills_with_black(script):
    images = jnp.zeros((64, 9, 9, 3)).at[:, 4, 4].set(1.0)
    moved = script.augment(jax.random.key(0), images, script.Augmentation(shift=3, rotate=0, scale=0), -jnp.ones(3))
    mass = np.asarray(jnp.sum(jnp.clip(moved, 0, None), axis=(1, 2)))
    rows = np.asarray(jnp.argmax(jnp.max(moved[..., 0], axis=2), axis=1))
    assert rows.min() >= 1
    assert rows.max() <= 7
    assert len(set(rows.tolist())) >= 5
    assert np.all(mass > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "images.npz"}, "one split only; write {split} where"),
        (
            {"overrides": (("img_size", 8), ("num_classes", 1))},
            "labels up to 1, but vim_micro has 1 classes",
        ),
        ({"overrides": (("colour", 3),)}, "no config field colour"),
        pytest.param(
            {"learning_rate": 1e20, "clip_norm": 1e30},
            "not finite in epoch .*lower --learning-rate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors_are_one_sentence(script, striped, change, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        script.train(tiny(script, striped, **change), progress=False)


# --- the embedded checkpoints


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "vim_micro" else [])
        for name in SMALL
        if name != "vit_micro"  # which is not embedded
    ],
)
def test_embedded_models_read_the_digits(name):
    pytest.importorskip("sklearn")
    model = load(name)
    assert model.config == model_config(name)
    data = load_images("digits", "test", model.config.img_size, model.config.preprocessing)
    fn, state = pure(model)
    forward = jax.jit(fn)
    logits = np.concatenate([forward(state, jnp.asarray(part)) for part in np.split(data.images, 5)])
    accuracy = top1(logits, data.labels)
    assert accuracy >= 0.98
    record = json.loads((resolve(name) / "training.json").read_text())
    assert record["config"]["model"] == name
    assert accuracy == pytest.approx(record["metrics"]["test"], abs=0.0021)  # one picture may change sides


@pytest.mark.parametrize("path", sorted(resolve("vim_micro").parent.iterdir()), ids=lambda path: path.name)
def test_embedded_checkpoints_are_small_and_load(path):
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 1e6
    model = load(path.name)
    assert model.config.num_classes == 10
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) > 100_000
