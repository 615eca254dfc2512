"""Tables of PromptLoop, its parts and its policies' other uses, from runs {setting: records}: Markdown lines.

`uses` are the evaluations of use_promptloop_elsewhere.py: for each seed, {title: {"scores", "seconds"}}.
"""

import numpy as np

from benchmark.markdown import direction, each, level, signed, table
from benchmark.records import settings_of
from benchmark.seed_statistics import SCORE, interval, last, num_images

LOOP = SCORE + "_loop"  # with prompts refined during sampling
APRIORI = SCORE + "_apriori"  # with the same policy's prompts, all written before sampling
FULL = "promptloop/default"
ONE_REFINEMENT = "promptloop/one_refinement"
NO_PREVIEWS = "promptloop/no_previews"
SHUFFLED_PREVIEWS = "promptloop/shuffled_previews"
PARTS = {  # setting -> (what the policy does, the paper's ImageReward with Stable Diffusion 1.5)
    ONE_REFINEMENT: ("1 refinement, before the first step", ".434"),
    NO_PREVIEWS: ("5 refinements without previews", ".491"),
    SHUFFLED_PREVIEWS: ("5 refinements, each with the preview of another prompt's image", ""),
    FULL: ("5 refinements with previews: PromptLoop", ".632"),
}
BASE = "the image model alone"
UNTRAINED = "5 refinements by the untrained policy"
CLAIMS = (  # what is claimed, the two scores that it compares, the paper's difference
    ("an untrained policy harms", UNTRAINED, BASE, "-0.313"),
    ("a trained one helps", FULL, BASE, "+0.550"),
    ("... with one refinement", ONE_REFINEMENT, BASE, "+0.353"),
    ("training is what helps", FULL, UNTRAINED, "+0.864"),
    ("several refinements without previews help", NO_PREVIEWS, ONE_REFINEMENT, "+0.057"),
    ("previews help", FULL, NO_PREVIEWS, "+0.141"),
    ("... because of what is in them", FULL, SHUFFLED_PREVIEWS, ""),
    ("several refinements with previews beat one", FULL, ONE_REFINEMENT, "+0.198"),
)
PAPER_OVERHEAD = {1: 1.05, 3: 1.13, 5: 1.23}  # number of refinements -> time over that of none
CLAIM_HEAD = ["claim", "the paper (ImageReward)", "here", "verdict"]


def parts(runs):
    """The image model alone, with the untrained policy and with trained ones, and what the paper claims."""
    first = runs[FULL][0]["metrics"][0]
    rows = [
        [BASE, "", f"{first[SCORE]:.3f}", "", ".082"],
        [UNTRAINED, "", f"{first[LOOP]:.3f}", f"{first[APRIORI]:.3f}", "-.232"],
    ]
    scores = {BASE: first[SCORE], UNTRAINED: first[LOOP]}
    for setting, (what, paper) in PARTS.items():
        if setting in runs:
            group = runs[setting]
            scores[setting] = last(group, LOOP)
            images = f"{num_images(group, LOOP):,.0f}"
            rows.append([what, images, level(last(group, LOOP)), level(last(group, APRIORI)), paper])
    head = ["", "images", "in the loop", "all prompts written beforehand", "the paper (ImageReward)"]
    lines = table(head, rows) + [""]

    rows = []
    for what, one, other, paper in CLAIMS:
        if one in scores and other in scores:
            difference = np.atleast_1d(scores[one] - scores[other])
            sign = -1 if paper.startswith("-") else 1
            here = signed(difference) if len(difference) > 1 else f"{difference[0]:+.3f}"  # without training
            rows.append([what, paper, here, direction(difference, sign)])
    return lines + table(CLAIM_HEAD, rows)


def trials(runs):
    """Runs that settings were chosen from, and others: flags, seeds, images, scores, the policy's entropy."""
    rows = []
    for group in settings_of(runs, "promptloop_trials").values():
        flags = group[0]["command"].removeprefix("python promptloop.py").rsplit("--seed ", 1)[0].strip()
        seeds = ", ".join(str(run["seed"]) for run in group)
        row = [f"`{flags}`" if flags else "", group[0]["commit"], seeds]
        row += [f"{num_images(group, LOOP):,.0f}", each(last(group, LOOP)), each(last(group, APRIORI))]
        rows.append(row + [each([run["metrics"][-1]["losses/lm_entropy"] for run in group])])
    head = ["flags, on top of that commit's defaults", "commit", "seeds", "images", "in the loop"]
    head += ["all prompts written beforehand", "last entropy"]
    return table(head, rows)


