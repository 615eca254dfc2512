"""Tables of Flow-GRPO, SuperFlow and FDFO, from runs {setting: records}: lines of Markdown."""

import numpy as np

from benchmark.markdown import each_signed, share, signed, table, verdict
from benchmark.seed_statistics import (
    SCORE,
    TAGS,
    change,
    curves,
    efficiency,
    interquartile_mean,
    interval,
    num_images,
)

ALGORITHMS = {  # script -> title; its records are in <script>/default
    "flow_grpo": "Flow-GRPO",
    "superflow": "SuperFlow",
    "fdfo": "FDFO",
}
CLAIMS = {  # script -> (largest share of Flow-GRPO's images by which the paper's claim would hold, its words)
    "superflow": (0.563, "5.4 to 56.3% of the training steps"),
    "fdfo": (1 / 6, "Flow-GRPO's best in 6 to 10 times fewer epochs"),
}
LEARNING_RATES = ("1.5e-4", "3e-4", "6e-4", "1.2e-3")
SUPERFLOW_PARTS = {  # setting -> what of SuperFlow is switched on
    "superflow_parts/none": "none (Flow-GRPO, but for the scale of its advantages)",
    "superflow_parts/choice": "prompt choice",
    "superflow_parts/size": "group size",
    "superflow_parts/baseline": "tracker as baseline",
    "superflow_parts/credit": "step credit",
    "superflow_parts/all": "all four",
}


def headline(runs):
    """The algorithms at their defaults, and what each paper claims against Flow-GRPO."""
    head = ["", "seeds", "images", "strict, before and after", "change", "interquartile mean of the tags"]
    head += ["paraphrased, change", "colours, bits, change"]
    rows = []
    for script, title in ALGORITHMS.items():
        if f"{script}/default" in runs:
            rows.append(headline_row(title, runs[f"{script}/default"]))
    lines = table(head, rows) + [""]

    rows = []
    for script, (claim, words) in CLAIMS.items():
        if f"{script}/default" in runs:
            needed = efficiency(runs[f"{script}/default"], runs["flow_grpo/default"])
            high = needed[2]
            rows.append([ALGORITHMS[script], share(*needed), words, verdict(high, claim)])
    head = ["", "images to Flow-GRPO's final score, of Flow-GRPO's images", "the paper", "verdict"]
    return lines + table(head, rows)


def headline_row(title, group):
    """The row of one algorithm."""
    scores = curves(group, SCORE).scores
    tags = np.stack([curves(group, f"{SCORE}/{tag}").scores[:, -1] for tag in TAGS], axis=1)  # (seeds, tags)
    low, high = interval(tags, interquartile_mean)
    bits = [run["diversity"]["after"]["colors"] - run["diversity"]["before"]["colors"] for run in group]
    return [
        title,
        str(len(group)),
        f"{num_images(group, SCORE):,.0f}",
        f"{scores[:, 0].mean():.3f}, {scores[:, -1].mean():.3f}",
        signed(change(group, SCORE)),
        f"{interquartile_mean(tags):.3f} [{low:.3f}, {high:.3f}]",
        signed(change(group, SCORE + "_paraphrased")),
        signed(np.array(bits), 2),
    ]


def learning_rates(runs):
    """Change of the strict score by learning rate, for each seed: the same grid for every algorithm."""
    rows = []
    for rate in LEARNING_RATES:
        row = [rate]
        for script in ALGORITHMS:
            changes = change(runs[f"learning_rates/{script}_{rate}"], SCORE)
            row.append(f"{changes.mean():+.3f} ({each_signed(changes)})")
        rows.append(row)
    return table(["learning rate"] + list(ALGORITHMS.values()), rows)


def superflow_parts(runs):
    """SuperFlow's parts, each alone, against none of them. Differences are between runs of the same seed."""
    rows = []
    none = change(runs["superflow_parts/none"], SCORE)
    for setting, what in SUPERFLOW_PARTS.items():
        changes = change(runs[setting], SCORE)
        against = "" if setting == "superflow_parts/none" else signed(changes - none)
        rows.append([what, f"{num_images(runs[setting], SCORE):,.0f}", signed(changes), against])
    return table(["parts switched on", "images", "change of the strict score", "against none"], rows)
