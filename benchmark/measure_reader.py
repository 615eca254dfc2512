"""Where the tiny world's reader draws its line: thresholds against ground truth and broken ground truth.

    python -m benchmark.measure_reader

The reader takes a component for a character where its overlap with the best template reaches MIN_OVERLAP. The
right threshold reads every character that was drawn, also after the autoencoder, and none that is broken. A
broken character has a fifth or a third of its 35 dots flipped, or lacks its upper, lower, left or right half.
No picture that a model drew from a prompt has a part in this. For each threshold, the script prints the share
of characters that are read as what they are, and the share of broken ones that are read as anything at all.
"""

import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange

from rewards.tiny_world import glyphs
from rewards.tiny_world.shapes import BACKGROUND, PALETTE
from tiny import world

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
CHARACTERS_PER_KIND = 720


def draw_dots(dots, rng):
    """(64, 64, 3) uint8 image of one character near the centre. dots (7, 5) bool."""
    canvas = np.full((world.SIZE, world.SIZE, 3), BACKGROUND, dtype=np.uint8)
    glyph = np.kron(dots.numpy(), np.ones((world.GLYPH_SCALE, world.GLYPH_SCALE), dtype=bool))
    x = (world.SIZE - glyph.shape[1]) // 2 + rng.randint(-2, 2)
    y = (world.SIZE - glyph.shape[0]) // 2 + rng.randint(-2, 2)
    region = canvas[y : y + glyph.shape[0], x : x + glyph.shape[1]]
    region[glyph] = PALETTE["white"]
    return canvas


def flip(dots, count, rng):
    """The character with so many dots flipped."""
    broken = dots.flatten().clone()
    chosen = rng.sample(range(len(broken)), count)
    broken[chosen] = ~broken[chosen]
    return broken.view(dots.shape)


def halve(dots, rng):
    """The character without one of its halves."""
    broken = dots.clone()
    half = rng.choice(((slice(0, 4), slice(None)), (slice(4, 7), slice(None)), (slice(None), slice(0, 2))))
    broken[half] = False
    return broken


def pictures_of(kind, characters, rng):
    """(B, 3, 64, 64) pictures in [0, 1] of characters, whole or broken."""
    pictures = []
    for character in characters:
        dots = glyphs.bitmap(character)
        if kind == "a fifth flipped":
            dots = flip(dots, 7, rng)
        elif kind == "a third flipped":
            dots = flip(dots, 12, rng)
        elif kind == "a half missing":
            dots = halve(dots, rng)
        pictures.append(torch.from_numpy(draw_dots(dots, rng)))
    return rearrange(torch.stack(pictures), "b h w c -> b c h w") / 255


@torch.no_grad()
def through_autoencoder(vae, pictures):
    """What the autoencoder makes of pictures."""
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def measure():
    """Prints a line for each kind of picture, with a share for each threshold."""
    vae = AutoencoderKL.from_pretrained("tiny/sd3", subfolder="vae", torch_dtype=torch.float32)
    rng = random.Random(0)
    characters = [rng.choice(glyphs.CHARACTERS) for _ in range(CHARACTERS_PER_KIND)]
    print("threshold".ljust(44), "  ".join(f"{threshold:.2f}" for threshold in THRESHOLDS))
    for kind in ("whole", "a fifth flipped", "a third flipped", "a half missing"):
        drawn = pictures_of(kind, characters, rng)
        for name, pictures in (("drawn", drawn), ("after the autoencoder", through_autoencoder(vae, drawn))):
            shares = []
            for threshold in THRESHOLDS:
                texts = glyphs.read(pictures, threshold)
                if kind == "whole":
                    hits = [text == character for text, character in zip(texts, characters)]
                else:
                    hits = [text != "" for text in texts]
                shares.append(sum(hits) / len(hits))
            verb = "read right" if kind == "whole" else "read as anything"
            print(f"{kind}, {name}: {verb}".ljust(44), "  ".join(f"{share:.2f}" for share in shares))


if __name__ == "__main__":
    measure()
