"""Compares runs: a table, and their curves in one picture, over images and over minutes of training.

    python -m benchmark.compare_runs runs/flow_grpo-... runs/fdfo-... [--score geneval_strict]

A run is a folder that an algorithm file made, finished or not. Runs with rewritten prompts are shown by the
score with rewrites. The minutes leave the evaluations out. To compare settings rather than single runs, run
several seeds of each: benchmark/run_seeds.py.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure

from benchmark.markdown import table
from benchmark.seed_statistics import evaluations

MODES = ("_loop", "_enhanced", "")  # the first that a run has is how it is meant to be used


def read_metrics(folder):
    """The rows of a run's metrics.jsonl. Raises SystemExit, naming the folder, if there are none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder} is no run: it has no metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def find_score(rows, name, folder):
    """The metric of a score, such as eval/reward_enhanced. Raises SystemExit if the run does not have it."""
    known = {key for row in rows for key in row if key.startswith("eval/")}
    for mode in MODES:
        if f"eval/{name}{mode}" in known:
            return f"eval/{name}{mode}"
    raise SystemExit(f"{folder} has no score {name!r}, but {', '.join(sorted(known))}")


class Curve(NamedTuple):
    """A run's evaluations, in their order."""

    metric: str  # such as eval/reward_enhanced
    images: list  # sampled so far
    minutes: list  # of training so far
    scores: list


def read_curve(folder, name):
    """The Curve of a run. Images that could not be scored leave out an evaluation, and not its time."""
    rows = read_metrics(folder)
    metric = find_score(rows, name, folder)
    curve = Curve(metric, [], [], [])
    for images, seconds, score in zip(*evaluations({"metrics": rows}, metric)):
        if score is not None:
            curve.images.append(images)
            curve.minutes.append(seconds / 60)
            curve.scores.append(score)
    if not curve.scores:
        raise SystemExit(f"{folder} has no evaluation whose {metric} is a number")
    return curve


def compare(folders, name):
    """{label: Curve} of runs. A label is the name of the folder, or its path where names are equal."""
    names = [Path(folder).resolve().name for folder in folders]
    curves = {}
    for folder, own_name in zip(folders, names):
        is_unique = names.count(own_name) == 1
        label = own_name if is_unique else str(folder)
        curves[label] = read_curve(folder, name)
    return curves


def comparison_table(curves):
    """Lines of a table, the best run first."""
    best_first = sorted(curves.items(), key=lambda item: -item[1].scores[-1])
    rows = []
    for label, curve in best_first:
        first = curve.scores[0]
        last = curve.scores[-1]
        rows.append(
            [
                label,
                curve.metric,
                f"{first:.3f}",
                f"{last:.3f}",
                f"{last - first:+.3f}",
                f"{curve.images[-1]:,}",
                f"{curve.minutes[-1]:.1f}",
            ]
        )
    head = ["run", "score", "first", "last", "change", "images", "minutes"]
    return table(head, rows)


def save_curves(path, curves, name):
    """A picture with a curve per run: over images on the left, over minutes of training on the right."""
    figure = matplotlib.figure.Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    for label, curve in curves.items():
        left.plot(curve.images, curve.scores, ".-", label=label)
        right.plot(curve.minutes, curve.scores, ".-", label=label)
    left.set(xlabel="images sampled", ylabel=f"{name} of the held-out prompts")
    right.set(xlabel="minutes of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--score", default="reward", help="which score, as in metrics.jsonl without eval/")
    parser.add_argument("--output", default="comparison.png", help="where the picture goes")
    args = parser.parse_args()
    curves = compare(args.runs, args.score)
    print("\n".join(comparison_table(curves)))
    save_curves(args.output, curves, args.score)
    print(f"look at {args.output}")
