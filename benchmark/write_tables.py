"""Writes the tables of the second edition into README.md, docs/results.md and the pages of tiny/.

    python -m benchmark.write_tables

Each table stands between two comments, such as <!-- baselines --> and <!-- end -->. The numbers come from
benchmark/results/: from the baselines (measure_baselines) and from the runs (run_seeds).
"""

import json
import re
from pathlib import Path

import numpy as np

from benchmark import arm_tables
from benchmark.choose_learning_rates import TRIAL_FLAGS
from benchmark.inference import claim_row
from benchmark.markdown import table
from benchmark.records import RESULTS, ROOT
from rewards.geneval.detection import TAGS
from tiny.world import EDITS

DOCUMENTS = (
    "README.md",
    "docs/results.md",
    "docs/log.md",
    "docs/promptrl.md",
    "tiny/README.md",
    "tiny/sd3b/README.md",
    "tiny/flux/README.md",
)
ALGORITHMS = {
    "flow_grpo": "Flow-GRPO",
    "superflow": "SuperFlow",
    "fdfo": "FDFO",
    "promptrl": "PromptRL",
    "promptloop": "PromptLoop",
}
SCORES = {  # the strict score of the way of sampling that a file trains
    "promptrl": "eval/geneval_strict_enhanced",
    "promptloop": "eval/geneval_strict_loop",
}


def read_baselines(model, split, fold=0):
    """The record of measure_baselines on a fold."""
    return json.loads((RESULTS / "baselines" / model / f"fold-{fold}-{split}.json").read_text())


def fold_of_run(record):
    """The fold whose prompts a run was evaluated on."""
    found = re.search(r"fold_(\d)/test", record["command"])
    if not found:
        raise SystemExit(f"not evaluated on the test prompts of a fold: {record['command']}")
    return int(found[1])


def best_guidance(settings):
    """The best strict score that the base model has at any guidance scale."""
    names = [name for name in settings if name == "base" or name.startswith("guidance ")]
    return max(settings[name]["strict"] for name in names)


def baseline_rows(settings, tag_names):
    """Cells of each setting: its name, its strict score, the noises' standard deviation, and the tags."""
    rows = []
    for name, own in settings.items():
        count = len(own["images"])
        spread = "" if own["std_over_noises"] is None else f"{own['std_over_noises']:.3f}"
        tags = [f"{own['tags'][tag]:.3f}" for tag in tag_names]
        rows.append([name, f"{own['strict']:.3f}", f"{spread} ({count})", *tags])
    return rows


def source_of(record):
    """One line that says how a record came about."""
    return f"`{record['command']}`, commit {record['commit']}, {record['date']}, {record['machine']}."


def baselines_table(model, split, part="settings"):
    """A table of what a model scores before any training, with its source.

    part: "settings", of prompts to draw, or "edits".
    """
    record = read_baselines(model, split)
    tag_names = EDITS if part == "edits" else TAGS
    head = ["nothing is learned", "strict", "std over noises (number)", *tag_names]
    return table(head, baseline_rows(record[part], tag_names)) + ["", source_of(record)]


def texts_table(models):
    """A table of what models score on the texts of the development split, by OCR, at each guidance scale."""
    records = {model: read_baselines(model, "dev") for model in models}
    scales = max((list(record["ocr"]) for record in records.values()), key=len)
    rows = []
    for model, record in records.items():
        measured = [record["ocr"].get(scale) for scale in scales]
        cells = [f"{own['mean']:.3f} ({own['std_over_noises']:.3f})" if own else "" for own in measured]
        rows.append([f"tiny/{model}", *cells])
    return table(["OCR, mean (std over noises)", *[f"guidance {scale}" for scale in scales]], rows)


def read_test_runs(settings):
    """{algorithm: the records of its runs on test prompts}, of those that were measured.

    settings: a pattern of the folders' names: "default", "flux", or "superseded_*" for defaults that were
    replaced after they had been run on the test prompts.
    """
    runs = {}
    for algorithm in ALGORITHMS:
        paths = sorted((RESULTS / algorithm).glob(f"{settings}/seed-*.json"))
        if paths:
            runs[algorithm] = [json.loads(path.read_text()) for path in paths]
    return runs


def evaluated(record, score):
    """(first, last) value of an evaluated score in a run's metrics."""
    values = [row[score] for row in record["metrics"] if row.get(score) is not None]
    return values[0], values[-1]


