"""Images to edit: the "source" of a row of a prompt file, a path relative to that file."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from rewards import BadInput


def resolve_sources(path, file):
    """The PromptFile read from path, each "source" replaced by the path of the image from here.

    Raises BadInput, with the row's number, for a source that is missing or no image, and for a file in which
    only some rows have one: the rows of a micro-batch are sampled together.
    """
    with_source = [row for row in file.metadata if "source" in row]
    if not with_source:
        return file
    if len(with_source) < len(file.metadata):
        raise BadInput(
            f"{path}: {len(with_source)} of {len(file.metadata)} rows have a source, all or none must"
        )
    metadata = []
    for number, row in enumerate(file.metadata, start=1):
        if not isinstance(row["source"], str):
            raise BadInput(f"{path}, row {number}: its source must be the path of an image")
        source = Path(path).parent / row["source"]
        if not source.is_file():
            raise BadInput(f"{path}, row {number}: its source {source} does not exist")
        try:
            with Image.open(source) as image:
                image.verify()
        except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow's, for all that is no image
            raise BadInput(f"{path}, row {number}: its source {source} is not an image") from None
        metadata.append(row | {"source": str(source)})
    return file._replace(metadata=metadata)


def load_source(path, size):
    """An image to edit, (3, size, size) float32 in [0, 1]: upright, RGB, the square at its centre."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(np.array(square)), "h w c -> c h w").float() / 255
