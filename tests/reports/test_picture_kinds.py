"""Pictures of every kind give the pixels that their format means."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ouromamba_jax.data import load_images, preprocess, to_pixels
from ouromamba_jax.data.preprocessing import Preprocessing

HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def read(folder):
    return to_pixels(load_images(folder, "test", 8, HALF).images, HALF)[0]


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "ppm", "png", "bmp"])
def test_lossless_kinds(suffix, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read(tmp_path), pixels)


def test_a_gif_gives_its_first_frame(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((200, 10, 30), (0, 250, 0)))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read(tmp_path), np.broadcast_to(np.uint8([200, 10, 30]), (8, 8, 3)))


def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([9, 9, 9, 40, 50, 60])
    picture.save(tmp_path / "a.png", transparency=b"\x00\x80")
    np.testing.assert_array_equal(read(tmp_path), np.broadcast_to(np.uint8([40, 50, 60]), (8, 8, 3)))


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_obeyed(orientation, suffix, pixels, tmp_path):
    """The table of the EXIF standard: e.g. 6 means that the picture has to be turned clockwise by 90 degrees."""
    flat = np.repeat(np.repeat(pixels[:2, :2] // 64 * 64, 4, 0), 4, 1)  # of four colours, which JPEG keeps about
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(flat).save(tmp_path / f"a.{suffix}", exif=exif, quality=100, subsampling=0)
    expected = TURNS[orientation](flat).astype(int)
    np.testing.assert_allclose(read(tmp_path), expected, atol=4 if suffix == "jpg" else 0)


def png16(levels):
    """A PNG of 16 bits per channel, which Pillow cannot write."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colours_are_scaled_to_8_bits(tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**16, (8, 8, 3))
    (tmp_path / "a.png").write_bytes(png16(levels))
    np.testing.assert_allclose(read(tmp_path), levels / 257, atol=1)  # 65535 / 257 = 255; the low byte is cut


def test_16_bit_gray_tiff(tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**16, (8, 8), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path), np.rint(levels / 257).astype(np.uint8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_is_ink(suffix, tmp_path):
    """Each colour is what its ink and black leave: (1 - ink) (1 - black). JPEG stores CMYK inverted."""
    ink = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 4, (2, 2, 4)) * 80, 4, 0), 4, 1).astype(np.uint8)
    Image.fromarray(ink, mode="CMYK").save(tmp_path / f"a.{suffix}", quality=100, subsampling=0)
    left = 1 - ink / 255
    np.testing.assert_allclose(read(tmp_path), 255 * left[..., :3] * left[..., 3:], atol=4 if suffix == "jpg" else 1)


def test_a_picture_that_is_given_is_turned_once(pixels):
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = 6
    expected = preprocess(ImageOps.exif_transpose(picture), 8, HALF)
    np.testing.assert_array_equal(preprocess(picture, 8, HALF), expected)
    np.testing.assert_array_equal(to_pixels(expected[None], HALF)[0], np.rot90(pixels, -1))


def test_pictures_of_unread_kinds_are_counted_and_named(pixels, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
        (tmp_path / name / "1.HEIC").touch()
        (tmp_path / name / "notes.txt").touch()
    (tmp_path / "dog" / "2.avif").touch()
    with pytest.warns(
        UserWarning, match=r"3 pictures in \S+ are .* left out \(1 \.avif, 2 \.heic\); convert them to PNG"
    ):
        data = load_images(tmp_path, "test", 8, HALF)
    assert data.labels.tolist() == [0, 1]


def test_a_folder_of_unread_kinds_alone_says_so(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(
        ValueError, match=r"holds no images \(.*\) but pictures of other kinds \(1 \.heic\), so convert"
    ):
        load_images(tmp_path, "test", 8, HALF)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG"])
def test_other_names_of_jpeg_are_read(suffix, tmp_path):
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / f"b{suffix}")
    assert len(load_images(tmp_path, "train", 8, Preprocessing()).images) == 1
