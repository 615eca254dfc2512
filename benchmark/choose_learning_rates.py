"""Tries five learning rates of an algorithm file, on the development prompts.

    python -m benchmark.choose_learning_rates flow_grpo [--jobs 2 --threads 1]

Every file gets the same budget: five learning rates, two seeds, 16 iterations, evaluated on the development
prompts of fold 0 with two noises per prompt. Neither the seeds nor the prompts are those of reported numbers.
The records are in benchmark/results/trials/<file>/. A file may have up to ten free runs beside them, like

    python -m benchmark.run_seeds trials/flow_grpo/window_4 flow_grpo.py --seeds 11 -- --sde-window 4

with the flags that --show prints.
"""

import argparse
import os
import shutil
import subprocess
import sys

from benchmark.records import ROOT, RUNS

SEEDS = ("11", "12")
LEARNING_RATES = {  # of each file: the flag, and what is tried
    "flow_grpo": ("--learning-rate", ["1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3"]),
    "superflow": ("--learning-rate", ["1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3"]),
    "fdfo": ("--learning-rate", ["2e-4", "4e-4", "8e-4", "1.6e-3", "3.2e-3"]),
    "promptrl": ("--lm-learning-rate", ["2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"]),
    "promptloop": ("--lm-learning-rate", ["2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"]),
}


# A copy of the development prompts alone: beside the original are paraphrases, which would be evaluated, too.
DEV_FILE = RUNS / "prompts" / "dev.jsonl"
TRIAL_FLAGS = {  # what all trial runs share
    "--num-iterations": "16",
    "--save-every": "16",
    "--eval-every": "16",
    "--eval-noises": "2",
    "--eval-prompts": str(DEV_FILE.relative_to(ROOT)),
}


def make_dev_file():
    """Copies the development prompts of fold 0 to DEV_FILE."""
    DEV_FILE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tiny/prompts/fold_0/dev.jsonl", DEV_FILE)


def trial_flags():
    """TRIAL_FLAGS as a list of words."""
    return [word for flag_and_value in TRIAL_FLAGS.items() for word in flag_and_value]


def commands(algorithm, jobs, threads):
    """The commands that try the learning rates of an algorithm file, one per rate."""
    flag, rates = LEARNING_RATES[algorithm]
    lines = []
    for rate in rates:
        lines.append(
            [
                *(sys.executable, "-m", "benchmark.run_seeds"),
                *(f"trials/{algorithm}/{rate}", f"{algorithm}.py"),
                *("--seeds", *SEEDS, "--jobs", str(jobs), "--threads", str(threads), "--no-diversity"),
                *("--", *trial_flags(), flag, rate),
            ]
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithm", choices=LEARNING_RATES)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--show", action="store_true", help="print the flags of a trial run, and run nothing")
    args = parser.parse_args()
    make_dev_file()
    if args.show:
        print(" ".join(trial_flags()))
    else:
        for command in commands(args.algorithm, args.jobs, args.threads):
            subprocess.run(command, cwd=ROOT, check=True)
