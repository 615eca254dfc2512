"""GenEval: does the image show what the prompt asks for, object by object?

Scores the detections of an image against GenEval's metadata, three ways:
  official   the benchmark's own rule (Ghosh et al. 2023): at least the asked count of each class; the first
             `count` objects must have the colour and the position; `exclude` fails at its count.
  strict     every clause exact: as official, but the count must be equal and all found objects are examined.
  soft       for training, in [0, 1]: the mean over clauses of how nearly each holds (see `soft_score`).
The reward trained on is the mean of soft and strict. Soft alone can be raised while strict falls, because
three objects out of four earn most of the credit. Strict alone is flat where a prompt never succeeds.

Metadata, in GenEval's format: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation,
index], "place"?}], "exclude"?: [{"class", "count"}], "prompt"}. A key whose value is None counts as absent.
`place` is not GenEval's: it names the ninth of the image that the objects' centres must be in. The
detector is passed in: `detector(images, metadata) -> list of Detection lists`, None where it failed on an
image. The metadata tell it how sure it must be (of counting prompts) and whose colour is asked for, never
what to find.
"""

from rewards.geneval.detection import MAX_OBJECTS, PLACES, RELATIONS

POSITION_THRESHOLD = 0.1  # a centre offset counts beyond this share of the summed sizes


