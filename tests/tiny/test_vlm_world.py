"""What tiny/vlm was taught: the parser of the world's wordings, exact both ways, and the tasks' answers."""

import random

import numpy as np
import pytest
import torch

from rewards.geneval.detection import TAGS, Detection
from rewards.geneval.rule import passes
from tiny import vlm_world, world
from tiny.vlm_world import keeps_meaning, parse, rewrite

CONTENTS = [content for tag in TAGS for content in world.all_contents(tag)]


def content(tag, *clauses):
    return world.content_of(tag, list(clauses))


def clause(shape, count=1, **more):
    return {"class": shape, "count": count} | more


CIRCLE_LEFT_OF_SQUARE = content("position", clause("square"), clause("circle", position=["left of", 0]))
TWO = content("two_object", clause("circle"), clause("square"))
RED_CIRCLE = content("colors", clause("circle", color="red"))
THREE = content("counting", clause("cross", 3))
STAR_AT_THE_TOP = content("single_object", clause("star", place="top"))
K7 = world.text_content("K7")


@pytest.mark.parametrize(
    "sentence, objects, relation",
    [
        ("a circle", [("circle", None, None)], None),
        ("there is an azure box", [("square", "blue", None)], None),
        ("a trio of pluses", [("cross", None, None)] * 3, None),
        ("a star at the upper left", [("star", None, "top left")], None),
        ("an image of a red lune in the midpoint", [("moon", "red", "center")], None),
        ("towards the east please draw a heart", [("heart", None, "right")], None),
        ("on a dark background please draw stars, two of them", [("star", None, None)] * 2, None),
        (
            "east of a star which is colored aqua you can see an eggtimer",
            [("star", "cyan", None), ("hourglass", None, None)],
            ("hourglass", "right of", "star"),
        ),
        ("both a ball and a lime pyramid", [("circle", None, None), ("triangle", "green", None)], None),
        (
            "an image of a disc to the left of a red box",
            [("circle", None, None), ("square", "red", None)],
            ("circle", "left of", "square"),
        ),
        (
            "a wedge north of a plus",
            [("triangle", None, None), ("cross", None, None)],
            ("triangle", "above", "cross"),
        ),
        (
            "red circle top left, blue square center",
            [("circle", "red", "top left"), ("square", "blue", "center")],
            None,
        ),
    ],
)
def test_parsed_scenes(sentence, objects, relation):
    said = parse(sentence)
    assert (said.text, sorted(said.objects, key=str), said.relation) == (
        None,
        sorted(objects, key=str),
        relation,
    )


@pytest.mark.parametrize(
    "template", sorted({*vlm_world.TEXTS, *world.SENTENCES["text"], *world.HARD_SENTENCES["text"]})
)
def test_parsed_texts(template):
    assert parse(template.format(t="K7")) == ("K7", [], None)
    assert parse(template.format(t="k7")) is None and parse(template.format(t="")) is None


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "circle",
        "a",
        "a  circle",
        "a circle.",
        " a circle",
        "an circle",
        "a azure disc",
        "a circle circle",
        "a red",
        "red circle",
        "red circle middle",
        "crimson circle top",
        "red circle top,blue square left",
        "red circle top, ",
        "two circle",
        "a pair of red circles",
        "a circle left of",
        "a circle left a square",
        "there is a circle and a square",
        "a star at the upper",
        "a star which is colored star",
        "a red star which is colored red",
        "stars, two",
        "the text K7",
        'the text "K7" center',
    ],
)
def test_what_the_world_does_not_say_is_not_parsed(sentence):
    assert parse(sentence) is None
    assert not any(keeps_meaning(sentence, c) for c in (TWO, RED_CIRCLE, THREE, K7))


