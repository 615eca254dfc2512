"""Draws docs/results.md and its curves from benchmark/results/*.json.

    python -m benchmark.plot

Curves are the mean over seeds with a 95% bootstrap interval, against images sampled and against seconds;
benchmark/compare.py has the comparisons.
"""

import json
from collections import defaultdict

import matplotlib.figure
import numpy as np

from benchmark import compare, looping, rewriting
from benchmark.run import RESULTS, ROOT

DOCS = ROOT / "docs"
EVALUATE = "perf/seconds_evaluate"
SETTINGS = {  # name of the runs -> (score that the setting is about, what it is)
    "flow_grpo": ("eval/geneval_strict", "`python flow_grpo.py`, the default: GenEval, window of 2 steps"),
    "flow_grpo_ocr": ("eval/ocr", "the same on written text"),
    "flow_grpo_64": ("eval/geneval_strict", "two thirds of the iterations"),
    "flow_grpo_ocr_64": ("eval/ocr", "the same on written text"),
    "superflow": ("eval/geneval_strict", "`python superflow.py`, the default"),
    "fdfo": ("eval/geneval_strict", "`python fdfo.py`, the default"),
    "fdfo_64": ("eval/geneval_strict", "two thirds of the iterations"),
    "fdfo_3e-4": ("eval/geneval_strict", "`fdfo.py` while its default learning rate was looked for"),
    "fdfo_4e-4": ("eval/geneval_strict", "the same: colours collapse to white, see [fdfo.md](fdfo.md)"),
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
    return dict(runs)


def draw(path, runs, names, score, label):
    """Curves of several settings on one score, against images and against seconds."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for name in names:
        images, seconds, values = compare.curves(runs[name], score)
        low, high = compare.interval(values)
        for axes, x in ((left, images.mean(0)), (right, seconds.mean(0))):
            axes.plot(x, values.mean(0), ".-", label=f"{name} ({len(values)} seeds)")
            axes.fill_between(x, low, high, alpha=0.2)
    left.set(xlabel="images sampled", ylabel=label)
    right.set(xlabel="seconds of training")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def trained(group):
    """Rows of metrics of all the runs that have a training step."""
    return [row for run in group for row in run["metrics"] if "losses/ratio_first" in row]


def provenance(runs, prefix=""):
    """Where the runs whose names begin so come from: commits, dates, machines, and each one's command."""
    group = [run for name in runs if name.startswith(prefix) for run in runs[name]]
    commits, dates, machines = (sorted({run[key] for run in group}) for key in ("commit", "date", "machine"))
    lines = [f"Commit {', '.join(commits)}; {', '.join(dates)}; {'; '.join(machines)}. Commands:", ""]
    commands = {}
    for run in group:
        words = run["command"].rsplit(" --seed ", 1)[0]
        commands.setdefault((run["name"], words), []).append(str(run["seed"]))
    return lines + [f"- {n}: `{words}`, seeds {', '.join(s)}" for (n, words), s in commands.items()] + [""]


def change(runs, score):
    """'before | after | change (each seed)' of a score, means over seeds."""
    scores = compare.curves(runs, score)[2]
    before, after = scores[:, 0].mean(), scores[:, -1].mean()
    each = ", ".join(f"{change:+.3f}" for change in compare.final(runs, score))
    return f"{before:.3f} | {after:.3f} | {after - before:+.3f} ({each})"


def setting(runs, name):
    """The section of one setting: where it comes from, its scores before and after, its curve."""
    (score, what), group, rows = SETTINGS[name], runs[name], trained(runs[name])
    clipped = [row["losses/clipfrac_positive"] + row["losses/clipfrac_negative"] for row in rows]
    lines = [f"## {name}", "", f"{what}.", ""]
    lines += [f"- command: `{group[0]['command']}`, seeds {', '.join(str(run['seed']) for run in group)}"]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in group))
    lines += [f"- commit {commits}, {group[0]['date']}, {group[0]['machine']}"]
    times = [str(round(run["seconds"])) for run in group]
    lines += [f"- seconds a run, start-up included: {', '.join(times)}"]
    lines += [f"- {group[0]['note']}"] if "note" in group[0] else []
    rate = np.median([row["perf/images_per_second"] for row in rows])
    lines += [f"- images: {group[0]['metrics'][-1]['charts/num_images']}, {rate:.1f} a second (median)"]
    lines += [f"- `losses/ratio_first` at most {max(row['losses/ratio_first'] for row in rows):.1e};"]
    lines[-1] += f" clipped share of the terms {np.mean(clipped):.1%} on average, {max(clipped):.1%} at most"
    lines += ["", "| score | before | after | change (each seed) |", "|---|---|---|---|"]
    stem = score.removesuffix("_strict")
    keys = [score, score + "_paraphrased", stem + "_soft", stem + "_official"]
    for key in keys + [f"{score}/{tag}" for tag in compare.TAGS]:
        lines += [f"| {key} | {change(group, key)} |"] if key in group[0]["metrics"][0] else []
    for measure in ("pixels", "places", "colors") if "diversity" in group[0] else ():
        pairs = np.array([[run["diversity"][when][measure] for when in ("before", "after")] for run in group])
        each = ", ".join(f"{b - a:+.3f}" for a, b in pairs)
        before, after = pairs.mean(0)
        lines += [f"| diversity: {measure} | {before:.3f} | {after:.3f} | {after - before:+.3f} ({each}) |"]
    draw(DOCS / f"{name}.png", runs, [name], score, score)
    return lines + ["", f"![{name}]({name}.png)", ""]


