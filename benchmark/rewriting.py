"""Compares PromptRL with its parts, from benchmark/results/*.json; `python -m benchmark.plot` writes it.

Intervals are compare.py's. `swaps` are the evaluations of benchmark/swap.py, {title: scores} a seed.
"""

import numpy as np

from benchmark.compare import SCORE, curves, efficiency, interval, percent, signed, verdict

ENHANCED = SCORE + "_enhanced"  # with the language model's rewrites
FLOW_ONLY, FULL = "promptrl_flow_only", "promptrl"
RUNS = {  # name of the runs -> (what is trained, the paper's score without rewrites of GenEval)
    FLOW_ONLY: ("the flow model alone, no rewrites (m = 8)", ""),
    "promptrl_frozen_lm": ("the flow model, on rewrites of the frozen language model (m = 2)", ""),
    "promptrl_lm_only": ("the language model alone (m = 2)", ""),
    "promptrl_m0": ("both, m = 0", ".83"),
    "promptrl_m1": ("both, m = 1", ".76"),
    FULL: ("both, m = 2: PromptRL", ".94"),
    "promptrl_m4": ("both, m = 4", ".92"),
}
RETENTION = {
    "promptrl_m0": 0.11,
    "promptrl_m1": 0.18,
    "promptrl_m4": 0.02,
}  # by which the paper's m = 2 is above
TRIALS = ("promptrl_lr_", "promptrl_flow_w", "promptrl_window2")  # beginnings of names
SCORES = {  # of a reward by tags -> its metric
    "geneval": SCORE,
    "ocr": "eval/ocr",
    "jpeg": "eval/jpeg",
}
TAGGED = {  # of a reward by tags -> the paper's three rewards: with specialists, at once
    "geneval": "GenEval .97, .93",
    "ocr": "OCR .98, .96",
    "jpeg": "PickScore 24.05, 23.94",
}


def table(head, rows):
    """Lines of a Markdown table; a row's cells are strings."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def before_after(runs, score):
    """'before, after [interval of after]' of a score, means over seeds."""
    values = curves(runs, score)[2]
    return f"{values[:, 0].mean():.3f}, {level(values[:, -1])}"


def level(values, digits=3):
    """'mean [low, high]' of scores (seeds,)."""
    low, high = interval(values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def last(runs, score):
    """Final value of a score, (seeds,)."""
    return curves(runs, score)[2][:, -1]


def direction(differences, claim):
    """On the claim that a difference has this sign, by its interval over seeds."""
    low, high = interval(differences)
    if low <= 0 <= high:
        return "not seen here: the interval has zero in it"
    return "holds here" if (low > 0) == (claim > 0) else "does not hold here, it is the other way round"


def parts(runs):
    """Scores of the prompts as they are and with rewrites, at equal images, and images to flow-only's end."""
    head = ["trained", "images", "as they are", "with rewrites", "paraphrased", "paraphrased, with rewrites"]
    head += ["images to the first row's final score", "the paper, as they are"]
    rows = []
    for name, (what, paper) in [item for item in RUNS.items() if item[0] in runs]:
        group, cells = runs[name], [what]
        rewrites = ENHANCED in group[0]["metrics"][0]
        cells += [f"{curves(group, SCORE)[0][:, -1].mean():,.0f}"]
        for suffix in ("", "_enhanced", "_paraphrased", "_paraphrased_enhanced"):
            missing = not rewrites and suffix.endswith("enhanced")
            cells += ["" if missing else before_after(group, SCORE + suffix)]
        estimate, low, high = efficiency(group, runs[FLOW_ONLY], ENHANCED if rewrites else SCORE)
        rows += [[*cells, f"{percent(estimate)} [{percent(low)}, {percent(high)}]", paper]]
    return table(head, rows)


def rewritten(runs):
    """The runs with their score with rewrites in the place of the score of the prompts as they are."""
    return [
        run
        | {"metrics": [row | {SCORE: row[ENHANCED]} if ENHANCED in row else row for row in run["metrics"]]}
        for run in runs
    ]


