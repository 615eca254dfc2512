"""The GenEval reward: detections of an image, scored by the rule in `rewards/geneval/rule.py`."""

from functools import partial

import torch

from rewards import BadInput
from rewards.geneval.detection import CLASSES, COLORS
from rewards.geneval.rule import check_metadata, passes, soft_score


class GenEval:
    """The reward: mean of soft and strict. `details` has all three scores (for the evaluation)."""

    def __init__(self, detector):
        self.detector = detector

    def check(self, prompt, metadata):
        check_metadata(metadata)

    def details(self, images, prompts, metadata):
        """{"geneval", "geneval_soft", "geneval_strict", "geneval_official"}: each (B,) float32, NaN where the
        detector failed."""
        rows = list(zip(self.detector(images, metadata), metadata))

        def score(rule):
            values = [float("nan") if found is None else float(rule(found, row)) for found, row in rows]
            return torch.tensor(values, dtype=torch.float32, device=images.device)

        soft, strict = score(soft_score), score(partial(passes, exact=True))
        official = score(partial(passes, exact=False))
        return {
            "geneval": (soft + strict) / 2,
            "geneval_soft": soft,
            "geneval_strict": strict,
            "geneval_official": official,
        }

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["geneval"]


def unknown_words(metadata, classes, colors):
    """[(class or colour, prompt)] for all that a detector of these classes and colours doesn't know."""
    found = []
    for row in metadata:
        for clause in row["include"] + row.get("exclude", []):
            words = [(clause["class"], classes)] + ([(clause["color"], colors)] if "color" in clause else [])
            found += [(word, row.get("prompt", "")) for word, known in words if word not in known]
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
        word, prompt = min(not_shapes, not_coco, key=len)[0]
        raise BadInput(
            f"geneval: no detector knows {word!r} of the prompt {prompt!r}: use GenEval's 80 classes and ten "
            f"colours (rewards/geneval/detection.py), or only {', '.join((*shapes.CLASSES, *shapes.PALETTE))}"
        )
    from rewards.geneval.mask2former import load_detector

    asks_colors = any("color" in clause for row in metadata for clause in row["include"])
    return GenEval(load_detector(model, device, asks_colors))
