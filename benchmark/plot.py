"""Draws docs/results.md and its curves from benchmark/results/*.json.

    python -m benchmark.plot

Curves are the mean over seeds with a 95% bootstrap interval, against images sampled and against seconds.
"""

import json
from collections import defaultdict

import matplotlib.figure
import numpy as np

from benchmark.run import RESULTS, ROOT

DOCS = ROOT / "docs"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SETTINGS = {  # name of the runs -> (score that the setting is about, what it is)
    "flow_grpo": ("eval/geneval_strict", "`python flow_grpo.py`, the default: GenEval, window of 2 steps"),
    "flow_grpo_ocr": ("eval/ocr", "the same on written text"),
    "flow_grpo_64": ("eval/geneval_strict", "two thirds of the iterations"),
    "flow_grpo_ocr_64": ("eval/ocr", "the same on written text"),
    "superflow": ("eval/geneval_strict", "`python superflow.py`, the default"),
    "fdfo": ("eval/geneval_strict", "`python fdfo.py`, the default"),
    "flow_grpo_window2": ("eval/geneval_strict", "window of 2 steps, 20 iterations"),
    "flow_grpo_all_steps": (
        "eval/geneval_strict",
        "all steps trained at a third of the learning rate (not tuned further), 20 iterations",
    ),
}


def load():
    """{name: runs, in the order of their seeds}."""
    runs = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if "metrics" in record:
            runs[record["name"]].append(record)
    return runs


def evaluations(run, score):
    """Images, seconds of training and score at each evaluation of a run: three lists."""
    images, seconds, scores, clock = [], [], [], 0.0
    for row in run["metrics"]:
        clock += sum(
            v for k, v in row.items() if k.startswith("perf/seconds_") and k != "perf/seconds_evaluate"
        )
        if score in row:
            images.append(row["charts/num_images"])
            seconds.append(clock)
            scores.append(row[score])
    return images, seconds, scores


def interval(values, rng):
    """95% bootstrap interval of the mean over seeds. values (seeds, points) -> two arrays (points,)."""
    picks = rng.integers(len(values), size=(2000, len(values)))
    return np.percentile(values[picks].mean(axis=1), [2.5, 97.5], axis=0)


def draw(path, runs, names, score, label):
    """Curves of several settings on one score, against images and against seconds."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for name in names:
        points = [evaluations(run, score) for run in runs[name]]
        shortest = min(len(images) for images, _, _ in points)
        images, seconds, values = (np.array([p[i][:shortest] for p in points]) for i in range(3))
        low, high = interval(values, np.random.default_rng(0))
        for axes, x in ((left, images.mean(0)), (right, seconds.mean(0))):
            axes.plot(x, values.mean(0), ".-", label=f"{name} ({len(points)} seeds)")
            axes.fill_between(x, low, high, alpha=0.2)
    left.set(xlabel="images sampled", ylabel=label)
    right.set(xlabel="seconds of training")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def change(runs, score):
    """'before -> after (change, per seed ...)' of a score, means over seeds."""
    pairs = [(scores[0], scores[-1]) for _, _, scores in (evaluations(run, score) for run in runs)]
    before, after = np.mean(pairs, axis=0)
    each = ", ".join(f"{b - a:+.3f}" for a, b in pairs)
    return f"{before:.3f} | {after:.3f} | {after - before:+.3f} ({each})"


def write(runs):
    """The text of docs/results.md."""
    lines = ["# Results on the tiny world", ""]
    lines += ["Made by `python -m benchmark.plot` from `benchmark/results/`; do not edit by hand.", ""]
    for name, (score, what) in SETTINGS.items():
        if name not in runs:
            continue
        group = runs[name]
        training = [row for run in group for row in run["metrics"] if "losses/ratio_first" in row]
        clipped = [row["losses/clipfrac_positive"] + row["losses/clipfrac_negative"] for row in training]
        lines += [f"## {name}", "", f"{what}.", ""]
        lines += [f"- command: `{group[0]['command']}`, seeds {', '.join(str(run['seed']) for run in group)}"]
        commits = ", ".join(dict.fromkeys(run["commit"] for run in group))
        lines += [f"- commit {commits}, {group[0]['date']}, {group[0]['machine']}"]
        times = [str(round(run["seconds"])) for run in group]
        lines += [f"- seconds a run, start-up included: {', '.join(times)}"]
        if "note" in group[0]:
            lines += [f"- {group[0]['note']}"]
        rate = np.median([row["perf/images_per_second"] for row in training])
        lines += [f"- images: {group[0]['metrics'][-1]['charts/num_images']}, {rate:.1f} a second (median)"]
        lines += [f"- `losses/ratio_first` at most {max(row['losses/ratio_first'] for row in training):.1e};"]
        lines[-1] += (
            f" clipped share of the terms {np.mean(clipped):.1%} on average, {max(clipped):.1%} at most"
        )
        lines += ["", "| score | before | after | change (each seed) |", "|---|---|---|---|"]
        stem = score.removesuffix("_strict")
        for key in (score, score + "_paraphrased", stem + "_soft", stem + "_official"):
            if key in group[0]["metrics"][0]:
                lines.append(f"| {key} | {change(group, key)} |")
        for tag in TAGS:
            if f"{score}/{tag}" in group[0]["metrics"][0]:
                lines.append(f"| {score}/{tag} | {change(group, f'{score}/{tag}')} |")
        for measure in ("pixels", "places", "colors"):
            pairs = [
                [r["diversity"][when][measure] for when in ("before", "after")]
                for r in group
                if "diversity" in r
            ]
            if pairs:
                each = ", ".join(f"{b - a:+.3f}" for a, b in pairs)
                before, after = np.mean(pairs, axis=0)
                lines.append(
                    f"| diversity: {measure} | {before:.3f} | {after:.3f} | {after - before:+.3f} ({each}) |"
                )
        draw(DOCS / f"{name}.png", runs, [name], score, score)
        lines += ["", f"![{name}]({name}.png)", ""]
    if {"speed_window2", "speed_all_steps"} <= runs.keys():
        rates = []
        for name in ("speed_window2", "speed_all_steps"):
            rows = [row for run in runs[name] for row in run["metrics"] if "losses/ratio_first" in row]
            rates.append(np.median([row["perf/images_per_second"] for row in rows]))
        lines += ["## A window of two steps against all steps", ""]
        ratio = f"{rates[0]:.1f} against {rates[1]:.1f}, {rates[0] / rates[1]:.2f} times"
        lines += [f"Images per second, medians of runs that had the machine to themselves: {ratio}.", ""]
    names = ["flow_grpo_window2", "flow_grpo_all_steps"]
    if set(names) <= runs.keys():
        draw(DOCS / "window.png", runs, names, "eval/geneval_strict", "held-out strict GenEval")
        lines += ["The curves' runs shared the machine with other work: read them against images."]
        lines += ["", "![window](window.png)", ""]
    overhead = RESULTS / "overhead.json"
    if overhead.exists():
        record = json.loads(overhead.read_text())
        lines += ["## Distance from the floor", ""]
        lines += [
            f"`{record['command']}`, {record['date']}, {record['machine']}, medians of {record['iterations']}"
        ]
        lines[-1] += (
            " iterations. Wall time of an iteration over the sum of its bare parts, measured in turn in the"
        )
        lines[-1] += f" same process: **{record['ratio']:.2f}**."
        for title, seconds in (("phases of the run", record["phases"]), ("bare parts", record["parts"])):
            lines += ["", f"| {title} | seconds |", "|---|---|"]
            lines += [f"| {name} | {value:.3f} |" for name, value in seconds.items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(write(load()))
