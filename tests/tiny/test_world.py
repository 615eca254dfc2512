import random
import re

import pytest
import torch
from einops import rearrange

from rewards.geneval import detection, rule
from rewards.tiny_world import shapes
from tiny import world


def detect(pictures):
    """Detections of lists of Things, as the detector sees their renders."""
    batch = torch.stack([torch.from_numpy(world.draw(things)) for things in pictures])
    return shapes.detect(rearrange(batch, "b h w c -> b c h w").float() / 255)


def as_detections(things):
    """What a perfect detector would say."""
    detections = []
    for thing in things:
        place = world.place(thing.x, thing.y)
        detections.append(detection.Detection(thing.shape, world.box_of(thing), 1.0, thing.color, place))
    return detections


def first(options):
    return options[0]


# ---- contents ----
def test_no_content_is_there_twice_and_each_is_well_formed():
    contents = [content for tag in detection.TAGS for content in world.all_contents(tag)]
    assert len({str(content) for content in contents}) == len(contents)
    for content in contents:
        rule.check_metadata(content)


# ---- scenes ----
@pytest.mark.parametrize("tag", detection.TAGS)
def test_realise_shows_exactly_the_content(tag):
    rng = random.Random(0)
    contents = [rng.choice(world.CONTENTS[tag]) for _ in range(60)]
    pictures = [world.realise(content, rng) for content in contents]
    for content, things in zip(contents, pictures):
        assert rule.passes(as_detections(things), content, exact=True)
        assert rule.soft_score(as_detections(things), content) == 1
    passed = [rule.passes(d, content, exact=True) for d, content in zip(detect(pictures), contents)]
    assert sum(passed) >= 59


def test_objects_never_overlap_and_stay_inside():
    rng = random.Random(1)
    for _ in range(400):
        _, things, image = world.sample(rng, text_share=0)
        assert image.shape == (world.SIZE, world.SIZE, 3)
        assert things
        for i, a in enumerate(things):
            box = world.box_of(a)
            assert min(box) >= world.MARGIN - 1e-9 and max(box) <= world.SIZE - world.MARGIN + 1e-9
            assert world.RADIUS[0] <= a.r <= world.RADIUS[1]
            assert world.fits(a, things[:i])
            for b in things[:i]:
                other = world.box_of(b)
                gaps = [max(box[k] - other[k + 2], other[k] - box[k + 2]) for k in (0, 1)]
                assert max(gaps) >= world.GAP - 1e-9


def test_the_same_seed_draws_the_same_examples():
    def draw_all(seed):
        rng = random.Random(seed)
        examples = [world.sample(rng) for _ in range(40)]
        return [(c, t, i.tobytes(), world.wording(c, t, rng)) for c, t, i in examples], [
            world.sample_edit(rng) for _ in range(10)
        ]

    assert draw_all(3) == draw_all(3)
    assert draw_all(3) != draw_all(4)


def test_samples_cover_every_tag_and_texts():
    rng = random.Random(0)
    tags = [world.sample(rng)[0]["tag"] for _ in range(400)]
    assert set(tags) == {*detection.TAGS, "text"}
    assert 0.08 < tags.count("text") / len(tags) < 0.17


# ---- edits ----
@pytest.fixture(scope="module")
def edits():
    rng = random.Random(0)
    return [world.sample_edit(rng) for _ in range(200)]


def test_an_edit_changes_the_picture_and_reaches_its_metadata(edits):
    assert {edit.content["tag"] for _, edit in edits} == set(world.EDITS)
    for source, (_, _, target, content, kept) in edits:
        rule.check_metadata(content)
        assert source != target
        assert set(kept) <= set(target)
        if content["tag"] == "remove":
            assert kept == source[1:]
        assert (world.draw(source) != world.draw(target)).any()
        assert rule.passes(as_detections(target), content, exact=True)
        assert all(world.fits(thing, target[:i]) for i, thing in enumerate(target))
        assert all(0 <= min(world.box_of(t)) and max(world.box_of(t)) <= world.SIZE for t in target)
    passed = [
        rule.passes(d, e.content, exact=True)
        for d, (_, e) in zip(detect([e.target for _, e in edits]), edits)
    ]
    assert sum(passed) >= 199


@pytest.mark.parametrize("kind", world.EDITS)
def test_an_unchanged_source_does_not_pass_as_edited(edits, kind):
    chosen = [(source, edit) for source, edit in edits if edit.content["tag"] == kind]
    assert chosen
    for source, edit in chosen:
        assert not rule.passes(as_detections(source), edit.content, exact=True)


