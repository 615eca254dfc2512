"""The tables of what is run beside the defaults: other arms of the same file, on the same seeds.

write_tables puts them into the documents. Arms and claims are those of docs/protocol.md; the arms' flags and
meanings are in settings.py. An arm without a record is left out, and so are its claims.
"""

from typing import NamedTuple

import numpy as np

from benchmark.inference import claim_row
from benchmark.markdown import table
from benchmark.records import RESULTS, read_records
from benchmark.settings import GROUPS

STRICT = "eval/geneval_strict"
REWRITTEN = "eval/geneval_strict_enhanced"


class Claim(NamedTuple):
    """That an arm ends with a higher score than another one."""

    text: str
    better: str  # FILE/NAME
    score_of_better: str
    worse: str
    score_of_worse: str


CLAIMS = {
    "promptrl": [
        Claim(
            "P1: with rewrites, it ends above training the flow model alone",
            "promptrl/default",
            REWRITTEN,
            "promptrl/flow_only",
            STRICT,
        ),
        Claim(
            "P3: with rewrites, it ends above training the language model alone",
            "promptrl/default",
            REWRITTEN,
            "promptrl/lm_only",
            REWRITTEN,
        ),
        Claim(
            "P4: for plain prompts, two originals per group are better than none",
            "promptrl/default",
            STRICT,
            "promptrl/originals_0",
            STRICT,
        ),
        Claim(
            "P5: ... than one",
            "promptrl/default",
            STRICT,
            "promptrl/originals_1",
            STRICT,
        ),
        Claim(
            "P6: ... than four",
            "promptrl/default",
            STRICT,
            "promptrl/originals_4",
            STRICT,
        ),
        Claim(
            "P7: for plain prompts, its flow model is no worse than one that was trained alone",
            "promptrl/default",
            STRICT,
            "promptrl/flow_only",
            STRICT,
        ),
    ],
}
SCORES = {  # column: score, of each file
    "promptrl": {"plain prompts": STRICT, "with rewrites": REWRITTEN},
}


def read_arm(name):
    """{seed: record} of an arm, FILE/NAME."""
    return {record["seed"]: record for record in read_records(name, RESULTS)}


def measured(record, score):
    """The values of a score in a run, from the first evaluation to the last. Empty where there are none."""
    return [row[score] for row in record["metrics"] if row.get(score) is not None]


def shared_seeds(arms):
    """The seeds that all arms have, a sorted list. arms: {seed: record} each."""
    return sorted(set.intersection(*[set(arm) for arm in arms]))


def score_cells(records, scores, index):
    """The mean of each score over runs, before training (index 0) or after it (-1). "" where not measured."""
    cells = []
    for score in scores:
        values = [measured(record, score)[index] for record in records if measured(record, score)]
        cells.append(f"{np.mean(values):.3f}" if values else "")
    return cells


def arms_table(algorithm):
    """A row per arm: what it is, and the mean of each score, over the seeds that all arms have."""
    default = next(setting for setting in GROUPS["defaults"] if setting.algorithm == algorithm)
    arms = {}  # setting: {seed: record}
    for setting in [default, *GROUPS[algorithm]]:
        records = read_arm(setting.name)
        if records:
            arms[setting] = records
    seeds = shared_seeds(arms.values())
    scores = SCORES[algorithm]
    before = score_cells([arms[default][seed] for seed in seeds], scores.values(), 0)
    rows = [["before any training", "", *before, ""]]
    for setting, records in arms.items():
        own = [records[seed] for seed in seeds]
        flags = f"`{setting.own_flags}`" if setting.own_flags else ""
        minutes = np.median([record["seconds"] / 60 for record in own])
        rows.append([setting.meaning, flags, *score_cells(own, scores.values(), -1), f"{minutes:.1f}"])
    names = ", ".join(str(seed) for seed in seeds)
    return table([f"mean over the seeds {names}", "flags", *scores, "minutes"], rows)


def claims_table(algorithm):
    """A row per claim: the difference of each seed that both arms have, its interval, and the verdict."""
    rows = []
    for claim in CLAIMS[algorithm]:
        better, worse = read_arm(claim.better), read_arm(claim.worse)
        differences = []
        for seed in shared_seeds([better, worse]):
            score = measured(better[seed], claim.score_of_better)[-1]
            differences.append(score - measured(worse[seed], claim.score_of_worse)[-1])
        if len(differences) >= 2:
            rows.append(claim_row(claim.text, differences))
    return table(["claim", "difference of each seed", "mean, 95%", "verdict"], rows)
