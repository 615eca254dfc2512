"""Images that several tests of rewards are made of."""

import torch
from einops import rearrange

from rewards.tiny_world import shapes


def to_batch(arrays):
    """List of (H, W, 3) uint8 arrays -> (B, 3, H, W) float in [0, 1]."""
    batch = torch.stack([torch.from_numpy(array) for array in arrays])
    return rearrange(batch, "b h w c -> b c h w").float() / 255


def paint(mask, color="red"):
    """mask (H, W) bool -> (3, H, W) image with that colour on the background."""
    foreground, background = (torch.tensor(c) / 255 for c in (shapes.PALETTE[color], shapes.BACKGROUND))
    return torch.where(mask, foreground.view(3, 1, 1), background.view(3, 1, 1))


def rectangles(*corners):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    for x0, y0, x1, y1 in corners:
        mask[y0:y1, x0:x1] = True
    return mask


def to_uint8(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8 array."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
