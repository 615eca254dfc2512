"""Runs one setting of an algorithm on several seeds, and keeps a record of each run.

    python -m benchmark.run_seeds SETTING FILE.py --seeds 1 2 3 [--jobs 2 --threads 1] [-- FLAGS OF THE FILE]

For example, `python -m benchmark.run_seeds flow_grpo/default flow_grpo.py --seeds 1 2 3` writes
benchmark/results/flow_grpo/default/seed-1.json and so on: the command with all flags, commit, versions, date,
machine, seconds, hashes of models and prompt files, the rows of metrics.jsonl, and the score of each image
that was evaluated first and last. The runs themselves are in runs/benchmark/.

In the flags, {seed} stands for the seed, and {fold} for a fold of the tiny world: seed 1 has fold 0, seed 2
has fold 1, and so on. So an average over seeds is an average over prompts and noises, too:

    python -m benchmark.run_seeds flow_grpo/default flow_grpo.py -- \\
        --eval-noises 4 --eval-seed {seed} --eval-wordings \\
        --prompts tiny/prompts/fold_{fold}/train.jsonl --eval-prompts tiny/prompts/fold_{fold}/test.jsonl

A seed that has a record is not run again, so an interrupted command can be given once more. In a clone of
this repository the records of docs/ exist. To reproduce them, add --results runs/records.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmark.records import (
    RESULTS,
    ROOT,
    RUNS,
    circumstances,
    hash_of,
    missing_seeds,
    record_path,
    versions,
    write_record,
)
from tiny import splits


def fold_of(seed):
    """The fold of the tiny world that a seed has."""
    return (seed - 1) % splits.FOLDS


def fill(flags, seed):
    """The flags of a seed's run: {seed} and {fold} replaced by their numbers."""
    return [flag.replace("{fold}", str(fold_of(seed))).replace("{seed}", str(seed)) for flag in flags]


def image_scores(run_dir, iteration):
    """{evaluation: [scores of the rows, for each noise]} of an iteration: strict ones, or else the reward."""
    evaluations = {}
    for line in (run_dir / "scores" / f"{iteration:06d}.jsonl").read_text().splitlines():
        image = json.loads(line)
        noises = evaluations.setdefault(image["evaluation"], {})
        score = image.get("geneval_strict", image.get("edit_strict", image["reward"]))
        noises.setdefault(image["noise"], []).append(score)
    return {name: [shortened(scores) for scores in noises.values()] for name, noises in evaluations.items()}


def shortened(scores):
    """Scores that are all 0 or 1 as a string of these digits; others rounded. None is an unscored image."""
    if all(score in (0, 1) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return [None if score is None else round(score, 4) for score in scores]


def contents_of(run_dir):
    """What a finished run's folder adds to its record."""
    flags = json.loads((run_dir / "args.json").read_text())
    flags.pop("output_dir")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    paths = [flags[name] for name in ("model", "lm", "prompts", "eval_prompts") if name in flags]
    return {
        "args": flags,
        "sha256": {path: hash_of(ROOT / path) for path in paths if (ROOT / path).exists()},
        "metrics": metrics,
        "first images": image_scores(run_dir, 0),
        "last images": image_scores(run_dir, metrics[-1]["iteration"]),
    }


def start(setting, seed, script, flags, threads):
    """Starts a run in the background: (process, the record that its results will join)."""
    output_dir = RUNS / setting / f"seed-{seed}-{int(time.time())}"
    flags = fill(flags, seed)
    command = [script] + flags + ["--seed", str(seed)]
    record = {"name": setting, "seed": seed, "command": " ".join(["python"] + command)}
    record |= circumstances(threads) | {"versions": versions()}
    record["output_dir"] = output_dir
    record["began"] = time.time()
    words = [sys.executable] + command
    words += ["--output-dir", str(output_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    return process, record


def finish(process, record, results, measure_diversity):
    """Waits for a run and writes its record."""
    if process.wait() != 0:
        raise SystemExit(f"{record['command']} failed with exit code {process.returncode}")
    (run_dir,) = record.pop("output_dir").iterdir()
    record["seconds"] = round(time.time() - record.pop("began"), 1)
    record |= contents_of(run_dir)
    path = record_path(record["name"], record["seed"], results)
    write_record(path, record)
    transformer = run_dir / "transformer"
    is_on_geneval = "eval/geneval" in record["metrics"][-1]
    is_measured_model = record["args"]["model"] == "tiny/sd3"
    if measure_diversity and is_on_geneval and is_measured_model and transformer.exists():
        from benchmark.measure_diversity import (
            diversity,
        )  # here: it loads torch, which --help need not wait for

        record["diversity"] = {"before": diversity(None), "after": diversity(transformer)}
        write_record(path, record)


def run_seeds(args, flags):
    """Runs the seeds that have no record, args.jobs at a time."""
    measure_diversity = not args.no_diversity
    running = []
    for seed in missing_seeds(args.setting, args.seeds, args.results):
        if len(running) == args.jobs:
            process, record = running.pop(0)
            finish(process, record, args.results, measure_diversity)
        running.append(start(args.setting, seed, args.script, flags, args.threads))
    for process, record in running:
        finish(process, record, args.results, measure_diversity)


def parse(words):
    """(own options, flags of the algorithm file), which stand after a "--"."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", help="folder of the records, such as flow_grpo/default")
    parser.add_argument("script", help="algorithm file, such as flow_grpo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    num_cores = os.cpu_count()
    parser.add_argument("--threads", type=int, default=num_cores, help="threads of each run")
    parser.add_argument("--no-diversity", action="store_true", help="do not measure the images' diversity")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all records")
    flags = []
    if "--" in words:
        position = words.index("--")
        flags = words[position + 1 :]
        words = words[:position]
    return parser.parse_args(words), flags


if __name__ == "__main__":
    args, flags = parse(sys.argv[1:])
    run_seeds(args, flags)
