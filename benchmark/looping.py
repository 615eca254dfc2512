"""Compares PromptLoop with its parts, from benchmark/results/*.json; `python -m benchmark.plot` writes it.

`uses` are the evaluations of benchmark/loop.py, {title: {"scores", "seconds"}} a seed.
"""

import numpy as np

from benchmark.compare import SCORE, curves, interval, signed
from benchmark.rewriting import direction, each, last, level, table

LOOP, APRIORI = SCORE + "_loop", SCORE + "_apriori"
FULL = "promptloop"
RUNS = {  # name of the runs -> (what the policy does, the paper's ImageReward with Stable Diffusion 1.5)
    "promptloop_once": ("1 refinement, before the first step", ".434"),
    "promptloop_none": ("5 refinements without previews", ".491"),
    "promptloop_shuffled": ("5 refinements, each with the preview of another prompt's image", ""),
    FULL: ("5 refinements with previews: PromptLoop", ".632"),
}
TRIALS = "try", "first", "p16", "shared", "own_noise", "long", "once_long"  # other runs, promptloop_...
BASE, UNTRAINED = "base", "untrained"
CLAIMS = (  # what is claimed, of which scores it is the difference, the paper's
    ("an untrained policy harms", UNTRAINED, BASE, "-0.313"),
    ("a trained one helps", FULL, BASE, "+0.550"),
    ("... with one refinement", "promptloop_once", BASE, "+0.353"),
    ("training is what helps", FULL, UNTRAINED, "+0.864"),
    ("several refinements without previews help", "promptloop_none", "promptloop_once", "+0.057"),
    ("previews help", FULL, "promptloop_none", "+0.141"),
    ("... because of what is in them", FULL, "promptloop_shuffled", ""),
    ("several refinements with previews beat one", FULL, "promptloop_once", "+0.198"),
)
OVERHEAD = {1: 1.05, 3: 1.13, 5: 1.23}  # the paper's: number of refinements -> time over that of none


def parts(runs):
    """The image model alone, with the untrained policy and with trained ones, and what the paper claims."""
    first = runs[FULL][0]["metrics"][0]
    rows = [["the image model alone", "", f"{first[SCORE]:.3f}", "", ".082"]]
    rows += [
        ["5 refinements by the untrained policy", "", f"{first[LOOP]:.3f}", f"{first[APRIORI]:.3f}", "-.232"]
    ]
    for name, (what, paper) in [item for item in RUNS.items() if item[0] in runs]:
        group = runs[name]
        images = f"{curves(group, LOOP)[0][:, -1].mean():,.0f}"
        rows += [[what, images, *(level(last(group, score)) for score in (LOOP, APRIORI)), paper]]
    head = ["", "images", "in the loop", "all prompts written beforehand", "the paper (ImageReward)"]
    lines = [*table(head, rows), ""]
    scores = {BASE: first[SCORE], UNTRAINED: first[LOOP]}
    scores |= {name: last(runs[name], LOOP) for name in RUNS if name in runs}
    rows = []
    for what, name, other, paper in CLAIMS:
        if name in scores and other in scores:
            change = np.atleast_1d(scores[name] - scores[other])
            claim = -1 if paper.startswith("-") else 1
            value = signed(change) if len(change) > 1 else f"{change[0]:+.3f}"  # of no run: no interval
            rows += [[what, paper, value, direction(change, claim)]]
    return lines + table(["claim", "the paper (ImageReward)", "here", "verdict"], rows)


def trials(runs):
    """Runs that settings were chosen from, and others: flags, seeds, images, scores, the policy's entropy."""
    rows = []
    for name in sorted(name for name in runs if name.startswith(tuple(f"promptloop_{t}" for t in TRIALS))):
        group = runs[name]
        flags = group[0]["command"].removeprefix("python promptloop.py").rsplit("--seed ", 1)[0].strip()
        cells = [
            f"`{flags}`" if flags else "",
            group[0]["commit"],
            ", ".join(str(run["seed"]) for run in group),
        ]
        cells += [f"{curves(group, LOOP)[0][:, -1].mean():,.0f}"]
        cells += [each(last(group, score)) for score in (LOOP, APRIORI)]
        rows += [[*cells, each([run["metrics"][-1]["losses/lm_entropy"] for run in group])]]
    head = ["flags, on top of that commit's defaults", "commit", "seeds", "images", "in the loop"]
    return table([*head, "all prompts written beforehand", "last entropy"], rows)


def uses(runs, uses):
    """One policy with other numbers of refinements, and with image models that it never saw."""

    def scores(title, who, score):
        return np.array([use[f"{title}_{who}"]["scores"][score] for use in uses])

    more = scores("refinements_5", "trained", LOOP) - scores("refinements_1", "trained", LOOP)
    claims = [
        ["more refinements by the same policy help, 5 less 1", "rises", signed(more), direction(more, 1)]
    ]
    rows = []
    for count, paper in ((1, OVERHEAD[1]), (2, ""), (3, OVERHEAD[3]), (5, OVERHEAD[5])):
        title = f"refinements_{count}"
        times = [use[f"{title}_trained"]["seconds"] for use in uses]
        ratio = np.array([seconds["loop"] / seconds["plain"] for seconds in times])
        rows += [[str(count), f"{scores(title, 'untrained', LOOP).mean():.3f}"]]
        rows[-1] += [level(scores(title, "trained", score)) for score in (LOOP, APRIORI)]
        rows[-1] += [level(ratio, 2), str(paper)]
    head = ["refinements", "untrained policy", "trained", "written beforehand"]
    lines = [*table([*head, "time over that of none", "the paper's"], rows), ""]
    slow = "holds here" if interval(ratio)[1] <= OVERHEAD[5] else "does not hold here"
    claims += [["5 refinements: time over that of none", str(OVERHEAD[5]), level(ratio, 2), slow]]

    first, trained = runs[FULL][0]["metrics"][0], last(runs[FULL], LOOP)
    base = first[SCORE]
    gain = trained - base
    cells = [f"{base:.3f}, {level(trained)}", f"{first[LOOP] - base:+.3f}", signed(gain)]
    rows = [["tiny/sd3, in training", *cells, "", ""]]
    for title, what, paper in (
        ("second_model", "tiny/sd3b, never seen", ""),
        ("flow_grpo", "tiny/sd3 with a Flow-GRPO LoRA", "69 to 80%"),
    ):
        base, loop = scores(title, "trained", SCORE), scores(title, "trained", LOOP)
        kept = (loop - base) / gain
        low, high = interval(kept)
        untrained = (scores(title, "untrained", LOOP) - base).mean()
        cells = [f"{base.mean():.3f}, {level(loop)}", f"{untrained:+.3f}", signed(loop - base)]
        rows += [[what, *cells, f"{kept.mean():.0%} [{low:.0%}, {high:.0%}]", paper]]
        if title == "second_model":
            unseen = ["a model never seen is helped", "FLUX.1-dev, +0.245", signed(loop - base)]
            claims += [[*unseen, direction(loop - base, 1)]]
    stays = "holds here" if low >= 0.69 else "does not hold here"
    claims += [["of its gain is kept beside a Flow-GRPO LoRA", "69 to 80%", rows[-1][4], stays]]
    head = ["image model", "alone, with the policy", "gain by the untrained policy", "gain"]
    lines += [*table([*head, "of the gain in training", "the paper's"], rows), ""]
    return lines + table(["claim", "the paper (ImageReward)", "here", "verdict"], claims)