def run_rows(runs):
    """Cells of each run: what its fold's baselines are, what it reached, and what it took.

    What compares a run with baselines that were not measured is left empty.
    """
    rows = []
    for algorithm, records in runs.items():
        score = SCORES.get(algorithm, "eval/geneval_strict")
        for record in records:
            fold = fold_of_run(record)
            model = Path(record["args"]["model"]).name
            before, after = evaluated(record, score)
            baselines = [""] * 3
            differences = [""] * 2
            if (RESULTS / "baselines" / model / f"fold-{fold}-test.json").exists():
                settings = read_baselines(model, "test", fold)["settings"]
                base, best = settings["base"]["strict"], best_guidance(settings)
                scripted = settings["scripted"]["strict"]
                baselines = [f"{value:.3f}" for value in (base, best, scripted)]
                differences = [f"{after - value:+.3f}" for value in (best, scripted)]
            rows.append(
                [
                    ALGORITHMS[algorithm],
                    str(record["seed"]),
                    str(fold),
                    *baselines,
                    f"{before:.3f}",
                    f"{after:.3f}",
                    *differences,
                    f"{record['metrics'][-1]['charts/num_images']:,}",
                    f"{record['seconds'] / 60:.1f}",
                ]
            )
    return rows


def claims_table():
    """What the default runs say: the difference of each seed, its 95% interval, and the verdict."""
    rows = []
    for algorithm, records in read_test_runs("default").items():
        score = SCORES.get(algorithm, "eval/geneval_strict")
        reference = "the scripted wording" if algorithm in SCORES else "the base at its best guidance"
        differences, gains = [], []
        for record in records:
            settings = read_baselines("sd3", "test", fold_of_run(record))["settings"]
            before, after = evaluated(record, score)
            unlearned = settings["scripted"]["strict"] if algorithm in SCORES else best_guidance(settings)
            differences.append(after - unlearned)
            gains.append(after - before)
        rows.append(claim_row(f"{ALGORITHMS[algorithm]} ends above {reference}", differences))
        if algorithm == "promptloop":
            rows.append(claim_row("PromptLoop ends above its own untrained policy", gains))
    return table(["claim", "difference of each seed", "mean, 95%", "verdict"], rows)


def runs_table(settings):
    """A table of runs on test prompts, with their sources."""
    runs = read_test_runs(settings)
    head = ["run", "seed", "fold", "base", "base at its best guidance", "scripted"]
    head += ["before training", "after training", "above the best guidance", "above scripted"]
    head += ["images", "minutes"]
    lines = table(head, run_rows(runs)) + [""]
    lines += ["- " + source_of(record) for records in runs.values() for record in records]
    return lines


def read_trials(experiment):
    """{algorithm: {setting: its records}} of the runs that settings were chosen from.

    experiment: the ending of the folders' names: "" for tiny/sd3, "_flux" for prompts on tiny/flux, "_edit"
    for edits.
    """
    trials = {}
    for algorithm in ALGORITHMS:
        paths = sorted((RESULTS / "trials" / f"{algorithm}{experiment}").glob("*/seed-*.json"))
        for path in paths:
            own = trials.setdefault(algorithm, {})
            own.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    return trials


def trained_score(record, algorithm):
    """The name of the score of a trial: the reward of edits, or else the strict score of prompts.

    It is that of the way of sampling that the run trained: without rewrites, where it had none.
    """
    if record["args"]["rewards"] == "edit":
        names = ["eval/edit_enhanced", "eval/edit"]
    else:
        names = [SCORES.get(algorithm, "eval/geneval_strict"), "eval/geneval_strict"]
    measured = set().union(*record["metrics"])
    return next(name for name in names if name in measured)


def own_flags(record):
    """The flags of a trial that change how it trains, without the seed and the number of iterations.

    The learning rate is among them, whether it was a flag or the default of the commit.
    """
    command = record["command"]
    for flag in (*TRIAL_FLAGS, "--seed"):
        command = re.sub(rf"{flag} \S+", "", command)
    flags = command.split()[2:]
    name = "lm_learning_rate" if "lm_learning_rate" in record["args"] else "learning_rate"
    flag = "--" + name.replace("_", "-")
    if flag not in flags:
        flags = [flag, f"{record['args'][name]:.1e}".replace("e-0", "e-").replace(".0e", "e"), *flags]
    return " ".join(flags)


