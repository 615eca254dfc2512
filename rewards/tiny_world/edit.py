"""The reward for edits in the tiny world: does the image show what was asked for, and is the rest as it was?

An exact miniature of EditReward, without a model. It reads two things in a row's metadata: GenEval's
description of the result (rewards/geneval/rule.py), and what had to stay,

    "keep": [{"class": "moon", "color": "blue", "center": [0.25, 0.7]}]

where a centre is given in shares of the image's width and height. An object has stayed if the image shows one
of its class and colour, and with its centre at most TOLERANCE away.

    soft     the mean over GenEval's clauses and over the objects to keep, each in [0, 1]
    strict   1 when all of them hold exactly, else 0
    edit     the mean of the two, which is what is trained on
    kept     the share of the objects to keep that have stayed; NaN where there is nothing to keep
"""

import math

import torch

from rewards.errors import BadInput
from rewards.geneval.reward import unknown_words
from rewards.geneval.rule import check_metadata, clause_scores, passes
from rewards.tiny_world import shapes

TOLERANCE = 4 / 64  # of the image's side: a quarter of the width of an object


def center(detection, width, height):
    """The centre of a Detection's box, in shares of the image's width and height."""
    x0, y0, x1, y1 = detection.box
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height


def has_stayed(kept, detections, width, height):
    """Whether an object to keep, an entry of "keep", is among the detections of an image of this size."""
    for detection in detections:
        same = detection.class_name == kept["class"] and detection.color == kept["color"]
        if same and math.dist(center(detection, width, height), kept["center"]) <= TOLERANCE:
            return True
    return False


class EditOfShapes:
    """The reward. Raises ValueError from `check` for a row without GenEval's metadata or without "keep"."""

    def check(self, prompt, metadata):
        check_metadata(metadata)
        kept = metadata.get("keep")
        if not isinstance(kept, list):
            raise ValueError('edit needs a list "keep" in the metadata, of the objects that must stay')
        for index, entry in enumerate(kept):
            check_kept(f"keep[{index}]", entry)

    def details(self, images, prompts, metadata):
        """{"edit", "edit_soft", "edit_strict", "edit_kept"}: each (B,) float32. images: (B, 3, H, W)."""
        height, width = images.shape[2:]
        rows = []
        for detections, row in zip(shapes.detect(images), metadata):
            stayed = [has_stayed(kept, detections, width, height) for kept in row["keep"]]
            clauses = clause_scores(detections, row) + [float(holds) for holds in stayed]
            soft = sum(clauses) / len(clauses)
            strict = float(passes(detections, row, exact=True) and all(stayed))
            share = sum(stayed) / len(stayed) if stayed else math.nan
            rows.append([(soft + strict) / 2, soft, strict, share])
        columns = torch.tensor(rows, dtype=torch.float32, device=images.device).unbind(dim=1)
        return dict(zip(("edit", "edit_soft", "edit_strict", "edit_kept"), columns))

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["edit"]


def check_kept(name, entry):
    """Raises ValueError unless an entry of "keep" names a shape, a colour and a place in the image."""
    known = isinstance(entry, dict)
    known = known and entry.get("class") in shapes.CLASSES and entry.get("color") in shapes.PALETTE
    if not known:
        raise ValueError(f'edit: {name} needs a "class" and a "color" of the tiny world, not {entry!r}')
    point = entry.get("center")
    good = isinstance(point, list) and len(point) == 2
    good = good and all(isinstance(share, int | float) and 0 <= share <= 1 for share in point)
    if not good:
        raise ValueError(f'edit: {name}["center"] must be two numbers from 0 to 1, not {point!r}')


def make_edit(metadata, device):
    """The reward. Raises BadInput where a row asks for what is not in the tiny world."""
    reward = EditOfShapes()
    try:
        for row in metadata:
            check_metadata(row)
    except ValueError:  # `check` will say which row it is
        return reward
    unknown = unknown_words(metadata, shapes.CLASSES, tuple(shapes.PALETTE))
    if unknown:
        word, row = unknown[0]
        raise BadInput(
            f"edit: {word!r} of the prompt {row.get('prompt', '')!r} is not in the tiny world. For "
            "photographs, use editreward"
        )
    return reward
