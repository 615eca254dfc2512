"""GenEval's rule, on cases worked out by hand."""

from collections import Counter

import pytest

from rewards.geneval import detection, rule
from tests.rewards.geneval.notation import ask, asked, shown


def scene(text):
    """'red circle@50,0; square' -> detections with 20 x 20 boxes around the centres, falling scores."""
    detections = []
    for i, part in enumerate(filter(None, (part.strip() for part in text.split(";")))):
        words, _, centre = part.partition("@")
        x, y = map(int, centre.split(",")) if centre else (0, 0)
        color, _, name = words.rpartition(" ")
        box = (x - 10, y - 10, x + 10, y + 10)
        detections.append(detection.Detection(name, box, 1 - i / 100, color))
    return detections


ASKED = {
    "single_object": {"include": [ask("circle")]},
    "single_object, no square": {"include": [ask("circle")], "exclude": [ask("square")]},
    "two_object": {"include": [ask("circle"), ask("square")]},
    "counting": {"include": [ask("circle", 3)], "exclude": [ask("circle", 4)]},
    "counting, open": {"include": [ask("circle", 2)]},
    "colors": {"include": [ask("circle", color="red")]},
    "colors, two": {"include": [ask("circle", 2, color="red")]},
    "position": {"include": [ask("circle"), ask("square", position=["left of", 0])]},
    "position, two": {"include": [ask("circle"), ask("square", 2, position=["left of", 0])]},
    "position, red": {"include": [ask("circle", color="red"), ask("square", position=["left of", 0])]},
    "color_attr": {"include": [ask("circle", color="red"), ask("square", color="blue")]},
}


SCORES = [  # asked, shown, official, strict, soft
    ("single_object", "circle", 1, 1, 1),
    ("single_object", "", 0, 0, 0),
    ("single_object", "square", 0, 0, 0),
    ("single_object", "circle; square", 1, 1, 1),
    ("single_object", "circle; circle", 1, 0, 0),
    ("single_object, no square", "circle", 1, 1, 1),
    ("single_object, no square", "circle; square", 0, 0, 1 / 2),
    ("single_object, no square", "square", 0, 0, 0),
    ("single_object, no square", "", 0, 0, 1 / 2),
    ("two_object", "circle; square", 1, 1, 1),
    ("two_object", "circle", 0, 0, 1 / 2),
    ("two_object", "triangle; cross", 0, 0, 0),
    ("two_object", "circle; square; square", 1, 0, 1 / 2),
    ("two_object", "circle; circle; square; square", 1, 0, 0),
    ("counting", "circle; circle; circle", 1, 1, 1),
    ("counting", "circle; circle", 0, 0, (2 / 3 + 1) / 2),
    ("counting", "circle", 0, 0, (1 / 3 + 1) / 2),
    ("counting", "", 0, 0, 1 / 2),
    ("counting", "circle; circle; circle; circle", 0, 0, (2 / 3 + 0) / 2),
    ("counting", "circle; " * 6, 0, 0, 0),
    ("counting", "circle; " * 7, 0, 0, 0),
    ("counting, open", "circle; circle", 1, 1, 1),
    ("counting, open", "circle; circle; circle", 1, 0, 1 / 2),
    ("counting, open", "circle; " * 5, 1, 0, 0),  # Flow-GRPO's own score would be -1/2
    ("counting, open", "circle", 0, 0, 1 / 2),
    ("counting, open", "", 0, 0, 0),
    ("colors", "red circle", 1, 1, 1),
    ("colors", "blue circle", 0, 0, 1 / 2),
    ("colors", "red square", 0, 0, 0),
    ("colors", "red circle; blue circle", 1, 0, 0),
    ("colors", "blue circle; red circle", 0, 0, 0),
    ("colors, two", "red circle; red circle", 1, 1, 1),
    ("colors, two", "red circle; blue circle", 0, 0, (1 + 1 / 2) / 2),
    ("colors, two", "red circle; red circle; red circle", 1, 0, (1 / 2 + 0) / 2),
    ("position", "circle@50,0; square@0,0", 1, 1, 1),
    ("position", "circle@50,50; square@0,0", 1, 1, 1),
    ("position", "circle@0,0; square@50,0", 0, 0, 2 / 3),
    ("position", "circle@0,50; square@0,0", 0, 0, 2 / 3),
    ("position", "circle@0,0; square@0,0", 0, 0, 2 / 3),
    ("position", "square@0,0", 0, 0, 1 / 3),
    ("position", "circle@50,0", 0, 0, 1 / 3),
    ("position", "circle@50,0; square@0,0; square@100,0", 1, 0, 1 / 3),
    ("position", "circle@50,0; square@100,0; square@0,0", 0, 0, 1 / 3),
    ("position", "circle@50,0; circle@-50,0; square@0,0", 1, 0, 1 / 3),
    ("position, two", "circle@50,0; square@0,0; square@0,50", 1, 1, 1),
    ("position, two", "circle@50,0; square@0,0; square@100,0", 0, 0, (1 + 1 + 1 / 2) / 3),
    ("position, red", "red circle@50,0; square@0,0", 1, 1, 1),
    ("position, red", "blue circle@50,0; square@0,0", 0, 0, 3 / 4),
    ("color_attr", "red circle; blue square", 1, 1, 1),
    ("color_attr", "red circle; blue square; green cross", 1, 1, 1),
    ("color_attr", "blue circle; red square", 0, 0, 1 / 2),
    ("color_attr", "red circle; red square", 0, 0, 3 / 4),
    ("color_attr", "red circle", 0, 0, 1 / 2),
    ("color_attr", "red circle; blue square; green square", 1, 0, 1 / 2),
]


