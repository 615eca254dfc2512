"""JPEG size as a reward: needs no weights and works with any pipeline, so it is the first thing to try on a
new model.

compressibility = -(kilobytes at quality 95); incompressibility is its negative (Black et al. 2023, DDPO).
"""

import io

import torch
from einops import rearrange
from PIL import Image


def kilobytes(images):
    """Size of each image as a JPEG of quality 95. images (B, 3, H, W) float in [0, 1] -> (B,) float32."""
    pixels = (images.float() * 255).round().to(torch.uint8).cpu()
    pixels = rearrange(pixels, "b c h w -> b h w c").numpy()
    sizes = []
    for array in pixels:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def make_compressibility(metadata, device):
    return lambda images, prompts, metadata: -kilobytes(images)


def make_incompressibility(metadata, device):
    return lambda images, prompts, metadata: kilobytes(images)
