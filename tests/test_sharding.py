"""Several devices, and several processes, give what one gives: generation, quantisation and evaluation."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from compiling import compilations
from draws import normal
from flax import nnx

from ouromamba_jax import GenConfig, QuantConfig, create_model, generate_images, quantize
from ouromamba_jax.evaluation.evaluate import evaluate, predict
from ouromamba_jax.quantize.activation import Levels
from ouromamba_jax.quantize.stages import apply_in_batches
from ouromamba_jax.sharding import data_mesh

TINY = dict(img_size=16, embed_dim=16, depth=2, d_state=4)


def everything() -> dict[str, np.ndarray]:
    """Logits in two batch sizes (8 devices share one of them, 6 the other), accuracies, and generated images."""
    model = create_model("vim_micro", rngs=nnx.Rngs(1), **TINY)
    images = np.asarray(normal(0, (20, 16, 16, 3)))
    labels = np.arange(20) % 10
    accuracy = evaluate(model, [(images[:8], labels[:8]), (images[8:16], labels[8:16]), (images[16:], labels[16:])])
    config = GenConfig(num_images=16, batch_size=8, iterations=3, contrastive=1.0, neighbourhood=3, positives=3)
    generated = generate_images(model, config, jax.random.key(2))
    return dict(
        whole=predict(model, images, batch_size=8),
        parts=predict(model, jnp.asarray(images), batch_size=12),
        accuracy=np.asarray([accuracy.top1, accuracy.top5, accuracy.images]),
        images=np.asarray(generated.images),
    )


def test_prediction_takes_the_programs_of_quantisation():
    """What is spread over one device is where the rest is, or all would compile twice."""
    model = create_model("vim_micro", rngs=nnx.Rngs(1), **{**TINY, "depth": 1})
    x = images = normal(0, (4, 16, 16, 3))
    for _, stage in model.stages:
        x = apply_in_batches(stage, x, batch_size=4)
    with compilations() as compiled:
        np.testing.assert_array_equal(predict(model, images, batch_size=4), x)
    assert not [name for name in compiled if "apply_stage" in name]
    with compilations() as compiled:
        predict(model, images, batch_size=2)
    assert [name for name in compiled if "apply_stage" in name]


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/helpers']\n"
        "import test_sharding as t; t.on_eight_devices(sys.argv[2])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(tmp_path / "out.npz")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, eight = everything(), np.load(tmp_path / "out.npz")
    assert int(eight["devices"]) == 8
    images = one.pop("images")
    assert np.abs(eight["images"] - images).mean() < tolerances.SHARDED_PIXELS_MEAN
    assert np.abs(images[0] - images[1]).mean() > 100 * tolerances.SHARDED_PIXELS_MEAN
    for name, expected in one.items():
        np.testing.assert_allclose(eight[name], expected, rtol=tolerances.SHARDED, atol=tolerances.SHARDED)


def on_eight_devices(path: str) -> None:
    """Runs in a process of its own."""
    assert data_mesh(8).size == 8
    assert data_mesh(12).size == 6
    assert data_mesh(7).size == 7
    assert data_mesh(11).size == 1
    np.savez(path, devices=jax.device_count(), **everything())


def test_two_devices_quantise_as_one(tmp_path):
    folder = os.path.dirname(__file__)
    code = f"import sys; sys.path[:0] = {[folder, folder + '/helpers']}; import conftest, test_sharding as t; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} t.quantise_over_devices({str(tmp_path / 'two.npz')!r})"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    quantise_over_devices(tmp_path / "one.npz")
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert (int(one["devices"]), int(two["devices"])) == (1, 2)
    # Sums over tokens in another order bring a weight in a hundred, at most, to the other side of a tie.
    assert np.mean(one["levels"] != two["levels"]) < 0.01


def quantise_over_devices(path: str | os.PathLike) -> None:
    """All integer weights of a model that is quantised with five images, by twos, on every device there is."""
    model = create_model("vim_micro", rngs=nnx.Rngs(1), **{**TINY, "depth": 1})
    low, _ = quantize(model, normal(0, (5, 16, 16, 3)), QuantConfig(tune_epochs=0, batch_size=2))
    levels = [np.ravel(leaf[...]) for _, leaf in nnx.to_flat_state(nnx.state(low, Levels))]
    np.savez(path, devices=jax.device_count(), levels=np.concatenate(levels))


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path):
    """Each sees two devices, of which one or both are its own; no last batch divides among them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = {"one": (None, 0), "first": (address, 0), "second": (address, 1)}
    folder = os.path.dirname(__file__)
    code = f"import sys; sys.path[:0] = {[folder, folder + '/helpers']}; import conftest, test_sharding as t; "
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code} t.in_a_process({str(tmp_path / name)!r}, {place}, {host!r})"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1" if host else "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (host, place) in runs.items()
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, *others = (np.load(tmp_path / f"{name}.npz") for name in runs)
    assert one["devices"].tolist() == [2, 2]
    assert one["accuracy"][-1] == 5
    for other in others:
        assert other["devices"].tolist() == [1, 2]
        for name in set(one.files) - {"devices"}:
            np.testing.assert_array_equal(other[name], one[name], err_msg=name)


def in_a_process(path: str, place: int, address: str | None) -> None:
    """Generates three images, quantises with five and evaluates on five, by twos."""
    jax.config.update("jax_disable_most_optimizations", True)
    if address is not None:
        jax.distributed.initialize(address, 2, place)
    model = create_model("vim_micro", rngs=nnx.Rngs(1), **{**TINY, "depth": 1})
    config = GenConfig(num_images=3, batch_size=2, iterations=2, contrastive=0.0)
    generated = generate_images(model, config, jax.random.key(2)).images
    images = np.concatenate([generated, np.asarray(normal(0, (2, 16, 16, 3)))])
    low, report = quantize(model, images, QuantConfig(scale_search="max", tune_epochs=1, batch_size=2))
    labels = np.arange(5)
    score = evaluate(low, [(images[:2], labels[:2]), (images[2:4], labels[2:4]), (images[4:], labels[4:])])
    leaves = {f"leaf{i}": np.asarray(leaf, np.float32) for i, leaf in enumerate(jax.tree.leaves(nnx.state(low)))}
    np.savez(
        path,
        devices=[jax.local_device_count(), jax.device_count()],
        accuracy=[score.top1, score.top5, score.images],
        sqnr=[site.sqnr_db for site in report.sites],
        images=images,
        logits=predict(low, images, batch_size=2),
        **leaves,
    )