def test_a_reworded_instruction_says_the_same_in_synonyms(edits):
    synonyms = {}
    for table in (world.SHAPE_WORDS, world.COLOR_WORDS, world.PLACE_WORDS):
        for canonical, synonym, _ in table.values():
            synonyms[synonym] = canonical
    longest_first = sorted(synonyms, key=len, reverse=True)
    for _, edit in edits:
        said = edit.reworded
        for synonym in longest_first:
            said = re.sub(rf"\b{synonym}\b", synonyms[synonym], said)
        without_articles = [re.sub(r"\ban? ", "", text) for text in (said, edit.instruction)]
        assert without_articles[0] == without_articles[1]
        assert edit.reworded != edit.instruction


def test_a_move_goes_where_the_instruction_says(edits):
    moves = [(source, edit) for source, edit in edits if edit.content["tag"] == "move"]
    for source, edit in moves:
        before, after = source[0], edit.target[0]
        assert source[1:] == edit.target[1:] and before._replace(x=after.x, y=after.y) == after
        place = world.place(after.x, after.y)
        assert edit.instruction == f"move the {after.color} {after.shape} to the {place}"
        assert world.place(before.x, before.y) != world.place(after.x, after.y)


# ---- wording ----
@pytest.mark.parametrize(
    "tag, include, canonical, held_out",
    [
        (
            "single_object",
            [("cross", 1, {"place": "top left"})],
            "a cross at the top left",
            "an image of a cruciform in the northwest",
        ),
        ("colors", [("circle", 1, {"color": "blue"})], "a blue circle", "an image of a navy ball"),
        ("counting", [("square", 3, {})], "three squares", "an image of a triple of blocks"),
        ("counting", [("cross", 2, {})], "two crosses", "an image of a couple of cruciforms"),
        (
            "two_object",
            [("circle", 1, {}), ("triangle", 1, {})],
            "a circle and a triangle",
            "both a pyramid and a ball",
        ),
        (
            "position",
            [("circle", 1, {}), ("square", 1, {"position": ["left of", 0]})],
            "a square left of a circle",
            "an image of a block west of a ball",
        ),
    ],
)
def test_contents_are_said_in_words(tag, include, canonical, held_out):
    clauses = [{"class": name, "count": count} | more for name, count, more in include]
    content = world.content_of(tag, clauses)
    assert world.canonical(content) == canonical
    assert world.say(content, lambda options: options[2]) == held_out


def test_an_article_agrees_with_its_word():
    content = world.content_of("colors", [{"class": "circle", "count": 1, "color": "blue"}])
    assert world.say(content, lambda options: options[1]) == "there is an azure disc"
    assert world.article("hourglass") == world.article("orange") == "an"
    assert world.article("heart") == world.article("star") == "a"


@pytest.mark.parametrize(
    "include, expected",
    [
        (
            [{"class": "circle", "count": 1, "color": "red"}],
            "somewhere in this picture you can see a circle which is colored red",
        ),
        ([{"class": "star", "count": 3}], "somewhere in this picture you can see stars, three of them"),
        (
            [{"class": "moon", "count": 1, "place": "top"}],
            "in the top of this picture you can see a moon",
        ),
        (
            [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
            "next to a square this picture also shows a circle",
        ),
    ],
)
def test_hard_sentences(include, expected):
    content = world.content_of("any", include)
    assert world.say(content, first, hard=True) == expected


def test_a_hard_position_begins_with_the_relation():
    clauses = [
        {"class": "circle", "count": 1},
        {"class": "square", "count": 1, "position": ["left of", 0]},
    ]
    content = world.content_of("position", clauses)
    assert world.say(content, first, hard=True) == "left of a circle you can see a square"
    assert world.say(content, first, flip=True, hard=True) == "right of a square you can see a circle"


def test_saying_a_position_from_the_other_side_keeps_the_facts():
    for content in world.all_contents("position"):
        a, b = content["include"]
        relation = b["position"][0]
        plain_b = {"class": b["class"], "count": b["count"]}
        mirrored = world.content_of("position", [plain_b, a | {"position": [world.INVERSE[relation], 0]}])
        assert world.facts(mirrored) == world.facts(content)
        assert world.say(content, first, flip=True) == world.canonical(mirrored) != world.canonical(content)
        swapped = world.content_of("position", [plain_b, a | {"position": [relation, 0]}])
        assert world.facts(swapped) != world.facts(content)


def test_a_mirrored_position_is_shown_by_the_same_picture():
    rng = random.Random(0)
    for content in world.all_contents("position"):
        a, b = content["include"]
        relation = world.INVERSE[b["position"][0]]
        mirrored = {"include": [{"class": b["class"], "count": 1}, a | {"position": [relation, 0]}]}
        assert rule.passes(as_detections(world.realise(content, rng)), mirrored, exact=True)


def test_different_canonical_sentences_mean_different_contents():
    contents = [content for tag in detection.TAGS for content in world.all_contents(tag)]
    assert len({world.canonical(content) for content in contents}) == len(contents)
