"""OCR: is the asked text written in the image? One minus the edit distance over the text's length
(Flow-GRPO's formula).

Target: metadata["text"], else the prompt's first span in double quotes. Both sides are compared in lower case
and without spaces. The recogniser is passed in: `recogniser(images) -> list of strings`, None where it failed
on an image.
"""

import re

import torch

from rewards.ocr import engine
from rewards.tiny_world import glyphs


def levenshtein(a, b):
    """Edit distance: fewest single-character insertions, deletions and substitutions between two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def normalise(text):
    return text.replace(" ", "").lower()


def target_text(prompt, metadata):
    """The text that should be in the image. ValueError when the row names none."""
    if isinstance(metadata.get("text"), str):
        text = metadata["text"]
    elif prompt.count('"') >= 2:
        text = prompt.split('"')[1]
    else:
        raise ValueError('ocr needs a text in double quotes in the prompt, or "text" in the metadata')
    if not normalise(text):
        raise ValueError("ocr: the text to write is empty")
    return text


def text_score(recognised, target):
    """1 when the target is contained in what was read, else 1 - min(distance, length) / length, in [0, 1]."""
    recognised, target = normalise(recognised), normalise(target)
    if target in recognised:
        return 1.0
    return 1 - min(levenshtein(recognised, target), len(target)) / len(target)


class OCR:
    """The reward. A row that the recogniser failed on is NaN; an image where it finds no text is a true 0."""

    def __init__(self, recogniser):
        self.recogniser = recogniser

    def check(self, prompt, metadata):
        target_text(prompt, metadata)

    def __call__(self, images, prompts, metadata):
        scores = []
        for text, prompt, row in zip(self.recogniser(images), prompts, metadata):
            scores.append(float("nan") if text is None else text_score(text, target_text(prompt, row)))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def make_ocr(metadata, device):
    """Reads with the tiny world's own reader where every row asks for its writing, else with PP-OCR."""
    asked = [row.get("text") if row.get("tag") == "text" else None for row in metadata]
    if all(isinstance(text, str) and re.fullmatch("[A-Z0-9]{2,3}", text) for text in asked):
        return OCR(glyphs.read)
    return OCR(engine.Reader())