class Uses:
    """The evaluations of trained and untrained policies, {title: {"scores", "seconds"}} for each seed."""

    def __init__(self, uses):
        self.uses = uses

    def scores(self, title, who, score):
        """(seeds,) of a use by the "trained" or the "untrained" policy."""
        return np.array([use[f"{title}_{who}"]["scores"][score] for use in self.uses])

    def overhead(self, title):
        """Time to sample in the loop over time to sample without it, (seeds,)."""
        ratios = []
        for use in self.uses:
            seconds = use[f"{title}_trained"]["seconds"]
            ratios.append(seconds["loop"] / seconds["plain"])
        return np.array(ratios)


def uses(runs, records):
    """One policy with other numbers of refinements, and with image models that it never saw."""
    measured = Uses(records)
    lines, claims = refinements(measured)
    more_lines, more_claims = other_models(runs, measured)
    return lines + [""] + more_lines + [""] + table(CLAIM_HEAD, claims + more_claims)


def refinements(measured):
    """(lines of a table, rows of claims) of the policy with 1 to 5 refinements."""
    rows = []
    for count in (1, 2, 3, 5):
        title = f"refinements_{count}"
        row = [str(count), f"{measured.scores(title, 'untrained', LOOP).mean():.3f}"]
        row.append(level(measured.scores(title, "trained", LOOP)))
        row.append(level(measured.scores(title, "trained", APRIORI)))
        row.append(level(measured.overhead(title), 2))
        rows.append(row + [str(PAPER_OVERHEAD.get(count, ""))])
    head = ["refinements", "untrained policy", "trained", "written beforehand"]
    head += ["time over that of none", "the paper's"]

    most = measured.scores("refinements_5", "trained", LOOP)
    more = most - measured.scores("refinements_1", "trained", LOOP)
    what = "more refinements by the same policy help, 5 minus 1"
    claims = [[what, "rises", signed(more), direction(more, 1)]]
    overhead = measured.overhead("refinements_5")
    is_quick = interval(overhead)[1] <= PAPER_OVERHEAD[5]
    outcome = "holds here" if is_quick else "does not hold here"
    what = "5 refinements: time over that of none"
    claims.append([what, str(PAPER_OVERHEAD[5]), level(overhead, 2), outcome])
    return table(head, rows), claims


def other_models(runs, measured):
    """(lines of a table, rows of claims) of the policy with other image models than in its training."""
    first = runs[FULL][0]["metrics"][0]
    trained = last(runs[FULL], LOOP)
    gain_in_training = trained - first[SCORE]
    scores = f"{first[SCORE]:.3f}, {level(trained)}"
    untrained_gain = f"{first[LOOP] - first[SCORE]:+.3f}"
    rows = [["tiny/sd3, in training", scores, untrained_gain, signed(gain_in_training), "", ""]]
    models = (
        ("second_model", "tiny/sd3b, never seen", ""),
        ("flow_grpo", "tiny/sd3 with a Flow-GRPO LoRA", "69 to 80%"),
    )
    gains = {}
    kept = {}
    for title, what, paper in models:
        base = measured.scores(title, "trained", SCORE)
        loop = measured.scores(title, "trained", LOOP)
        gains[title] = loop - base
        kept[title] = gains[title] / gain_in_training
        untrained_gain = (measured.scores(title, "untrained", LOOP) - base).mean()
        row = [what, f"{base.mean():.3f}, {level(loop)}", f"{untrained_gain:+.3f}", signed(gains[title])]
        rows.append(row + [share_of_gain(kept[title]), paper])
    head = ["image model", "alone, with the policy", "gain by the untrained policy", "gain"]
    head += ["of the gain in training", "the paper's"]

    gain = gains["second_model"]
    what = "a model never seen is helped"
    claims = [[what, "FLUX.1-dev, +0.245", signed(gain), direction(gain, 1)]]
    is_kept = interval(kept["flow_grpo"])[0] >= 0.69
    outcome = "holds here" if is_kept else "does not hold here"
    what = "of its gain is kept beside a Flow-GRPO LoRA"
    claims.append([what, "69 to 80%", share_of_gain(kept["flow_grpo"]), outcome])
    return table(head, rows), claims


def share_of_gain(values):
    """'82% [78%, 85%]' of shares (seeds,)."""
    low, high = interval(values)
    return f"{values.mean():.0%} [{low:.0%}, {high:.0%}]"
