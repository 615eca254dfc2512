"""Writes the tables of the second edition into README.md, docs/results.md and tiny/README.md.

    python -m benchmark.write_tables

Each table stands between two comments, such as <!-- baselines --> and <!-- end -->. The numbers come from
benchmark/results/: from the baselines (measure_baselines) and from the runs (run_seeds).
"""

import json
import re

import numpy as np

from benchmark.markdown import table
from benchmark.records import RESULTS, ROOT
from rewards.geneval.detection import TAGS

DOCUMENTS = ("README.md", "docs/results.md", "tiny/README.md")
ALGORITHMS = {
    "flow_grpo": "Flow-GRPO",
    "superflow": "SuperFlow",
    "fdfo": "FDFO",
    "promptrl": "PromptRL",
    "promptloop": "PromptLoop",
}
SCORES = {  # the strict score of the way of sampling that a file trains
    "promptrl": "eval/geneval_strict_enhanced",
    "promptloop": "eval/geneval_strict_loop",
}


def read_baselines(model, split):
    """The record of measure_baselines on fold 0."""
    return json.loads((RESULTS / "baselines" / model / f"fold-0-{split}.json").read_text())


def baseline_rows(record):
    """Cells of each setting: its name, its strict score, the noises' standard deviation, and the tags."""
    rows = []
    for name, own in record["settings"].items():
        count = len(own["images"])
        spread = "" if own["std_over_noises"] is None else f"{own['std_over_noises']:.3f}"
        tags = [f"{own['tags'][tag]:.3f}" for tag in TAGS]
        rows.append([name, f"{own['strict']:.3f}", f"{spread} ({count})", *tags])
    return rows


def source_of(record):
    """One line that says how a record came about."""
    return f"`{record['command']}`, commit {record['commit']}, {record['date']}, {record['machine']}."


def baselines_table(model, split):
    """A table of what a model scores before any training, with its source."""
    record = read_baselines(model, split)
    head = ["nothing is learned", "strict", "std over noises (number)", *TAGS]
    return table(head, baseline_rows(record)) + ["", source_of(record)]


def read_default_runs():
    """{algorithm: the records of its default runs}, of those that were measured."""
    runs = {}
    for algorithm in ALGORITHMS:
        paths = sorted((RESULTS / algorithm / "default").glob("seed-*.json"))
        if paths:
            runs[algorithm] = [json.loads(path.read_text()) for path in paths]
    return runs


def evaluated(record, score):
    """(first, last) value of an evaluated score in a run's metrics."""
    values = [row[score] for row in record["metrics"] if row.get(score) is not None]
    return values[0], values[-1]


def run_rows(runs):
    """Cells of each algorithm: seeds, strict score before and after, change per seed, images and minutes."""
    rows = []
    for algorithm, records in runs.items():
        score = SCORES.get(algorithm, "eval/geneval_strict")
        pairs = np.array([evaluated(record, score) for record in records])
        changes = pairs[:, 1] - pairs[:, 0]
        images = records[0]["metrics"][-1]["charts/num_images"]
        minutes = np.median([record["seconds"] for record in records]) / 60
        rows.append(
            [
                ALGORITHMS[algorithm],
                str(len(records)),
                f"{pairs[:, 0].mean():.3f}",
                f"{pairs[:, 1].mean():.3f}",
                ", ".join(f"{change:+.3f}" for change in changes),
                f"{images:,}",
                f"{minutes:.1f}",
            ]
        )
    return rows


def runs_table():
    """A table of the default runs, with their sources."""
    runs = read_default_runs()
    head = ["default run", "seeds", "strict, before", "after", "change of each seed", "images", "minutes"]
    lines = table(head, run_rows(runs)) + [""]
    lines += ["- " + source_of(record) for records in runs.values() for record in records]
    return lines


def short_table():
    """The README's table: the baselines in one column, and what the default runs reach."""
    settings = read_baselines("sd3", "test")["settings"]
    rows = [[f"nothing is learned: {name}", f"{own['strict']:.3f}"] for name, own in settings.items()]
    for algorithm, records in read_default_runs().items():
        score = SCORES.get(algorithm, "eval/geneval_strict")
        after = np.mean([evaluated(record, score)[1] for record in records])
        seeds = "1 seed" if len(records) == 1 else f"{len(records)} seeds"
        rows.append([f"{ALGORITHMS[algorithm]}, {seeds}", f"{after:.3f}"])
    return table(["fold 0, test prompts", "strict"], rows)


def fill(text, name, lines):
    """The text with these lines between the comments <!-- name --> and <!-- end -->, where it has them."""
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text, flags=re.DOTALL)


def write_tables():
    """Fills all tables of all documents."""
    tables = {
        "results": short_table(),
        "baselines": baselines_table("sd3", "test"),
        "baselines on dev": baselines_table("sd3", "dev"),
        "default runs": runs_table(),
    }
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        for table_name, lines in tables.items():
            text = fill(text, table_name, lines)
        path.write_text(text)


if __name__ == "__main__":
    write_tables()
