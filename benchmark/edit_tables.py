"""The tables of PromptRL's editing experiment, which write_tables puts into docs/promptrl.md.

Three arms train on the edits of the tiny world: both models, the flow model without rewrites, and the
language model alone. Each seed has a fold of its own. Scores are those of the reward `edit` on the test
edits, with the instruction as it is and with its greedy rewrite. An arm is left out, with its claims, as long
as it lacks a seed that the arm of both models has.
"""

import json

import numpy as np

from benchmark.inference import claim_row
from benchmark.markdown import table
from benchmark.records import RESULTS
from tiny.world import EDITS

ARMS = {  # setting: what is trained
    "edit_both": "both models",
    "edit_flow_only": "flow model, no rewrites",
    "edit_lm_only": "language model",
}


def read_runs():
    """{setting: its records, by seed} of the arms that have all seeds of the first one."""
    runs = {}
    for setting in ARMS:
        paths = sorted((RESULTS / "promptrl" / setting).glob("seed-*.json"))
        runs[setting] = [json.loads(path.read_text()) for path in paths]
    first, *_ = runs.values()
    return {setting: records for setting, records in runs.items() if seeds_of(records) == seeds_of(first)}


def seeds_of(records):
    """The seeds of runs, in their order."""
    return [record["seed"] for record in records]


def evaluations(record, score):
    """(before, after) of a score in a run, or (None, None) where it was not evaluated."""
    values = [row[score] for row in record["metrics"] if row.get(score) is not None]
    return (values[0], values[-1]) if values else (None, None)


def cell(value):
    """A score as text, "" where there is none."""
    return "" if value is None else f"{value:.3f}"


def runs_table(runs):
    """A row per run: the reward before and after, plain and rewritten."""
    rows = []
    for setting, records in runs.items():
        for record in records:
            plain_before, plain_after = evaluations(record, "eval/edit")
            rewritten_before, rewritten_after = evaluations(record, "eval/edit_enhanced")
            scores = [plain_before, rewritten_before, plain_after, rewritten_after]
            rows.append(
                [
                    ARMS[setting],
                    str(record["seed"]),
                    *[cell(score) for score in scores],
                    f"{record['metrics'][-1]['charts/num_images']:,}",
                    f"{record['seconds'] / 60:.1f}",
                ]
            )
    head = ["trained", "seed", "before: plain", "before: rewritten", "after: plain", "after: rewritten"]
    return table([*head, "images", "minutes"], rows)


def mean_score(records, score, is_after):
    """The mean over the seeds of a score, before or after training."""
    return np.mean([evaluations(record, score)[is_after] for record in records])


def kinds_table(runs):
    """The strict score of each kind of edit, means over the seeds, of each way to draw the edits."""
    ways = [
        ("before training", "edit_both", "", False),
        ("before training, rewritten", "edit_both", "_enhanced", False),
        ("flow model trained, no rewrites", "edit_flow_only", "", True),
        ("language model trained, rewritten", "edit_lm_only", "_enhanced", True),
        ("both trained, rewritten", "edit_both", "_enhanced", True),
        ("both trained, not rewritten", "edit_both", "", True),
    ]
    rows = []
    for name, setting, suffix, is_after in ways:
        if setting not in runs:
            continue
        records = runs[setting]
        score = f"eval/edit_strict{suffix}"
        means = [mean_score(records, score, is_after)]
        means += [mean_score(records, f"{score}/{kind}", is_after) for kind in EDITS]
        rows.append([name, *[f"{mean:.3f}" for mean in means]])
    return table(["strict score of edits", "all", *EDITS], rows)


def claims_table(runs):
    """The paper's claims on editing: the difference of each seed, the interval, and the verdict.

    The paper's scores are EditReward's: 1.19 for FLUX.1-Kontext, 1.01 for it with the rewrites of an
    untrained language model, 1.36 for it trained without rewrites, and 1.43 for PromptRL.
    """
    PLAIN, REWRITTEN = "", "_enhanced"
    BEFORE, AFTER = False, True
    untrained = ("edit_both", PLAIN, BEFORE)
    untrained_rewritten = ("edit_both", REWRITTEN, BEFORE)
    flow_alone = ("edit_flow_only", PLAIN, AFTER)
    lm_alone = ("edit_lm_only", REWRITTEN, AFTER)
    both_plain = ("edit_both", PLAIN, AFTER)
    both_rewritten = ("edit_both", REWRITTEN, AFTER)
    claims = [  # text, what is better, what is worse
        (
            "rewrites by an untrained language model harm an untrained editor (1.19 to 1.01)",
            untrained,
            untrained_rewritten,
        ),
        ("training the editor alone helps (1.19 to 1.36)", flow_alone, untrained),
        (
            "training both is better than training the editor alone (1.36 to 1.43)",
            both_rewritten,
            flow_alone,
        ),
        ("training both is better than no training (1.19 to 1.43)", both_rewritten, untrained),
        ("after training both, rewrites help", both_rewritten, both_plain),
        ("training both is better than the untrained rewrites", both_rewritten, untrained_rewritten),
        ("training both is better than training the language model alone", both_rewritten, lm_alone),
    ]
    rows = []
    for text, better, worse in claims:
        if better[0] in runs and worse[0] in runs:
            rows.append(claim_row(text, rewards(runs, *better) - rewards(runs, *worse)))
    return table(["claim (the paper's EditReward)", "difference of each seed", "mean, 95%", "verdict"], rows)


def rewards(runs, setting, suffix, is_after):
    """The reward of each seed of an arm, an array. suffix: of plain or of rewritten instructions."""
    return np.array([evaluations(record, f"eval/edit{suffix}")[is_after] for record in runs[setting]])
