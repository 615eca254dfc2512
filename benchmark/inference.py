"""What may be said about two arms of an experiment: intervals, verdicts, and how often these are wrong.

    python -m benchmark.inference    # simulates comparisons whose truth is known

Two arms are compared on the same seeds. A seed decides the fold of the prompts, the noise of training and the
noises of evaluation, for both arms alike, and each seed has others. So the differences of the seeds are
independent of each other, and their spread contains all of these sources of chance. An interval is Student's
t interval of the mean difference: a percentile bootstrap of so few numbers is too narrow.
"""

import functools
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of all intervals
MARGIN = 0.03  # a difference of the strict score below this is called none
POWER = 0.8  # with which the difference would be seen that an inconclusive verdict names


# ---- Student's t ----
def student_cdf(t, df):
    """P(T < t) of Student's t distribution with df degrees of freedom.

    With t = sqrt(df) tan(a), the density becomes proportional to cos(a)^(df - 1), which is easily integrated.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    density = np.cos(angles) ** (df - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(np.arctan(t / np.sqrt(df)), angles, cumulative / cumulative[-1])


@functools.cache
def student_quantile(probability, df):
    """The t with P(T < t) = probability, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if student_cdf(middle, df) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# ---- comparisons ----
class Comparison(NamedTuple):
    """The mean of numbers of independent seeds, such as the differences of two arms."""

    mean: float
    low: float  # of the interval
    high: float
    p: float  # two-sided, of the hypothesis that the true mean is 0
    detectable: float  # the true mean that would have been told from 0 with probability POWER
    num_seeds: int


def compare(differences):
    """The Comparison of at least two numbers, one per seed. Equal numbers have an interval of no width."""
    differences = np.asarray(differences, dtype=np.float64)
    num_seeds = len(differences)
    df = num_seeds - 1
    mean = differences.mean()
    error = differences.std(ddof=1) / np.sqrt(num_seeds)
    critical = student_quantile((1 + LEVEL) / 2, df)
    if error > 0:
        p = 2 * student_cdf(-abs(mean / error), df)
    else:
        p = 1.0 if mean == 0 else 0.0
    detectable = (critical + student_quantile(POWER, df)) * error
    return Comparison(mean, mean - critical * error, mean + critical * error, p, detectable, num_seeds)


def verdict(comparison, margin=MARGIN):
    """What the interval says about the claim that the true mean is positive: one of four outcomes.

    "supported" and "contradicted": the interval is on one side of 0. "equivalent": it has 0 in it, and lies
    within the margin. "inconclusive": it has 0 in it, and more than the margin. Both can be true of a small
    difference that many seeds tell from 0: then it is supported, and its size is for the reader to judge.
    """
    if comparison.low > 0:
        return "supported"
    if comparison.high < 0:
        return "contradicted"
    if -margin < comparison.low and comparison.high < margin:
        return "equivalent"
    return "inconclusive"


def claim_row(claim, differences):
    """Cells of a claim that the differences are above 0, judged as docs/protocol.md says."""
    comparison = compare(differences)
    outcome = verdict(comparison)
    if outcome == "inconclusive":
        outcome += f" (could have seen {comparison.detectable:.3f})"
    each = ", ".join(f"{difference:+.3f}" for difference in differences)
    interval = f"{comparison.mean:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"
    return [claim, each, interval, outcome]


