import ast
import json
import math
import random
import re
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
import tyro
from einops import rearrange
from PIL import Image
from transformers import CLIPModel

import flow_grpo
import rewards
from rewards import __main__ as score_folder
from rewards import command_line, jpeg, report, weights
from rewards.geneval import detection, rule
from rewards.geneval import reward as geneval
from rewards.ocr import reward as ocr
from rewards.tiny_world import glyphs, shapes
from tiny import world

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")


def to_batch(arrays):
    """List of (H, W, 3) uint8 arrays -> (B, 3, H, W) float in [0, 1]."""
    batch = torch.stack([torch.from_numpy(array) for array in arrays])
    return rearrange(batch, "b h w c -> b c h w").float() / 255


@pytest.fixture(scope="module")
def scenes():
    """500 (content, things) and their renders (500, 3, 64, 64)."""
    rng = random.Random(0)
    examples = [world.sample(rng, text_share=0) for _ in range(500)]
    return [(content, things) for content, things, _ in examples], to_batch([image for *_, image in examples])


# ---- geneval ----
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


def ask(name, count=1, color=None, position=None):
    clause = {"class": name, "count": count, "color": color, "position": position}
    return {key: value for key, value in clause.items() if value is not None}


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


def test_the_geneval_reward_is_the_mean_of_soft_and_strict(scenes):
    rows, images = scenes
    metadata = [content for content, _ in rows[:32]]
    metadata = metadata[1:] + metadata[:1]  # mostly the wrong picture
    reward = geneval.make_geneval(metadata, "cpu")
    scores = reward.details(images[:32], [""] * 32, metadata)
    assert set(scores) == {"geneval", "geneval_soft", "geneval_strict", "geneval_official"}
    assert all(value.shape == (32,) and value.dtype == torch.float32 for value in scores.values())
    torch.testing.assert_close(scores["geneval"], (scores["geneval_soft"] + scores["geneval_strict"]) / 2)
    assert torch.equal(scores["geneval"], reward(images[:32], [""] * 32, metadata))
    assert (scores["geneval_strict"] <= scores["geneval_official"]).all()
    assert 0 < scores["geneval_soft"].mean() < 1


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
    ({"include": [ask("circle"), {"class": "square", "count": 1, "position": None}]}, "position"),
    ({"include": [ask("circle")], "exclude": [{"class": "circle"}]}, r"exclude\[0\]"),
    ({"include": [ask("circle")], "exclude": None}, "exclude"),
]


@pytest.mark.parametrize("metadata, said", BAD_METADATA)
def test_check_metadata_says_what_is_wrong(metadata, said):
    with pytest.raises(ValueError, match=said):
        rule.check_metadata(metadata)


@pytest.mark.parametrize("metadata", ASKED.values(), ids=ASKED)
def test_check_metadata_accepts_good_rows(metadata):
    rule.check_metadata(metadata)


# ---- ocr ----
@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("abc", "abd", 1),
        ("abc", "abcd", 1),
        ("abc", "bc", 1),
        ("ab", "ba", 2),
        ("kitten", "sitting", 3),
        ("sunday", "saturday", 3),
    ],
)
def test_levenshtein_counts_edits(a, b, distance):
    assert ocr.levenshtein(a, b) == ocr.levenshtein(b, a) == distance


@pytest.mark.parametrize(
    "recognised, score",
    [
        ("HELLO", 1.0),
        ("helo", 0.8),
        ("", 0.0),
        ("zqxv" * 20, 0.0),
        ("we say Hello there", 1.0),
        ("H E L L O", 1.0),
        ("jello", 0.8),
    ],
)
def test_text_score_follows_the_formula(recognised, score):
    assert ocr.text_score(recognised, "hello") == pytest.approx(score)


@pytest.mark.parametrize(
    "prompt, metadata, target",
    [
        ('a sign that says "Hello there"', {}, "Hello there"),
        ('first "one" then "two"', {}, "one"),
        ('a sign that says "no"', {"text": "yes"}, "yes"),
        ("a sign", {"text": "yes"}, "yes"),
    ],
)
def test_target_text_reads_metadata_then_quotes(prompt, metadata, target):
    assert ocr.target_text(prompt, metadata) == target


@pytest.mark.parametrize(
    "prompt, metadata",
    [("no quotes", {}), ('an open "quote', {}), ('an empty ""', {}), ('blank " "', {}), ("x", {"text": " "})],
)
def test_a_prompt_without_a_text_is_an_error(prompt, metadata):
    with pytest.raises(ValueError, match="ocr"):
        ocr.OCR(glyphs.read).check(prompt, metadata)


def test_a_failed_recogniser_gives_nan_and_no_text_gives_zero():
    reward = ocr.OCR(lambda images: [None, "", "K7"])
    values = reward(torch.zeros(3, 3, 8, 8), ['the text "K7"'] * 3, [{}] * 3)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([NAN, 0, 1]), equal_nan=True)


