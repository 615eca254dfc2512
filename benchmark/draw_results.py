"""Draws the pictures of docs/results.md from the records of the default runs.

    python -m benchmark.draw_results

tags.png has the strict test score of each kind of prompt: a point per seed, and what nothing learned can do.
learning.png has the strict score of the images sampled in training, over images and over seconds: running
means of an eighth of the run.
"""

import matplotlib.figure
import numpy as np

from benchmark.records import ROOT
from benchmark.write_tables import ALGORITHMS, SCORES, fold_of_run, read_baselines, read_test_runs
from rewards.geneval.detection import TAGS

FOLDER = ROOT / "docs/results"
COLORS = {
    "flow_grpo": "tab:blue",
    "superflow": "tab:orange",
    "fdfo": "tab:green",
    "promptrl": "tab:red",
    "promptloop": "tab:purple",
}
BASELINES = {"base": ("black", "-"), "scripted": ("grey", "--")}


def last_value(record, name):
    """The last value of a metric in a record."""
    return [row[name] for row in record["metrics"] if row.get(name) is not None][-1]


def draw_tags(runs):
    """A figure of the scores of each tag. runs: {algorithm: records}."""
    figure = matplotlib.figure.Figure(figsize=(10, 4))
    axes = figure.subplots()
    folds = sorted({fold_of_run(record) for records in runs.values() for record in records})
    for place, tag in enumerate(TAGS):
        for name, (color, style) in BASELINES.items():
            scores = [read_baselines("sd3", "test", fold)["settings"][name]["tags"][tag] for fold in folds]
            label = f"{name}, nothing learned" if place == 0 else None
            axes.hlines(np.mean(scores), place - 0.4, place + 0.4, color, style, lw=1.2, label=label)
        for number, (algorithm, records) in enumerate(runs.items()):
            score = SCORES.get(algorithm, "eval/geneval_strict")
            values = [last_value(record, f"{score}/{tag}") for record in records]
            x = place + 0.14 * (number - (len(runs) - 1) / 2)
            label = ALGORITHMS[algorithm] if place == 0 else None
            axes.plot([x] * len(values), values, "o", ms=4, alpha=0.8, color=COLORS[algorithm], label=label)
    axes.set_xticks(range(len(TAGS)), TAGS)
    axes.set(ylabel="strict score on test prompts", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def training_curve(record):
    """(images sampled, seconds of training, strict score of the sampled images) after each iteration."""
    rows = [row for row in record["metrics"] if row["iteration"] > 0]
    images = np.array([row["charts/num_images"] for row in rows])
    seconds = np.array(
        [row["perf/seconds_sample"] + row["perf/seconds_reward"] + row["perf/seconds_train"] for row in rows]
    )
    return images, np.cumsum(seconds), np.array([row["rewards/geneval_strict"] for row in rows])


def running_mean(values, width):
    """(len(values) - width + 1,): the means of all stretches of `width` values."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def draw_learning(runs):
    """A figure of the training score over images and over seconds: a thin line per seed."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2, sharey=True)
    for algorithm, records in runs.items():
        for number, record in enumerate(records):
            images, seconds, scores = training_curve(record)
            width = max(1, len(scores) // 8)
            smooth = running_mean(scores, width)
            label = ALGORITHMS[algorithm] if number == 0 else None
            left.plot(images[width - 1 :], smooth, lw=0.9, color=COLORS[algorithm], label=label)
            right.plot(seconds[width - 1 :], smooth, lw=0.9, color=COLORS[algorithm])
    left.set(xlabel="images sampled", ylabel="strict score of the sampled images")
    right.set(xlabel="seconds of training on one thread, without evaluations")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    default_runs = read_test_runs("default")
    for name, draw in {"tags": draw_tags, "learning": draw_learning}.items():
        draw(default_runs).savefig(FOLDER / f"{name}.png", dpi=110, bbox_inches="tight")
        print(f"wrote docs/results/{name}.png")
