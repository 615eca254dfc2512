"""Prompt files."""

import json
import os
import pickle
from pathlib import Path

import pytest

import rewards
from rewards import BadInput
from rewards.prompts import load_prompt_files, load_prompts
from tests.rewards.geneval.notation import ask

ROOT = Path(__file__).resolve().parents[2]


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


# ---- files of other tools ----
ROWS = [{"prompt": "a red dog", "tag": "colors"}, {"prompt": "zwei Würfel, 猫"}, {"prompt": 'says "Hi"'}]
PROMPTS = [row["prompt"] for row in ROWS]
LINES = "\n".join(PROMPTS) + "\n"
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'prompt,tag\na red dog,colors\n"zwei Würfel, 猫",\n"says ""Hi""",\n'
TABS = 'prompt\ttag\na red dog\tcolors\nzwei Würfel, 猫\t\n"says ""Hi"""\t\n'
NULLS = [{"prompt": row["prompt"], "tag": row.get("tag"), "exclude": None, "x": float("nan")} for row in ROWS]

# {what: (name of the file, its content)}: each holds the rows above, those of .txt without the tag
READ = {
    "txt": ("a.txt", LINES),
    "TXT": ("a.TXT", LINES),
    "a byte-order mark in .txt": ("a.txt", b"\xef\xbb\xbf" + LINES.encode()),
    "byte-order marks of files joined by cat": ("a.txt", "\ufeff" + LINES.replace("\n", "\n\ufeff")),
    "CRLF": ("a.txt", LINES.replace("\n", "\r\n")),
    "CR": ("a.txt", LINES.replace("\n", "\r")),
    "blank lines and spaces": ("a.txt", "\n\n  " + LINES.replace("\n", " \t\n\n \n")),
    "no newline at the end": ("a.txt", LINES.rstrip("\n")),
    "UTF-16": ("a.txt", LINES.encode("utf-16")),
    "UTF-16, big end first": ("a.txt", b"\xfe\xff" + LINES.encode("utf-16-be")),
    "UTF-32": ("a.txt", LINES.encode("utf-32")),
    "UTF-16 with CRLF, as Notepad writes it": ("a.txt", LINES.replace("\n", "\r\n").encode("utf-16")),
    "jsonl": ("a.jsonl", JSON_LINES),
    "JSONL": ("a.JSONL", JSON_LINES),
    "ndjson": ("a.ndjson", JSON_LINES),
    "jsonlines": ("a.jsonlines", JSON_LINES),
    "a byte-order mark in .jsonl": ("a.jsonl", b"\xef\xbb\xbf" + JSON_LINES.encode()),
    "CRLF in .jsonl": ("a.jsonl", JSON_LINES.replace("\n", "\r\n")),
    "UTF-16 in .jsonl": ("a.jsonl", JSON_LINES.encode("utf-16")),
    "escapes in .jsonl": ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    "nulls of a table's export": ("a.jsonl", "".join(json.dumps(row) + "\n" for row in NULLS)),
    "json, a list of objects": ("a.json", json.dumps(ROWS)),
    "json, pretty": ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "JSON": ("a.JSON", json.dumps(ROWS)),
    "json, an object with a list": ("a.json", json.dumps({"version": 1, "prompts": ROWS})),
    "json, a byte-order mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "json, in truth JSON lines, as of datasets.to_json": ("a.json", JSON_LINES),
    "csv": ("a.csv", TABLE),
    "CSV": ("a.CSV", TABLE),
    "csv, CRLF and a byte-order mark, as Excel writes it": (
        "a.csv",
        b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(),
    ),
    "csv, semicolons": ("a.csv", 'prompt;tag\na red dog;colors\nzwei Würfel, 猫;\n"says ""Hi""";\n'),
    "csv, an index, as of pandas": (
        "a.csv",
        ',prompt,tag\n0,a red dog,colors\n1,"zwei Würfel, 猫",\n2,"says ""Hi""",\n',
    ),
    "csv, Prompt": ("a.csv", TABLE.replace("prompt", "Prompt")),
    "csv, Prompts, as of DrawBench": ("a.csv", TABLE.replace("prompt", " Prompts ")),
    "csv, blank lines": ("a.csv", TABLE.replace("\n", "\n\n").replace("colors\n", "colors\n,\n")),
    "tsv": ("a.tsv", TABS),
    "tsv, Prompt, as of PartiPrompts": ("a.tsv", TABS.replace("prompt", "Prompt")),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name, content", READ.values(), ids=READ)
def test_files_of_other_tools_are_read_right(tmp_path, name, content):
    write(tmp_path / name, content)
    file = load_prompts(tmp_path / name)
    assert file.prompts == PROMPTS
    expected = [{"prompt": prompt} for prompt in PROMPTS] if name.lower().endswith("txt") else ROWS
    assert file.metadata == expected


def test_a_json_list_of_strings_is_one_of_prompts(tmp_path):
    for content in (PROMPTS, {"prompts": PROMPTS}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert load_prompts(tmp_path / "a.json") == (PROMPTS, [{"prompt": prompt} for prompt in PROMPTS])
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "one", "tags": ["x"]}))
    assert load_prompts(tmp_path / "a.json") == (["one"], [{"prompt": "one", "tags": ["x"]}])


