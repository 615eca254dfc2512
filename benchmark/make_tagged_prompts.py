"""Prompts of three kinds, each with its own reward: what PromptRL trains on at once, and specialists apart.

    python -m benchmark.make_tagged_prompts

Writes runs/benchmark/prompts/{all,two,geneval,ocr,jpeg}_{train,dev,test}.jsonl from fold 0. GenEval judges
the prompts with more than one thing to get right, OCR judges the written texts, and JPEG the single objects.
In training there are as many lines of each. `all` has them all, with tags; `two` has all but JPEG's. No
prompt has two rewards.
"""

import json

from benchmark.records import RUNS, shown
from rewards.prompts import load_prompts
from tiny.splits import PROMPTS

FOLDER = RUNS / "prompts"
LINES = 320  # of each kind in training: what GenEval has without its single objects


def kinds(split):
    """{reward: rows of metadata that it judges, with its tag} of "train", "dev" or "test"."""
    _, rows = load_prompts(PROMPTS / "fold_0" / f"{split}.jsonl")
    _, texts = load_prompts(PROMPTS / "fold_0" / f"text_{split}.jsonl")
    single = [row for row in rows if row["tag"] == "single_object"]
    others = [row for row in rows if row["tag"] != "single_object"]
    return {
        "geneval": [row | {"reward": "geneval"} for row in others],
        "ocr": [row | {"reward": "ocr"} for row in texts],
        "jpeg": [row | {"reward": "jpeg"} for row in single],
    }


def repeated(rows, count):
    """The first `count` of the rows over and over again."""
    return [rows[i % len(rows)] for i in range(count)]


def files(split):
    """{name of a file: its rows} of "train", "dev" or "test"."""
    parts = kinds(split)
    if split == "train":
        parts = {name: repeated(rows, LINES) for name, rows in parts.items()}
    two = parts["geneval"] + parts["ocr"]
    return parts | {"two": two, "all": two + parts["jpeg"]}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        for name, rows in files(split).items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (FOLDER / f"{name}_{split}.jsonl").write_text("".join(lines))
    print(f"wrote {shown(FOLDER)}")
