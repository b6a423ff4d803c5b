"""Labels count the model's classes, or the data set is refused."""

import re

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ouromamba_jax import create_model, save
from ouromamba_jax.cli.main import main
from ouromamba_jax.data import iterate_batches, load_images
from ouromamba_jax.data.classes import imagenet_synsets, read_class_names
from ouromamba_jax.data.preprocessing import Preprocessing

HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def folder_of(path, names):
    """One picture per class, all of the level that its class has in the order given."""
    for level, name in enumerate(names):
        (path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (level, 0, 0)).save(path / name / "0.png")
    return path


def levels(data):
    return np.rint((data.images[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_the_synset_ids_are_imagenets():
    ids = imagenet_synsets()
    assert len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert (ids[0], ids[207], ids[281], ids[999]) == ("n01440764", "n02099601", "n02123045", "n15075141")


@pytest.mark.parametrize("classes", [(5,), (281, 207), (0, 3, 999)])
def test_folders_of_synset_ids_are_recognised_whatever_their_number(classes, tmp_path):
    """ImageNet's order: 207 is the golden retriever, 281 the tabby cat."""
    folder = folder_of(tmp_path, [imagenet_synsets()[k] for k in classes])
    data = load_images(folder, "test", 8, HALF, classes=1000, labelled=True)
    assert dict(zip(levels(data), data.labels.tolist(), strict=True)) == dict(enumerate(classes))
    assert data.classes[281] == "n02123045"
    batches = list(iterate_batches(folder, "test", 8, HALF, batch_size=1, classes=1000))
    assert [int(b.labels[0]) for b in batches] == sorted(classes)


def test_synset_ids_of_a_model_with_as_many_classes_count_themselves(tmp_path):
    folder = folder_of(tmp_path, ["n01440764", "n02979186"])  # trained on these two alone
    assert load_images(folder, "test", 8, HALF, classes=2).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "classes", "says"),
    [
        (["cat", "dog"], 3, "has 2 classes (cat, dog), but the model has 3; name the model's classes"),
        (list("abcde"), 4, "has 5 classes (a, b, c, ...), but the model has 4; name the model's classes"),
        (["n01440764", "cat"], 1000, "has 2 classes (cat, n01440764), but the model has 1000"),
        ([str(k) for k in range(11)], 11, "are numbers in the order of their letters (0, 1, 10, ...)"),
        (["cat", "dog"], ["cat", "cow"], "has 2 classes, of which 1 are not among the 2 class names (dog)"),
        (["cat", "dog"], ["cat", "dog", "cat"], "the class names hold 'cat' twice"),
    ],
)
def test_classes_that_are_not_the_models_are_refused(names, classes, says, tmp_path):
    folder = folder_of(tmp_path, names)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        load_images(folder, "test", 8, HALF, classes=classes)
    assert isinstance(classes, list) or "--classes FILE, --class-names A,B,... or classes=[...]" in str(caught.value)


def test_a_thousand_names_that_are_no_synset_ids_have_no_known_order(tmp_path):
    folder = folder_of(tmp_path, [f"class_{k:03d}" for k in range(1000)])
    with pytest.raises(ValueError, match=r"has 1000 classes like the model, but their names .* are not ImageNet's"):
        load_images(folder, "test", 8, HALF, classes=1000, limit=1)
    names = [f"class_{k:03d}" for k in reversed(range(1000))]
    assert load_images(folder, "test", 8, HALF, classes=names, limit=1).labels.tolist() == [999]


def test_names_give_the_models_order(tmp_path):
    folder = folder_of(tmp_path / "data", ["dog", "cat"])
    (tmp_path / "names.txt").write_text("fish\ndog\n\ncat\n")
    names = read_class_names(tmp_path / "names.txt")
    assert names == ("fish", "dog", "cat")
    data = load_images(folder, "test", 8, HALF, classes=names)
    assert dict(zip(levels(data), data.labels.tolist(), strict=True)) == {0: 1, 1: 2}
    assert data.classes == names


def test_numbers_in_the_order_of_their_values_are_the_models(tmp_path):
    folder = folder_of(tmp_path, [f"{k:02d}" for k in range(11)])
    assert load_images(folder, "test", 8, HALF, classes=11).labels.tolist() == list(range(11))


def test_classes_of_an_npz_are_held_to_the_models_too(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([1, 0]), classes=np.array(["cat", "dog"]))
    assert load_images(tmp_path / "a.npz", "test", 8, HALF, classes=["dog", "cat"]).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"has 2 classes .* but the model has 10"):
        load_images(tmp_path / "a.npz", "test", 8, HALF, classes=10)
    np.savez(tmp_path / "b.npz", images=images, labels=np.array([1, 0]))
    assert load_images(tmp_path / "b.npz", "test", 8, HALF, classes=10).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="does not name its classes"):
        load_images(tmp_path / "b.npz", "test", 8, HALF, classes=["dog", "cat"])


def test_the_command_takes_them(tmp_path, capsys):
    sizes = dict(img_size=8, patch_size=4, stride=4, embed_dim=16, depth=1, num_classes=3)
    model = create_model("vim_micro", rngs=nnx.Rngs(0), **sizes)
    model.head.proj.kernel[...] = 0 * model.head.proj.kernel[...]
    model.head.proj.bias[...] = np.asarray([0.0, 1.0, 0.0], np.float32)  # always class 1
    save(tmp_path / "model", model)
    folder = folder_of(tmp_path / "data", ["dog", "cat"])
    (tmp_path / "names.txt").write_text("fish\ndog\ncat\n")
    call = ["evaluate", str(tmp_path / "model"), "--data", str(folder)]
    assert main(call) == 1
    assert "has 2 classes (cat, dog), but the model has 3" in capsys.readouterr().err
    assert main([*call, "--class-names", "dog,cat"]) == 1
    assert "there are 2 class names, but the model has 3 classes; name every one." in capsys.readouterr().err
    for names in (["--classes", str(tmp_path / "names.txt")], ["--class-names", "fish,dog,cat"]):
        assert main([*call, *names]) == 0
        assert "50.0" in capsys.readouterr().out  # dog is class 1 and cat is not
