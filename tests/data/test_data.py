"""Every source of images, and the evaluation transform against an independent definition of it."""

import io
import math
import re
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tolerances import PIXEL

from ouromamba_jax.data import digits_split, iterate_batches, load_images, preprocess, to_pixels
from ouromamba_jax.data.preprocessing import Preprocessing, height_width

HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)
IMAGENET = Preprocessing()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth_picture(rng, height, width):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


# --- preprocessing


def expected_input(pixels, size, config):
    """timm's transform, written out: torchvision's Resize(int), CenterCrop, ToTensor and Normalize."""
    height, width = pixels.shape[:2]
    short = math.floor(size / config.crop_pct)
    new = (short, int(short * width / height)) if height < width else (int(short * height / width), short)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    resized = np.asarray(Image.fromarray(pixels).resize((new[1], new[0]), filters[config.interpolation]))
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    cropped = resized[top : top + size, left : left + size].astype(np.float64) / 255
    return (cropped - np.array(config.mean)) / np.array(config.std)


@pytest.mark.parametrize("shape", [(64, 64), (60, 97), (131, 50), (40, 41), (33, 32), (300, 200)])
@pytest.mark.parametrize(("size", "crop_pct", "interpolation"), [(32, 0.875, "bicubic"), (48, 1.0, "bilinear")])
def test_preprocess_is_the_published_transform(rng, shape, size, crop_pct, interpolation):
    config = replace(IMAGENET, crop_pct=crop_pct, interpolation=interpolation)
    pixels = smooth_picture(rng, *shape)
    result = preprocess(pixels, size, config)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected_input(pixels, size, config), atol=PIXEL, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (60, 97), (131, 50)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_squashed_pictures_lose_their_proportions(rng, shape, size):
    """timm's crop_mode "squash": torchvision's Resize((height, width)), then the same centre crop."""
    config = replace(IMAGENET, crop_pct=0.93, crop_mode="squash")
    pixels = smooth_picture(rng, *shape)
    target = [math.floor(side / config.crop_pct) for side in size]
    resized = np.asarray(Image.fromarray(pixels).resize((target[1], target[0]), Image.Resampling.BICUBIC))
    top, left = (round((t - s) / 2) for t, s in zip(target, size, strict=True))
    cropped = resized[top : top + size[0], left : left + size[1]].astype(np.float64) / 255
    expected = (cropped - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(preprocess(pixels, size, config), expected, atol=PIXEL, rtol=0)


def test_preprocess_takes_height_and_width_in_that_order(rng):
    pixels = smooth_picture(rng, 90, 60)
    assert preprocess(pixels, (24, 40), HALF).shape == (24, 40, 3)
    whole = preprocess(pixels, (90, 60), HALF)
    np.testing.assert_allclose(whole, pixels / 127.5 - 1, atol=PIXEL, rtol=0)


@pytest.mark.parametrize("shape", [(61, 97), (131, 50), (40, 41)])
def test_a_target_that_is_not_square_is_rounded_and_bilinear(rng, shape):
    """timm's ResizeKeepRatio, written out; its default filter is bilinear, and the transform passes it no other."""
    pixels, (height, width) = smooth_picture(rng, *shape), (24, 40)
    covered = [math.floor(side / HALF.crop_pct) for side in (height, width)]
    ratio = min(shape[0] / covered[0], shape[1] / covered[1])
    new = [round(side / ratio) for side in shape]
    resized = np.asarray(Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BILINEAR))
    top, left = round((new[0] - height) / 2), round((new[1] - width) / 2)
    expected = resized[top : top + height, left : left + width] / 127.5 - 1
    np.testing.assert_allclose(preprocess(pixels, (height, width), HALF), expected, atol=PIXEL, rtol=0)


