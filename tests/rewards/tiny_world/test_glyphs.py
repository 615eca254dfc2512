"""The tiny world's reader."""

import random

import torch

from rewards.tiny_world import glyphs
from tests.rewards.drawing import paint, rectangles, to_batch
from tiny import world


def test_glyphs_are_read_exactly():
    rng = random.Random(0)
    texts = [world.random_text(rng) for _ in range(300)]
    read = glyphs.read(to_batch([world.draw_text(text, rng) for text in texts]))
    assert sum(a == b for a, b in zip(texts, read)) / len(texts) >= 0.995


def test_every_character_is_readable():
    assert glyphs.CHARACTERS == "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    rng = random.Random(0)
    images = to_batch([world.draw_text(character, rng) for character in glyphs.CHARACTERS])
    assert glyphs.read(images) == list(glyphs.CHARACTERS)


def test_images_without_writing_read_as_nothing(scenes):
    _, images = scenes
    empty = paint(rectangles())[None]
    assert glyphs.read(torch.cat([empty, torch.zeros_like(empty), torch.ones_like(empty)])) == ["", "", ""]
    assert max(len(text) for text in glyphs.read(images)) <= 1
