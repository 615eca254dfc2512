"""Prompt files, and the tags that say which reward judges a prompt."""

import json
from pathlib import Path
from typing import NamedTuple

from rewards import BadInput


class PromptFile(NamedTuple):
    """The rows of a prompt file, in two lists of equal length."""

    prompts: list  # of str
    metadata: list  # of dict; what a reward may need to know of a row


def load_prompts(path):
    """Reads a prompt file: .txt with a prompt a line, or .jsonl with "prompt" and metadata a line.

    Returns a PromptFile; blank lines are skipped. Raises ValueError, with
    the number of the line where there is one, when the file is missing, empty or has a line that is not such
    a record.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"prompt file {path} does not exist")
    prompts, metadata = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise BadInput(f'{path}, line {number}: needs an object with a string "prompt"')
        prompts.append(row["prompt"])
        metadata.append(row)
    if not prompts:
        raise BadInput(f"prompt file {path} is empty")
    return PromptFile(prompts, metadata)


def join_prompt_files(files):
    """One PromptFile with the rows of several."""
    joined = PromptFile([], [])
    for file in files:
        joined.prompts.extend(file.prompts)
        joined.metadata.extend(file.metadata)
    return joined


def load_prompt_files(prompts, eval_prompts=""):
    """{name: (prompts, metadata)} of "train", "eval" and, where such a file is there, "eval_paraphrased".

    eval_prompts empty: the file of prompts with `train` replaced by `eval` in its name. The paraphrases' file
    is named as the evaluation's with `_paraphrased` at the end of its stem.
    """
    path = Path(prompts)
    eval_path = Path(eval_prompts or path.with_name(path.name.replace("train", "eval")))
    if eval_path == path and not eval_prompts:
        raise BadInput(
            f"--eval-prompts is needed: {path.name} has no `train` in its name to replace by `eval`"
        )
    paths = {"train": path, "eval": eval_path}
    paraphrased = eval_path.with_stem(eval_path.stem + "_paraphrased")
    if paraphrased.is_file():
        paths["eval_paraphrased"] = paraphrased
    files = {name: load_prompts(path) for name, path in paths.items()}
    if any("source" in row for file in files.values() for row in file.metadata):
        from rewards.sources import (
            resolve_sources,
        )  # here, not above: text alone needs neither torch nor Pillow

        files = {name: resolve_sources(paths[name], file) for name, file in files.items()}
    return files


def check_tags(prompts, metadata, names):
    """Raises BadInput for a prompt whose tag, metadata["reward"], is none of these rewards."""
    for row, (prompt, data) in enumerate(zip(prompts, metadata), start=1):
        if (tag := data.get("reward")) not in (None, *names):
            raise BadInput(f'prompt {row} ({prompt!r}) has the tag "reward": {tag!r}, name it in --rewards')


def judged_rows(name, metadata):
    """The rows that a reward judges: those without a tag, and those tagged with its name."""
    return [i for i, row in enumerate(metadata) if row.get("reward") in (None, name)]
