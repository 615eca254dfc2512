"""Writes docs/first_edition.md and its pictures from benchmark/results/first_edition/.

    python -m benchmark.write_results

The tables are those of algorithm_tables.py, promptrl_tables.py and promptloop_tables.py. Each function here
returns the lines of one section.
"""

import json
from typing import NamedTuple

import numpy as np

from benchmark import algorithm_tables, curves, promptloop_tables, promptrl_tables
from benchmark.markdown import each_signed, table
from benchmark.records import FIRST_EDITION, ROOT, current_command, read_records, read_runs, settings_of
from benchmark.seed_statistics import SCORE, TAGS, trained_rows
from benchmark.seed_statistics import curves as curves_of

DOCS = ROOT / "docs"
PICTURES = DOCS / "first_edition"
INTRODUCTION = """\
**These numbers are history, not evidence.** They were measured on the first edition of the tiny world, with
four shapes and six colours, which this repository contained up to commit b466ceb. What is here now is the
second edition ([`tiny/README.md`](../tiny/README.md)), with other prompts and other models, so these commands
no longer give these numbers. Looked at hard, the first edition was thin:

- Its 384 evaluation lines were 91 distinct prompts, 18 effective ones.
- Classifier-free guidance of 2, without any training, lifted its base model from 0.438 to 0.609. The world's
  own detailed wording with a random layout lifted it to 0.703. No table shows these baselines.
- One initial noise per prompt was shared by all evaluations. Over six noises the base model is at 0.385 to
  0.492, and the intervals leave this out.
- All settings were chosen on the prompts that are reported.
- Its image model was made to forget letters in a last stage of pretraining, after results had been seen."""
GENEVAL_LABEL = "held-out strict GenEval"


class Section(NamedTuple):
    """A setting with a section of its own."""

    setting: str
    picture: str  # in docs/first_edition/
    score: str  # that the setting is about
    what: str  # it is


SECTIONS = (
    Section(
        "flow_grpo/default",
        "flow_grpo.png",
        SCORE,
        "`python flow_grpo.py`, the default: GenEval, window of 2 steps",
    ),
    Section("flow_grpo/ocr", "flow_grpo_ocr.png", "eval/ocr", "the same on written text"),
    Section("flow_grpo/default_64_iterations", "flow_grpo_64.png", SCORE, "two thirds of the iterations"),
    Section("flow_grpo/ocr_64_iterations", "flow_grpo_ocr_64.png", "eval/ocr", "the same on written text"),
    Section("superflow/default", "superflow.png", SCORE, "`python superflow.py`, the default"),
    Section("fdfo/default", "fdfo.png", SCORE, "`python fdfo.py`, the default"),
    Section("fdfo/default_64_iterations", "fdfo_64.png", SCORE, "two thirds of the iterations"),
    Section(
        "fdfo/learning_rate_3e-4",
        "fdfo_3e-4.png",
        SCORE,
        "`fdfo.py` while its default learning rate was looked for",
    ),
    Section(
        "fdfo/learning_rate_4e-4",
        "fdfo_4e-4.png",
        SCORE,
        "the same: colours collapse to white",
    ),
    Section(
        "flow_grpo/window_of_2_steps",
        "flow_grpo_window2.png",
        SCORE,
        "window of 2 steps, 20 iterations",
    ),
    Section(
        "flow_grpo/all_steps",
        "flow_grpo_all_steps.png",
        SCORE,
        "all steps trained at a third of the learning rate (not tuned further), 20 iterations",
    ),
)


def provenance(runs):
    """Where these runs come from: commits, dates, machines, and the command and seeds of each setting."""
    records = sum(runs.values(), [])
    commits = ", ".join(sorted({run["commit"] for run in records}))
    dates = ", ".join(sorted({run["date"] for run in records}))
    machines = "; ".join(sorted({run["machine"] for run in records}))
    seeds = {}  # (setting, command without its seed) -> seeds
    for setting, group in runs.items():
        for run in group:
            command = run["command"].rsplit(" --seed ", 1)[0]
            seeds.setdefault((setting, command), []).append(str(run["seed"]))
    lines = [f"Commit {commits}; {dates}; {machines}. Commands:", ""]
    for (setting, command), numbers in seeds.items():
        lines.append(f"- {setting}: `{command}`, seeds {', '.join(numbers)}")
    return lines + [""]


def select(runs, settings):
    """Those of the runs that are of these settings, in their order."""
    return {setting: runs[setting] for setting in settings if setting in runs}


def source(record):
    """Where a measurement that is no run comes from."""
    return f"`{current_command(record)}`, commit {record['commit']}, {record['date']}, {record['machine']}"


def median_rate(group):
    """Median of the images per second of the iterations that train."""
    return np.median([row["perf/images_per_second"] for row in trained_rows(group)])