@pytest.mark.parametrize(
    "sentence, content, kept",
    [
        ("a square to the right of a circle", CIRCLE_LEFT_OF_SQUARE, True),
        ("a square to the left of a circle", CIRCLE_LEFT_OF_SQUARE, False),
        ("a circle above a square", CIRCLE_LEFT_OF_SQUARE, False),
        ("a circle and a square", CIRCLE_LEFT_OF_SQUARE, False),
        ("red circle left, red square right", CIRCLE_LEFT_OF_SQUARE, True),
        (
            "red circle top left, red square center",
            CIRCLE_LEFT_OF_SQUARE,
            True,
        ),  # as near to left as to above
        ("red circle top left, red square bottom", CIRCLE_LEFT_OF_SQUARE, False),  # rather above
        ("red circle left, red square left", CIRCLE_LEFT_OF_SQUARE, False),  # does not tell
        ("red square left, red circle right", CIRCLE_LEFT_OF_SQUARE, False),
        ("red circle left, red square left", TWO, True),
        ("a red circle and a white box", TWO, True),
        ("a circle and a triangle", TWO, False),
        ("red circle top, red square left, red circle right", TWO, False),
        ("a circle", TWO, False),
        ("a scarlet ball", RED_CIRCLE, True),
        ("a circle", RED_CIRCLE, False),
        ("a blue circle", RED_CIRCLE, False),
        ("red circle bottom", RED_CIRCLE, True),
        ("three crosses", THREE, True),
        ("two crosses", THREE, False),
        ("red cross top, blue cross top, red cross left", THREE, True),
        ("red cross top, blue cross top", THREE, False),
        ("a cross", THREE, False),
        ("a red star at the top", STAR_AT_THE_TOP, True),
        ("red star top", STAR_AT_THE_TOP, True),
        ("red star top left", STAR_AT_THE_TOP, False),
        ("a star", STAR_AT_THE_TOP, False),
        ('a sign that says "K7"', K7, True),
        ('the word "7K"', K7, False),
        ("a circle", K7, False),
        ('the word "K7"', TWO, False),
    ],
)
def test_kept_meanings(sentence, content, kept):
    assert keeps_meaning(sentence, content) == kept


def test_a_content_is_said_by_its_own_wordings_and_by_no_other_contents():
    rng = random.Random(0)
    canonical = [world.canonical(c) for c in CONTENTS]
    facts = [world.facts(c) for c in CONTENTS]
    assert len(CONTENTS) > 150
    for i in rng.sample(range(len(CONTENTS)), 60):
        wordings = [world.paraphrase(CONTENTS[i], rng, held_out=held) for held in (False, True)]
        wordings += [world.hard_paraphrase(CONTENTS[i], rng) for _ in range(4)]
        for sentence in (canonical[i], *wordings, rewrite(CONTENTS[i], rng)):
            assert keeps_meaning(sentence, CONTENTS[i]), sentence
        for j in range(len(CONTENTS)):
            # a red circle is a circle, so a wording may say more than a content, but not another one
            if keeps_meaning(canonical[i], CONTENTS[j]) and facts[i] != facts[j]:
                uncoloured = [{k: v for k, v in c.items() if k != "color"} for c in CONTENTS[i]["include"]]
                relations = [{k: v for k, v in c.items() if k != "position"} for c in uncoloured]
                assert CONTENTS[j]["include"] in (uncoloured, relations, relations[::-1])


def test_a_detailed_wording_that_keeps_the_meaning_is_a_picture_that_passes():
    # drawn in the middle of its places, the scene must satisfy GenEval's own rules, and else must not
    rng, outcomes = random.Random(0), []
    for _ in range(1000):
        wanted = rng.choice(CONTENTS)
        objects = [
            (shape, rng.choice(list(world.COLOR_WORDS)), rng.choice(list(world.CELLS)))
            for c in (wanted if rng.random() < 0.5 else rng.choice(CONTENTS))["include"]
            for shape in [c["class"]] * c["count"]
        ]
        sentence = ", ".join(f"{color} {shape} {place}" for shape, color, place in objects)
        found = [
            Detection(shape, vlm_world.box_of_place(place), 1.0, color, place)
            for shape, color, place in objects
        ]
        outcomes.append(keeps_meaning(sentence, wanted))
        assert outcomes[-1] == passes(found, wanted, exact=True), sentence
    assert 30 < sum(outcomes) < 970


def test_rewrites_keep_the_meaning_differ_and_use_no_held_out_word():
    rng, held_out = random.Random(0), set()
    for table in (
        world.SHAPE_WORDS,
        world.COLOR_WORDS,
        world.COUNT_WORDS,
        world.RELATION_WORDS,
        world.PLACE_WORDS,
    ):
        held_out |= {world.plural(words[2]) for words in table.values()} | {
            words[2] for words in table.values()
        }
    for _ in range(300):
        wanted = vlm_world.any_content(rng)
        sentences = [rewrite(wanted, rng) for _ in range(8)]
        assert all(keeps_meaning(sentence, wanted) for sentence in sentences)
        assert len(set(sentences)) >= 2
        padded = [f" {sentence.replace(',', '')} " for sentence in sentences]
        assert not [word for word in held_out for sentence in padded if f" {word} " in sentence]


