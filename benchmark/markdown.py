"""Cells and tables of docs/first_edition.md, as Markdown text."""

import numpy as np

from benchmark.seed_statistics import curves, interval


def table(head, rows):
    """Lines of a table. A row is a list of strings."""
    lines = []
    for cells in [head, ["---"] * len(head)] + rows:
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def signed(values, digits=3):
    """'mean [low, high]' of differences (seeds,), with signs."""
    low, high = interval(values)
    return f"{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def level(values, digits=3):
    """'mean [low, high]' of scores (seeds,)."""
    low, high = interval(values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def before_after(runs, score):
    """'before, after [interval of after]' of a score, means over seeds."""
    scores = curves(runs, score).scores
    return f"{scores[:, 0].mean():.3f}, {level(scores[:, -1])}"


def each(values):
    """The value of each seed."""
    return ", ".join(f"{value:.3f}" for value in values)


def each_signed(values):
    """The difference of each seed, with its sign."""
    return ", ".join(f"{value:+.3f}" for value in values)


def percent(share):
    """'39%', or that it was not reached."""
    return f"{share:.0%}" if np.isfinite(share) else "not reached"


def share(estimate, low, high):
    """'39% [28%, 54%]', as from `efficiency`."""
    return f"{percent(estimate)} [{percent(low)}, {percent(high)}]"


def verdict(high, claim):
    """On the claim that at most this share of the baseline's images is needed. high: the interval's end."""
    if high <= claim:
        return "holds here"
    return "holds in part: fewer images, not that few" if high < 1 else "does not hold here"


def direction(differences, claim):
    """On the claim that a difference has this sign, by its interval over seeds."""
    low, high = interval(differences)
    if low <= 0 <= high:
        return "not seen here: the interval has zero in it"
    return "holds here" if (low > 0) == (claim > 0) else "does not hold here, it is the other way round"
