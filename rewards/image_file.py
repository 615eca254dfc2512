"""An image file: its pixels as a viewer shows them."""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

LONGEST_ASPECT = 100  # long side over short side; beyond it, no reward makes sense of an image


def read_image(path):
    """The pixels (H, W, 3) uint8 of an image as a viewer shows it. Raises ValueError where it is broken.

    Turned as EXIF says, transparent parts on white, colours brought to sRGB by the profile inside, 16 bits
    scaled to 8; of an animation, the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of broken EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                image = to_srgb(to_8_bits(turn_upright(file)))
    except MemoryError:
        raise ValueError("does not fit in memory") from None
    except UnidentifiedImageError:
        raise ValueError("no image, or only the beginning of one") from None
    except Exception as error:  # Pillow's decoders raise anything for broken files
        reason = str(error).split("\n")[0][:100]
        raise ValueError(f"{type(error).__name__}: {reason}") from None
    short, long = sorted(image.size)
    if long > LONGEST_ASPECT * short:
        raise ValueError(f"too thin to score, {image.width} x {image.height} pixels")
    return np.array(image)


def turn_upright(image):
    """The image turned as its EXIF orientation says; as it is where the EXIF data are broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_8_bits(image):
    """The image in a mode of 8 bits per channel."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    pixels = np.array(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have 32 bits, whose range is not known")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def to_srgb(image):
    """The image in RGB: transparent parts on white, other colour spaces converted."""
    profile = image.info.get("icc_profile")
    if image.mode == "P" and not image.has_transparency_data:
        image = image.convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                image = ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a broken profile, or one of another mode: viewers ignore it
    return image.convert("RGB")