def test_the_ocr_reward_reads_real_renders():
    rng = random.Random(0)
    images = to_batch([world.draw_text(text, rng) for text in ("K7", "K8", "AB3")])
    values = ocr.make_ocr([], "cpu")(images, ['the text "K7"'] * 3, [{}] * 3)
    torch.testing.assert_close(values, torch.tensor([1, 0.5, 0]))


# ---- shapes ----
def paint(mask, color="red"):
    """mask (H, W) bool -> (3, H, W) image with that colour on the background."""
    foreground, background = (torch.tensor(c) / 255 for c in (shapes.PALETTE[color], shapes.BACKGROUND))
    return torch.where(mask, foreground.view(3, 1, 1), background.view(3, 1, 1))


def rectangles(*corners):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    for x0, y0, x1, y1 in corners:
        mask[y0:y1, x0:x1] = True
    return mask


def test_detect_is_exact_on_ground_truth_renders(scenes):
    rows, images = scenes
    passed = [
        rule.passes(found, content, exact=True) for found, (content, _) in zip(shapes.detect(images), rows)
    ]
    assert sum(passed) / len(passed) >= 0.995


def test_detect_finds_boxes_and_colours(scenes):
    rows, images = scenes
    right = 0
    for found, (_, things) in zip(shapes.detect(images), rows):
        found, things = sorted(found, key=lambda d: d.box[:2]), sorted(things, key=lambda t: (t.x, t.y))
        right += len(found) == len(things) and all(
            any(
                (d.class_name, d.color) == (t.shape, t.color)
                and all(abs(a - b) <= 2 for a, b in zip(d.box, world.box_of(t)))
                for d in found
            )
            for t in things
        )
    assert right / len(rows) >= 0.99


def test_detect_on_a_batch_equals_one_by_one(scenes):
    _, images = scenes
    batch = shapes.detect(images[:48])
    assert any(batch)
    assert batch == [shapes.detect(images[i : i + 1])[0] for i in range(48)]


@pytest.mark.parametrize("name", shapes.CLASSES)
@pytest.mark.parametrize("color", shapes.PALETTE)
def test_detect_knows_every_class_and_colour(name, color):
    image = to_batch([world.draw([world.Thing(name, color, 30, 34, 8.5)])])
    assert [(d.class_name, d.color) for d in shapes.detect(image)[0]] == [(name, color)]


GENERATOR = torch.Generator().manual_seed(0)
BLOBS = {
    "empty": paint(rectangles()),
    "black": torch.zeros(3, 64, 64),
    "filled": torch.ones(3, 64, 64),
    "filled with red": paint(rectangles((0, 0, 64, 64))),
    "speck": paint(rectangles((30, 30, 34, 34))),
    "lying bar": paint(rectangles((10, 30, 50, 34))),
    "standing bar": paint(rectangles((30, 10, 34, 50))),
    "brick": paint(rectangles((10, 10, 38, 24))),
    "L": paint(rectangles((10, 10, 16, 34), (10, 28, 34, 34))),
    "U": paint(rectangles((10, 10, 15, 30), (25, 10, 30, 30), (10, 25, 30, 30))),
    "T": paint(rectangles((10, 10, 30, 16), (17, 10, 23, 30))),
    "two squares touching at a corner": paint(rectangles((10, 10, 24, 24), (24, 24, 38, 38))),
    "huge square": paint(rectangles((10, 10, 50, 50))),
    "noise": torch.rand(3, 64, 64, generator=GENERATOR),
    "dark noise": 0.35 * torch.rand(3, 64, 64, generator=GENERATOR),
    "speckle": paint(torch.rand(64, 64, generator=GENERATOR) < 0.2),
    "dense speckle": paint(torch.rand(64, 64, generator=GENERATOR) < 0.4),
}


@pytest.mark.parametrize("image", BLOBS.values(), ids=BLOBS)
def test_detect_sees_no_shape_in_a_blob(image):
    assert shapes.detect(image[None]) == [[]]


@pytest.mark.parametrize("dx, dy", [(13, 0), (0, 13)], ids=["side by side", "stacked"])
@pytest.mark.parametrize("a", shapes.CLASSES)
@pytest.mark.parametrize("b", shapes.CLASSES)
def test_detect_sees_no_shape_in_two_touching_objects(a, b, dx, dy):
    things = [world.Thing(a, "red", 24, 24, 8), world.Thing(b, "red", 24 + dx, 24 + dy, 8)]
    image = to_batch([world.draw(things)])
    assert len(shapes.connected_components(image[:, 0] > 0.5).unique()) == 2  # the background and one blob
    assert shapes.detect(image) == [[]]


