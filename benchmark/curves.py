"""Pictures of docs/first_edition.md: curves of scores, against images or seconds of training."""

import matplotlib.figure

from benchmark.seed_statistics import curves, interval


def draw_one(axes, x, scores, title):
    """Draws one curve. x (points,), scores (seeds, points)."""
    low, high = interval(scores)
    axes.plot(x, scores.mean(0), ".-", label=title)
    axes.fill_between(x, low, high, alpha=0.2)


def draw(path, groups, score, label):
    """Draws the mean over seeds with its interval. groups: for each setting, its records."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for group in groups:
        name = group[0]["name"]
        title = f"{name} ({len(group)} seeds)"
        images, seconds, scores = curves(group, score)
        draw_one(left, images.mean(0), scores, title)
        draw_one(right, seconds.mean(0), scores, title)
    left.set(xlabel="images sampled", ylabel=label)
    right.set(xlabel="seconds of training")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
