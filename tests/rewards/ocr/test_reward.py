"""The OCR reward: its formula, its target, its reader."""

import importlib.util
import random
import re
import sys
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


@pytest.mark.parametrize("name", ["text_train", "text_dev", "text_test"])
def test_the_tiny_worlds_prompts_are_recognised(name):
    prompts, metadata = load_prompts(ROOT / f"tiny/prompts/fold_0/{name}.jsonl")
    assert ocr.make_ocr(metadata, "cpu").recogniser is glyphs.read


def test_a_text_file_with_quotes_loads_as_it_is(tmp_path):
    (tmp_path / "train.txt").write_text(
        'A chalkboard with "Today\'s Menu", chalk\nA neon sign: "Jazz Club"\n'
    )
    prompts, metadata = load_prompts(tmp_path / "train.txt")
    reward = rewards.build("ocr", prompts, metadata)  # starts nothing yet
    assert isinstance(reward.parts["ocr"][0].recogniser, engine.Reader)
    assert [ocr.target_text(*row) for row in zip(prompts, metadata)] == ["Today's Menu", "Jazz Club"]


# ---- what is asked for ----
@pytest.mark.parametrize(
    "prompt, target",
    [
        ("a sign that says “Hello there”", "Hello there"),
        ("ein Schild „Guten Tag“", "Guten Tag"),
        ("ein Schild „Guten Tag”", "Guten Tag"),
        ("en skylt ”God dag”", "God dag"),
        ("un panneau « Bonjour »", " Bonjour "),
        ("et skilt »God dag«", "God dag"),
        ("a sign 「新年快乐」 in red", "新年快乐"),
        ("a sign 『新年』", "新年"),
        ("a sign ＂Hello＂", "Hello"),
        ('a sign “Hello" there', "Hello"),  # a keyboard's quote closes a typographic one
        ('a sign "Hello” there', "Hello"),
        ('“one” and "two"', "one"),
        ('"one” two" three', "one” two"),  # a straight quote prefers a straight one
        ('12" box that says "X"', "X"),
        ('a 12" box that says "X"', "X"),
        ('a 5\'10" tall man with a sign "Stop"', "Stop"),
        ('a 3"x5" card that says "Hi"', "Hi"),
        ('a sign that says "Exit 12"', "Exit 12"),
        ('a sign that says "12" on a door', "12"),
        ('"24" hours', "24"),
        ('"24"', "24"),
        ('a 12" sign “Open 24"', "Open 24"),
        ("the words 'no' and \"yes\"", "yes"),
        ('it says "don\'t"', "don't"),
        ('says " spaced "', " spaced "),
        ('says:"close"', "close"),
        ('a"b"c', "b"),
    ],
)
def test_quotes_of_all_kinds_are_read_and_inches_are_not(prompt, target):
    assert ocr.target_text(prompt, {}) == target
    assert ocr.target_text(prompt, {"text": None}) == target


@pytest.mark.parametrize(
    "prompt",
    [
        "a 12\" box", "a 12\" by 10\" box", 'an open "quote', "an open “quote", "closed”", "‘single’",
        "'single'", "5′ 10″", "« open", "",
    ],
)  # fmt: skip
def test_what_is_no_pair_of_quotes_is_an_error(prompt):
    with pytest.raises(ValueError, match='ocr needs a text in double quotes in the prompt, or "text"'):
        ocr.target_text(prompt, {})


@pytest.mark.parametrize("value", [2024, 1.5, True, ["A", "B"], {"a": 1}])
def test_a_text_that_is_no_string_is_named(value):
    said = f'ocr: "text" must be a string, such as "text": "{value}", not {value!r}'
    with pytest.raises(ValueError, match=re.escape(said)):
        ocr.target_text('a sign "quoted"', {"text": value})


@pytest.mark.parametrize("prompt, metadata", [('""', {}), ('" "', {}), ("“”", {}), ("x", {"text": ""})])
def test_an_empty_text_is_an_error(prompt, metadata):
    with pytest.raises(ValueError, match="ocr: the text to write is empty"):
        ocr.target_text(prompt, metadata)


# ---- what the engine can read ----
READABLE = [
    "Hello, World! 24/7", "Café Zürich ÆØÅ ß ı", "ΑΒΓ αβγ", "新年快乐", "新聞臺灣", "カタカナ ひらがな ー 々",
    "ＡＢＣ１２３", "1º 2ª", "µ", "Hawaiʻi", "€ £ ¥ © ™ … — ’ “ ”", "😂🚀", "Việt Nam", "Łódź",
]  # fmt: skip
UNREADABLE = {
    "Привет": "CYRILLIC CAPITAL LETTER PE",
    "Open Москва": "CYRILLIC",
    "pаypal": "CYRILLIC SMALL LETTER A",  # one letter that looks like a Latin one
    "안녕하세요": "HANGUL",
    "مرحبا": "ARABIC",
    "שלום": "HEBREW",
    "สวัสดี": "THAI",
    "नमस्ते": "DEVANAGARI",
    "გამარჯობა": "GEORGIAN",
    "Բարեւ": "ARMENIAN",
    "வணக்கம்": "TAMIL",
    "ሰላም": "ETHIOPIC",
    "𝐇𝐞𝐥𝐥𝐨": "MATHEMATICAL BOLD CAPITAL H",
}


@pytest.mark.parametrize("text", READABLE)
def test_a_text_that_the_engine_can_read_is_accepted(text):
    ocr.OCR(engine.Reader(1)).check("", {"text": text})


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_script_that_the_engine_lacks_is_refused_before_training(text):
    with pytest.raises(
        rewards.BadInput, match=f"prompt 2 .*ocr: the engine cannot read .*{UNREADABLE[text]}"
    ):
        rewards.build("ocr", ['a sign "Hello"', f'a sign "{text}"'], [{}, {}])
    ocr.OCR(glyphs.read).check("", {"text": text})  # another reader's letters are its own


def test_the_scripts_are_those_of_the_engines_dictionary():
    import onnxruntime
    import rapidocr

    (path,) = (Path(rapidocr.__file__).parent / "models").glob("*_rec_*.onnx")
    dictionary = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map["character"]
    characters = set(dictionary.split("\n"))
    for text in ("Hello24", "ΑΒΓαβγ", "新年快乐聞臺灣", "カタカナひらがなー々", "ＡＢＣ", "ºªµßé"):
        assert set(text) <= characters
    for text in UNREADABLE:
        unreadable = [c for c in text if c.isalpha() and not c.isascii()]
        assert not set(unreadable) & characters


def test_a_missing_package_is_named_before_training(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name))
    with pytest.raises(rewards.BadInput, match="rapidocr: pip install rapidocr onnxruntime"):
        ocr.make_ocr([{"prompt": 'a "sign"'}], "cpu")
    assert ocr.make_ocr([TINY], "cpu").recogniser is glyphs.read


def test_an_engine_that_does_not_start_is_one_line():
    broken = engine.Reader(1, [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(rewards.RewardError, match="^ocr: the OCR engine does not start: its own message"):
        ocr.OCR(broken)(torch.zeros(1, 3, 8, 8), ['"a"'], [{}])
