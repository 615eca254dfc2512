"""The reward for edits: against drawn results, unedited sources, and new pictures of what was asked for."""

import math
import random

import numpy as np
import pytest
import torch
from einops import rearrange

import rewards
from rewards import BadInput
from rewards.image_file import read_image
from rewards.prompts import load_prompts
from rewards.tiny_world.edit import TOLERANCE, EditOfShapes
from tiny import splits, world


def to_batch(images):
    batch = torch.from_numpy(np.stack(images)).float() / 255
    return rearrange(batch, "b h w c -> b c h w")


def draw(*scenes):
    return to_batch([world.draw(scene) for scene in scenes])


CIRCLE = world.Thing("circle", "red", 16, 20, 8)
MOON = world.Thing("moon", "blue", 44, 40, 8)
KEEP_MOON = {"class": "moon", "color": "blue", "center": [44 / 64, 40 / 64]}
RECOLOURED = {  # make the red circle green
    "include": [
        {"class": "circle", "count": 1, "color": "green"},
        {"class": "moon", "count": 1, "color": "blue"},
    ],
    "exclude": [{"class": "star", "count": 1}],
    "keep": [{"class": "circle", "color": "green", "center": [16 / 64, 20 / 64]}, KEEP_MOON],
}


def score(scene, row=RECOLOURED):
    details = EditOfShapes().details(draw(scene), ["make the red circle green"], [row])
    return {name: round(value.item(), 4) for name, value in details.items()}


def test_scores_worked_out_by_hand():
    """Seven clauses: two counts, two colours, what must not appear, and two objects that must stay."""
    green = CIRCLE._replace(color="green")
    far = MOON._replace(y=MOON.y + 1.5 * TOLERANCE * 64)
    star = world.Thing("star", "white", 50, 14, 8)
    everything = {"edit": 1, "edit_soft": 1, "edit_strict": 1, "edit_kept": 1}
    assert score([green, MOON]) == everything
    near = MOON._replace(y=MOON.y + 0.5 * TOLERANCE * 64)
    assert score([green, near]) == everything
    for scene, soft, kept in (
        ([CIRCLE, MOON], 5 / 7, 0.5),  # unedited: the colour is wrong, so this is not the circle to keep
        ([green, far], 6 / 7, 0.5),
        ([green], 4 / 7, 0.5),  # of the moon, the count, the colour and the place are lost
        ([green, MOON, star], 6 / 7, 1),  # one thing too many
        ([star], 0, 0),
    ):
        assert score(scene) == {
            "edit": round(soft / 2, 4),
            "edit_soft": round(soft, 4),
            "edit_strict": 0,
            "edit_kept": kept,
        }


def test_where_nothing_is_to_be_kept_its_share_is_unknown():
    row = {"include": [{"class": "circle", "count": 1, "place": "top"}], "keep": []}
    scores = score([CIRCLE._replace(x=32, y=12)], row)
    assert scores["edit"] == scores["edit_strict"] == 1 and math.isnan(scores["edit_kept"])


@pytest.fixture(scope="module")
def edits():
    rng = random.Random(5)
    return [world.sample_edit(rng) for _ in range(200)]


def rows_of(edits):
    return [edit.content | {"keep": [splits.described(thing) for thing in edit.kept]} for _, edit in edits]


def test_the_drawn_result_of_an_edit_is_right(edits):
    details = EditOfShapes().details(draw(*[edit.target for _, edit in edits]), None, rows_of(edits))
    assert details["edit_strict"].mean() >= 0.995
    assert details["edit"].min() > 0.4


def test_the_unedited_source_scores_low(edits):
    details = EditOfShapes().details(draw(*[source for source, _ in edits]), None, rows_of(edits))
    assert details["edit_strict"].max() == 0
    assert details["edit"].max() <= 0.45 and details["edit"].mean() < 0.4


def test_a_new_picture_of_what_was_asked_for_loses_what_had_to_stay(edits):
    """GenEval alone would call it right."""
    kept = [(source, edit) for source, edit in edits if edit.kept]
    rows = rows_of(kept)
    images = draw(*[world.realise(edit.content, random.Random(7)) for _, edit in kept])
    details = EditOfShapes().details(images, None, rows)
    geneval = rewards.build("geneval", [""] * len(rows), rows).details(images, [""] * len(rows), rows)
    assert geneval["geneval_strict"].mean() >= 0.99
    assert details["edit_strict"].mean() < 0.05 and details["edit_kept"].mean() < 0.1


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_the_shipped_edits_keep_what_their_sources_show(name):
    """Only a recoloured or replaced object is to be kept without being in the source as it is."""
    file = load_prompts(splits.PROMPTS / "fold_0" / f"edit_{name}.jsonl")
    reward = rewards.build("edit", file.prompts, file.metadata)
    folder = splits.PROMPTS / "fold_0"
    sources = to_batch([read_image(folder / row["source"]) for row in file.metadata])
    kept = reward.details(sources, file.prompts, file.metadata)["edit_kept"]
    for share, row in zip(kept.tolist(), file.metadata):
        if row["tag"] in ("recolour", "replace"):
            assert share == 1 - 1 / len(row["keep"])
        elif row["keep"]:
            assert share == 1
        else:
            assert row["tag"] == "move" and math.isnan(share)


GOOD = {"class": "moon", "color": "blue", "center": [0.5, 0.5]}


@pytest.mark.parametrize(
    "keep, words",
    [
        (None, 'needs a list "keep"'),
        ([GOOD, 3], r"keep\[1\] needs a .class. and a .color. of the tiny world, not 3"),
        ([GOOD | {"class": "dog"}], r"keep\[0\] needs a .class."),
        ([GOOD | {"color": "pink"}], r"keep\[0\] needs a .class."),
        ([GOOD | {"center": [0.5]}], "must be two numbers from 0 to 1"),
        ([GOOD | {"center": [0.5, 32]}], "must be two numbers from 0 to 1"),
        ([GOOD | {"center": "left"}], "must be two numbers from 0 to 1"),
    ],
)
def test_a_bad_row_is_named(keep, words):
    row = {"include": [{"class": "moon", "count": 1}], "keep": keep}
    with pytest.raises(BadInput, match=words):
        rewards.build("edit", ["move the moon"], [row])


def test_words_of_other_worlds_and_rows_of_no_world_are_refused():
    with pytest.raises(BadInput, match="'dog' of the prompt 'add a dog' is not in the tiny world"):
        rewards.build(
            "edit", ["add a dog"], [{"include": [{"class": "dog", "count": 1}], "prompt": "add a dog"}]
        )
    with pytest.raises(BadInput, match="include"):
        rewards.build("edit", ["add a dog"], [{}])
