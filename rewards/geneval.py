"""GenEval: does the image show what the prompt asks for, object by object?

Scores the detections of an image against GenEval's metadata, three ways:
  official   the benchmark's own rule (Ghosh et al. 2023): at least the asked count of each class; the first
             `count` objects must have the colour and the position; `exclude` fails at its count.
  strict     every clause exact: as official, but the count must be equal and all found objects are examined.
  soft       for training, in [0, 1]: the mean over clauses of how nearly each holds (see `soft_score`).
The reward trained on is the mean of soft and strict: soft alone can be raised while strict falls (three
objects out of four earn most of the credit), strict alone is flat where a prompt never succeeds.

Metadata, in GenEval's format: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation,
index]}], "exclude"?: [{"class", "count"}], "prompt"}. The detector is passed in: `detector(images, metadata)
-> list of Detection lists`, None where it failed on an image. The metadata tell it how sure it must be (of
counting prompts) and whose colour is asked for, never what to find.
"""

from collections import namedtuple
from functools import partial

import torch

from rewards import BadInput

Detection = namedtuple("Detection", "class_name box score color")  # box in pixels: x0, y0, x1, y1

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = tuple(  # COCO's 80 in its order and GenEval's words: computer mouse, tv remote, computer keyboard
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush".split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
POSITION_THRESHOLD = 0.1  # a centre offset counts beyond this share of the summed sizes
MAX_OBJECTS = 16  # detections kept per class, best score first


def relative_position(box_a, box_b):
    """The relations that hold of box_a towards box_b, as a set: GenEval's rule, e.g. {"left of", "above"}."""
    offset = [(box_a[i] + box_a[i + 2] - box_b[i] - box_b[i + 2]) / 2 for i in (0, 1)]
    sizes = [box_a[i + 2] - box_a[i] + box_b[i + 2] - box_b[i] for i in (0, 1)]
    # the part of the offset beyond the margin, over the length of the whole offset
    beyond = [max(abs(o) - POSITION_THRESHOLD * s, 0) * (1 if o > 0 else -1) for o, s in zip(offset, sizes)]
    if all(abs(o) < 1e-3 for o in beyond):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = beyond[0] / length, beyond[1] / length
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def group_by_class(detections):
    """{class name: its detections, best score first, at most MAX_OBJECTS}."""
    groups = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        groups.setdefault(detection.class_name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in groups.items()}


def excluded_is_absent(groups, metadata):
    return all(len(groups.get(e["class"], [])) < e["count"] for e in metadata.get("exclude", []))


def passes(detections, metadata, exact):
    """True when every clause holds: GenEval's own rule, or with `exact` the strict one."""
    groups, matched, correct = group_by_class(detections), [], True
    for clause in metadata["include"]:
        found = groups.get(clause["class"], [])
        enough = len(found) == clause["count"] if exact else len(found) >= clause["count"]
        found = found if exact else found[: clause["count"]]
        if enough and "color" in clause:
            enough = sum(d.color == clause["color"] for d in found) >= clause["count"]
        if enough and "position" in clause:
            relation, index = clause["position"]
            targets = matched[index]  # None when the clause it refers to failed
            enough = targets is not None and all(
                relation in relative_position(d.box, target.box) for d in found for target in targets
            )
        matched.append(found if enough else None)
        correct = correct and enough
    return correct and excluded_is_absent(groups, metadata)


def soft_score(detections, metadata):
    """Mean over clauses, each in [0, 1].

    count      1 - |asked - found| / asked, at least 0 (Flow-GRPO's training score goes negative here)
    colour     the same over the objects of that colour; 0 while the count is wrong
    position   share of (object, target) pairs in the asked relation; 0 while either count is wrong
    exclude    1 when no excluded class reaches its count: one clause for all, so that extras cost
    """
    groups, counted, scores = group_by_class(detections), [], []
    for clause in metadata["include"]:
        asked, found = clause["count"], groups.get(clause["class"], [])
        scores.append(max(0.0, 1 - abs(asked - len(found)) / asked))
        counted.append(found if len(found) == asked else [])
        if "color" in clause:
            share = sum(d.color == clause["color"] for d in found) / asked
            scores.append(share if counted[-1] else 0.0)
        if "position" in clause:
            relation, index = clause["position"]
            pairs = [(d, target) for d in counted[-1] for target in counted[index]]
            hold = sum(relation in relative_position(d.box, target.box) for d, target in pairs)
            scores.append(hold / len(pairs) if pairs else 0.0)
    if metadata.get("exclude"):
        scores.append(float(excluded_is_absent(groups, metadata)))
    return sum(scores) / len(scores)


def check_metadata(metadata):
    """Raises ValueError, saying what is wrong, unless the row has what the scorer reads."""
    if not isinstance(metadata.get("include"), list) or not metadata["include"]:
        raise ValueError('geneval needs a non-empty "include" list: use a .jsonl in GenEval\'s format')
    if not isinstance(metadata.get("exclude", []), list):
        raise ValueError('geneval: "exclude" must be a list')
    for name in ("include", "exclude"):
        for i, clause in enumerate(metadata.get(name, [])):
            if (
                not isinstance(clause, dict)
                or "class" not in clause
                or not isinstance(clause.get("count"), int)
            ):
                raise ValueError(f'geneval: {name}[{i}] needs "class" and an integer "count"')
            if clause["count"] < 1:
                raise ValueError(
                    f"geneval: {name}[{i}] has a count of {clause['count']}, at least 1 is needed"
                )
            position = clause.get("position")
            if "position" in clause and not (
                isinstance(position, list)
                and len(position) == 2
                and position[0] in RELATIONS
                and isinstance(position[1], int)
                and 0 <= position[1] < i
            ):
                raise ValueError(
                    f'geneval: {name}[{i}]["position"] must be [relation, index of an earlier clause]'
                )


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
    from rewards import shapes

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
            f"colours (listed in rewards/geneval.py), or only {', '.join((*shapes.CLASSES, *shapes.PALETTE))}"
        )
    from rewards.mask2former import load_detector

    asks_colors = any("color" in clause for row in metadata for clause in row["include"])
    return GenEval(load_detector(model, device, asks_colors))