def test_gray_and_transparent_pictures_become_rgb(rng):
    gray = rng.integers(0, 256, (20, 20), dtype=np.uint8)
    result = preprocess(gray, 20, HALF)
    np.testing.assert_array_equal(result[..., 0], result[..., 2])
    rgba = np.dstack([smooth_picture(rng, 20, 20), np.full((20, 20), 255, np.uint8)])
    np.testing.assert_array_equal(preprocess(rgba, 20, HALF), preprocess(rgba[..., :3], 20, HALF))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_gray_is_scaled_to_8_bits(rng, tmp_path, order):
    levels = np.sort(np.append(rng.integers(0, 2**16, 62), [0, 65535])).astype(order).reshape(8, 8)
    expected = np.stack([np.rint(levels / 257).astype(np.uint8)] * 3, -1)
    picture = Image.fromarray(levels)
    assert picture.mode.startswith("I;16")
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode.startswith("I;16")
    for images in (preprocess(picture, 8, HALF)[None], load_images(tmp_path, "test", 8, HALF).images):
        np.testing.assert_array_equal(to_pixels(images, HALF)[0], expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_an_unknown_range_are_refused(tmp_path, mode):
    picture = Image.new(mode, (8, 8))
    with pytest.raises(ValueError, match=rf"of mode {mode} has no known range; store 8 or 16 bits per channel\.$"):
        preprocess(picture, 8, HALF)
    picture.save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(ValueError, match=rf"a\.png cannot be read as an image \(a picture of mode {mode} .*\); remove"):
        load_images(tmp_path, "test", 8, HALF)


def test_to_pixels_inverts_the_normalisation(rng):
    pixels = rng.integers(0, 256, (3, 9, 11, 3), dtype=np.uint8)
    images = np.stack([preprocess(p, (9, 11), replace(IMAGENET, crop_pct=1.0)) for p in pixels])
    np.testing.assert_array_equal(to_pixels(images, IMAGENET), pixels)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(interpolation="lanczos"), "there is no interpolation 'lanczos'; use one of bicubic, bilinear, nearest."),
        (dict(crop_pct=0), "crop_pct is 0, but it is a share of the side; use one in (0, 1]."),
        (dict(crop_pct=1.1), "crop_pct is 1.1, but it is a share of the side; use one in (0, 1]."),
        (dict(crop_pct="all"), "crop_pct is all, but it is a share of the side; use one in (0, 1]."),
        (dict(crop_mode="border"), "there is no crop_mode 'border'; use one of center, squash."),
        (dict(std=(0, 0, 0)), "std is (0.0, 0.0, 0.0), but pixels are divided by it; use positive numbers."),
        (dict(std=0.5), "std is 0.5, but it must be three numbers, or one for gray; change it."),
        (dict(mean=(0.5, 0.5)), "mean is (0.5, 0.5), but it must be three numbers, or one for gray; change it."),
        (dict(mean=(0.5, 0.5, math.nan)), "mean is (0.5, 0.5, nan), but it must be three numbers, or one for gray; "),
    ],
)
def test_no_picture_can_be_prepared_with_it(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        replace(HALF, **wrong)


def test_lists_and_numbers_of_numpy_are_as_good():
    assert hash(replace(HALF, mean=[0.5, 0.5, 0.5])) == hash(HALF)
    assert height_width(np.int64(24)) == (24, 24)


# --- digits

DIGITS_FINGERPRINT = ([855, 921, 269, 1185, 11], 959645)
"""First members of the test split, and a checksum of all in order."""


def test_digits_splits_are_fixed_disjoint_and_stratified():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    labels = sklearn_datasets.load_digits().target
    train, test = digits_split(labels, "train"), digits_split(labels, "test")
    assert len(train) == 1297
    np.testing.assert_array_equal(np.bincount(labels[test]), np.full(10, 50))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    # The members themselves, so that no version of NumPy or scikit-learn moves a picture between the splits.
    assert (test[:5].tolist(), int(np.sum(test * np.arange(1, 501)) % 1_000_003)) == DIGITS_FINGERPRINT


def test_digits_are_32_by_32_and_normalised():
    data = load_images("digits", "test", 32, HALF)
    assert data.images.shape == (500, 32, 32, 3)
    assert data.images.dtype == np.float32
    assert data.labels.dtype == np.int32
    assert data.classes == tuple("0123456789")
    assert data.images.min() == -1
    assert data.images.max() == 1
    again = load_images("digits", "test", 32, HALF)
    np.testing.assert_array_equal(data.images, again.images)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"ouromamba_jax\[demo\]\""):
        load_images("digits", "train", 32, HALF)


def test_unknown_digits_split():
    with pytest.raises(ValueError, match='use "train" or "test"'):
        load_images("digits", "validation", 32, HALF)


# --- image folders


@pytest.fixture
def class_folder(tmp_path, rng):
    """Two classes, five PNGs; returns (folder, pixels in reading order)."""
    pixels = []
    for name, count in (("cat", 2), ("dog", 3)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels.append(smooth_picture(rng, 16, 16))
            Image.fromarray(pixels[-1]).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train", np.stack(pixels)


def test_class_folders_give_labels(class_folder):
    folder, pixels = class_folder
    data = load_images(folder, "train", 16, HALF)
    np.testing.assert_array_equal(to_pixels(data.images, HALF), pixels)
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1, 1])
    assert data.classes == ("cat", "dog")
    by_template = load_images(str(folder.parent / "{split}"), "train", 16, HALF)
    np.testing.assert_array_equal(by_template.images, data.images)