@pytest.mark.parametrize("asked, shown, official, strict, soft", SCORES)
def test_geneval_scores_a_hand_made_table(asked, shown, official, strict, soft):
    detections, metadata = scene(shown), ASKED[asked]
    assert rule.passes(detections, metadata, exact=False) == bool(official)
    assert rule.passes(detections, metadata, exact=True) == bool(strict)
    assert rule.soft_score(detections, metadata) == pytest.approx(soft)


def test_the_geneval_table_covers_every_tag():
    assert {asked.split(",")[0] for asked, *_ in SCORES} == set(detection.TAGS)


@pytest.mark.parametrize(
    "a, b, relations",
    [
        ((0, 0, 20, 20), (200, 0, 220, 20), {"left of"}),
        ((200, 0, 220, 20), (0, 0, 20, 20), {"right of"}),
        ((0, 0, 20, 20), (0, 200, 20, 220), {"above"}),
        ((0, 200, 20, 220), (0, 0, 20, 20), {"below"}),
        ((0, 0, 20, 20), (100, 100, 120, 120), {"above", "left of"}),
        ((100, 0, 120, 20), (0, 100, 20, 120), {"above", "right of"}),
        ((0, 0, 100, 100), (15, 0, 115, 100), set()),  # within a tenth of the summed sizes
        ((0, 0, 100, 100), (39, 0, 139, 100), set()),  # beyond it, but by less than half of the offset
        ((0, 0, 100, 100), (41, 0, 141, 100), {"left of"}),
        ((0, 0, 20, 20), (0, 0, 20, 20), set()),
        ((0, 0, 20, 20), (100, 20, 120, 40), {"left of"}),  # mostly sideways
        ((0, 0, 20, 20), (40, 100, 60, 120), {"above"}),
        ((100, 40, 120, 60), (0, 0, 20, 20), {"right of"}),
    ],
)
def test_relative_position_follows_genevals_rule(a, b, relations):
    assert rule.relative_position(a, b) == relations