def trials_table(experiment="", plain_score=None):
    """A table of all trials, the best last: flags, seeds, and the score on the dev prompts or dev edits.

    plain_score: a score of plain prompts that gets two more columns, its means before and after training.
    """
    rows = []
    for algorithm, settings in read_trials(experiment).items():
        own = []
        for records in settings.values():
            score = trained_score(records[0], algorithm)
            before, after = np.array([evaluated(record, score) for record in records]).T
            cells = [
                ALGORITHMS[algorithm],
                f"`{own_flags(records[0])}`",
                records[0]["commit"],
                ", ".join(str(record["seed"]) for record in records),
                f"{records[0]['metrics'][-1]['charts/num_images']:,}",
                f"{before.mean():.3f}",
                ", ".join(f"{value:.3f}" for value in after),
                f"{after.mean():.3f}",
            ]
            if plain_score:
                pairs = [evaluated(record, plain_score) for record in records]
                cells += [f"{mean:.3f}" for mean in np.mean(pairs, axis=0)]
            own.append((after.mean(), cells))
        own.sort(key=lambda row: row[0])
        rows += [cells for _, cells in own]
    head = ["file", "flags, on top of the commit's defaults", "commit", "seeds", "images", "dev, before"]
    head += ["after, of each seed", "mean"]
    if plain_score:
        head += ["without rewrites: before", "after"]
    return table(head, rows)


def short_table():
    """The README's table: the baselines in one column, and what the default runs reach, on the same folds."""
    runs = read_test_runs("default")
    folds = sorted({fold_of_run(record) for records in runs.values() for record in records})
    settings = [read_baselines("sd3", "test", fold)["settings"] for fold in folds]
    rows = []
    for name in settings[0]:
        mean = np.mean([own[name]["strict"] for own in settings])
        rows.append([f"nothing is learned: {name}", f"{mean:.3f}"])
    for algorithm, records in runs.items():
        if {fold_of_run(record) for record in records} != set(folds):
            raise SystemExit(f"the default runs of {algorithm} are on other folds than the others")
        score = SCORES.get(algorithm, "eval/geneval_strict")
        after = np.mean([evaluated(record, score)[1] for record in records])
        rows.append([ALGORITHMS[algorithm], f"{after:.3f}"])
    names = ", ".join(str(fold) for fold in folds)
    return table([f"test prompts, mean of the folds {names}", "strict"], rows)


def wordings_table():
    """A row per algorithm: means over the default runs before and after training, for each wording."""
    rows = []
    for algorithm, records in read_test_runs("default").items():
        name, _, way = SCORES.get(algorithm, "eval/geneval_strict").partition("strict")
        cells = []
        for wording in ("", "_paraphrased", "_hard"):
            pairs = [evaluated(record, f"{name}strict{wording}{way}") for record in records]
            before, after = np.mean(pairs, axis=0)
            cells += [f"{before:.3f}", f"{after:.3f}"]
        rows.append([ALGORITHMS[algorithm], *cells])
    head = ["mean over the runs"]
    for wording in ("as in training", "paraphrased", "hard"):
        head += [f"{wording}: before", "after"]
    return table(head, rows)


def busy_cores_table():
    """A table of the time of the same work with one and two threads, beside an idle and a busy core."""
    record = json.loads((RESULTS / "speed/busy_cores.json").read_text())
    ratios = record["ratio_to_one_thread"]
    rows = []
    for case, ratio in ratios.items():
        threads, neighbour = case.split(", beside ")
        if neighbour == "an idle core":
            rows.append([threads, f"{ratio:.2f}", f"{ratios[f'{threads}, beside a busy core']:.2f}"])
    head = ["time, as a multiple of one thread's", "the other core is idle", "the other core is busy"]
    return table(head, rows) + ["", source_of(record)]


def fill(text, name, lines):
    """The text with these lines between the comments <!-- name --> and <!-- end -->, where it has them."""
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text, flags=re.DOTALL)


def write_tables():
    """Fills all tables of all documents."""
    tables = {
        "results": short_table(),
        "baselines": baselines_table("sd3", "test"),
        "baselines on dev": baselines_table("sd3", "dev"),
        "second model on dev": baselines_table("sd3b", "dev"),
        "flux on dev": baselines_table("flux", "dev"),
        "edits on dev": baselines_table("flux", "dev", "edits"),
        "texts on dev": texts_table(["sd3", "sd3b", "flux"]),
        "default runs": runs_table("default"),
        "claims": claims_table(),
        "superseded runs": runs_table("superseded_*"),
        "flux runs": runs_table("flux"),
        "trials": trials_table(),
        "flux trials": trials_table("_flux"),
        "edit trials": trials_table("_edit", plain_score="eval/edit"),
        "wordings": wordings_table(),
        "busy cores": busy_cores_table(),
        "promptrl arms": arm_tables.arms_table("promptrl"),
        "promptrl claims": arm_tables.claims_table("promptrl"),
    }
    texts = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    for table_name in tables:
        if f"<!-- {table_name} -->" not in texts:
            raise SystemExit(f"no document has a place for the table: {table_name}")
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        for table_name, lines in tables.items():
            text = fill(text, table_name, lines)
        path.write_text(text)


if __name__ == "__main__":
    write_tables()
