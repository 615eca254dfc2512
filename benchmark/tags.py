"""Prompts of three kinds, each with its own reward: what PromptRL trains on at once, and specialists apart.

    python -m benchmark.tags

Writes runs/benchmark/prompts/{all,two,geneval,ocr,jpeg}_{train,eval}.jsonl from tiny/prompts: GenEval judges
the prompts with more than one thing to get right, OCR the written texts, JPEG the single objects. As many
lines of each in training; `all` has them all, tagged, `two` all but JPEG's. No prompt has two rewards.
"""

import json

import rewards
from benchmark.run import ROOT
from tiny.world import PROMPTS

FOLDER = ROOT / "runs" / "benchmark" / "prompts"
LINES = 320  # of each kind in training: what GenEval has without its single objects


def kinds(split):
    """{reward: metadata of the prompts that it judges, tagged}, of `train` or `eval`."""
    geneval, text = (
        rewards.prompts.load_prompts(PROMPTS / name)[1] for name in (f"{split}.jsonl", f"text_{split}.jsonl")
    )
    single = [row for row in geneval if row["tag"] == "single_object"]
    rows = {"geneval": [row for row in geneval if row not in single], "ocr": text, "jpeg": single}
    return {name: [row | {"reward": name} for row in part] for name, part in rows.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        parts = kinds(split)
        if split == "train":
            parts = {name: (rows * LINES)[:LINES] for name, rows in parts.items()}
        two = parts["geneval"] + parts["ocr"]
        parts |= {"two": two, "all": two + parts["jpeg"]}
        for name, rows in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (FOLDER / f"{name}_{split}.jsonl").write_text(text)