@pytest.mark.parametrize("exact", [False, True])
def test_at_most_sixteen_detections_of_a_class_count(exact):
    crowd = scene("circle; " * (detection.MAX_OBJECTS + 4) + "square")
    assert detection.MAX_OBJECTS == 16
    assert rule.passes(crowd, {"include": [ask("circle", 16), ask("square")]}, exact)
    assert not rule.passes(crowd, {"include": [ask("circle", 17)]}, exact)
    assert rule.soft_score(crowd, {"include": [ask("circle", 16)]}) == 1


def test_the_best_scored_object_comes_first_whatever_the_order():
    detections = scene("red circle; blue circle")
    for order in (detections, detections[::-1]):
        assert rule.passes(order, {"include": [ask("circle", color="red")]}, exact=False)
        assert not rule.passes(order, {"include": [ask("circle", color="blue")]}, exact=False)


CASES = [  # tag, asked, shown, then GenEval's own verdict, the strict one, and the soft score
    ("single_object", "dog", "dog", 1, 1, 1),
    ("single_object", "dog", "", 0, 0, 0),
    ("single_object", "dog", "cat; hot dog", 0, 0, 0),
    ("single_object", "dog", "dog; cat; cat", 1, 1, 1),  # nobody asked about cats
    ("single_object", "dog", "dog; dog", 1, 0, 0),  # |1 - 2| / 1
    ("single_object", "computer mouse", "computer mouse", 1, 1, 1),
    ("single_object", "computer mouse", "mouse", 0, 0, 0),  # COCO's word is not GenEval's
    ("single_object", "dog, not cat", "dog; cat", 0, 0, 1 / 2),
    ("single_object", "dog, not 2 cat", "dog; cat", 1, 1, 1),  # one below the excluded count
    ("single_object", "dog, not 2 cat", "dog; cat; cat; cat", 0, 0, 1 / 2),
    ("single_object", "dog, not cat, not bus", "dog; bus", 0, 0, 1 / 2),  # one clause for all exclusions
    ("two_object", "dog, cat", "cat; dog", 1, 1, 1),
    ("two_object", "dog, cat", "dog", 0, 0, 1 / 2),
    ("two_object", "dog, cat", "bus; car", 0, 0, 0),
    ("two_object", "dog, cat", "dog; dog; cat", 1, 0, 1 / 2),
    ("two_object", "dog, cat", "dog; dog; dog", 0, 0, 0),  # 1 - 2 is below 0
    ("two_object", "dog, cat", "dog; dog; cat; cat", 1, 0, 0),
    ("two_object", "dog, cat, not 2 dog", "dog; dog; cat", 0, 0, 1 / 3),
    ("counting", "3 dog, not 4 dog", "dog; dog; dog", 1, 1, 1),
    ("counting", "3 dog, not 4 dog", "dog; dog", 0, 0, (2 / 3 + 1) / 2),
    ("counting", "3 dog, not 4 dog", "dog; dog; dog; dog", 0, 0, (2 / 3 + 0) / 2),
    ("counting", "3 dog, not 4 dog", "dog; dog; dog; dog; dog", 0, 0, (1 / 3 + 0) / 2),
    ("counting", "3 dog, not 4 dog", "dog; dog; dog; dog; dog; dog", 0, 0, 0),
    ("counting", "3 dog, not 4 dog", "dog; dog; cat", 0, 0, (2 / 3 + 1) / 2),
    ("counting", "3 dog, not 4 dog", "cat; cat; cat", 0, 0, 1 / 2),  # no four dogs: that clause holds
    ("counting", "2 dog, not 3 dog", "dog", 0, 0, (1 / 2 + 1) / 2),
    ("counting", "2 dog, not 3 dog", "dog; dog; dog", 0, 0, (1 / 2 + 0) / 2),
    ("counting", "4 dog, not 5 dog", "dog; dog; dog", 0, 0, (3 / 4 + 1) / 2),
    ("counting", "2 dog", "dog; dog; dog", 1, 0, 1 / 2),  # at least two; exactly two; half of one too many
    ("counting", "2 dog, 3 cat", "dog; dog; cat; cat", 0, 0, (1 + 2 / 3) / 2),
    ("counting", "16 dog, not 17 dog", "; ".join(["dog"] * 20), 1, 1, 1),  # only 16 of a class are kept
    ("counting", "17 dog", "; ".join(["dog"] * 20), 0, 0, 16 / 17),
    # 20 dogs, the four blue ones surest: of the 16 that are kept, 12 are red
    ("colors", "16 red dog", "; ".join(["red dog 0.5"] * 16 + ["blue dog 0.9"] * 4), 0, 0, (1 + 12 / 16) / 2),
    ("colors", "red dog", "red dog", 1, 1, 1),
    ("colors", "red dog", "blue dog", 0, 0, 1 / 2),
    ("colors", "red dog", "dog", 0, 0, 1 / 2),  # the detector said nothing of its colour
    ("colors", "red dog", "red cat", 0, 0, 0),
    ("colors", "red dog", "red dog 0.9; blue dog 0.5", 1, 0, 0),  # the first by score is red
    ("colors", "red dog", "red dog 0.5; blue dog 0.9", 0, 0, 0),
    ("colors", "red dog", "blue dog 0.5; red dog 0.9", 1, 0, 0),
    ("colors", "2 red dog", "red dog; red dog", 1, 1, 1),
    ("colors", "2 red dog", "red dog; blue dog", 0, 0, (1 + 1 / 2) / 2),
    ("colors", "2 red dog", "blue dog; green dog", 0, 0, 1 / 2),
    ("colors", "2 red dog", "red dog 0.9; red dog 0.8; blue dog 0.7", 1, 0, (1 / 2 + 0) / 2),
    ("colors", "2 red dog", "red dog 0.9; red dog 0.7; blue dog 0.8", 0, 0, (1 / 2 + 0) / 2),
    (
        "colors",
        "2 red dog",
        "red dog",
        0,
        0,
        (1 / 2 + 0) / 2,
    ),  # a colour earns nothing while the count is off
    # 20 + 20 pixels: a centre counts from a tenth, 4 pixels, and then by (offset - 4) / offset > 1/2
    ("position", "cat, dog left of 0", "cat; dog @-50,0", 1, 1, 1),
    ("position", "cat, dog left of 0", "cat; dog @50,0", 0, 0, 2 / 3),
    ("position", "cat, dog left of 0", "cat; dog", 0, 0, 2 / 3),  # the same place
    ("position", "cat, dog left of 0", "cat; dog @-4,0", 0, 0, 2 / 3),  # at the margin
    ("position", "cat, dog left of 0", "cat; dog @-8,0", 0, 0, 2 / 3),  # 4 / 8 is not above a half
    ("position", "cat, dog left of 0", "cat; dog @-9,0", 1, 1, 1),  # 5 / 9 is
    ("position", "cat, dog right of 0", "cat; dog @9,0", 1, 1, 1),
    ("position", "cat, dog above 0", "cat; dog @0,-9", 1, 1, 1),  # y points down
    ("position", "cat, dog below 0", "cat; dog @0,-9", 0, 0, 2 / 3),
    ("position", "cat, dog below 0", "cat; dog @0,8", 0, 0, 2 / 3),
    ("position", "cat, dog below 0", "cat; dog @0,9", 1, 1, 1),
    ("position", "cat, dog left of 0", "cat 100x20; dog @-24,0", 0, 0, 2 / 3),  # the margin is 12: 12 / 24
    ("position", "cat, dog left of 0", "cat 100x20; dog @-25,0", 1, 1, 1),  # 13 / 25
    ("position", "cat, dog above 0", "cat 100x20; dog @0,-9", 1, 1, 1),  # the width is no matter for above
    ("position", "cat, dog left of 0", "cat; dog @-100,-100", 1, 1, 1),  # a diagonal is both: 96 / 141
    ("position", "cat, dog above 0", "cat; dog @-100,-100", 1, 1, 1),
    ("position", "cat, dog right of 0", "cat; dog @-100,-100", 0, 0, 2 / 3),
    ("position", "cat, dog left of 0", "cat; dog @-100,-60", 1, 1, 1),  # 96 / 117
    ("position", "cat, dog above 0", "cat; dog @-100,-60", 0, 0, 2 / 3),  # 56 / 117
    ("position", "cat, dog left of 0", "dog @-50,0", 0, 0, 1 / 3),  # no target
    ("position", "cat, dog left of 0", "cat", 0, 0, 1 / 3),
    ("position", "cat, dog left of 0", "", 0, 0, 0),
    ("position", "cat, dog left of 0", "cat; dog @-50,0 0.9; dog @50,0 0.8", 1, 0, 1 / 3),
    ("position", "cat, dog left of 0", "cat; dog @-50,0 0.8; dog @50,0 0.9", 0, 0, 1 / 3),
    ("position", "cat, dog left of 0", "cat 0.9; cat @-100,0 0.8; dog @-50,0", 1, 0, 1 / 3),
    ("position", "cat, dog left of 0", "cat 0.8; cat @-100,0 0.9; dog @-50,0", 0, 0, 1 / 3),
    ("position", "cat, 2 dog left of 0", "cat; dog @-50,0; dog @-50,50", 1, 1, 1),
    ("position", "cat, 2 dog left of 0", "cat; dog @-50,0; dog @50,0", 0, 0, (1 + 1 + 1 / 2) / 3),
    ("position", "cat, 2 dog left of 0", "cat; dog @-50,0; dog @-50,9; dog @50,0", 1, 0, (1 + 1 / 2) / 3),
    ("position", "2 cat, dog left of 0", "cat; cat @100,0; dog @-50,0", 1, 1, 1),
    ("position", "2 cat, dog left of 0", "cat; cat @100,0; dog @50,0", 0, 0, (1 + 1 + 1 / 2) / 3),
    ("position", "cat, dog left of 0, bus above 1", "cat; dog @-50,0; bus @-50,-50", 1, 1, 1),
    ("position", "cat, dog left of 0, bus above 1", "cat; dog @50,0; bus @50,-50", 0, 0, 4 / 5),  # see below
    ("position", "red cat, dog left of 0", "blue cat; dog @-50,0", 0, 0, 3 / 4),  # a target of a wrong colour
    ("color_attr", "red dog, blue cat", "red dog; blue cat", 1, 1, 1),
    ("color_attr", "red dog, blue cat", "blue dog; red cat", 0, 0, 1 / 2),
    ("color_attr", "red dog, blue cat", "red dog; red cat", 0, 0, 3 / 4),
    ("color_attr", "red dog, blue cat", "red dog; white cat; black bus", 0, 0, 3 / 4),
    ("color_attr", "red dog, blue cat", "blue cat", 0, 0, 1 / 2),
    ("color_attr", "red dog, blue cat", "red dog; blue cat 0.9; green cat 0.8", 1, 0, 1 / 2),
    ("color_attr", "red dog, blue cat", "red dog; blue cat 0.8; green cat 0.9", 0, 0, 1 / 2),
    ("color_attr", "red dog, blue dog", "red dog 0.9; blue dog 0.8", 0, 0, 0),  # both clauses see the first
]
# "see below": in GenEval's rule a clause whose position fails is no target for later ones, the bus fails too