def test_connected_components_joins_diagonals_and_keeps_images_apart():
    first = """
        11000
        00100
        00000
        10001
        10011
    """
    second = """
        00001
        00000
        11111
        00001
        11101
    """
    rows = [[[int(c) for c in row] for row in picture.split()] for picture in (first, second)]
    mask = torch.tensor(rows, dtype=torch.bool)
    labels = shapes.connected_components(mask)
    assert labels.shape == mask.shape and labels.dtype == torch.int64
    assert torch.equal(labels > 0, mask)
    groups = [
        {(0, 0, 0), (0, 0, 1), (0, 1, 2)},
        {(0, 3, 0), (0, 4, 0)},
        {(0, 3, 4), (0, 4, 3), (0, 4, 4)},
        {(1, 0, 4)},
        {(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 2, 4), (1, 3, 4), (1, 4, 4)},
        {(1, 4, 0), (1, 4, 1), (1, 4, 2)},
    ]
    found = [set(map(tuple, (labels == i).nonzero().tolist())) for i in labels.unique() if i > 0]
    assert sorted(found, key=sorted) == sorted(groups, key=sorted)


def test_connected_components_follows_a_spiral_and_does_not_leak_across_borders():
    spiral = torch.zeros(2, 9, 9, dtype=torch.bool)
    for i in range(0, 9, 2):  # a snake over the rows, turning at alternating ends
        spiral[:, i] = True
        if i:
            spiral[:, i - 1, -1 if i % 4 else 0] = True
    labels = shapes.connected_components(spiral)
    assert [len(image[image > 0].unique()) for image in labels] == [1, 1]
    assert labels[0].max() != labels[1].max()
    edges = torch.zeros(1, 4, 4, dtype=torch.bool)
    edges[0, 1, 3] = edges[0, 2, 0] = True  # neighbours in memory, not in the picture
    assert len(shapes.connected_components(edges).unique()) == 3


# ---- glyphs ----
def test_glyphs_are_read_exactly():
    rng = random.Random(0)
    texts = [world.random_text(rng) for _ in range(300)]
    read = glyphs.read(to_batch([world.draw_text(text, rng) for text in texts]))
    assert sum(a == b for a, b in zip(texts, read)) / len(texts) >= 0.995


def test_every_character_is_readable():
    assert glyphs.CHARACTERS == "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    rng = random.Random(0)
    images = to_batch([world.draw_text(character, rng) for character in glyphs.CHARACTERS])
    assert glyphs.read(images) == list(glyphs.CHARACTERS)


def test_images_without_writing_read_as_nothing(scenes):
    _, images = scenes
    empty = paint(rectangles())[None]
    assert glyphs.read(torch.cat([empty, torch.zeros_like(empty), torch.ones_like(empty)])) == ["", "", ""]
    assert max(len(text) for text in glyphs.read(images)) <= 1


# ---- jpeg ----
def test_jpeg_finds_noise_larger_than_a_flat_image():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=GENERATOR)])
    small, large = jpeg.kilobytes(images).tolist()
    assert 0 < small < 1 < 5 < large < 3 * 64 * 64 / 1000 + 1


def test_compressibility_is_minus_incompressibility(scenes):
    images, prompts, metadata = scenes[1][:8], [""] * 8, [{}] * 8
    less = jpeg.make_compressibility(metadata, "cpu")(images, prompts, metadata)
    more = jpeg.make_incompressibility(metadata, "cpu")(images, prompts, metadata)
    assert (more > 0).all() and more.dtype == torch.float32
    assert torch.equal(less, -more)


# ---- specs and prompt files ----
@pytest.mark.parametrize(
    "spec, weights",
    [
        ("geneval", {"geneval": (1, "")}),
        ("geneval:1,jpeg:0.2", {"geneval": (1, ""), "jpeg": (0.2, "")}),
        (" ocr:2 , jpeg:-1e-2", {"ocr": (2, ""), "jpeg": (-0.01, "")}),
        ("jpeg_incompressibility:0", {"jpeg_incompressibility": (0, "")}),
        ("vlm@Qwen/Qwen2.5-VL-7B-Instruct", {"vlm": (1, "Qwen/Qwen2.5-VL-7B-Instruct")}),
        (
            "clipscore@../weights/clip.v2:-0.5,ocr",
            {"clipscore": (-0.5, "../weights/clip.v2"), "ocr": (1, "")},
        ),
        ("vlm@a/b@main:3", {"vlm": (3, "a/b@main")}),
    ],
)
def test_parse_spec_reads_names_weights_and_models(spec, weights):
    assert rewards.parse_spec(spec) == weights


@pytest.mark.parametrize(
    "spec, said",
    [
        ("", "unknown reward ''"),
        ("genval", "unknown reward 'genval'.*geneval"),
        ("genval@a/b:1", "unknown reward 'genval'"),
        ("@a/b", "unknown reward ''"),
        ("vlm@a,vlm@b", "'vlm' is named twice"),
        ("vlm@a/b:c", "weight 'c' of reward 'vlm'"),
        ("geneval,,jpeg", "unknown reward ''"),
        ("jpeg:1,jpeg:2", "'jpeg' is named twice"),
        ("jpeg:much", "weight 'much' of reward 'jpeg'"),
        ("jpeg:1:2", "weight '1:2' of reward 'jpeg'"),
        ("jpeg:nan", "weight 'nan' of reward 'jpeg'"),
        ("jpeg:inf", "weight 'inf' of reward 'jpeg'"),
    ],
)
def test_parse_spec_says_what_is_wrong(spec, said):
    with pytest.raises(ValueError, match=said):
        rewards.parse_spec(spec)


