"""Tables of PromptRL and its parts, from runs {setting: records}: lines of Markdown.

`swaps` are the evaluations of swap_promptrl_models.py: for each seed, {title: scores}.
"""

import numpy as np

from benchmark.markdown import before_after, direction, each, level, share, signed, table, verdict
from benchmark.records import settings_of
from benchmark.seed_statistics import SCORE, efficiency, interval, last, num_images

ENHANCED = SCORE + "_enhanced"  # with the language model's rewrites
FLOW_ONLY = "promptrl/flow_only"
FROZEN_LM = "promptrl/frozen_lm"
LM_ONLY = "promptrl/lm_only"
FULL = "promptrl/default"
PARTS = {  # setting -> (what is trained, the paper's score of GenEval without rewrites)
    FLOW_ONLY: ("the flow model alone, no rewrites (m = 8)", ""),
    FROZEN_LM: ("the flow model, on rewrites of the frozen language model (m = 2)", ""),
    LM_ONLY: ("the language model alone (m = 2)", ""),
    "promptrl/0_original_prompts": ("both, m = 0", ".83"),
    "promptrl/1_original_prompt": ("both, m = 1", ".76"),
    FULL: ("both, m = 2: PromptRL", ".94"),
    "promptrl/4_original_prompts": ("both, m = 4", ".92"),
}
RETENTION = {  # setting -> (m, by how much the paper's m = 2 is above it)
    "promptrl/0_original_prompts": (0, 0.11),
    "promptrl/1_original_prompt": (1, 0.18),
    "promptrl/4_original_prompts": (4, 0.02),
}
TAG_SCORES = {  # reward of a tag -> its metric
    "geneval": SCORE,
    "ocr": "eval/ocr",
    "jpeg": "eval/jpeg",
}
TAG_PAPER = {  # reward of a tag -> the paper's three rewards: with specialists, at once
    "geneval": "GenEval .97, .93",
    "ocr": "OCR .98, .96",
    "jpeg": "PickScore 24.05, 23.94",
}


def has_rewrites(group):
    """Whether a setting's runs were evaluated with rewrites too."""
    return ENHANCED in group[0]["metrics"][0]


def parts(runs):
    """Scores with and without rewrites at equal images, and images to the flow-only run's final score."""
    rows = []
    for setting, (what, paper) in PARTS.items():
        if setting not in runs:
            continue
        group = runs[setting]
        row = [what, f"{num_images(group, SCORE):,.0f}"]
        for suffix in ("", "_enhanced", "_paraphrased", "_paraphrased_enhanced"):
            is_missing = suffix.endswith("enhanced") and not has_rewrites(group)
            row.append("" if is_missing else before_after(group, SCORE + suffix))
        score = ENHANCED if has_rewrites(group) else SCORE
        row.append(share(*efficiency(group, runs[FLOW_ONLY], score)))
        rows.append(row + [paper])
    head = ["trained", "images", "as they are", "with rewrites", "paraphrased", "paraphrased, with rewrites"]
    head += ["images to the first row's final score", "the paper, as they are"]
    return table(head, rows)


def judged_with_rewrites(group):
    """Runs whose score with rewrites stands in the place of the score of the prompts as they are."""
    judged = []
    for run in group:
        rows = []
        for row in run["metrics"]:
            rows.append(row | {SCORE: row[ENHANCED]} if ENHANCED in row else row)
        judged.append(run | {"metrics": rows})
    return judged


def claims(runs, swaps):
    """What the paper says, what came out, and a verdict."""
    needed = efficiency(runs[FULL], runs[FLOW_ONLY], ENHANCED)
    high = needed[2]
    rows = [["images to flow-only's final score", "about 50%", share(*needed), verdict(high, 0.5)]]
    if FROZEN_LM in runs:  # the fairer question: both have rewrites from the start
        needed = efficiency(runs[FULL], judged_with_rewrites(runs[FROZEN_LM]), ENHANCED)
        what = "images to the final score, with rewrites, of the frozen language model's run"
        rows.append([what, "", share(*needed), ""])
    if LM_ONLY in runs:
        what = "with rewrites, both trained minus the language model alone"
        difference = last(runs[FULL], ENHANCED) - last(runs[LM_ONLY], ENHANCED)
        rows.append(claim(what, ".97, .76 (RePrompt)", difference, 1))
    for setting, (m, paper) in RETENTION.items():
        if setting in runs:
            difference = last(runs[FULL], SCORE) - last(runs[setting], SCORE)
            what = f"prompts as they are, m = 2 minus m = {m}"
            rows.append(claim(what, f"{paper:+.2f}", difference, 1))
    if swaps:
        rows += swap_claims(runs, swaps)
    return table(["claim", "the paper", "here", "verdict"], rows)


