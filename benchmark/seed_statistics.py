"""Statistics over the seeds of a setting: curves, intervals, and how many images a score takes.

All intervals are 95% bootstrap intervals over seeds, from 2,000 resamples of the seeds, of both sides of a
comparison. A run is a record with "metrics", the rows of its metrics.jsonl.
"""

from typing import NamedTuple

import numpy as np

from benchmark.inference import cost_to_reach

SCORE = "eval/geneval_strict"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RESAMPLES = 2000


class Curves(NamedTuple):
    """A score at each evaluation, each array (seeds, points)."""

    images: np.ndarray  # sampled so far
    seconds: np.ndarray  # of training so far, evaluations left out
    scores: np.ndarray


def evaluations(run, score):
    """Images, seconds of training and score at each evaluation of a run: three lists."""
    images = []
    seconds = []
    scores = []
    clock = 0.0
    for row in run["metrics"]:
        for name, value in row.items():
            is_phase = name.startswith("perf/seconds_")
            if is_phase and name != "perf/seconds_evaluate":
                clock += value
        if score in row:
            images.append(row["charts/num_images"])
            seconds.append(clock)
            scores.append(row[score])
    return images, seconds, scores


def curves(runs, score):
    """The Curves of runs, at the evaluations that all of them have."""
    points = [np.array(evaluations(run, score)) for run in runs]  # (3, points) each
    shortest = min(run_points.shape[1] for run_points in points)
    stacked = np.stack([run_points[:, :shortest] for run_points in points])  # (seeds, 3, points)
    return Curves(stacked[:, 0], stacked[:, 1], stacked[:, 2])


def resample(values, rng):
    """A bootstrap sample of the seeds. values (seeds, ...), the same shape returned."""
    return values[rng.integers(len(values), size=len(values))]


def interval(values, statistic=np.mean):
    """(low, high) of a statistic of the seeds. values (seeds, ...); the statistic is over axis 0."""
    rng = np.random.default_rng(0)
    statistics = [statistic(resample(values, rng), axis=0) for _ in range(RESAMPLES)]
    return np.quantile(statistics, [0.025, 0.975], axis=0)


def interquartile_mean(values, axis=None):
    """Mean of the middle half of all values. The two at its ends count by the part of them that is inside."""
    values = np.sort(np.ravel(values))
    begin = np.arange(len(values))  # value i lies between i and i + 1
    end = begin + 1
    low = len(values) / 4
    high = 3 * len(values) / 4
    inside = np.minimum(end, high) - np.maximum(begin, low)
    weights = np.clip(inside, 0, 1)
    return (values * weights).sum() / weights.sum()


def efficiency(runs, baseline, score=SCORE):
    """Images to the baseline's final strict score, as a share of all its images: (estimate, low, high).

    The curves are means over seeds. score: what of the runs is compared. inf where it is not reached.
    """
    images, _, scores = curves(runs, score)
    budget, _, targets = curves(baseline, SCORE)
    images = images.mean(0)
    budget = budget[:, -1].mean()
    targets = targets[:, -1]

    def share(scores, targets):
        return cost_to_reach(images, scores.mean(0), targets.mean()) / budget

    rng = np.random.default_rng(0)
    shares = []
    for _ in range(RESAMPLES):
        sampled_scores = resample(scores, rng)
        sampled_targets = resample(targets, rng)
        shares.append(share(sampled_scores, sampled_targets))
    # "nearest", because there is nothing between a number and inf.
    low, high = np.quantile(shares, [0.025, 0.975], method="nearest")
    return share(scores, targets), low, high


def last(runs, score):
    """Final value of a score, (seeds,)."""
    return curves(runs, score).scores[:, -1]


def change(runs, score):
    """Final minus first value of a score, (seeds,)."""
    scores = curves(runs, score).scores
    return scores[:, -1] - scores[:, 0]


def num_images(runs, score):
    """Images of a whole run, mean over seeds."""
    return curves(runs, score).images[:, -1].mean()


def trained_rows(runs):
    """Rows of metrics of all runs that have a training step."""
    rows = []
    for run in runs:
        rows += [row for row in run["metrics"] if "losses/ratio_first" in row]
    return rows