def comparison(runs):
    """The algorithms against each other, how their settings were chosen, and SuperFlow's parts."""
    names = [name for name in compare.ALGORITHMS if name in runs]
    draw(DOCS / "comparison.png", runs, names, compare.SCORE, "held-out strict GenEval")
    lines = ["## The algorithms", "", *compare.headline(runs), "", "![comparison](comparison.png)", ""]
    if not any(name.startswith("tune_") for name in runs):
        return lines
    lines += [
        "## The learning rates",
        "",
        "The same grid for each, two seeds a cell: change of the strict score",
    ]
    lines += ["in short runs, the learning rate falling to zero in each.", "", *compare.tuning(runs), ""]
    lines += provenance(runs, "tune_")
    lines += [
        "## SuperFlow's parts, one at a time",
        "",
        *compare.parts(runs),
        "",
        *provenance(runs, "parts_"),
    ]
    return lines


def speeds(runs):
    """Images a second of short runs, and seconds of whole ones, that had the machine to themselves."""
    names = [f"speed_{name}" for name in compare.ALGORITHMS if f"speed_{name}" in runs]
    lines = [
        "## Speed",
        "",
        "Runs with the machine to themselves: some of a few iterations, and one whole run.",
    ]
    lines += ["", "| | images a second, median | seconds of an evaluation, median | a whole run, seconds |"]
    lines += ["|---|---|---|---|"]
    for name in list(names):
        evaluations = [s for run in runs[name] for row in run["metrics"] for s in [row.get(EVALUATE)] if s]
        rate = np.median([row["perf/images_per_second"] for row in trained(runs[name])])
        whole, title = name.replace("speed", "time"), compare.ALGORITHMS[name.removeprefix("speed_")]
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs[whole])
        lines += [f"| {title} | {rate:.1f} | {np.median(evaluations):.1f} | {seconds} |"]
        names += [whole]
    return [*lines, "", *[line for name in names for line in provenance(runs, name)]]


def promptrl(runs):
    """PromptRL against its parts, and what the paper claims."""
    swaps = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("swap-*.json"))]
    scores = [swap["swaps"] for swap in swaps]
    lines = ["## PromptRL and its parts", ""]
    lines += [
        "Strict score, before and after; equal numbers of images. Between evaluations, 5 or 10 iterations"
    ]
    lines += ["of 256 images apart, a score is taken to change in a line.", ""]
    lines += [*rewriting.parts(runs), "", *rewriting.claims(runs, scores), ""]
    names = [name for name in rewriting.RUNS if name in runs]
    lines += provenance({name: runs[name] for name in names})
    draw(DOCS / "promptrl.png", runs, names[1:], rewriting.ENHANCED, "strict GenEval, with rewrites")
    lines += ["![promptrl](promptrl.png)", ""]
    if swaps:
        one = swaps[0]
        source = f"`{one['command']}`, commit {one['commit']}, {one['date']}, {one['machine']}"
        lines += ["### Wordings that a flow model was not trained on", "", f"Strict score. {source}.", ""]
        lines += [*rewriting.paraphrases(runs, scores), ""]
    lines += ["### Runs that PromptRL's settings were chosen from", ""]
    lines += [
        "Final strict scores, and the mean entropy of the rewriter's tokens.",
        "",
        *rewriting.trials(runs),
        "",
    ]
    if "promptrl_tags_all" in runs:
        lines += [
            "### Three rewards by tags",
            "",
            "With rewrites, before and after; `jpeg` in kilobytes, negated.",
        ]
        lines += ["The prompts: `python -m benchmark.tags`.", ""]
        lines += [*rewriting.tags(runs), "", *provenance(runs, "promptrl_tags_")]
    return lines