def claim(what, paper, differences, sign):
    """The row of a claim that a difference has this sign."""
    return [what, paper, signed(differences), direction(differences, sign)]


def swap_claims(runs, swaps):
    """The rows about trained parts that are put together with others."""

    def scores(title):
        return np.array([swap[title][ENHANCED] for swap in swaps])

    base = np.array([run["metrics"][0][ENHANCED] for run in runs[FULL]])
    return [
        claim(
            "the trained rewriter swapped for another (here: for the untrained one)",
            "-0.09",
            scores("flow") - scores("both"),
            -1,
        ),
        claim(
            "the trained rewriter swapped for that of another seed",
            "-0.09",
            scores("other") - scores("both"),
            -1,
        ),
        claim(
            "the trained rewriter with the base model, minus the untrained one",
            "SD3 +0.19, minus no rewriter",
            scores("lm") - base,
            1,
        ),
    ]


def paraphrases(runs, swaps):
    """Flow models on the prompts, on held-out synonyms, and on rewrites of the untrained language model."""
    wordings = (SCORE, SCORE + "_paraphrased", ENHANCED)
    first = runs[FULL][0]["metrics"][0]
    base_scores = [f"{first[score]:.3f}" for score in wordings]
    rows = [["the base model"] + base_scores + [".58, .63 (SD3)"]]
    flow_models = (
        ("flow_only", "flow-only", ".92, .81 (Flow-GRPO)"),
        ("flow", "PromptRL's flow model", "not tested"),
    )
    for title, what, paper in flow_models:
        row = [what]
        for score in wordings:
            row.append(level(np.array([swap[title][score] for swap in swaps])))
        rows.append(row + [paper])
    head = ["", "as they are", "held-out synonyms", "the untrained model's rewrites"]
    head += ["the paper, as they are and rewritten by an untrained model"]
    return table(head, rows)


def trials(runs):
    """Runs that settings were chosen from: flags, seeds, images, final scores, the rewriter's entropy."""
    rows = []
    for group in settings_of(runs, "promptrl_trials").values():
        flags = group[0]["command"].removeprefix("python promptrl.py ").rsplit(" --seed ", 1)[0]
        seeds = ", ".join(str(run["seed"]) for run in group)
        row = [f"`{flags}`", group[0]["commit"], seeds]
        row += [f"{num_images(group, SCORE):,.0f}", each(last(group, SCORE))]
        if has_rewrites(group):
            entropies = [run["metrics"][-1]["losses/lm_entropy"] for run in group]
            row += [each(last(group, ENHANCED)), each(entropies)]
        else:
            row += ["", ""]
        rows.append(row)
    head = ["flags, on top of that commit's defaults", "commit", "seeds", "images"]
    head += ["as they are", "with rewrites", "last entropy"]
    return table(head, rows)


def tags(runs):
    """One run on several rewards against a specialist for each, on as many images of each kind."""
    rows = []
    for name, score in TAG_SCORES.items():
        score += "_enhanced"
        specialist = runs[f"promptrl_tags/{name}"]
        row = [name, before_after(specialist, score)]
        for joint in ("promptrl_tags/two", "promptrl_tags/all"):
            if score in runs[joint][0]["metrics"][0]:
                difference = last(runs[joint], score) - last(specialist, score)
                row += [before_after(runs[joint], score), signed(difference)]
            else:  # its prompts are not judged by this reward
                row += ["", ""]
        is_worse = interval(difference)[1] < 0  # of all three rewards, which come last
        outcome = "does not hold here" if is_worse else "holds here: no worse than the specialist"
        rows.append(row + [TAG_PAPER[name], outcome])
    head = ["reward", "specialist", "GenEval and OCR", "minus the specialist", "all three"]
    head += ["minus the specialist", "the paper: specialists, all three", "verdict"]
    return table(head, rows)