def test_flat_folders_have_no_labels(class_folder):
    folder, pixels = class_folder
    data = load_images(folder / "dog", "train", 16, HALF)
    np.testing.assert_array_equal(to_pixels(data.images, HALF), pixels[2:])
    assert data.labels is None
    assert data.classes is None


def test_hidden_files_are_no_pictures(class_folder):
    """macOS leaves a "._0.png" with metadata beside "0.png" on other file systems."""
    folder, pixels = class_folder
    for path in list(folder.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    (folder / "._cat.png").write_bytes(b"Mac OS X")
    np.testing.assert_array_equal(to_pixels(load_images(folder, "train", 16, HALF).images, HALF), pixels)
    np.testing.assert_array_equal(to_pixels(load_images(folder / "dog", "train", 16, HALF).images, HALF), pixels[2:])


def test_batches_are_the_whole_in_order(class_folder):
    folder, _ = class_folder
    whole = load_images(folder, "train", 16, HALF)
    batches = iterate_batches(folder, "train", 16, HALF, batch_size=2)
    assert batches.num_images == 5
    batches = list(batches)
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), whole.images)
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), whole.labels)


def test_limit_spreads_over_the_classes(class_folder):
    folder, _ = class_folder
    np.testing.assert_array_equal(load_images(folder, "train", 16, HALF, limit=2).labels, [0, 1])
    assert len(load_images(folder, "train", 16, HALF, limit=99).images) == 5
    with pytest.raises(ValueError, match="limit is 0; ask for at least one"):
        load_images(folder, "train", 16, HALF, limit=0)


def test_unreadable_picture_is_named(class_folder):
    folder, _ = class_folder
    path = folder / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"dog/1\.png cannot be read as an image .*remove or replace it"):
        load_images(folder, "train", 16, HALF)


def test_folders_that_are_not_a_data_set(class_folder, tmp_path, rng):
    folder, _ = class_folder
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give an image folder"):
        load_images(tmp_path / "nowhere", "train", 16, HALF)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        iterate_batches(tmp_path / "nowhere", "train", 16, HALF, batch_size=2)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folders without images \(empty\)"):
        load_images(folder, "train", 16, HALF)
    with pytest.raises(ValueError, match="holds no images"):
        load_images(folder / "empty", "train", 16, HALF)
    Image.fromarray(smooth_picture(rng, 8, 8)).save(folder / "stray.png")
    with pytest.raises(ValueError, match="images beside class folders"):
        load_images(folder, "train", 16, HALF)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"neither a folder nor an \.npz file"):
        load_images(tmp_path / "notes.txt", "train", 16, HALF)


# --- .npz


def test_npz_of_pixels(tmp_path, rng):
    pixels, labels = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8), rng.integers(0, 4, 6)
    np.savez(tmp_path / "a_test.npz", images=pixels, labels=labels, classes=np.array(["a", "b", "c", "d"]))
    data = load_images(str(tmp_path / "a_{split}.npz"), "test", 12, HALF)
    np.testing.assert_array_equal(to_pixels(data.images, HALF), pixels)
    np.testing.assert_array_equal(data.labels, labels)
    assert data.classes == ("a", "b", "c", "d")
    assert load_images(tmp_path / "a_test.npz", "test", 8, HALF).images.shape == (6, 8, 8, 3)


def test_npz_of_floats_is_model_input(tmp_path, rng):
    images = rng.normal(size=(3, 10, 10, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=images)
    data = load_images(tmp_path / "a.npz", "test", 10, HALF)
    np.testing.assert_array_equal(data.images, images)
    assert data.labels is None
    with pytest.raises(ValueError, match=r"float images of \S+a\.npz are 10x10x3, but the model takes 12x12x3"):
        load_images(tmp_path / "a.npz", "test", 12, HALF)


def jpeg_arrays(rng, count):
    files = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(smooth_picture(rng, 16, 16)).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    return files, {"jpeg": jpeg, "offsets": np.cumsum([0, *map(len, files)])}


def test_npz_of_jpeg_files(tmp_path, rng):
    files, arrays = jpeg_arrays(rng, 4)
    np.savez(tmp_path / "a.npz", **arrays, labels=np.array([3, 1, 0, 2], np.uint8))
    data = load_images(tmp_path / "a.npz", "train", 16, HALF)
    np.testing.assert_array_equal(data.labels, [3, 1, 0, 2])
    expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    np.testing.assert_array_equal(to_pixels(data.images, HALF), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1])}, "has 3 images but `labels` is int64 of shape"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "has 3 images but `labels` is float64"),
        ({"images": np.zeros((3, 8, 8, 4), np.uint8)}, r"\(N, height, width, 3 or 1\) is needed"),
        ({"images": np.zeros((3, 8, 8, 3), np.int64)}, "store uint8 pixels or normalised floats"),
        (
            {"images": np.full((3, 8, 8, 3), np.nan, np.float32)},
            r"float images of \S+a\.npz hold .* not finite, first in number 0",
        ),
        (
            {"images": np.full((3, 8, 8, 3), 200, np.float32)},
            r"float images of \S+a\.npz are 0 to 200, but .* compute \(images / 255 - ",
        ),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": None, "pictures": np.zeros(3)}, "holds labels, pictures, but an array `images`"),
        ({"images": None, "jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 5, 12])}, "`offsets` in .* must rise"),
        ({"images": None, "jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 3, 6, 9])}, "image 0 of .*cannot be"),
        ({"images": np.array([{}, {}, {}], object)}, "cannot be read as an .npz of plain arrays"),
    ],
)
def test_npz_that_is_not_a_data_set(tmp_path, rng, change, message):
    arrays = {"images": rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), "labels": np.arange(3)} | change
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / "a.npz", "train", 8, HALF)
    assert "\n" not in str(caught.value)