# ---- sections ----
def algorithms(runs):
    """The algorithms against each other, how their settings were chosen, and SuperFlow's parts."""
    settings = [f"{script}/default" for script in algorithm_tables.ALGORITHMS]
    groups = select(runs, settings).values()
    curves.draw(PICTURES / "comparison.png", groups, SCORE, GENEVAL_LABEL)
    lines = ["## The algorithms", ""] + algorithm_tables.headline(runs)
    lines += ["", "![comparison](first_edition/comparison.png)", ""]
    grid = settings_of(runs, "learning_rates")
    if grid:
        lines += ["## The learning rates", ""]
        lines += ["The same grid for each, two seeds a cell: change of the strict score"]
        lines += ["in short runs, the learning rate falling to zero in each.", ""]
        lines += algorithm_tables.learning_rates(runs) + [""] + provenance(grid)
    parts = settings_of(runs, "superflow_parts")
    if parts:
        lines += ["## SuperFlow's parts, one at a time", ""]
        lines += algorithm_tables.superflow_parts(runs) + [""] + provenance(parts)
    return lines


def promptrl(runs):
    """PromptRL against its parts, and what the paper claims."""
    records = read_records("promptrl_swapped_models", FIRST_EDITION)
    swaps = [record["swaps"] for record in records]
    parts = select(runs, promptrl_tables.PARTS)
    lines = ["## PromptRL and its parts", ""]
    lines += [
        "Strict score, before and after; equal numbers of images. Between evaluations, 5 or 10 iterations"
    ]
    lines += ["of 256 images apart, a score is taken to change in a line.", ""]
    lines += promptrl_tables.parts(runs) + [""] + promptrl_tables.claims(runs, swaps) + [""]
    lines += provenance(parts)
    with_rewrites = [group for group in parts.values() if promptrl_tables.has_rewrites(group)]
    label = "strict GenEval, with rewrites"
    curves.draw(PICTURES / "promptrl.png", with_rewrites, promptrl_tables.ENHANCED, label)
    lines += ["![promptrl](first_edition/promptrl.png)", ""]
    if swaps:
        lines += ["### Wordings that a flow model was not trained on", ""]
        lines += [f"Strict score. {source(records[0])}.", ""]
        lines += promptrl_tables.paraphrases(runs, swaps) + [""]
    lines += ["### Runs that PromptRL's settings were chosen from", ""]
    lines += ["Final strict scores, and the mean entropy of the rewriter's tokens.", ""]
    lines += promptrl_tables.trials(runs) + [""]
    tags = settings_of(runs, "promptrl_tags")
    if tags:
        lines += ["### Three rewards by tags", ""]
        lines += ["With rewrites, before and after; `jpeg` in kilobytes, negated."]
        lines += ["The prompts: `python -m benchmark.make_tagged_prompts`.", ""]
        lines += promptrl_tables.tags(runs) + [""] + provenance(tags)
    return lines


def promptloop(runs):
    """PromptLoop against its parts, and its policies' other uses."""
    parts = select(runs, promptloop_tables.PARTS)
    lines = ["## PromptLoop and its parts", "", "Strict score; the policy's prompts are greedy.", ""]
    lines += promptloop_tables.parts(runs) + [""] + provenance(parts)
    for run in runs.get("speed/whole_run_promptloop", []):
        where = f"`{run['command']}`, commit {run['commit']}, {run['machine']}"
        lines += [f"A whole run with the machine to itself: {run['seconds']:.0f} s ({where}).", ""]
    label = "strict GenEval, in the loop"
    curves.draw(PICTURES / "promptloop.png", parts.values(), promptloop_tables.LOOP, label)
    lines += ["![promptloop](first_edition/promptloop.png)", ""]
    records = read_records("promptloop_elsewhere", FIRST_EDITION)
    if records:
        lines += ["### The same policies elsewhere", "", f"{source(records[0])}.", ""]
        lines += promptloop_tables.uses(runs, [record["uses"] for record in records]) + [""]
        lines += ["The LoRAs:", ""] + provenance(select(runs, ["promptloop/flow_grpo_lora"]))
    lines += ["### Other runs of PromptLoop", ""]
    lines += ["Those that its settings were chosen from, and single ones.", ""]
    return lines + promptloop_tables.trials(runs) + [""]


def speeds(runs):
    """Images a second of short runs, and seconds of whole ones, that had the machine to themselves."""
    rows = []
    short = []
    whole = []
    for script, title in algorithm_tables.ALGORITHMS.items():
        if f"speed/{script}" not in runs:
            continue
        group = runs[f"speed/{script}"]
        evaluations = []
        for run in group:
            for row in run["metrics"]:
                if "perf/seconds_evaluate" in row:
                    evaluations.append(row["perf/seconds_evaluate"])
        seconds = [f"{run['seconds']:.0f}" for run in runs[f"speed/whole_run_{script}"]]
        rate = median_rate(group)
        rows.append([title, f"{rate:.1f}", f"{np.median(evaluations):.1f}", ", ".join(seconds)])
        short.append(f"speed/{script}")
        whole.append(f"speed/whole_run_{script}")
    head = ["", "images a second, median", "seconds of an evaluation, median", "a whole run, seconds"]
    lines = ["## Speed", ""]
    lines += ["Runs with the machine to themselves: some of a few iterations, and one whole run.", ""]
    lines += table(head, rows) + [""]
    for setting in short + whole:
        lines += provenance(select(runs, [setting]))
    return lines


