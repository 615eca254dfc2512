"""Puts the parts of trained PromptRL runs together anew: a flow model with another language model.

    python -m benchmark.swap_promptrl_models [--seeds 1 2 3] [--results FOLDER]

Takes the newest run of each seed that run_seeds.py made on this machine, and evaluates `promptrl.py` at
iteration 0 with the models that PAIRS names. Writes benchmark/results/promptrl_swapped_models/seed-SEED.json.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import promptrl
from benchmark.records import (
    RESULTS,
    ROOT,
    circumstances,
    missing_seeds,
    newest_run,
    record_path,
    write_record,
)

SETTING = "promptrl_swapped_models"


class Pair(NamedTuple):
    """Which models to put together. None: the untrained one."""

    flow_setting: str | None
    lm_setting: str | None
    lm_of_next_seed: bool = False


PAIRS = {
    "flow_only": Pair("promptrl/flow_only", None),
    "flow": Pair("promptrl/default", None),
    "lm": Pair(None, "promptrl/default"),
    "both": Pair("promptrl/default", "promptrl/default"),
    "other": Pair("promptrl/default", "promptrl/default", lm_of_next_seed=True),
}


def evaluate(flow, lm):
    """The strict scores of a trained flow model with a trained rewriter, folders of runs or None."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(ROOT / "tiny" / "sd3", folder / "sd3")
        if flow:
            shutil.copytree(flow / "transformer", folder / "sd3" / "transformer", dirs_exist_ok=True)
        args = promptrl.Args(num_iterations=0, model=str(folder / "sd3"), output_dir=str(folder))
        if lm:
            args.lm = str(lm / "lm")
        run_dir = promptrl.train(args)
        (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    return {name: value for name, value in metrics.items() if name.startswith("eval/geneval_strict")}


def swap(seeds, results):
    """Evaluates all pairs for the seeds that have no record."""
    command = f"python -m benchmark.swap_promptrl_models --seeds {' '.join(map(str, seeds))}"
    for seed in missing_seeds(SETTING, seeds, results):
        next_seed = seeds[(seeds.index(seed) + 1) % len(seeds)]
        folders = {}  # of all runs, before the first evaluation: one may be missing
        for title, pair in PAIRS.items():
            lm_seed = next_seed if pair.lm_of_next_seed else seed
            flow = newest_run(pair.flow_setting, seed) if pair.flow_setting else None
            lm = newest_run(pair.lm_setting, lm_seed) if pair.lm_setting else None
            folders[title] = (flow, lm)
        record = {"command": command, "seed": seed}
        record |= circumstances(torch.get_num_threads())
        record["swaps"] = {title: evaluate(flow, lm) for title, (flow, lm) in folders.items()}
        write_record(record_path(SETTING, seed, results), record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all records")
    args = parser.parse_args()
    swap(args.seeds, args.results)
