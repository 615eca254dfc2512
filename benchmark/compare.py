"""Compares the algorithms from benchmark/results/*.json; `python -m benchmark.plot` writes what it finds.

All intervals are 95% bootstrap intervals over seeds: 2,000 resamples of
the seeds, of both sides of a comparison.
"""

import numpy as np

SCORE = "eval/geneval_strict"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
ALGORITHMS = {  # name of the default's runs -> title
    "flow_grpo": "Flow-GRPO",
    "superflow": "SuperFlow",
    "fdfo": "FDFO",
}
CLAIMS = {  # largest share of Flow-GRPO's images by which the paper's claim would hold, and its words
    "superflow": (0.563, "5.4 to 56.3% of the training steps"),
    "fdfo": (1 / 6, "Flow-GRPO's best in 6 to 10 times fewer epochs"),
}
LEARNING_RATES = ("1.5e-4", "3e-4", "6e-4", "1.2e-3")
PARTS = {  # name of the runs -> what of SuperFlow is on
    "parts_none": "none (Flow-GRPO, but for the scale of its advantages)",
    "parts_choice": "prompt choice",
    "parts_size": "group size",
    "parts_baseline": "tracker as baseline",
    "parts_credit": "step credit",
    "parts_all": "all four",
}


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


def curves(runs, score):
    """Images, seconds and scores, each (seeds, points), at the evaluations that all the runs have."""
    points = [evaluations(run, score) for run in runs]
    shortest = min(len(images) for images, _, _ in points)
    return tuple(np.array([p[i][:shortest] for p in points]) for i in range(3))


def resample(values, rng):
    """A bootstrap sample of the seeds. values (seeds, ...), the same shape returned."""
    return values[rng.integers(len(values), size=len(values))]


def interval(values, statistic=np.mean):
    """Interval of a statistic of the seeds (over axis 0). values (seeds, ...) -> (low, high)."""
    rng = np.random.default_rng(0)
    return np.quantile(
        [statistic(resample(values, rng), axis=0) for _ in range(2000)], [0.025, 0.975], axis=0
    )


def interquartile_mean(values, axis=None):
    """Mean of the middle half of all the values; the two at its ends count by what is left of them."""
    values, position = np.sort(np.ravel(values)), np.arange(np.size(values))
    low, high = len(values) / 4, 3 * len(values) / 4
    weights = np.clip(np.minimum(position + 1, high) - np.maximum(position, low), 0, 1)
    return (values * weights).sum() / weights.sum()


def images_to_reach(images, scores, target):
    """Images at which a curve, linear between its points, first has the target; inf if it never has."""
    for i, score in enumerate(scores):
        if score >= target:
            back = (score - target) / (score - scores[i - 1]) * (images[i] - images[i - 1]) if i else 0
            return images[i] - back
    return np.inf


def efficiency(runs, baseline, score=SCORE):
    """Images to the baseline's final strict score over all the baseline's images: (estimate, low, high).

    The curves are means over seeds; score: what of the runs is compared. inf where it is not reached.
    """
    (images, _, scores), (budget, _, targets) = curves(runs, score), curves(baseline, SCORE)
    images, budget, rng = images.mean(0), budget[:, -1].mean(), np.random.default_rng(0)

    def share(scores, targets):
        return images_to_reach(images, scores.mean(0), targets[:, -1].mean()) / budget

    shares = [share(resample(scores, rng), resample(targets, rng)) for _ in range(2000)]
    low, high = np.quantile(shares, [0.025, 0.975], method="nearest")  # never between a number and inf
    return share(scores, targets), low, high


def verdict(high, claim):
    """On the claim that at most this share of the baseline's images is needed, by the upper end."""
    if high <= claim:
        return "holds here"
    return "holds in part: fewer images, not that few" if high < 1 else "does not hold here"


def percent(share):
    return f"{share:.0%}" if np.isfinite(share) else "not reached"


def final(runs, score):
    """Final minus first value of a score, (seeds,)."""
    values = curves(runs, score)[2]
    return values[:, -1] - values[:, 0]


def headline(runs):
    """The table of the algorithms at their defaults, and what each paper claims against Flow-GRPO."""
    lines = ["| | seeds | images | strict, before and after | change | interquartile mean of the tags |"]
    lines[0] += " paraphrased, change | colours, bits, change |"
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in [name for name in ALGORITHMS if name in runs]:
        group = runs[name]
        images, _, scores = curves(group, SCORE)
        tags = np.stack([curves(group, f"{SCORE}/{tag}")[2][:, -1] for tag in TAGS], axis=1)  # (seeds, tags)
        cells = [ALGORITHMS[name], str(len(group)), f"{images[:, -1].mean():,.0f}"]
        cells += [f"{scores[:, 0].mean():.3f}, {scores[:, -1].mean():.3f}"]
        cells += [signed(final(group, SCORE))]
        low, high = interval(tags, interquartile_mean)
        cells += [f"{interquartile_mean(tags):.3f} [{low:.3f}, {high:.3f}]"]
        cells += [signed(final(group, SCORE + "_paraphrased"))]
        bits = [run["diversity"]["after"]["colors"] - run["diversity"]["before"]["colors"] for run in group]
        lines += ["| " + " | ".join([*cells, signed(np.array(bits), 2)]) + " |"]
    lines += ["", "| | images to Flow-GRPO's final score, of Flow-GRPO's images | the paper | verdict |"]
    lines += ["|---|---|---|---|"]
    for name, (claim, words) in [item for item in CLAIMS.items() if item[0] in runs]:
        estimate, low, high = efficiency(runs[name], runs["flow_grpo"])
        share = f"{percent(estimate)} [{percent(low)}, {percent(high)}]"
        lines += [f"| {ALGORITHMS[name]} | {share} | {words} | {verdict(high, claim)} |"]
    return lines


def signed(values, digits=3):
    """'mean [low, high]' of differences (seeds,)."""
    low, high = interval(values)
    return f"{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def tuning(runs):
    """Change of the strict score by learning rate, each seed: the same grid for every algorithm."""
    lines = ["| learning rate | " + " | ".join(ALGORITHMS.values()) + " |"]
    lines += ["|---" * (1 + len(ALGORITHMS)) + "|"]
    for rate in LEARNING_RATES:
        cells = []
        for name in ALGORITHMS:
            changes = final(runs[f"tune_{name}_{rate}"], SCORE)
            cells += [f"{changes.mean():+.3f} ({', '.join(f'{change:+.3f}' for change in changes)})"]
        lines += ["| " + " | ".join([rate, *cells]) + " |"]
    return lines


def parts(runs):
    """SuperFlow's parts, each alone, against none of them: differences are between runs of the same seed."""
    lines = [
        "| parts switched on | images | change of the strict score | against none |",
        "|---|---|---|---|",
    ]
    none = final(runs["parts_none"], SCORE)
    for name, what in PARTS.items():
        changes = final(runs[name], SCORE)
        images = curves(runs[name], SCORE)[0][:, -1].mean()
        against = "" if name == "parts_none" else signed(changes - none)
        lines += [f"| {what} | {images:,.0f} | {signed(changes)} | {against} |"]
    return lines