def test_truncated_npz(tmp_path, rng):
    path = tmp_path / "a.npz"
    np.savez(path, images=rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an \.npz of plain arrays"):
        load_images(path, "train", 8, HALF)


# --- TFDS


class FakeTfds(ModuleType):
    """What `load_images` uses of TFDS: `data_source` with random access to decoded examples."""

    def __init__(self, pixels):
        super().__init__("tensorflow_datasets")
        self.pixels = pixels

    def data_source(self, name, *, split):
        if name != "mnist":
            raise ValueError(f"Dataset {name} not found.\nlong advice")
        assert split in ("train", "test")
        return [{"image": p, "label": np.int64(i)} for i, p in enumerate(self.pixels[: 2 if split == "test" else 4])]


def test_tfds(monkeypatch, rng):
    pixels = rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", FakeTfds(pixels))
    data = load_images("tfds:mnist", "train", 8, HALF)
    np.testing.assert_array_equal(to_pixels(data.images, HALF)[..., :1], pixels)
    np.testing.assert_array_equal(data.labels, np.arange(4))
    assert len(load_images("tfds:mnist:test", "train", 8, HALF).images) == 2
    with pytest.raises(ValueError, match="TFDS cannot open 'cifar10'"):  # which the stand-in lacks
        load_images("cifar10", "train", 8, HALF)
    with pytest.raises(ValueError, match=r"TFDS cannot open 'nist', split 'train' .*array_record") as caught:
        load_images("tfds:nist", "train", 8, HALF)
    assert "long advice" not in str(caught.value)


def test_images_without_a_class_cannot_be_scored(monkeypatch, rng, tmp_path):
    """As in the test split of TFDS's imagenet2012, whose labels are all -1."""
    pixels = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)

    def data_source(name, *, split):
        return [{"image": p, "label": np.int64(-1 if split == "test" else 7)} for p in pixels]

    tfds = ModuleType("tensorflow_datasets")
    monkeypatch.setattr(tfds, "data_source", data_source, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    says = r"the split 'test' of imagenet2012 has images without a class .* e\.g\. tfds:imagenet2012:validation"
    for source, split in (("tfds:imagenet2012", "test"), ("tfds:imagenet2012:test", "train")):
        assert load_images(source, split, 8, HALF).images.shape == (4, 8, 8, 3)  # enough for calibration
        with pytest.raises(ValueError, match=says):
            load_images(source, split, 8, HALF, labelled=True)
        with pytest.raises(ValueError, match=says):
            next(iterate_batches(source, split, 8, HALF, batch_size=2, labelled=True))
    np.testing.assert_array_equal(load_images("tfds:imagenet2012:validation", "test", 8, HALF, labelled=True).labels, 7)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 1, -1, 2]))
    with pytest.raises(ValueError, match=r"a\.npz has the label -1, which is no class"):
        load_images(tmp_path / "a.npz", "test", 8, HALF, labelled=True)
    np.savez(tmp_path / "b.npz", images=pixels)
    with pytest.raises(ValueError, match=r"b\.npz has no labels; give one folder per class"):
        load_images(tmp_path / "b.npz", "test", 8, HALF, labelled=True)


def test_tfds_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it now fails, installed or not
    with pytest.raises(ImportError, match=r"tfds:mnist needs TFDS; pip install \"ouromamba_jax\[data\]\""):
        load_images("tfds:mnist", "train", 8, HALF)
