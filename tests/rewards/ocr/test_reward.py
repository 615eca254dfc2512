"""The OCR reward: its formula, its target, its reader."""

import random
from pathlib import Path

import pytest
import torch

import rewards
from rewards.ocr import engine
from rewards.ocr import reward as ocr
from rewards.prompts import load_prompts
from rewards.tiny_world import glyphs
from tests.rewards.drawing import to_batch
from tiny import world

ROOT = Path(__file__).resolve().parents[3]


NAN = float("nan")


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


TINY = {"tag": "text", "text": "K7"}


@pytest.mark.parametrize(
    "metadata, tiny",
    [
        ([TINY, {"tag": "text", "text": "AB3"}], True),
        ([TINY, {"tag": "text", "text": "Hello"}], False),
        ([TINY, {"tag": "text", "text": "k7"}], False),
        ([TINY, {"tag": "sign", "text": "K7"}], False),
        ([TINY, {"prompt": 'the text "K7"'}], False),
        ([TINY, {"tag": "text", "text": 12}], False),
    ],
)
def test_the_tiny_worlds_reader_is_for_its_own_rows_alone(metadata, tiny):
    assert (ocr.make_ocr(metadata, "cpu").recogniser is glyphs.read) == tiny


@pytest.mark.parametrize("name", ["text_train", "text_eval"])
def test_the_tiny_worlds_prompts_are_recognised(name):
    prompts, metadata = load_prompts(ROOT / f"tiny/prompts/{name}.jsonl")
    assert ocr.make_ocr(metadata, "cpu").recogniser is glyphs.read


def test_a_text_file_with_quotes_loads_as_it_is(tmp_path):
    (tmp_path / "train.txt").write_text(
        'A chalkboard with "Today\'s Menu", chalk\nA neon sign: "Jazz Club"\n'
    )
    prompts, metadata = load_prompts(tmp_path / "train.txt")
    reward = rewards.build("ocr", prompts, metadata)  # starts nothing yet
    assert isinstance(reward.parts["ocr"][0].recogniser, engine.Reader)
    assert [ocr.target_text(*row) for row in zip(prompts, metadata)] == ["Today's Menu", "Jazz Club"]
