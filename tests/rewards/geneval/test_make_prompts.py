"""Training prompts in GenEval's templates."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tyro

from rewards import BadInput
from rewards.geneval import detection, rule
from rewards.geneval import make_prompts as geneval_prompts
from rewards.geneval import reward as geneval
from rewards.prompts import load_prompts
from tests.rewards.geneval.notation import asked, shown

ROOT = Path(__file__).resolve().parents[3]
ROWS = [  # one in each format: GenEval's evaluation_metadata.jsonl, Flow-GRPO's train_metadata.jsonl
    '{"tag": "position", "include": [{"class": "tv remote", "count": 1}, {"class": "oven", "count": 1, '
    '"position": ["left of", 0]}], "prompt": "a photo of an oven left of a tv remote"}',
    '{"tag": "counting", "include": [{"class": "sandwich", "count": 3}], "exclude": [{"class": "sandwich", '
    '"count": 4}], "prompt": "a photo of three sandwichs"}',
]


SHARES = {tag: 1 for tag in detection.TAGS}


def read_sentence(sentence):
    """Objects as a prompt's words have them, without its metadata: what a faithful picture would show."""
    words = sentence.removeprefix("a photo of ")
    for relation, (dx, dy) in {
        "left of": (-99, 0),
        "right of": (99, 0),
        "above": (0, -99),
        "below": (0, 99),
    }.items():
        if f" {relation} " in words:
            a, b = (part.split(" ", 1) for part in words.split(f" {relation} "))
            return f"{a[1]} @{dx},{dy}; {b[1]}", [a, b]
    number, noun = words.split(" ", 1)
    if number in ("two", "three", "four"):
        (name,) = (c for c in detection.CLASSES if noun == (c + "es" if c.endswith("s") else c + "s"))
        return "; ".join([name] * ("two", "three", "four").index(number) + [name] * 2), []
    parts = [part.split(" ", 1) for part in words.split(" and ")]
    return "; ".join(noun for _, noun in parts), parts


def test_a_picture_of_the_sentence_passes_its_metadata():
    rows = geneval_prompts.generate(SHARES, 600, set(), seed=0)
    assert {row["tag"] for row in rows} == set(detection.TAGS)
    for row in rows:
        objects, phrases = read_sentence(row["prompt"])
        rule.check_metadata(row)
        assert rule.passes(shown(objects), row, exact=True), row
        assert all((article == "an") == (noun[0] in "aeiou") for article, noun in phrases)
    asks = {row["tag"]: (len(row["include"]), {"color" in c for c in row["include"]}) for row in rows}
    assert asks == {
        "single_object": (1, {False}), "two_object": (2, {False}), "counting": (1, {False}),
        "colors": (1, {True}), "position": (2, {False}), "color_attr": (2, {True}),
    }  # fmt: skip
    assert geneval.unknown_words(rows, detection.CLASSES, detection.COLORS) == []
    assert not any("color" in c and c["class"] == "person" for row in rows for c in row["include"])
    for row in rows:
        expected = (
            [row["include"][0] | {"count": row["include"][0]["count"] + 1}]
            if row["tag"] == "counting"
            else None
        )
        assert row.get("exclude") == expected


def test_generate_repeats_itself_and_keeps_the_shares():
    shares = SHARES | {"counting": 3, "single_object": 0}
    rows = geneval_prompts.generate(shares, 3000, set(), seed=1)
    assert rows == geneval_prompts.generate(shares, 3000, set(), seed=1)
    assert rows != geneval_prompts.generate(shares, 3000, set(), seed=2)
    tags = Counter(row["tag"] for row in rows)
    assert "single_object" not in tags
    assert tags["counting"] / 3000 == pytest.approx(3 / 7, abs=0.04)
    assert tags["position"] / 3000 == pytest.approx(1 / 7, abs=0.03)


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("dog, cat", "cat, dog", True),
        ("red dog, blue cat", "blue cat, red dog", True),
        ("red dog, blue cat", "blue dog, red cat", False),
        ("dog, cat above 0", "cat, dog below 0", True),
        ("dog, cat above 0", "cat, dog above 0", False),
        ("dog, cat left of 0", "cat, dog right of 0", True),
        ("dog, cat left of 0", "dog, cat above 0", False),
        ("dog, cat left of 0", "dog, cat", False),
        ("2 dog, not 3 dog", "2 dog", True),
        ("2 dog", "3 dog", False),
        ("dog", "red dog", False),
    ],
)
def test_content_is_what_is_asked_for_not_how_it_is_said(a, b, same):
    assert (geneval_prompts.content(asked(a)) == geneval_prompts.content(asked(b))) == same