def test_load_prompts_reads_txt(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n  zwei Würfel  \n", encoding="utf-8")
    prompts, metadata = rewards.prompts.load_prompts(tmp_path / "a.txt")
    assert prompts == ["a red circle", "zwei Würfel"]
    assert metadata == [{"prompt": prompt} for prompt in prompts]


def test_load_prompts_reads_jsonl(tmp_path):
    rows = [{"prompt": "a circle", "tag": "single_object", "include": [ask("circle")]}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert rewards.prompts.load_prompts(str(tmp_path / "a.jsonl")) == (["a circle", "b"], rows)


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c\u0085d"}]  # both are legal unescaped inside JSON strings
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert rewards.prompts.load_prompts(tmp_path / "a.jsonl") == (["a\u2028b", "c\u0085d"], rows)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.txt", None, "does not exist"),
        ("a.txt", "", "is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3: not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'line 2: .*"prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', 'line 1: .*"prompt"'),
        ("a.jsonl", '["a"]\n', 'line 1: .*"prompt"'),
    ],
)
def test_load_prompts_says_what_is_wrong(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        rewards.prompts.load_prompts(tmp_path / name)
    assert name in str(error.value)


def test_load_prompt_files_finds_the_siblings(tmp_path):
    for name in ("my_train", "my_eval", "my_eval_paraphrased", "other"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = rewards.prompts.load_prompt_files(tmp_path / "my_train.txt")
    assert {key: prompts for key, (prompts, _) in found.items()} == {
        "train": ["my_train"],
        "eval": ["my_eval"],
        "eval_paraphrased": ["my_eval_paraphrased"],
    }
    found = rewards.prompts.load_prompt_files(str(tmp_path / "my_train.txt"), str(tmp_path / "other.txt"))
    assert {key: prompts for key, (prompts, _) in found.items()} == {"train": ["my_train"], "eval": ["other"]}


def test_load_prompt_files_needs_an_evaluation_file(tmp_path):
    for name in ("prompts", "train"):
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match="--eval-prompts.*train"):
        rewards.prompts.load_prompt_files(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="eval.txt does not exist"):
        rewards.prompts.load_prompt_files(tmp_path / "train.txt")


def images_with(row, value):
    images = torch.full((3, 3, 4, 4), 0.5)
    images[row, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    "images, num_prompts, num_rows, said",
    [
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), 3, 3, r"floats.*torch.uint8"),
        (torch.zeros(3, 4, 4), 3, 3, r"\(B, 3, H, W\).*\(3, 4, 4\)"),
        (torch.zeros(3, 4, 4, 3), 3, 3, r"\(B, 3, H, W\).*\(3, 4, 4, 3\)"),
        (torch.zeros(3, 3, 4, 4), 2, 3, "3 images, 2 prompts and 3 metadata"),
        (torch.zeros(3, 3, 4, 4), 3, 4, "3 images, 3 prompts and 4 metadata"),
        (images_with(1, 1.001), 3, 3, "row 1 "),
        (images_with(2, -0.001), 3, 3, "row 2 "),
        (images_with(0, NAN), 3, 3, "row 0 .*not finite"),
        (images_with(2, math.inf), 3, 3, "row 2 .*not finite"),
    ],
)
def test_check_images_names_the_mistake(images, num_prompts, num_rows, said):
    with pytest.raises(ValueError, match=said):
        rewards.weighted_sum.check_images(images, [""] * num_prompts, [{}] * num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_images_accepts_every_float_type(dtype):
    rewards.weighted_sum.check_images(
        torch.tensor([0.0, 0.5, 1.0], dtype=dtype).expand(2, 3, 4, 3), ["", ""], [{}, {}]
    )


# ---- the weighted sum ----
def test_the_weighted_sum_equals_its_parts(scenes):
    rows, images = scenes
    images, prompts = images[:16], [""] * 16
    metadata = [content | {"tag": "text", "text": "A1"} for content, _ in rows[1:17]]
    reward = rewards.build("geneval:0.7,jpeg:0.2,ocr:-3", prompts, metadata)
    details = reward.details(images, prompts, metadata)
    assert set(details) == {
        "reward", "geneval", "geneval_soft", "geneval_strict", "geneval_official", "jpeg", "ocr",
    }  # fmt: skip
    parts = {
        name: rewards.build(name, prompts, metadata)(images, prompts, metadata)
        for name in ("geneval", "jpeg", "ocr")
    }
    for name, value in parts.items():
        assert torch.equal(details[name], value)
    expected = 0.7 * parts["geneval"] + 0.2 * parts["jpeg"] - 3 * parts["ocr"]
    assert torch.equal(details["reward"], expected)
    assert torch.equal(reward(images, prompts, metadata), expected)
    assert expected.shape == (16,) and expected.dtype == torch.float32 and expected.std() > 0


def test_nan_in_a_part_makes_the_row_nan_and_only_it(scenes):
    images, prompts, metadata = scenes[1][:3], ['the text "K7"'] * 3, [{}] * 3
    fails_on_the_second = ocr.OCR(lambda images: ["K7", None, ""])
    total = rewards.weighted_sum.WeightedSum(
        {"ocr": (fails_on_the_second, 0.5), "jpeg": (jpeg.make_compressibility(metadata, "cpu"), 1.0)}
    )
    details = total.details(images, prompts, metadata)
    assert details["reward"].isnan().tolist() == [False, True, False]
    torch.testing.assert_close(details["ocr"], torch.tensor([1, NAN, 0]), equal_nan=True)
    assert not details["jpeg"].isnan().any()


def test_the_weighted_sum_checks_its_images():
    with pytest.raises(ValueError, match="row 1"):
        rewards.build("jpeg", [""] * 3, [{}] * 3)(images_with(1, 2.0), [""] * 3, [{}] * 3)


@pytest.mark.parametrize(
    "spec, prompts, metadata, said",
    [
        ("ocr", ['the text "K7"', "no quotes"], [{}, {}], "prompt 2 .*'no quotes'.*ocr needs a text"),
        ("jpeg,ocr", ["no quotes"], [{}], "prompt 1 .*ocr needs a text"),
        ("geneval", ["a yeti"], [{"include": [ask("yeti")]}], "'yeti'.*circle"),
        ("geneval", ["a circle", "b"], [{"include": [ask("circle")]}, {}], "prompt 2 .*include"),
        ("geneval", ["a circle"], [{"include": None}], "prompt 1 .*include"),
        ("nothing", ["a"], [{}], "unknown reward 'nothing'"),
        (
            "jpeg",
            ["a", "b"],
            [{}, {"reward": "geneval"}],
            "prompt 2 .'b'. has the tag .*'geneval'.*--rewards",
        ),
        ("jpeg", ["a"], [{"reward": 0.5}], "prompt 1 .* has the tag .*0.5"),
        ("jpeg", ["a"], [{"reward": ["jpeg"]}], "prompt 1 .* has the tag"),
        ("jpeg,ocr", ["a", "b"], [{"reward": "jpeg"}] * 2, "'ocr' judges no prompt"),
        ("jpeg,ocr", ["a", "b"], [{"reward": "jpeg"}, {"reward": "ocr"}], "prompt 2 .*ocr needs a text"),
        ("jpeg@a/b", ["a"], [{}], "'jpeg' takes no model, remove @a/b"),
        ("jpeg:2,ocr@a/b", ['"K7"'], [{}], "'ocr' takes no model"),
    ],
)
def test_build_says_which_prompt_cannot_be_scored(spec, prompts, metadata, said):
    with pytest.raises(ValueError, match=said):
        rewards.build(spec, prompts, metadata)


# ---- tagged prompts ----
class Size:
    """A reward that notes what it is asked: the image's first pixel, and with details its double."""

    def __init__(self, metadata, model=None):
        self.metadata, self.model, self.checked, self.asked = metadata, model, [], []

    def check(self, prompt, metadata):
        self.checked.append(prompt)

    def details(self, images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata) > 0
        assert [row["prompt"] for row in metadata] == prompts
        self.asked += prompts
        value = images[:, 0, 0, 0]
        return {"size": value, "size_double": 2 * value}


def make_size(metadata, device, model="default"):
    return Size(metadata, model)


def make_ten(metadata, device):
    return lambda images, prompts, metadata: torch.full((len(images),), 10.0)


@pytest.fixture
def size_and_ten(monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "size", f"{__name__}:make_size")
    monkeypatch.setitem(rewards.REGISTRY, "ten", f"{__name__}:make_ten")


def tagged_rows(*tags):
    metadata = [{"prompt": f"prompt {i}"} | ({"reward": tag} if tag else {}) for i, tag in enumerate(tags)]
    images = torch.arange(len(tags)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 8
    return images, [row["prompt"] for row in metadata], metadata


def test_a_tagged_row_has_the_raw_value_of_its_reward_alone(size_and_ten):
    images, prompts, metadata = tagged_rows("size", None, "ten", "size", None)
    reward = rewards.build("size:4,ten:-0.5", prompts, metadata)
    size = reward.parts["size"][0]
    judged = ["prompt 0", "prompt 1", "prompt 3", "prompt 4"]
    assert size.checked == judged and [row["prompt"] for row in size.metadata] == judged
    size.asked.clear()
    details = reward.details(images, prompts, metadata)
    assert size.asked == judged
    expected = {
        "reward": [0, 4 / 8 - 5, 10, 3 / 8, 4 * 4 / 8 - 5],
        "size": [0, 1 / 8, NAN, 3 / 8, 4 / 8],
        "size_double": [0, 2 / 8, NAN, 6 / 8, 8 / 8],
        "ten": [NAN, 10, 10, NAN, 10],
    }
    assert list(details) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(details[name], torch.tensor(values), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(reward(images, prompts, metadata), details["reward"])


def test_every_batch_of_a_tagged_file_has_the_same_names(size_and_ten):
    images, prompts, metadata = tagged_rows("ten", "size", "ten")
    reward = rewards.build("ten,size", prompts, metadata)
    whole = reward.details(images, prompts, metadata)
    parts = [reward.details(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1]) for i in range(3)]
    for name, values in whole.items():
        together = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(together, values, equal_nan=True, rtol=0, atol=0)
    assert all(list(part) == ["reward", "ten", "size", "size_double"] for part in parts)


def test_a_row_with_a_tag_that_was_not_built_is_an_error_not_a_zero(size_and_ten):
    images, prompts, metadata = tagged_rows("ten", None)
    with pytest.raises(ValueError, match="prompt 2 .*'size'"):
        rewards.build("ten", prompts, metadata)(images, prompts, [metadata[0], {"reward": "size"}])


def test_tags_load_and_split_as_written(tmp_path, size_and_ten):
    rows = [{"prompt": "prompt 0", "reward": "ten"}, {"prompt": "prompt 1"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = rewards.build("size,ten", *rewards.prompts.load_prompts(tmp_path / "a.jsonl"))
    assert reward.parts["size"][0].metadata == rows[1:]


def test_what_follows_the_at_sign_is_the_factorys_model(size_and_ten):
    for spec, model in (("size", "default"), ("size@org/name:2", "org/name"), ("size@org/name", "org/name")):
        reward, weight = rewards.build(spec, *tagged_rows(None)[1:]).parts["size"]
        assert (reward.model, weight) == (model, 2 if ":" in spec else 1)


def test_a_run_on_a_tagged_file(tmp_path):
    rows = [json.loads(line) for line in (ROOT / "tiny/prompts/train.jsonl").read_text().splitlines()[:4]]
    rows = [row | {"reward": tag} for row, tag in zip(rows, ("geneval", "jpeg", "geneval", "jpeg"))]
    for name, lines in (("train", rows), ("eval", rows[:2]), ("eval_paraphrased", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = dict(num_prompts_per_iteration=4, num_images_per_prompt=2, num_iterations=1, micro_batch_size=2)
    flags |= dict(num_inference_steps=3, eval_num_inference_steps=2, output_dir=str(tmp_path / "runs"))
    flags |= dict(rewards="geneval,jpeg:0.1", model=str(ROOT / "tiny/sd3"), device="cpu")
    run_dir = flow_grpo.train(flow_grpo.Args(prompts=str(tmp_path / "train.jsonl"), **flags))
    before, after = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    assert after["charts/nan_fraction"] == 0 and after["rewards/geneval"] >= 0 > after["rewards/jpeg"]
    mean = (after["rewards/geneval"] + after["rewards/jpeg"]) / 2  # as many rows each, no weight
    assert after["charts/reward_mean"] == pytest.approx(mean, abs=1e-5)
    assert before["eval/jpeg"] < 0 <= before["eval/geneval_strict"]
    assert "eval/geneval_soft_paraphrased" in before and "eval/jpeg_paraphrased" not in before
    assert all(math.isfinite(value) for row in (before, after) for value in row.values())


# ---- weights that are not there ----
def make_unloadable(metadata, device, model="nobody/has-this"):
    return weights.from_hub(CLIPModel.from_pretrained, model)


@pytest.mark.parametrize(
    "spec, named",
    [("unloadable", "nobody/has-this"), ("jpeg,clipscore@nobody/has-that:0.5", "nobody/has-that")],
)
def test_missing_weights_end_a_run_before_it_starts(tmp_path, monkeypatch, capsys, spec, named):
    monkeypatch.setitem(rewards.REGISTRY, "unloadable", f"{__name__}:make_unloadable")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(flow_grpo, "load_model", lambda *_: pytest.fail("the pipeline was loaded"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(flow_grpo.train, flow_grpo.Args(rewards=spec, output_dir=str(tmp_path / "runs")))
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line


FORBIDDEN = {
    "torchvision",
    "scipy",
    "open_clip",
    "mmdet",
    "paddle",
    "paddleocr",
    "clip",
    "ImageReward",
    "hpsv3",
}


def test_no_file_imports_what_makes_setting_up_hard():
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    imported = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                imported.setdefault(name.split(".")[0], path.name)
    assert len(paths) > 20 and {"torch", "transformers", "rapidocr"} <= imported.keys()
    assert {name: path for name, path in imported.items() if name in FORBIDDEN} == {}


# ---- scoring a folder ----
def save_images(folder, *names, size=(8, 8)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


@pytest.mark.parametrize(
    "num_prompts, rows",
    [
        (3, {"C.JPEG": 0, "a.jpg": 1, "b.png": 2}),  # one each, in the order of the names
        (3, {"1st.png": 0, "2.png": 1, "3.png": 2}),  # the first starts with a word
        (11, {"2.png": 2, "10.png": 10, "0.png": 0}),
        (4, {"00001_0.png": 1, "00001_1.png": 1, "00003.webp": 3}),
        (3, {"00000/samples/0000.png": 0, "00000/samples/0001.png": 0, "2/samples/1.png": 2}),
        (2, {"1/grid.png": 1, "1/x.png": 1}),
    ],
)
def test_find_images_tells_whose_prompt_an_image_is(tmp_path, num_prompts, rows):
    save_images(tmp_path, *rows)
    (tmp_path / "notes.txt").write_text("")
    if (tmp_path / "00000").exists():
        save_images(tmp_path, "00000/grid.png")  # GenEval's overview of the samples
    paths, found = score_folder.find_images(tmp_path, num_prompts)
    assert {path.relative_to(tmp_path).as_posix(): row for path, row in zip(paths, found)} == rows


@pytest.mark.parametrize(
    "names, said",
    [
        ((), "0 images, 3 prompts"),
        (("a.png", "b.png"), "2 images, 3 prompts"),
        (("0.png", "3.png"), "prompt 3, counted from 0, of 3"),
    ],
)
def test_find_images_refuses_to_guess(tmp_path, names, said):
    save_images(tmp_path, *names)
    with pytest.raises(rewards.BadInput, match=said):
        score_folder.find_images(tmp_path, 3)


def run_score_folder(*words):
    command_line.main(score_folder.main, tyro.cli(score_folder.Args, args=[str(word) for word in words]))


def test_a_folder_of_images_is_scored(tmp_path, capsys, scenes):
    rows, images = scenes
    wanted = [content | {"prompt": f"scene {i}"} for i, (content, _) in enumerate(rows[:24])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, wanted)))
    for i in range(24):
        shown = images[i if i % 2 else (i + 7) % 24]  # every second one is of another prompt
        pixels = (rearrange(shown, "c h w -> h w c") * 255).byte().numpy()
        folder = tmp_path / f"images/{i:05d}/samples"
        folder.mkdir(parents=True)
        for k in range(1 + i % 2):
            Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    flags = ["--images", tmp_path / "images", "--prompts", tmp_path / "prompts.jsonl", "--batch-size", 5]
    run_score_folder("geneval", "jpeg:0.1", *flags, "--output", tmp_path / "scores.jsonl")
    table = capsys.readouterr().out.splitlines()
    record = json.loads(table[-1])
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    order = [i for i in range(24) for _ in range(1 + i % 2)]
    assert [line["prompt"] for line in lines] == [f"scene {i}" for i in order]
    assert record["images"] == 36 and record["unscored"] == 0
    strict = [line["geneval_strict"] for line in lines]
    assert all(value == 1 for i, value in zip(order, strict) if i % 2) and 0 in strict
    scores = record["scores"]["geneval_strict"]
    assert scores["all"] == pytest.approx(sum(strict) / 36)
    tags = sorted({row["tag"] for row in wanted})
    for tag in tags:
        values = [value for i, value in zip(order, strict) if wanted[i]["tag"] == tag]
        assert scores[tag] == pytest.approx(sum(values) / len(values))
    assert scores["mean of tags"] == pytest.approx(sum(scores[tag] for tag in tags) / len(tags))
    assert table[0].split()[:3] == ["reward", "geneval", "geneval_soft"]
    assert table[1].split()[0] == "all" and float(table[1].split()[4]) == pytest.approx(
        scores["all"], abs=1e-4
    )
    assert lines[0]["reward"] == pytest.approx(lines[0]["geneval"] + 0.1 * lines[0]["jpeg"], abs=1e-5)


def test_images_of_several_sizes_and_unscored_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "picky", f"{__name__}:make_picky")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd")
    for name, size in (("0.png", (8, 8)), ("1.png", (8, 8)), ("2.png", (9, 7)), ("3.png", (8, 8))):
        save_images(tmp_path, name, size=size)
    flags = ("--images", tmp_path, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl")
    run_score_folder("picky", *flags)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["picky"] for line in lines] == [8, 8, None, 8]
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == {"images": 4, "unscored": 1, "scores": {"picky": {"all": 8.0}}}


def make_picky(metadata, device):
    """The width, NaN for an image that is no square."""
    return lambda images, prompts, metadata: torch.full(
        (len(images),), float(images.shape[3]) if images.shape[2] == images.shape[3] else NAN
    )


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("beauty", {}, "unknown reward 'beauty'"),
        ("ocr", {}, "prompt 1 .*double quotes"),
        ("jpeg", {"--prompts": "none.txt"}, "none.txt does not exist"),
        ("jpeg", {"--images": "none"}, "0 images, 1 prompts"),
        ("jpeg", {"--output": "none/x.jsonl"}, "--output none/x.jsonl: there is no folder none"),
        ("jpeg", {"--images": "broken"}, "broken/0.png is no image"),
    ],
)
def test_mistakes_end_the_scoring_with_one_line(tmp_path, monkeypatch, capsys, name, changes, said):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images", "0.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/0.png").write_bytes((tmp_path / "images/0.png").read_bytes()[:40])
    (tmp_path / "prompts.txt").write_text("a dog")
    flags = {"--images": "images", "--prompts": "prompts.txt"} | changes
    with pytest.raises(SystemExit) as stopped:
        run_score_folder(name, *(word for flag in flags.items() for word in flag))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"error: .*{said}", line)


# ---- report ----
@pytest.mark.parametrize("values, expected", [([1, 2, NAN, 6], 3), ([NAN], NAN), ([], NAN), ([0], 0)])
def test_mean_leaves_nan_out(values, expected):
    assert report.mean(values) == pytest.approx(expected, nan_ok=True)


def test_summarise_gives_means_over_all_and_per_tag():
    metadata = [{"tag": "colors"}, {"tag": "position"}, {"tag": "colors"}, {}, {"tag": "counting"}]
    scores = {
        "reward": {0: 1.0, 1: 0.5, 2: NAN, 3: 0.0, 4: NAN},
        "jpeg": {2: -4.0, 0: -2.0, 1: -1.0, 3: 0.0, 4: NAN},
    }
    expected = {
        "eval/reward": 0.5,
        "eval/reward/colors": 1.0,
        "eval/reward/position": 0.5,
        "eval/reward/counting": NAN,
        "eval/jpeg": -7 / 4,
        "eval/jpeg/colors": -3.0,
        "eval/jpeg/position": -1.0,
        "eval/jpeg/counting": NAN,
    }
    assert report.summarise(scores, metadata, "") == pytest.approx(expected, nan_ok=True)


def test_summarise_leaves_out_what_another_reward_judged():
    metadata = [{"tag": "colors"}, {"tag": "text"}, {"tag": "text"}, {"tag": "colors"}, {"tag": "text"}]
    scores = {
        "reward": {0: 1.0, 1: -4.0, 2: NAN, 3: 0.0, 4: -2.0},
        "geneval": {0: 1.0, 1: NAN, 2: NAN, 3: 0.0, 4: NAN},
        "jpeg": {0: NAN, 1: -4.0, 2: NAN, 3: NAN, 4: -2.0},
        "ocr": {0: NAN, 1: NAN, 3: NAN, 4: NAN},
    }
    means = report.summarise(scores, metadata, "")
    expected = {"eval/geneval": 0.5, "eval/geneval/colors": 0.5, "eval/geneval/text": NAN}
    expected |= {"eval/jpeg": -3.0, "eval/jpeg/text": -3.0}
    expected |= {"eval/reward": -5 / 4, "eval/reward/colors": 0.5, "eval/reward/text": -3.0}
    assert means == pytest.approx(expected, nan_ok=True)


def test_reward_metrics_are_means_over_the_rows_a_reward_judged():
    scores = {
        "reward": torch.tensor([1.0, 3, -8, -4, 5, 5, 5, 5, 0, 2, 4, NAN]),
        "geneval": torch.tensor([1.0, 3] + 6 * [NAN] + [0, 2, 4, NAN]),
        "jpeg": torch.tensor([NAN, NAN, -8, -4] + 8 * [NAN]),
        "ocr": torch.full((12,), NAN),
    }
    row = report.reward_metrics(scores, [2] * 6)
    assert row["rewards/geneval"] == 2 and row["rewards/jpeg"] == -6 and "rewards/ocr" not in row
    assert row["charts/nan_fraction"] == pytest.approx(1 / 12)
    assert row["charts/reward_mean"] == pytest.approx(18 / 11)
    assert row["charts/zero_std_fraction"] == pytest.approx(3 / 6)


def test_the_runs_folder_is_named_after_the_first_reward(tmp_path):
    args = flow_grpo.Args(rewards="clipscore@org/name:0.5,jpeg", output_dir=str(tmp_path), seed=7)
    run_dir = report.open_run(flow_grpo.Args, args, "flow_grpo.py")[1]
    assert run_dir.parent == tmp_path and run_dir.name.startswith("flow_grpo-clipscore-7-")


def test_summarise_puts_the_suffix_before_the_tag():
    means = report.summarise({"reward": {0: 0.25}}, [{"tag": "colors"}], "_paraphrased")
    assert means == {"eval/reward_paraphrased": 0.25, "eval/reward_paraphrased/colors": 0.25}