def holm(p_values):
    """P values of a family of claims, adjusted by Holm's method: the chance that any is found falsely.

    The smallest is multiplied by the number of claims, the next by one less, and so on; none gets below the
    one before it.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result


# ---- summaries of an arm ----
def probability_of_improvement(ours, theirs):
    """How likely a run of ours is better than one of theirs; ties count half. Each (seeds, tasks).

    The mean over the tasks of the share of pairs of runs in which ours is better (Agarwal et al. 2021).
    """
    ours = np.asarray(ours)[:, None]  # (seeds, 1, tasks)
    theirs = np.asarray(theirs)[None]  # (1, seeds, tasks)
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


def normalised(scores, base):
    """The share of what the base leaves open: 0 is the base, 1 a score of 1. Arrays that broadcast."""
    return (np.asarray(scores) - base) / (1 - np.asarray(base))


def interquartile_mean(values):
    """Mean of the middle half of all values. The two at its ends count by the part of them that is inside."""
    values = np.sort(np.ravel(values))
    begin = np.arange(len(values))  # value i lies between i and i + 1
    low = len(values) / 4
    high = 3 * len(values) / 4
    weights = np.clip(np.minimum(begin + 1, high) - np.maximum(begin, low), 0, 1)
    return float((values * weights).sum() / weights.sum())


# ---- efficiency ----
def cost_to_reach(costs, scores, target):
    """The cost at which a curve, linear between its points, first has the target. inf if it never has."""
    for i, score in enumerate(scores):
        if score < target:
            continue
        if i == 0:
            return costs[0]
        slope = (score - scores[i - 1]) / (costs[i] - costs[i - 1])
        return costs[i] - (score - target) / slope
    return np.inf


def relative_cost(ours, theirs, share):
    """The cost to get a share of the reference's gain, as a multiple of what the reference itself needs.

    ours, theirs: (costs, scores) of the mean curves. Both curves start at the base model's score. The
    reference's gain is from its first to its last score.
    """
    _, reference_scores = theirs
    first, last = reference_scores[0], reference_scores[-1]
    target = first + share * (last - first)
    return cost_to_reach(*ours, target) / cost_to_reach(*theirs, target)


# ---- how often this is wrong ----
class Simulation(NamedTuple):
    """Shares of simulated comparisons."""

    coverage: float  # intervals that contain the truth
    false_verdicts: float  # supported or contradicted, while there is no difference


def simulate_scores(rng, num_seeds, effect, num_rows=77, num_noises=4, num_folds=4):
    """Strict scores (arms, seeds) of two arms as experiments here give them; the second is better by effect.

    A prompt has its own difficulty, which both arms and all seeds of a fold share. A run is better or worse
    at it by chance, and so is each of its images, which are right or wrong.
    """
    difficulty = rng.normal(0.5, 0.3, (num_folds, num_rows))
    scores = np.empty((2, num_seeds))
    for arm in range(2):
        for seed in range(num_seeds):
            of_run = rng.normal(0, 0.016)
            of_prompts = rng.normal(0, 0.1, num_rows)
            chance = difficulty[seed % num_folds] + of_run + of_prompts + arm * effect
            images = rng.random((num_noises, num_rows)) < np.clip(chance, 0, 1)
            scores[arm, seed] = images.mean()
    return scores


def true_effect(rng, effect, count=400_000):
    """The mean difference of the simulated arms. It is below `effect`, since no chance is above 1."""
    chance = rng.normal(0.5, 0.3, count) + rng.normal(0, 0.016, count) + rng.normal(0, 0.1, count)
    return float((np.clip(chance + effect, 0, 1) - np.clip(chance, 0, 1)).mean())


def simulate(num_seeds, effect, num_comparisons=2000, seed=0):
    """The Simulation of this many comparisons with a number of seeds and a true effect."""
    rng = np.random.default_rng(seed)
    truth = true_effect(rng, effect)
    covered = 0
    false = 0
    for _ in range(num_comparisons):
        theirs, ours = simulate_scores(rng, num_seeds, effect)
        comparison = compare(ours - theirs)
        covered += comparison.low <= truth <= comparison.high
        false += effect == 0 and verdict(comparison) in ("supported", "contradicted")
    return Simulation(covered / num_comparisons, false / num_comparisons)


if __name__ == "__main__":
    print("seeds  effect  coverage  false verdicts")
    for num_seeds in (3, 4, 8, 12):
        for effect in (0.0, 0.05, 0.2):
            found = simulate(num_seeds, effect)
            false = f"{found.false_verdicts:.3f}" if effect == 0 else ""
            print(f"{num_seeds:5d}  {effect:6.2f}  {found.coverage:8.3f}  {false}")