def test_a_cell_may_hold_lines(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,tag\n"two\nlines",x\nb,y,z\n')
    with pytest.raises(BadInput, match="line 4: has 3 cells where the header has 2"):
        load_prompts(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('prompt,tag\n"two\nlines",x\n')
    assert load_prompts(tmp_path / "a.csv").prompts == ["two\nlines"]


DEEP = "[" * 100_000
LONG = '{"prompt": "a", "n": ' + "9" * 5000 + "}"
# {what: (name of the file, its content, what the line says)}
REFUSED = {
    "UTF-16 without a mark": ("a.txt", LINES.encode("utf-16-le"), "not UTF-8; save|NUL character"),
    "plain UTF-16 without a mark": (
        "a.txt",
        "a dog\na cat".encode("utf-16-le"),
        "line 1: has a NUL character",
    ),
    "Latin-1": ("a.txt", "a dog\nzwei Würfel\n".encode("latin-1"), "line 2: is not UTF-8; save the file as"),
    "Latin-1 in .jsonl": ("a.jsonl", '{"prompt": "Würfel"}'.encode("latin-1"), "line 1: is not UTF-8"),
    "GBK": ("a.txt", "a dog\n\n一张狗的照片\n".encode("gbk"), "line 3: is not UTF-8"),
    "half a UTF-16 pair": ("a.txt", b"\xff\xfea\0\n\0\x00\xd8", "line 2: is not UTF-16"),
    "an encoded surrogate": ("a.txt", b"a dog\n\xed\xa0\x80\n", "line 2: is not UTF-8"),
    "an escaped surrogate": (
        "a.jsonl",
        '{"prompt": "a"}\n{"prompt": "\\ud83d"}',
        "line 2: has half of a surr",
    ),
    "a surrogate in metadata": ("a.jsonl", '{"prompt": "a", "x": [{"\\udc00": 1}]}', "line 1: has half of a"),
    "NUL": ("a.txt", "a dog\na\0cat\n", "line 2: has a NUL character"),
    "an escaped NUL": ("a.jsonl", '{"prompt": "a\\u0000b"}', "line 1: has a NUL character"),
    "an escaped NUL in metadata": ("a.jsonl", '{"prompt": "a", "text": "\\u0000"}', "line 1: has a NUL"),
    "a PNG": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 1: is not UTF-8"),
    "a gzip": ("a.jsonl", b"\x1f\x8b\x08\0\0\0\0\0", "line 1: is not UTF-8"),
    "a zip": ("a.txt", b"PK\x03\x04\x14\0\0\0", "line 1: has a NUL character"),
    "a parquet called .jsonl": ("a.jsonl", b"PAR1\x15\x04\x15\0", "line 1: has a NUL character"),
    "parquet": ("a.parquet", b"PAR1", "convert it.*read_parquet.*lines=True"),
    "arrow": ("a.arrow", b"ARROW1", "convert it"),
    "no ending": ("prompts", LINES, r"must end in .txt \(one prompt per line\), .jsonl, .json, .csv or .tsv"),
    "markdown": ("a.md", LINES, "must end in .txt"),
    "yaml": ("a.yaml", "- a dog", "must end in .txt"),
    "Excel": ("a.xlsx", b"PK", "must end in .txt"),
    "compressed": ("a.jsonl.gz", b"\x1f\x8b", "must end in .txt"),
    "a pointer of Git LFS": (
        "a.txt",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "a web page": ("a.txt", "\n<!DOCTYPE html>\n<html>404</html>", "web page.*raw form"),
    "a web page, called .jsonl": ("a.jsonl", "<html>\n<body>", "web page"),
    "JSON lines called .txt": ("a.txt", "\n" + JSON_LINES, "line 2: is a JSON object.*name the file .jsonl"),
    "a table called .txt": ("a.txt", TABLE, "line 1: is the header of a table.*name the file .csv"),
    "tabs called .txt": ("a.txt", TABS, "line 1: is the header of a table"),
    "a header over prompts": ("a.txt", "prompt\na dog\n", "line 1: is the header of a table"),
    "a list called .jsonl": ("a.jsonl", json.dumps(ROWS), "line 1: needs an object .* not a list"),
    "a pretty list called .jsonl": ("a.jsonl", json.dumps(ROWS, indent=1), "line 1: not valid JSON"),
    "texts in .jsonl": ("a.jsonl", '"a dog"\n"a cat"\n', "line 1: needs an object .* not a str"),
    "a table called .jsonl": ("a.jsonl", TABLE, "line 1: not valid JSON"),
    "lines called .json": ("a.json", LINES, "line 1: not valid JSON"),
    "half of a .json": ("a.json", json.dumps(ROWS, indent=1)[:60], "line [2-9]: not valid JSON"),
    "JSON lines called .json, one broken": ("a.json", JSON_LINES + '{"prompt": \n', "line 4: not valid JSON"),
    "a number in .json": ("a.json", "3", "needs a list of prompts"),
    "columns in .json": ("a.json", json.dumps({"prompt": PROMPTS, "tag": ["x"] * 3}), "needs a list of pro"),
    "columns of pandas in .json": (
        "a.json",
        json.dumps({"prompt": {"0": "a"}}),
        "needs .* object with 'prompt'",
    ),
    "prompts by number in .json": ("a.json", json.dumps({"0": {"prompt": "a"}}), "object with '0'"),
    "two lists in .json": ("a.json", json.dumps({"train": ["a"], "eval": ["b"]}), "'train', 'eval'"),
    "numbers in a list": ("a.json", '["a dog", 3]', "entry 2: needs an object"),
    "null in a list": ("a.json", '["a dog", null]', "entry 2: needs an object"),
    "an empty object": ("a.json", "{}", "object with no keys"),
    "an empty list": ("a.json", "[]", "is empty"),
    "an empty .json": ("a.json", " \n", "is empty"),
    "single quotes": ("a.jsonl", "{'prompt': 'a dog'}", "line 1: not valid JSON"),
    "commas at the ends": ("a.jsonl", '{"prompt": "a"},\n{"prompt": "b"}', "line 1: not valid JSON"),
    "two objects on a line": ("a.jsonl", '{"prompt": "a"}{"prompt": "b"}', "line 1: not valid JSON"),
    "nested too deeply": ("a.jsonl", DEEP, "line 1: not valid JSON .nested too deeply"),
    "nested too deeply, .json": ("a.json", DEEP, "line 1: not valid JSON .nested too deeply"),
    "a number of 5000 digits": ("a.jsonl", LONG, "line 1: not valid JSON .a number is too long"),
    "captions": ("a.jsonl", '{"caption": "a dog", "id": 3}', "it has 'caption', 'id'"),
    "texts": ("a.jsonl", '{"text": "a dog"}', "it has 'text'"),
    "Prompt": ("a.jsonl", '{"Prompt": "a dog"}', "it has 'Prompt'"),
    "no keys": ("a.jsonl", "{}", "it has no keys"),
    "null": ("a.jsonl", '{"prompt": null}', "line 1: needs an object .* no keys"),
    "a number as prompt": ("a.jsonl", '{"prompt": 3}', "line 1: needs an object"),
    "a list as prompt": ("a.jsonl", '{"prompt": ["a", "b"]}', "line 1: needs an object"),
    "a blank prompt": ("a.jsonl", '{"prompt": "a"}\n{"prompt": " \\n"}', 'line 2: its "prompt" is blank'),
    "a number as tag": ("a.jsonl", '{"prompt": "a", "tag": 3}', 'line 1: its "tag" must be a string, not 3'),
    "a list as tag": ("a.jsonl", '{"prompt": "a", "tag": ["x"]}', 'line 1: its "tag" must be a string'),
    "blank lines alone": ("a.txt", " \n\t\n\ufeff\n", "is empty"),
    "a mark alone": ("a.txt", b"\xef\xbb\xbf", "is empty"),
    "a table without a header": ("a.csv", "a dog,x\na cat,y\n", "column with the name prompt .* 'a dog,x'"),
    "a table of captions": ("a.csv", "caption,tag\na dog,x\n", "not 'caption,tag'"),
    "two columns of prompts": ("a.csv", "prompt,Prompt\na,b\n", "column with the name prompt"),
    "a header alone": ("a.csv", "prompt,tag\n", "is empty"),
    "an empty table": ("a.csv", "\n\n", "is empty"),
    "a comma without quotes": (
        "a.csv",
        "prompt,tag\na dog, red,x\n",
        "line 2: has 3 cells where the header has 2",
    ),
    "a short row": ("a.csv", "prompt,tag\na dog,x\na cat\n", "line 3: has 1 cells where the header has 2"),
    "a row without a prompt": ("a.csv", "prompt,tag\na dog,x\n,y\n", "line 3: needs .* it has 'tag'"),
    "an open quote": ("a.csv", 'prompt,tag\n"a dog,x\na cat,y\n', "line 3: unexpected end of data"),
    "text after a quote": ("a.tsv", 'prompt\n"Hello" on a sign\n', "line 2: .*double quotes are doubled"),
    "commas in .tsv": ("a.tsv", "prompt,tag\na dog,x\n", "column with the name prompt"),
    "GenEval's clauses as text": (
        "a.csv",
        "prompt,include\na dog,\"[{'class': 'dog', 'count': 1}]\"\n",
        None,  # loads; the reward says what is wrong
    ),
}


@pytest.mark.parametrize("name, content, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_one_line_with_the_place(tmp_path, name, content, said):
    write(tmp_path / name, content)
    if said is None:
        with pytest.raises(BadInput, match=r'prompt 1 \(.*a.csv, line 2: .*"include" list'):
            rewards.build("geneval", *load_prompts(tmp_path / name))
        return
    with pytest.raises(BadInput, match=said) as error:
        load_prompts(tmp_path / name)
    line = str(error.value)
    assert name in line and "\n" not in line and len(line) < 400


def test_what_is_no_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    long = "a" * 5000 + ".txt"
    for path, said in (
        ("", "name of a prompt file is empty"),
        (".", "is a folder"),
        ("..", "is a folder"),
        ("/", "is a folder"),
        (tmp_path / "folder.txt", "is a folder: name a file in it"),
        (tmp_path / "pipe.txt", "is no ordinary file"),
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "none/a.txt", "does not exist"),
        (tmp_path / "folder.txt/a.txt", "does not exist"),
        (f"{tmp_path}/a\0b.txt", r"has a NUL character: .*a\\x00b.txt"),
        (f"{tmp_path}/{long}", "cannot be read: File name too long"),
    ):
        with pytest.raises(BadInput, match=said) as error:
            load_prompts(path)
        assert "\n" not in str(error.value)
    (tmp_path / "a_train.txt").write_text("a dog")
    longest = "a" * 251 + ".txt"  # with _paraphrased it would be too long
    (tmp_path / longest).write_text("a cat")
    assert set(load_prompt_files(tmp_path / "a_train.txt", tmp_path / longest)) == {"train", "eval"}
    for prompts, evaluation, said in (
        ("", "", "--prompts is empty"),
        (".", "", "is a folder"),
        (tmp_path / "none.txt", "", "none.txt does not exist"),
        (tmp_path / "a_train.txt", "a" * 5000 + ".txt", "File name too long"),
    ):
        with pytest.raises(BadInput, match=said):
            load_prompt_files(prompts, evaluation)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.txt").write_text("a dog")
    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    with pytest.raises(BadInput, match="secret.txt cannot be read: Permission denied"):
        load_prompts(tmp_path / "secret.txt")


def test_a_row_knows_where_it_was_read(tmp_path):
    write(tmp_path / "a.jsonl", "\n" + JSON_LINES)
    (_, second, _) = load_prompts(tmp_path / "a.jsonl").metadata
    assert second.place == f"{tmp_path}/a.jsonl, line 3"
    copied = pickle.loads(pickle.dumps(second))
    assert copied == second and copied.place == second.place
    assert json.loads(json.dumps(second)) == ROWS[1]


def test_nulls_are_left_out_at_all_depths(tmp_path):
    row = {"prompt": "a", "text": None, "include": [{"class": "dog", "color": None, "x": {"y": None}}, None]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_prompts(tmp_path / "a.jsonl").metadata == [
        {"prompt": "a", "include": [{"class": "dog", "x": {}}, None]}
    ]


def test_the_tiny_worlds_files_are_read_as_they_were():
    """What they hold as JSON, line by line."""
    for path in sorted((ROOT / "tiny/prompts").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        assert load_prompts(path) == ([row["prompt"] for row in rows], rows)