def test_content_takes_none_for_absent():
    row = asked("red dog, cat above 0")
    filled = {"include": [{"color": None, "position": None} | clause for clause in row["include"]]}
    assert geneval_prompts.content(filled) == geneval_prompts.content(row)


def test_no_prompt_asks_for_what_is_excluded():
    evaluation = geneval_prompts.generate(SHARES, 2000, set(), seed=3)
    evaluation += [asked(name) for name in detection.CLASSES]
    excluded = {geneval_prompts.content(row) for row in evaluation}
    shares = SHARES | {"single_object": 0}
    free = geneval_prompts.generate(shares, 2000, set(), seed=4)
    assert sum(geneval_prompts.content(row) in excluded for row in free) > 100  # it would happen
    rows = geneval_prompts.generate(shares, 2000, excluded, seed=4)
    assert not any(geneval_prompts.content(row) in excluded for row in rows)
    with pytest.raises(BadInput, match="single_object.*--single-object 0"):
        geneval_prompts.generate(SHARES, 2000, excluded, seed=4)


def test_the_command_writes_a_file_that_loads(tmp_path):
    (tmp_path / "evaluation.jsonl").write_text("\n".join(ROWS) + "\n")
    output = tmp_path / "geneval" / "train.jsonl"
    flags = ["--num-prompts", "300", "--output", output, "--exclude", tmp_path / "evaluation.jsonl"]
    geneval_prompts.main(tyro.cli(geneval_prompts.Args, args=list(map(str, flags))))
    prompts, metadata = load_prompts(output)
    assert len(prompts) == 300 and "single_object" not in {row["tag"] for row in metadata}
    assert "a photo of three sandwichs" not in prompts
    options = {tag: getattr(geneval_prompts.Args(output=""), tag) for tag in detection.TAGS}
    assert options == {
        "position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"output": "train.txt"}, "must end in .jsonl"),
        ({"num_prompts": 0}, "--num-prompts"),
        ({"counting": -1}, "shares"),
        (dict.fromkeys(detection.TAGS, 0), "shares"),
        ({"exclude": "nowhere.jsonl"}, "does not exist"),
        ({"exclude": "bad.jsonl"}, "bad.jsonl, line 1, prompt 'a dog'.*include"),
        ({"output": "bad.jsonl/train.jsonl"}, "--output bad.jsonl/train.jsonl cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong(changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a dog"}) + "\n")
    with pytest.raises(BadInput, match=said):
        geneval_prompts.main(geneval_prompts.Args(**{"output": "train.jsonl", "num_prompts": 3} | changes))
    assert not (tmp_path / "train.jsonl").exists()


def test_the_generator_does_not_wait_for_torch():
    """Its imports: a script that writes text must start at once."""
    code = (
        "import sys, time; start = time.perf_counter(); import rewards.geneval.make_prompts;"
        "print([name for name in ('torch', 'numpy', 'transformers', 'diffusers') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout == "[]\n"


def test_help_takes_less_than_two_seconds_and_does_not_load_torch():
    words = [sys.executable, "-X", "importtime", "-m", "rewards.geneval.make_prompts", "--help"]
    start = time.perf_counter()
    output = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert "Writes training prompts" in output.stdout
    imported = {line.rpartition("|")[2].strip() for line in output.stderr.splitlines()}
    assert "rewards.geneval.rule" in imported and not {"torch", "numpy", "transformers"} & imported
