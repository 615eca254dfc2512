"""An image file is read as a viewer shows it, or refused with a reason."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from rewards.image_file import read_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # 6 high, 9 wide
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def as_rgb(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def over_white(pixels, alpha):
    """pixels (H, W, 3) with alpha (H, W), both uint8, on white."""
    share = alpha[:, :, None] / 255
    return pixels * share + 255 * (1 - share)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    if mode:
        image = image.convert(mode)
    image.save(path, **options)


ALPHA = np.array([[0, 51, 102, 153, 204, 255, 0, 128, 255]] * 6, dtype=np.uint8)
RGBA = np.dstack([PICTURE, ALPHA])


def write_16_bit_rgb_png(path):
    """A PNG with 16 bits per channel, which Pillow does not write."""
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in PICTURE)
    header = struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + checksum
    path.write_bytes(data)


def write_animation(path, **options):
    frames = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


# {what: (ending, how to write it, the pixels that a viewer shows, how far they may be off)}
UNUSUAL = {
    "RGB": (".png", lambda path: save(path, PICTURE), PICTURE, 0),
    "grey": (".png", lambda path: save(path, GREY), as_rgb(GREY), 0),
    "black and white": (".png", lambda path: save(path, GREY, "1"), None, 0),
    "16 bits, grey": (
        ".png",
        lambda path: save(path, GREY.astype(np.uint16) * 257),
        as_rgb(GREY),
        0,
    ),
    "16 bits, grey, TIFF": (".tiff", lambda path: save(path, GREY.astype(np.uint16) * 257), as_rgb(GREY), 0),
    "16 bits, RGB": (".png", write_16_bit_rgb_png, PICTURE, 0),
    "palette": (".png", lambda path: save(path, PICTURE // 64 * 64, "P"), None, 0),
    "transparent": (".png", lambda path: save(path, RGBA), over_white(PICTURE, ALPHA), 1),
    "transparent WebP": (
        ".webp",
        lambda path: save(path, RGBA, lossless=True, exact=True),
        over_white(PICTURE, ALPHA),
        1,
    ),
    "grey and transparent": (
        ".png",
        lambda path: save(path, np.dstack([GREY, ALPHA])),
        over_white(as_rgb(GREY), ALPHA),
        1,
    ),
    "one transparent colour": (
        ".png",
        lambda path: save(path, as_rgb(GREY // 128 * 128), transparency=(0, 0, 0)),
        np.where(as_rgb(GREY) < 128, 255, 128),
        0,
    ),
    "CMYK": (".jpg", lambda path: save(path, np.full((6, 9, 3), (200, 40, 90), np.uint8), "CMYK"), None, 0),
    "YCbCr": (".tiff", lambda path: save(path, PICTURE, "YCbCr"), None, 0),
    "animated GIF": (".gif", lambda path: write_animation(path), None, 0),
    "animated PNG": (".png", lambda path: write_animation(path), PICTURE, 0),
    "animated WebP": (".webp", lambda path: write_animation(path, lossless=True), PICTURE, 0),
    "several pages": (".tiff", lambda path: write_animation(path), PICTURE, 0),
    "bitmap": (".bmp", lambda path: save(path, PICTURE), PICTURE, 0),
    "a PNG that is called .jpg": (".jpg", lambda path: save(path, PICTURE, format="PNG"), PICTURE, 0),
}


@pytest.mark.parametrize("ending, write, shown, off", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_are_read_as_shown(tmp_path, ending, write, shown, off):
    path = tmp_path / f"image{ending}"
    write(path)
    pixels = read_image(path)
    assert pixels.shape == (6, 9, 3) and pixels.dtype == np.uint8
    if shown is None:  # Pillow's own conversion of the file
        with Image.open(path) as image:
            shown = np.array(image.convert("RGB"))
    assert np.abs(pixels.astype(float) - shown).max() <= off


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(GREY // 128 * 128).convert("P")
    image.save(tmp_path / "image.png", transparency=0)
    pixels = read_image(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        clear = np.array(image) == 0
    assert clear.any() and (pixels[clear] == 255).all() and (pixels[~clear] != 255).any()


TURNS = {  # EXIF's orientation -> what a viewer makes of the stored pixels
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_exif_says(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{ending}"
    options = {"quality": 100, "subsampling": 0} if ending == ".jpg" else {}
    options |= {"lossless": True} if ending == ".webp" else {}
    smooth = np.array(Image.fromarray(PICTURE[:2, :2]).resize((24, 16), Image.Resampling.BICUBIC))
    save(path, smooth, exif=exif, **options)
    shown = TURNS[orientation](smooth)
    pixels = read_image(path)
    assert pixels.shape == shown.shape
    assert np.abs(pixels.astype(float) - shown).max() <= 8


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0garbage" * 9, b"Exif\0\0MM\0*\0\0\xff\xff"])
def test_broken_exif_data_are_ignored(tmp_path, exif):
    save(tmp_path / "image.png", PICTURE, exif=exif)
    assert np.array_equal(read_image(tmp_path / "image.png"), PICTURE)


def test_colours_are_those_of_the_profile_inside(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    save(tmp_path / "image.png", PICTURE, icc_profile=srgb.tobytes())
    assert np.array_equal(read_image(tmp_path / "image.png"), PICTURE)
    save(tmp_path / "image.png", PICTURE, icc_profile=b"no profile")
    assert np.array_equal(read_image(tmp_path / "image.png"), PICTURE)
    # sRGB's own profile with red and green exchanged, as the profile of another colour space
    data = bytearray(srgb.tobytes())
    for tag in (b"rXYZ", b"gXYZ", b"desc"):
        assert data.count(tag) >= 1
    data = bytes(data).replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")
    data = data.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")
    save(tmp_path / "image.png", PICTURE, icc_profile=data)
    exchanged = PICTURE[..., [1, 0, 2]].astype(float)
    assert np.abs(read_image(tmp_path / "image.png") - exchanged).max() <= 2


def encode(array, kind):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
BROKEN = {
    "empty": b"",
    "text": b"a page that says 404",
    "AppleDouble": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
    "half a PNG": encode(NOISE, "PNG")[:6000],
    "the beginning of a PNG": encode(NOISE, "PNG")[:40],
    "half a JPEG": encode(NOISE, "JPEG")[:1500],
    "half a WebP": encode(NOISE, "WEBP")[:1500],
    "a PNG with a wrong checksum": encode(NOISE, "PNG")[:60] + b"xxxx" + encode(NOISE, "PNG")[64:],
    "a PNG without an end": encode(NOISE, "PNG")[:-300],
    "zeros, as left by a full disk": bytes(5000),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a float TIFF": None,
    "a film strip": encode(np.zeros((2, 300, 3), np.uint8), "PNG"),
    "a decompression bomb": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_with_a_reason(tmp_path, name, monkeypatch):
    path = tmp_path / "image.png"
    content = BROKEN[name]
    if name == "a float TIFF":
        path = tmp_path / "image.tiff"
        save(path, GREY.astype(np.float32))
    elif name == "a decompression bomb":
        Image.new("1", (10_000, 10_000)).save(path)  # 100 million pixels in a file of a few kilobytes
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_image(path)
    reason = str(error.value)
    assert reason and "\n" not in reason and len(reason) < 200


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError):
            read_image(path)
