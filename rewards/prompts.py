"""Prompt files, and the tags that say which reward judges a prompt."""

import codecs
import csv
import io
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from rewards.errors import BadInput

READ = ".txt (one prompt per line), .jsonl, .json, .csv or .tsv"
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
ENDINGS = JSON_LINES + (".txt", ".json", ".csv", ".tsv")
# Byte-order marks. UTF-32's begins with UTF-16's, so it stands first.
MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)


class PromptFile(NamedTuple):
    """The rows of a prompt file, in two lists of equal length."""

    prompts: list  # of str
    metadata: list  # of dict; what a reward may need to know of a row


class Row(dict):
    """The metadata of a row. `place` says where it was read, such as "train.jsonl, line 3"."""

    def __init__(self, values, place):
        super().__init__(values)
        self.place = place


def load_prompts(path):
    """Reads a prompt file, by its ending.

    .txt: one prompt per line. .jsonl (.ndjson): one JSON object per line, with "prompt" and metadata. .json:
    a list of such objects or of strings, or an object that holds one such list. .csv, .tsv: a table with a
    column `prompt` (or `prompts`); the others are metadata, as text.

    UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Blank lines are skipped. A key whose value is null or
    NaN is left out, at all depths: so tools that write tables fill in what a row does not have.

    Returns a PromptFile. Raises BadInput, with the line where there is one, for a file that is missing,
    empty, of another kind, or has a row without a prompt.
    """
    if not str(path):
        raise BadInput("the name of a prompt file is empty: give one")
    if "\0" in str(path):
        raise BadInput(f"the name of a prompt file has a NUL character: {str(path)!r}")
    path = Path(path)
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        rows = read_txt(path, text)
    elif suffix in JSON_LINES:
        rows = read_json_lines(path, text)
    elif suffix == ".json":
        rows = read_json(path, text)
    else:
        rows = read_table(path, text)
    if not rows:
        raise BadInput(f"prompt file {path} is empty")
    prompts = []
    metadata = []
    for place, row in rows:
        row = without_nulls(row)
        problem = find_problem(row)
        if problem:
            raise BadInput(f"{place}: {problem}")
        prompts.append(row["prompt"])
        metadata.append(Row(row, place))
    return PromptFile(prompts, metadata)


def read_text(path):
    """The content of a prompt file, with \\n at the end of lines and no byte-order mark."""
    try:
        if path.is_dir():
            raise BadInput(f"prompt file {path} is a folder: name a file in it")
        if not path.exists():
            raise BadInput(f"prompt file {path} does not exist")
        if path.suffix.lower() in (".parquet", ".arrow"):
            raise BadInput(
                f"prompt file {path}: {path.suffix} is not read; convert it, for example with pandas: "
                "read_parquet(...).to_json('prompts.jsonl', orient='records', lines=True)"
            )
        if path.suffix.lower() not in ENDINGS:
            raise BadInput(f"prompt file {path}: its name must end in {READ}")
        if not path.is_file():
            raise BadInput(f"prompt file {path} is no ordinary file")
        text = decode(path, path.read_bytes())
    except OSError as error:
        raise BadInput(f"prompt file {path} cannot be read: {error.strerror}") from None
    if text.startswith("version https://git-lfs.github.com"):
        raise BadInput(f"prompt file {path} is a pointer of Git LFS, not the file: run `git lfs pull`")
    if text.lstrip()[:15].lower().startswith(("<!doctype html", "<html")):
        raise BadInput(f"prompt file {path} is a web page, not the file: download it in its raw form")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(path, data):
    """The bytes of a prompt file as text. Raises BadInput for another encoding, with the line."""
    encoding = "UTF-8"
    for mark, name in MARKS:
        if data.startswith(mark):
            encoding = name
            data = data.removeprefix(mark)
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
        line = before.count("\n") + 1
        raise BadInput(f"{path}, line {line}: is not {encoding}; save the file as UTF-8") from None
    if "\0" in text:
        line = text.split("\0")[0].count("\n") + 1
        raise BadInput(
            f"{path}, line {line}: has a NUL character, so it is no text, or UTF-16 without a byte-order "
            "mark; save the file as UTF-8"
        )
    return text


