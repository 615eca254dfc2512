"""The GenEval reward: detections of an image, scored by the rule in `rewards/geneval/rule.py`."""

from functools import partial

import torch

from rewards.errors import BadInput
from rewards.geneval.detection import CLASSES, COLORS
from rewards.geneval.rule import asked_color, check_metadata, excluded_clauses, passes, soft_score

COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


class GenEval:
    """The reward: mean of soft and strict. `details` has all three scores (for the evaluation)."""

    def __init__(self, detector):
        self.detector = detector

    def check(self, prompt, metadata):
        check_metadata(metadata)

    def details(self, images, prompts, metadata):
        """{"geneval", "geneval_soft", "geneval_strict", "geneval_official"}: each (B,) float32, NaN where the
        detector failed."""
        detected = self.detector(images, metadata)
        scores = {}
        for name, rule in (
            ("geneval_soft", soft_score),
            ("geneval_strict", partial(passes, exact=True)),
            ("geneval_official", partial(passes, exact=False)),
        ):
            values = []
            for detections, row in zip(detected, metadata):
                values.append(float("nan") if detections is None else float(rule(detections, row)))
            scores[name] = torch.tensor(values, dtype=torch.float32, device=images.device)
        return {"geneval": (scores["geneval_soft"] + scores["geneval_strict"]) / 2} | scores

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["geneval"]


def unknown_words(metadata, classes, colors):
    """[(class or colour, metadata row)] for all that a detector of these classes and colours doesn't know."""
    found = []
    for row in metadata:
        for clause in row["include"] + excluded_clauses(row):
            if clause["class"] not in classes:
                found.append((clause["class"], row))
            color = asked_color(clause)
            if color is not None and color not in colors:
                found.append((color, row))
    return found


def make_geneval(metadata, device, model="facebook/mask2former-swin-small-coco-instance"):
    """The reward with a detector that knows all classes and colours of the rows.

    That is the tiny world's, which loads nothing, or Mask2Former, with CLIP where a row asks for a colour.
    Raises BadInput, before anything is loaded, when a row asks for what no detector knows.
    """
    from rewards.tiny_world import shapes

    try:
        for row in metadata:
            check_metadata(row)
    except ValueError:  # `check` will say which row it is: load nothing before that
        return GenEval(detector=None)
    not_shapes = unknown_words(metadata, shapes.CLASSES, tuple(shapes.PALETTE))
    if not not_shapes:
        return GenEval(lambda images, metadata: shapes.detect(images))
    not_coco = unknown_words(metadata, CLASSES, COLORS)
    if not_coco:
        word, row = min(not_shapes, not_coco, key=len)[0]  # of the detector that knows more of the words
        place = f" ({row.place})" if getattr(row, "place", "") else ""
        hint = f"; GenEval's name for it is {COCO_NAMES[word]!r}" if word in COCO_NAMES else ""
        tiny_words = ", ".join(list(shapes.CLASSES) + list(shapes.PALETTE))
        raise BadInput(
            f"geneval: no detector knows {word!r} of the prompt {row.get('prompt', '')!r}{place}: use "
            "GenEval's 80 classes and ten colours (rewards/geneval/detection.py), or only "
            f"{tiny_words}{hint}"
        )
    from rewards.geneval.mask2former import load_detector

    return GenEval(load_detector(model, device, any(asks_color(row) for row in metadata)))


def asks_color(row):
    """Whether a metadata row asks for the colour of anything."""
    return any(asked_color(clause) is not None for clause in row["include"])
