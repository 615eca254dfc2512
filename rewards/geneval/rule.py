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

from rewards.geneval.detection import MAX_OBJECTS, RELATIONS

POSITION_THRESHOLD = 0.1  # a centre offset counts beyond this share of the summed sizes


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
