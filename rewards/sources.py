"""Images to edit: the "source" of a row of a prompt file, a path relative to that file."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from rewards.errors import BadInput
from rewards.image_file import read_image


def check_source(path, row):
    """The path of a row's source image. Raises BadInput where there is no image."""
    if not isinstance(row["source"], str):
        raise BadInput(f"{row.place}: its source must be the path of an image, from the folder of {path}")
    source = Path(path).parent / row["source"]
    if not source.is_file():
        raise BadInput(f"{row.place}: its source {source} does not exist")
    try:
        read_image(source)
    except ValueError as error:
        raise BadInput(
            f"{row.place}: its source {source} is not an image that can be read ({error})"
        ) from None
    return str(source)


def load_source(path, size):
    """An image to edit, (3, size, size) float32 in [0, 1]: the square at the centre of the picture."""
    image = Image.fromarray(read_image(path))
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(np.array(square)), "h w c -> c h w").float() / 255