def claims(runs, swaps):
    """What the paper says, what came out, and a verdict."""
    rows = []
    estimate, low, high = efficiency(runs[FULL], runs[FLOW_ONLY], ENHANCED)
    share = f"{percent(estimate)} [{percent(low)}, {percent(high)}]"
    rows += [["images to flow-only's final score", "about 50%", share, verdict(high, 0.5)]]
    if "promptrl_frozen_lm" in runs:  # the fairer question: both have rewrites from the start
        frozen = rewritten(runs["promptrl_frozen_lm"])
        estimate, low, high = efficiency(runs[FULL], frozen, ENHANCED)
        share = f"{percent(estimate)} [{percent(low)}, {percent(high)}]"
        rows += [
            ["images to the final score, with rewrites, of the frozen language model's run", "", share, ""]
        ]
    if "promptrl_lm_only" in runs:
        change = last(runs[FULL], ENHANCED) - last(runs["promptrl_lm_only"], ENHANCED)
        what = "with rewrites, both trained less the language model alone"
        rows += [[what, ".97, .76 (RePrompt)", signed(change), direction(change, 1)]]
    full = last(runs[FULL], SCORE)
    for name, claim in [item for item in RETENTION.items() if item[0] in runs]:
        change = full - last(runs[name], SCORE)
        what = f"prompts as they are, m = 2 less m = {name[-1]}"
        rows += [[what, f"{claim:+.2f}", signed(change), direction(change, claim)]]
    if swaps:
        own, untrained = (np.array([swap[title][ENHANCED] for swap in swaps]) for title in ("both", "flow"))
        what = "the trained rewriter swapped for another (here: for the untrained one)"
        rows += [[what, "-0.09", signed(untrained - own), direction(untrained - own, -1)]]
        other = np.array([swap["other"][ENHANCED] for swap in swaps])
        what = "the trained rewriter swapped for that of another seed"
        rows += [[what, "-0.09", signed(other - own), direction(other - own, -1)]]
        base = np.array([run["metrics"][0][ENHANCED] for run in runs[FULL]])
        moved = np.array([swap["lm"][ENHANCED] for swap in swaps])
        what = "the trained rewriter with the base model, less the untrained one"
        rows += [[what, "SD3 +0.19, less no rewriter", signed(moved - base), direction(moved - base, 1)]]
    return table(["claim", "the paper", "here", "verdict"], rows)


def paraphrases(runs, swaps):
    """Each flow model on the prompts, on held-out synonyms and on the untrained language model's rewrites."""
    first = runs[FULL][0]["metrics"][0]
    wordings = (SCORE, SCORE + "_paraphrased", ENHANCED)
    rows = [["the base model", *(f"{first[score]:.3f}" for score in wordings), ".58, .63 (SD3)"]]
    for title, what, paper in (
        ("flow_only", "flow-only", ".92, .81 (Flow-GRPO)"),
        ("flow", "PromptRL's flow model", "not tested"),
    ):
        values = [np.array([swap[title][score] for swap in swaps]) for score in wordings]
        rows += [[what, *map(level, values), paper]]
    head = ["", "as they are", "held-out synonyms", "the untrained model's rewrites"]
    return table([*head, "the paper, as they are and rewritten by an untrained model"], rows)


def trials(runs):
    """Runs that settings were chosen from: flags, seeds, images, final scores, the rewriter's entropy."""
    rows = []
    for name in sorted(name for name in runs if name.startswith(TRIALS)):
        group = runs[name]
        flags = group[0]["command"].removeprefix("python promptrl.py ").rsplit(" --seed ", 1)[0]
        cells = [f"`{flags}`", group[0]["commit"], ", ".join(str(run["seed"]) for run in group)]
        cells += [f"{curves(group, SCORE)[0][:, -1].mean():,.0f}", each(last(group, SCORE))]
        rewrites = ENHANCED in group[0]["metrics"][0]
        cells += [each(last(group, ENHANCED)) if rewrites else ""]
        entropies = [run["metrics"][-1]["losses/lm_entropy"] for run in group]
        rows += [[*cells, each(entropies) if rewrites else ""]]
    head = [
        "flags, on top of that commit's defaults",
        "commit",
        "seeds",
        "images",
        "as they are",
        "with rewrites",
    ]
    return table([*head, "last entropy"], rows)


def each(values):
    return ", ".join(f"{value:.3f}" for value in values)


def tags(runs):
    """One run on several rewards against a specialist for each, on as many images of each kind."""
    rows = []
    for name, score in SCORES.items():
        score += "_enhanced"
        alone, cells = runs[f"promptrl_tags_{name}"], []
        for joint in ("promptrl_tags_two", "promptrl_tags_all"):
            judged = score in runs[joint][0]["metrics"][0]
            change = last(runs[joint], score) - last(alone, score) if judged else None
            cells += [before_after(runs[joint], score), signed(change)] if judged else ["", ""]
        worse = interval(change)[1] < 0  # of all three
        outcome = "does not hold here" if worse else "holds here: no worse than the specialist"
        rows += [[name, before_after(alone, score), *cells, TAGGED[name], outcome]]
    head = [
        "reward",
        "specialist",
        "GenEval and OCR",
        "less the specialist",
        "all three",
        "less the specialist",
    ]
    return table([*head, "the paper: specialists, all three", "verdict"], rows)