@pytest.mark.parametrize("tag, asks, shows, official, strict, soft", CASES)
def test_the_scores_of_a_hand_made_table(tag, asks, shows, official, strict, soft):
    metadata, detections = asked(asks), shown(shows)
    rule.check_metadata(metadata)
    for order in (detections, detections[::-1]):
        if len({d.score for d in detections}) == len(detections) or order is detections:
            assert rule.passes(order, metadata, exact=False) == bool(official)
            assert rule.passes(order, metadata, exact=True) == bool(strict)
            assert rule.soft_score(order, metadata) == pytest.approx(soft)


def test_the_table_has_many_cases_of_every_tag():
    tags = Counter(case[0] for case in CASES)
    assert len(CASES) >= 60 and set(tags) == set(detection.TAGS) and min(tags.values()) >= 7
    assert len(set(CASES)) == len(CASES)


BAD_METADATA = [
    ({}, "include"),
    ({"include": []}, "include"),
    ({"include": None}, "include"),
    ({"include": "circle"}, "include"),
    ({"include": ["circle"]}, r"include\[0\]"),
    ({"include": [{"count": 1}]}, r"include\[0\]"),
    ({"include": [{"class": "circle"}]}, r"include\[0\]"),
    ({"include": [{"class": "circle", "count": "2"}]}, r"include\[0\]"),
    ({"include": [ask("circle"), ask("square", 0)]}, r"include\[1\]"),
    ({"include": [ask("circle"), ask("square", position=["beside", 0])]}, "position"),
    ({"include": [ask("circle"), ask("square", position=["above", 1])]}, "position"),
    ({"include": [ask("circle"), ask("square", position=["above", -1])]}, "position"),
    ({"include": [ask("circle", position=["above", 0])]}, "position"),
    ({"include": [ask("circle"), ask("square", position=["above"])]}, "position"),
    ({"include": [ask("circle"), ask("square", position=3)]}, "position"),
    ({"include": [ask("circle"), ask("square", position=["above", "0"])]}, "position.*not .'above', '0'."),
    ({"include": [ask("circle"), ask("square", position=["above", True])]}, "position"),
    ({"include": [ask("circle"), ask("square", position=[["above"], 0])]}, "position"),
    ({"include": [ask("circle"), ask("square", position={"relation": "above"})]}, "position"),
    ({"include": [ask("circle", color=["red"])]}, "color"),
    ({"include": [ask("circle", color=3)]}, "color"),
    ({"include": [ask("circle", True)]}, r"include\[0\].*count"),
    ({"include": [ask("circle", 2.0)]}, r"include\[0\].*count"),
    ({"include": [ask("circle", None)]}, r"include\[0\].*count"),
    ({"include": [ask(None)]}, r"include\[0\].*class"),
    ({"include": [ask(3)]}, r"include\[0\].*class"),
    ({"include": [None]}, r"include\[0\]"),
    ({"include": '[{"class": "circle", "count": 1}]'}, "include"),
    ({"include": {"class": ["circle"], "count": [1]}}, "include"),
    ({"include": [ask("circle")], "exclude": [{"class": "circle"}]}, r"exclude\[0\]"),
    ({"include": [ask("circle")], "exclude": "square"}, "exclude"),
    ({"include": [ask("circle")], "exclude": [ask("square", position=["above", 0])]}, "position"),
]


@pytest.mark.parametrize("metadata, said", BAD_METADATA)
def test_check_metadata_says_what_is_wrong(metadata, said):
    with pytest.raises(ValueError, match=said):
        rule.check_metadata(metadata)


@pytest.mark.parametrize("metadata", ASKED.values(), ids=ASKED)
def test_check_metadata_accepts_good_rows(metadata):
    rule.check_metadata(metadata)


@pytest.mark.parametrize("metadata", ASKED.values(), ids=ASKED)
def test_a_key_that_is_none_counts_as_absent(metadata):
    """As a table's export writes rows: all clauses have all keys, None where they had none."""
    keys = {"class": None, "count": None, "color": None, "position": None}
    filled = {"tag": "x", "exclude": None, "include": [keys | clause for clause in metadata["include"]]}
    if "exclude" in metadata:
        filled["exclude"] = [keys | clause for clause in metadata["exclude"]]
    rule.check_metadata(filled)
    for _, shown_text, *_ in SCORES:
        detections = scene(shown_text)
        for exact in (False, True):
            assert rule.passes(detections, filled, exact) == rule.passes(detections, metadata, exact)
        assert rule.soft_score(detections, filled) == rule.soft_score(detections, metadata)
