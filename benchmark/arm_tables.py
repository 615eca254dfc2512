"""The tables of what is run beside the defaults: other arms of the same file, on the same seeds.

write_tables puts them into the documents. Arms and claims are those of docs/protocol.md; the arms' flags and
meanings are in settings.py. An arm without a record is left out, and so are its claims.
"""

import json
from typing import NamedTuple

import numpy as np

from benchmark.inference import claim_row
from benchmark.markdown import table
from benchmark.records import RESULTS
from benchmark.settings import GROUPS

STRICT = "eval/geneval_strict"
REWRITTEN = "eval/geneval_strict_enhanced"
LOOP = "eval/geneval_strict_loop"


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
            "P7: for plain prompts, its flow model ends above one that was trained alone",
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
    records = {}
    for path in (RESULTS / name).glob("seed-*.json"):
        record = json.loads(path.read_text())
        records[record["seed"]] = record
    return records


def final(record, score):
    """The last value of an evaluated score, or None where a run does not measure it."""
    values = [row[score] for row in record["metrics"] if row.get(score) is not None]
    return values[-1] if values else None


def arms_table(algorithm):
    """A row per arm: what it is, its seeds, and the mean of each score after training."""
    default = next(setting for setting in GROUPS["defaults"] if setting.algorithm == algorithm)
    rows = []
    for setting in [default, *GROUPS[algorithm]]:
        records = read_arm(setting.name)
        if not records:
            continue
        cells = [setting.meaning, f"`{setting.own_flags}`" if setting.own_flags else ""]
        cells.append(", ".join(str(seed) for seed in sorted(records)))
        for score in SCORES[algorithm].values():
            values = [final(record, score) for record in records.values()]
            measured = [value for value in values if value is not None]
            cells.append(f"{np.mean(measured):.3f}" if measured else "")
        minutes = [record["seconds"] / 60 for record in records.values()]
        rows.append([*cells, f"{np.median(minutes):.1f}"])
    return table(["arm", "flags", "seeds", *SCORES[algorithm], "minutes"], rows)


def claims_table(algorithm):
    """A row per claim: the difference of each seed that both arms have, its interval, and the verdict."""
    rows = []
    for claim in CLAIMS[algorithm]:
        better, worse = read_arm(claim.better), read_arm(claim.worse)
        differences = []
        for seed in sorted(better.keys() & worse.keys()):
            score = final(better[seed], claim.score_of_better)
            differences.append(score - final(worse[seed], claim.score_of_worse))
        if len(differences) >= 2:
            rows.append(claim_row(claim.text, differences))
    return table(["claim", "difference of each seed", "mean, 95%", "verdict"], rows)