def promptloop(runs):
    """PromptLoop against its parts, and its policy's other uses."""
    lines = ["## PromptLoop and its parts", "", "Strict score; the policy's prompts are greedy.", ""]
    names = [name for name in looping.RUNS if name in runs]
    lines += [*looping.parts(runs), "", *provenance({name: runs[name] for name in names})]
    if "time_promptloop" in runs:
        (whole,) = runs["time_promptloop"]
        lines += [f"A whole run with the machine to itself: {whole['seconds']:.0f} s"]
        lines[-1] += f" (`{whole['command']}`, commit {whole['commit']}, {whole['machine']})."
        lines += [""]
    draw(DOCS / "promptloop.png", runs, names, looping.LOOP, "strict GenEval, in the loop")
    lines += ["![promptloop](promptloop.png)", ""]
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("loop-*.json"))]
    if records:
        one = records[0]
        source = f"`{one['command']}`, commit {one['commit']}, {one['date']}, {one['machine']}"
        lines += ["### The same policies elsewhere", "", f"{source}.", ""]
        lines += [*looping.uses(runs, [record["uses"] for record in records]), ""]
        lines += ["The LoRAs:", "", *provenance(runs, "promptloop_flow_grpo")]
    lines += [
        "### Other runs of PromptLoop",
        "",
        "Those that its settings were chosen from, and single ones.",
    ]
    lines += ["", *looping.trials(runs), ""]
    return lines


def window(runs):
    """A window of two steps against all steps: speed, and curves."""
    names = ("speed_window2", "speed_all_steps")
    rates = [np.median([row["perf/images_per_second"] for row in trained(runs[name])]) for name in names]
    draw(
        DOCS / "window.png",
        runs,
        ["flow_grpo_window2", "flow_grpo_all_steps"],
        compare.SCORE,
        "held-out strict GenEval",
    )
    lines = ["## A window of two steps against all steps", ""]
    ratio = f"{rates[0]:.1f} against {rates[1]:.1f}, {rates[0] / rates[1]:.2f} times"
    lines += [f"Images per second, medians of runs that had the machine to themselves: {ratio}.", ""]
    sources = [line for name in names for line in provenance(runs, name)]
    return [*lines, *sources, "![window](window.png)", ""]


def overhead():
    """Wall time of an iteration over the sum of its bare parts."""
    record = json.loads((RESULTS / "overhead.json").read_text())
    source = f"`{record['command']}`, {record['date']}, {record['machine']}"
    lines = ["## Distance from the floor", "", f"{source}, medians of {record['iterations']} iterations."]
    lines += [
        "Wall time of an iteration over the sum of its bare parts, measured in turn in the same process:"
    ]
    lines += [f"**{record['ratio']:.2f}**."]
    for title, seconds in (("phases of the run", record["phases"]), ("bare parts", record["parts"])):
        lines += ["", f"| {title} | seconds |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in seconds.items()]
    return [*lines, ""]


def write(runs):
    """The text of docs/results.md."""
    lines = ["# Results on the tiny world", ""]
    lines += [
        "Made by `python -m benchmark.plot` from `benchmark/results/`; do not edit by hand. Intervals in"
    ]
    lines += ["brackets are 95% bootstrap intervals over seeds.", ""]
    lines += comparison(runs)
    lines += promptrl(runs) if "promptrl_flow_only" in runs else []
    lines += promptloop(runs) if "promptloop" in runs else []
    lines += speeds(runs)
    lines += [line for name in SETTINGS if name in runs for line in setting(runs, name)]
    lines += window(runs) if "speed_all_steps" in runs else []
    lines += overhead() if (RESULTS / "overhead.json").exists() else []
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(write(load()))