@pytest.mark.parametrize(
    "prompt, answer, expected",
    [
        ("a red disc and a blue box", "red circle top, blue square left", True),
        ("a red disc and a blue box", "a blue square with a red circle", False),
        ("both a blue block and a red ball", "blue square top, red circle left", True),
        ("two pluses", "red cross top, blue cross left", True),
        ("a cross left of a square", "a square right of a cross", False),
        ("a cross left of a square", "red square center, red cross left", False),
        ("a cross below a square", "a square above a cross", False),
        ("a cross below a square", "red square top, red cross center", True),  # lists begin at the top
        ('the text "K7"', 'the word "K7"', True),
    ],
)
def test_answers_name_objects_in_the_prompts_order(prompt, answer, expected):
    assert vlm_world.follows(answer, prompt) == expected


def test_rewrites_and_refinements_follow_the_prompt():
    rng = random.Random(0)
    for _ in range(200):
        _, question, answer, _ = vlm_world.sample_rewrite(rng)
        prompt = question.split("prompt: ")[1].split(". Answer")[0]
        assert vlm_world.follows(answer[len("<answer>") : -len("</answer>")], prompt)
        _, question, answer, _ = vlm_world.sample_refine(rng)
        current, prompt = (
            question.split("Current prompt: ")[1].split(". Improve")[0].split(". Original prompt: ")
        )
        for text in (current, answer[len("<answer>") : -len("</answer>")]):
            assert vlm_world.follows(text, prompt)


@pytest.mark.parametrize("name", vlm_world.TASKS)
def test_examples_of_every_task(name):
    rng, sampler = random.Random(0), vlm_world.TASKS[name][0]
    for _ in range(100):
        image, question, answer, key = sampler(rng)
        assert (image is None) == (name == "rewrite" or question.startswith("No preview yet."))
        assert image is None or (image.shape == (64, 64, 3) and image.dtype == np.uint8)
        assert "{" not in question
        if name == "caption":
            assert keeps_meaning(answer, key) or key["tag"] == "position"  # whose places need not tell
        else:
            assert answer.startswith("<answer>") and answer.endswith("</answer>")
            inside = answer.removeprefix("<answer>").removesuffix("</answer>")
            assert inside in key if name == "edit" else keeps_meaning(inside, key)


def test_captions_say_what_is_drawn():
    from rewards.tiny_world.shapes import detect

    rng, right, count = random.Random(0), 0, 0
    while count < 60:
        image, _, answer, key = vlm_world.sample_caption(rng)
        if key["tag"] != "text":
            count += 1
            (found,) = detect(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
            seen = sorted((d.class_name, d.color) for d in found)
            right += seen == sorted((shape, color) for shape, color, _ in parse(answer).objects)
    assert right >= 58


def test_a_preview_is_closer_to_the_image_the_more_is_done():
    image = world.draw(world.realise(TWO, random.Random(0))).astype(float)
    distances = [
        np.abs(vlm_world.preview(image.astype(np.uint8), done, random.Random(0)) - image).mean()
        for done in (0.0, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.5 and distances[0] > 10


def test_edit_answers():
    things = [world.Thing("circle", "blue", 10, 10, 8), world.Thing("square", "red", 50, 32, 8)]
    red = [things[0]._replace(color="red"), things[1]]
    asked = content("recolour", clause("circle", color="red"), clause("square", color="red"))
    edit = world.Edit("make the blue circle red", "", red, asked, red)
    assert vlm_world.edit_answers(things, edit) == (
        "make the blue circle red",
        "make the blue circle top left red",
        "red circle top left, red square right",
    )
    added = [*things, world.Thing("cross", "white", 32, 54, 8)]
    asked = content("add", clause("circle"), clause("square"), clause("cross"))
    edit = world.Edit("add a white cross", "", added, asked, things)
    assert vlm_world.edit_answers(things, edit)[1] == "add a white cross bottom"