def filled_lines(path, text):
    """[(place, line)] of the lines that are not blank, without the spaces around them."""
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip().strip("\ufeff").strip()  # files joined by `cat` have byte-order marks inside
        if line:
            lines.append((f"{path}, line {number}", line))
    return lines


def read_txt(path, text):
    """[(place, row)] of a .txt, one prompt per line."""
    lines = filled_lines(path, text)
    if lines:
        place, first = lines[0]
        if is_json_object(first):
            raise BadInput(f"{place}: is a JSON object, not a prompt; name the file .jsonl")
        if "prompt" in re.split("[,;\t]", first.lower()):
            raise BadInput(f"{place}: is the header of a table, not a prompt; name the file .csv or .tsv")
    return [(place, {"prompt": line}) for place, line in lines]


def is_json_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path, text):
    """[(place, row)] of a .jsonl, one JSON object per line."""
    rows = []
    for place, line in filled_lines(path, text):
        try:
            rows.append((place, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{place}: not valid JSON ({json_problem(error)})") from None
    return rows


def json_problem(error):
    """Why a text is no JSON, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def read_json(path, text):
    """[(place, row)] of a .json: one list, or JSON lines, as some tools name them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = filled_lines(path, text)
        if len(lines) > 1 and is_json_object(lines[0][1]):
            return read_json_lines(path, text)
        if not lines:
            return []
        line = getattr(error, "lineno", 1)
        raise BadInput(f"{path}, line {line}: not valid JSON ({json_problem(error)})") from None
    if isinstance(content, dict):
        content = find_list(path, content)
    if not isinstance(content, list):
        raise BadInput(f'{path}: needs a list of prompts or of objects with a string "prompt"')
    rows = []
    for number, row in enumerate(content, start=1):
        if isinstance(row, str):
            row = {"prompt": row}
        rows.append((f"{path}, entry {number}", row))
    return rows


def find_list(path, content):
    """The one list in a JSON object, or the object itself as a list of one row."""
    lists = [value for value in content.values() if isinstance(value, list)]
    if isinstance(content.get("prompt"), str):
        return [content]
    if len(lists) != 1 or "prompt" in content:
        raise BadInput(
            f'{path}: needs a list of prompts or of objects with a string "prompt"; it is an object with '
            f"{name_keys(content)}"
        )
    return lists[0]


def read_table(path, text):
    """[(place, row)] of a .csv or .tsv with a header."""
    delimiters = ["\t"] if path.suffix.lower() == ".tsv" else [",", ";"]  # ; is Excel's in many countries
    for delimiter in delimiters:
        lines = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        rows = []
        header = None
        try:
            for cells in lines:
                place = f"{path}, line {lines.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = find_columns(cells)
                    if header is None:
                        break
                elif len(cells) != len(header):
                    raise BadInput(
                        f"{place}: has {len(cells)} cells where the header has {len(header)}; a prompt with "
                        f"{delimiter!r} in it must stand in double quotes"
                    )
                else:
                    row = {name: cell for name, cell in zip(header, cells) if name and cell}
                    rows.append((place, row))
        except csv.Error as error:
            raise BadInput(f"{path}, line {lines.line_num}: {error}; double quotes are doubled") from None
        if header is not None:
            return rows
    if not text.strip():
        return []
    first = text.strip().split("\n")[0]
    raise BadInput(f"{path}: needs a column with the name prompt in its first line, not {first[:80]!r}")


def find_columns(cells):
    """The names of a table's columns, or None where not exactly one of them is the prompt's."""
    names = [cell.strip().strip("\ufeff") for cell in cells]
    own = [name for name in names if name.lower() in ("prompt", "prompts")]
    if len(own) != 1:
        return None
    return ["prompt" if name == own[0] else name for name in names]


def without_nulls(value):
    """A JSON value without the keys whose value is null or NaN, at all depths."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        is_nan = isinstance(item, float) and math.isnan(item)
        if item is not None and not is_nan:
            kept[key] = without_nulls(item)
    return kept


def find_problem(row):
    """Why a row cannot be used, "" if it can."""
    if not isinstance(row, dict):
        return f'needs an object with a string "prompt", not a {type(row).__name__}'
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return f'needs an object with a string "prompt"; it has {name_keys(row)}'
    if not prompt.strip():
        return 'its "prompt" is blank'
    if not isinstance(row.get("tag", ""), str):
        return f'its "tag" must be a string, not {row["tag"]!r}'
    for text in find_texts(row):
        if "\0" in text:
            return "has a NUL character"
        if re.search("[\ud800-\udfff]", text):
            return "has half of a surrogate pair, which is no character"
    return ""


def find_texts(value):
    """Yields every string in a JSON value, at all depths, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from find_texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from find_texts(item)


def name_keys(row):
    """The keys of a JSON object, in a few words."""
    keys = list(row)[:6]
    return ", ".join(repr(key) for key in keys) if keys else "no keys"


def join_prompt_files(files):
    """One PromptFile with the rows of several."""
    joined = PromptFile([], [])
    for file in files:
        joined.prompts.extend(file.prompts)
        joined.metadata.extend(file.metadata)
    return joined


def load_prompt_files(prompts, eval_prompts=""):
    """{name: PromptFile} of "train", "eval" and, where they exist, "eval_paraphrased" and "eval_hard".

    prompts: the training prompts' path. eval_prompts: the held-out ones', or empty for what
    `find_eval_prompts` finds. Paraphrases are found by their name: the evaluation's with `_paraphrased` or
    `_hard` at the end of its stem. The "source" of a row, an image to edit, becomes a path from here.
    Raises BadInput as `load_prompts` does.
    """
    if not str(prompts):
        raise BadInput("--prompts is empty: name a prompt file")
    path = Path(prompts)
    files = {"train": load_prompts(path)}
    eval_path = Path(eval_prompts) if eval_prompts else find_eval_prompts(path)
    files["eval"] = load_prompts(eval_path)
    paths = {"train": path, "eval": eval_path}
    for ending in ("paraphrased", "hard"):
        other = eval_path.with_stem(f"{eval_path.stem}_{ending}")
        if os.path.isfile(other):
            files[f"eval_{ending}"] = load_prompts(other)
            paths[f"eval_{ending}"] = other
    return {name: resolve_sources(paths[name], file) for name, file in files.items()}


def find_eval_prompts(path):
    """The held-out prompts beside a file of training prompts: `eval`, or else `dev`, stands for `train`.

    Raises BadInput where the name has no `train` in it.
    """
    if "train" not in path.name:
        raise BadInput(
            f"--eval-prompts is needed: {path.name} has no `train` in its name to replace by `eval` or `dev`"
        )
    eval_path = path.with_name(path.name.replace("train", "eval"))
    dev_path = path.with_name(path.name.replace("train", "dev"))
    if not os.path.isfile(eval_path) and os.path.isfile(dev_path):
        return dev_path
    return eval_path


def resolve_sources(path, file):
    """The PromptFile that was read from path, with each "source", an image to edit, as a path from here.

    Raises BadInput, naming the row, for a source that is missing or not an image, and for a file in which
    only some rows have one: the rows of a micro-batch are sampled together.
    """
    with_source = [row for row in file.metadata if "source" in row]
    if not with_source:
        return file
    from rewards.sources import check_source  # here, not above: it needs torch

    if len(with_source) < len(file.metadata):
        raise BadInput(
            f"{path}: {len(with_source)} of its {len(file.metadata)} rows have a source; all must, or none"
        )
    metadata = []
    for row in file.metadata:
        source = check_source(path, row)
        metadata.append(Row(row | {"source": source}, row.place))
    return PromptFile(file.prompts, metadata)


def describe_row(row, prompt, metadata):
    """How an error names a row: its number from 1, where it was read if that is known, its prompt."""
    place = getattr(metadata, "place", "")
    where = f"{place}: " if place else ""
    short = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    return f"prompt {row + 1} ({where}{short!r})"


def check_tags(prompts, metadata, names):
    """Raises BadInput for a prompt whose tag, metadata["reward"], is none of these rewards."""
    for row, (prompt, data) in enumerate(zip(prompts, metadata)):
        tag = data.get("reward")
        if tag is not None and tag not in list(names):
            raise BadInput(
                f'{describe_row(row, prompt, data)} has the tag "reward": {tag!r}, name it in --rewards'
            )


def judged_rows(name, metadata):
    """The rows that a reward judges: those without a tag, and those tagged with its name."""
    return [row for row, data in enumerate(metadata) if data.get("reward") in (None, name)]
