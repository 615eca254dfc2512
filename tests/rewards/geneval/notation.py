"""A short way to write what is asked for and what an image shows."""

import re

from rewards.geneval import detection

COLOR = f"(?:({'|'.join(detection.COLORS)}) )?"


def asked(text):
    """'2 red dog, cat left of 0, not 3 bus' -> metadata of one tag or another: include and exclude."""
    pattern = re.compile(rf"(not )?(?:(\d+) )?{COLOR}(.+?)(?: ({'|'.join(detection.RELATIONS)}) (\d))?")
    metadata = {"include": [], "exclude": []}
    for part in text.split(", "):
        absent, count, color, name, relation, index = pattern.fullmatch(part).groups()
        clause = {"class": name, "count": int(count or 1)}
        clause |= {"color": color} if color else {}
        clause |= {"position": [relation, int(index)]} if relation else {}
        metadata["exclude" if absent else "include"].append(clause)
    return metadata


def shown(text):
    """'red dog 0.9; cat @100,0 40x20' -> detections: centre (0, 0), 20 x 20 pixels and falling scores where
    nothing is said."""
    number = r"-?[\d.]+"
    place = rf"(?: @({number}),({number}))?(?: (\d+)x(\d+))?(?: (0\.\d+))?"
    detections = []
    for i, part in enumerate(text.split("; ") if text else []):
        color, name, x, y, w, h, score = re.fullmatch(rf"{COLOR}([a-z].*?){place}", part).groups()
        x, y, w, h = float(x or 0), float(y or 0), float(w or 20), float(h or 20)
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        detections.append(detection.Detection(name, box, float(score or 1 - i / 100), color))
    return detections


def ask(name, count=1, color=None, position=None):
    """A clause of GenEval's metadata."""
    clause = {"class": name, "count": count, "color": color, "position": position}
    return {key: value for key, value in clause.items() if value is not None}
