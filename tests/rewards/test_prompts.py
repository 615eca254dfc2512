"""Prompt files."""

import json

import pytest

from rewards.prompts import load_prompt_files, load_prompts
from tests.rewards.geneval.notation import ask


def test_load_prompts_reads_txt(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n  zwei Würfel  \n", encoding="utf-8")
    prompts, metadata = load_prompts(tmp_path / "a.txt")
    assert prompts == ["a red circle", "zwei Würfel"]
    assert metadata == [{"prompt": prompt} for prompt in prompts]


def test_load_prompts_reads_jsonl(tmp_path):
    rows = [{"prompt": "a circle", "tag": "single_object", "include": [ask("circle")]}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert load_prompts(str(tmp_path / "a.jsonl")) == (["a circle", "b"], rows)


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c\u0085d"}]  # both are legal unescaped inside JSON strings
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert load_prompts(tmp_path / "a.jsonl") == (["a\u2028b", "c\u0085d"], rows)


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
        load_prompts(tmp_path / name)
    assert name in str(error.value)


def test_load_prompt_files_finds_the_siblings(tmp_path):
    for name in ("my_train", "my_eval", "my_eval_paraphrased", "other"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = load_prompt_files(tmp_path / "my_train.txt")
    assert {key: prompts for key, (prompts, _) in found.items()} == {
        "train": ["my_train"],
        "eval": ["my_eval"],
        "eval_paraphrased": ["my_eval_paraphrased"],
    }
    found = load_prompt_files(str(tmp_path / "my_train.txt"), str(tmp_path / "other.txt"))
    assert {key: prompts for key, (prompts, _) in found.items()} == {"train": ["my_train"], "eval": ["other"]}


def test_load_prompt_files_needs_an_evaluation_file(tmp_path):
    for name in ("prompts", "train"):
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match="--eval-prompts.*train"):
        load_prompt_files(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="eval.txt does not exist"):
        load_prompt_files(tmp_path / "train.txt")