def setting_section(runs, section):
    """The section of one setting: where it comes from, its scores before and after, its curve."""
    group = runs[section.setting]
    first = group[0]
    rows = trained_rows(group)
    seeds = ", ".join(str(run["seed"]) for run in group)
    commits = ", ".join(dict.fromkeys(run["commit"] for run in group))
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in group)
    clipped = [row["losses/clipfrac_positive"] + row["losses/clipfrac_negative"] for row in rows]
    ratio = max(row["losses/ratio_first"] for row in rows)
    lines = [f"## {section.setting}", "", f"{section.what}.", ""]
    lines += [f"- command: `{first['command']}`, seeds {seeds}"]
    lines += [f"- commit {commits}, {first['date']}, {first['machine']}"]
    lines += [f"- seconds a run, start-up included: {seconds}"]
    if "note" in first:
        lines += [f"- {first['note']}"]
    images = first["metrics"][-1]["charts/num_images"]
    lines += [f"- images: {images}, {median_rate(group):.1f} a second (median)"]
    share = f"{np.mean(clipped):.1%} on average, {max(clipped):.1%} at most"
    lines += [f"- `losses/ratio_first` at most {ratio:.1e}; clipped share of the terms {share}", ""]

    stem = section.score.removesuffix("_strict")
    scores = [section.score, section.score + "_paraphrased", stem + "_soft", stem + "_official"]
    scores += [f"{section.score}/{tag}" for tag in TAGS]
    rows = []
    for score in scores:
        if score in first["metrics"][0]:
            values = curves_of(group, score).scores
            rows.append(change_row(score, values[:, 0], values[:, -1]))
    if "diversity" in first:
        for measure in ("pixels", "places", "colors"):
            before = np.array([run["diversity"]["before"][measure] for run in group])
            after = np.array([run["diversity"]["after"][measure] for run in group])
            rows.append(change_row(f"diversity: {measure}", before, after))
    lines += table(["score", "before", "after", "change (each seed)"], rows)
    name = section.picture.removesuffix(".png")
    curves.draw(PICTURES / section.picture, [group], section.score, section.score)
    return lines + ["", f"![{name}](first_edition/{section.picture})", ""]


def change_row(name, before, after):
    """The row of a score, from values (seeds,) before and after."""
    mean_change = f"{after.mean() - before.mean():+.3f} ({each_signed(after - before)})"
    return [name, f"{before.mean():.3f}", f"{after.mean():.3f}", mean_change]


def window(runs):
    """A window of two steps against all steps: speed, and curves."""
    settings = ["speed/flow_grpo_window_of_2_steps", "speed/flow_grpo_all_steps"]
    two, every = (median_rate(runs[setting]) for setting in settings)
    groups = [runs["flow_grpo/window_of_2_steps"], runs["flow_grpo/all_steps"]]
    curves.draw(PICTURES / "window.png", groups, SCORE, GENEVAL_LABEL)
    lines = ["## A window of two steps against all steps", ""]
    lines += ["Images per second, medians of runs that had the machine to themselves:"]
    lines[-1] += f" {two:.1f} against {every:.1f}, {two / every:.2f} times."
    lines += [""]
    for setting in settings:
        lines += provenance(select(runs, [setting]))
    return lines + ["![window](first_edition/window.png)", ""]


def overhead(record):
    """Wall time of an iteration over the sum of its bare parts."""
    where = f"`{current_command(record)}`, {record['date']}, {record['machine']}"
    lines = ["## Distance from the floor", "", f"{where}, medians of {record['iterations']} iterations."]
    lines += [
        "Wall time of an iteration over the sum of its bare parts, measured in turn in the same process:"
    ]
    lines += [f"**{record['ratio']:.2f}**."]
    for title, seconds in (("phases of the run", record["phases"]), ("bare parts", record["parts"])):
        rows = [[name, f"{value:.3f}"] for name, value in seconds.items()]
        lines += [""] + table([title, "seconds"], rows)
    return lines + [""]


def results_page(runs):
    """The text of docs/first_edition.md. Draws its pictures."""
    lines = ["# The first edition of the tiny world: an archive", ""]
    lines += [INTRODUCTION, ""]
    lines += ["Made by `python -m benchmark.write_results` from `benchmark/results/first_edition/`."]
    lines += ["Intervals in brackets are 95% bootstrap intervals over seeds.", ""]
    lines += algorithms(runs)
    if promptrl_tables.FLOW_ONLY in runs:
        lines += promptrl(runs)
    if promptloop_tables.FULL in runs:
        lines += promptloop(runs)
    lines += speeds(runs)
    for section in SECTIONS:
        if section.setting in runs:
            lines += setting_section(runs, section)
    if "speed/flow_grpo_all_steps" in runs:
        lines += window(runs)
    path = FIRST_EDITION / "speed" / "iteration_overhead.json"
    if path.exists():
        lines += overhead(json.loads(path.read_text()))
    # What the pages of the algorithms said about these numbers. It was written by hand.
    lines += ["", (FIRST_EDITION / "discussion.md").read_text()]
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "first_edition.md").write_text(results_page(read_runs(FIRST_EDITION)))