def relative_position(box_a, box_b):
    """The relations that hold of box_a towards box_b, as a set: GenEval's rule, e.g. {"left of", "above"}."""
    offset = []  # of the centres, along x and y
    beyond = []  # the part of each offset beyond the margin
    for low, high in ((0, 2), (1, 3)):
        distance = (box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2
        size = box_a[high] - box_a[low] + box_b[high] - box_b[low]
        sign = 1 if distance > 0 else -1
        offset.append(distance)
        beyond.append(max(abs(distance) - POSITION_THRESHOLD * size, 0) * sign)
    if abs(beyond[0]) < 1e-3 and abs(beyond[1]) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5  # of the whole offset, margin included
    dx = beyond[0] / length
    dy = beyond[1] / length
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def group_by_class(detections):
    """{class name: its detections, best score first, at most MAX_OBJECTS}."""
    groups = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        groups.setdefault(detection.class_name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in groups.items()}


def asked_color(clause):
    """The colour that a clause asks for, or None."""
    return clause.get("color")


def asked_position(clause):
    """(relation, index of the target's clause) that a clause asks for, or None."""
    return clause.get("position")


def asked_place(clause):
    """The name of the ninth of the image that a clause asks for, or None."""
    return clause.get("place")


def excluded_clauses(metadata):
    """The clauses of what must not appear."""
    return metadata.get("exclude") or []


def count_color(detections, color):
    """How many of the detections have a colour."""
    return sum(detection.color == color for detection in detections)


def count_place(detections, place):
    """How many of the detections have their centre in a ninth of the image."""
    return sum(detection.place == place for detection in detections)


def excluded_is_absent(groups, metadata):
    """Whether every excluded class stays below its count."""
    for clause in excluded_clauses(metadata):
        if len(groups.get(clause["class"], [])) >= clause["count"]:
            return False
    return True


def all_related(detections, targets, relation):
    """Whether a relation holds of every detection towards every target."""
    for detection in detections:
        for target in targets:
            if relation not in relative_position(detection.box, target.box):
                return False
    return True


def passes(detections, metadata, exact):
    """True when every clause holds: GenEval's own rule, or with `exact` the strict one."""
    groups = group_by_class(detections)
    matched = []  # per clause, the objects that fulfil it; None where it failed
    for clause in metadata["include"]:
        found = groups.get(clause["class"], [])
        if exact:
            holds = len(found) == clause["count"]
        else:
            holds = len(found) >= clause["count"]
            found = found[: clause["count"]]
        color = asked_color(clause)
        if holds and color is not None:
            holds = count_color(found, color) >= clause["count"]
        place = asked_place(clause)
        if holds and place is not None:
            holds = count_place(found, place) >= clause["count"]
        position = asked_position(clause)
        if holds and position is not None:
            relation, index = position
            targets = matched[index]
            holds = targets is not None and all_related(found, targets, relation)
        matched.append(found if holds else None)
    return None not in matched and excluded_is_absent(groups, metadata)


def soft_score(detections, metadata):
    """The mean of `clause_scores`."""
    scores = clause_scores(detections, metadata)
    return sum(scores) / len(scores)


def clause_scores(detections, metadata):
    """How nearly each clause holds, a list of numbers in [0, 1].

    count      1 - |asked - found| / asked, at least 0 (Flow-GRPO's training score goes negative here)
    colour     the same over the objects of that colour; 0 while the count is wrong
    place      the same over the objects in that ninth of the image; 0 while the count is wrong
    position   share of (object, target) pairs in the asked relation; 0 while either count is wrong
    exclude    1 when no excluded class reaches its count: one clause for all, so that extras cost
    """
    groups = group_by_class(detections)
    counted = []  # per clause, its objects where their number is right
    scores = []
    for clause in metadata["include"]:
        asked = clause["count"]
        found = groups.get(clause["class"], [])
        scores.append(max(0.0, 1 - abs(asked - len(found)) / asked))
        counted.append(found if len(found) == asked else [])
        color = asked_color(clause)
        if color is not None:
            scores.append(count_color(found, color) / asked if counted[-1] else 0.0)
        place = asked_place(clause)
        if place is not None:
            scores.append(count_place(found, place) / asked if counted[-1] else 0.0)
        position = asked_position(clause)
        if position is not None:
            relation, index = position
            scores.append(share_of_pairs(counted[-1], counted[index], relation))
    if excluded_clauses(metadata):
        scores.append(float(excluded_is_absent(groups, metadata)))
    return scores


def share_of_pairs(detections, targets, relation):
    """The share of pairs (detection, target) in a relation, 0 where there is no pair."""
    if not detections or not targets:
        return 0.0
    holding = 0
    for detection in detections:
        for target in targets:
            if relation in relative_position(detection.box, target.box):
                holding += 1
    return holding / (len(detections) * len(targets))


def check_metadata(metadata):
    """Raises ValueError, saying what is wrong, unless the row has what the scorer reads."""
    if not isinstance(metadata.get("include"), list) or not metadata["include"]:
        raise ValueError('geneval needs a non-empty "include" list: use a .jsonl in GenEval\'s format')
    if not isinstance(excluded_clauses(metadata), list):
        raise ValueError('geneval: "exclude" must be a list')
    for index, clause in enumerate(metadata["include"]):
        check_clause(f"include[{index}]", clause)
        color = asked_color(clause)
        if color is not None and not isinstance(color, str):
            raise ValueError(f'geneval: include[{index}]["color"] must be a string, not {color!r}')
        check_place(f"include[{index}]", asked_place(clause))
        check_position(f"include[{index}]", asked_position(clause), index)
    for index, clause in enumerate(excluded_clauses(metadata)):
        check_clause(f"exclude[{index}]", clause)
        check_position(f"exclude[{index}]", asked_position(clause), index)


def check_clause(name, clause):
    """Raises ValueError unless a clause has a class and a count."""
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        raise ValueError(f'geneval: {name} needs "class" and an integer "count"')
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(f'geneval: {name} needs "class" and an integer "count", not {count!r}')
    if count < 1:
        raise ValueError(f"geneval: {name} has a count of {count}, at least 1 is needed")


def check_place(name, place):
    """Raises ValueError unless a place, if there is one, names a ninth of the image."""
    names = sum(PLACES, ())
    if place is not None and place not in names:
        raise ValueError(f'geneval: {name}["place"] must be one of {", ".join(names)}, not {place!r}')


def check_position(name, position, index):
    """Raises ValueError unless a position, if there is one, names a relation and an earlier clause."""
    if position is None:
        return
    good = isinstance(position, list) and len(position) == 2
    if good:
        relation, target = position
        good = relation in RELATIONS and isinstance(target, int) and not isinstance(target, bool)
        good = good and 0 <= target < index
    if not good:
        raise ValueError(
            f'geneval: {name}["position"] must be [relation, index of an earlier clause], not {position!r}'
        )
