"""Runs a group of the settings in benchmark/settings.py, or checks that a record can still be reproduced.

    python -m benchmark.run_group                           # lists the groups, and what is missing of each
    python -m benchmark.run_group defaults [--seeds 1 2] [--jobs 2 --threads 1]
    python -m benchmark.run_group defaults --check 4        # the first 4 iterations again, compared exactly

A run that has a record is not repeated: the command says so. With --results runs/records the runs are made
again, and their records are kept apart from those of docs/. --check runs the first seed of each setting with
the recorded flags and number of threads, stops it after some iterations, and compares every number that does
not depend on the clock with the record. It needs the processor and the versions of the record: others may
round in another way.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import run_seeds
from benchmark.records import RESULTS, ROOT, read_records, record_path
from benchmark.settings import GROUPS, ONE_SEED_PER_FOLD


def list_groups(results):
    """A line per setting: its name, what it is, and the seeds that have no record."""
    lines = []
    for group, settings in GROUPS.items():
        lines.append(group)
        for setting in settings:
            seeds = ONE_SEED_PER_FOLD
            missing = [str(seed) for seed in seeds if not record_path(setting.name, seed, results).exists()]
            state = f"no record of seeds {' '.join(missing)}" if missing else "complete"
            lines.append(f"  {setting.name:32} {setting.meaning}: {state}")
    return lines


def run(group, seeds, jobs, threads, results):
    """Runs the seeds of a group's settings that have no record."""
    for setting in GROUPS[group]:
        words = [setting.name, setting.script, "--seeds", *map(str, seeds)]
        words += ["--jobs", str(jobs), "--threads", str(threads), "--results", str(results)]
        args, flags = run_seeds.parse([*words, "--", *setting.flags])
        run_seeds.run_seeds(args, flags)


def without_clock(row):
    """A row of metrics.jsonl without what depends on the clock."""
    return {name: value for name, value in row.items() if not name.startswith("perf/")}


def read_rows(folder):
    """The complete rows of metrics.jsonl of the run in a folder, [] as long as there are none."""
    for run_dir in folder.iterdir():
        path = run_dir / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


def first_rows(record, num_iterations):
    """Runs the recorded command up to an iteration, stops it, and returns its rows of metrics.jsonl."""
    threads = record["machine"].split(", ")[-1].split(" ")[0]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *record["command"].split(" ")[1:], "--output-dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        try:
            while len(read_rows(Path(folder))) <= num_iterations and process.poll() is None:
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        return read_rows(Path(folder))[: num_iterations + 1]


def differences(record, rows):
    """(what differs between the record and a new run, a line per number; how many numbers only one has)."""
    lines = []
    num_in_one = 0
    for old, new in zip(record["metrics"], rows):
        old, new = without_clock(old), without_clock(new)
        for name in sorted(old.keys() & new.keys()):
            if old[name] != new[name]:
                lines.append(f"iteration {old['iteration']}, {name}: {old[name]}, now {new[name]}")
        num_in_one += len(old.keys() ^ new.keys())
    return lines, num_in_one


def check(group, num_iterations, results):
    """Compares the first record of each setting with a new run. Returns whether all are the same.

    A file may measure more or less than when the record was made. Such numbers are counted, and do not count
    as differences.
    """
    same = True
    for setting in GROUPS[group]:
        records = read_records(setting.name, results)
        if not records:
            print(f"{setting.name}: no record to compare with")
            continue
        rows = first_rows(records[0], num_iterations)
        lines, num_in_one = differences(records[0], rows)
        if len(rows) <= num_iterations:
            lines.append(f"the run ended after {len(rows)} rows of metrics.jsonl")
        same = same and not lines
        state = "\n  ".join([f"{len(lines)} differences", *lines[:5]]) if lines else "the same"
        if num_in_one > 0:
            state += f" ({num_in_one} numbers were measured in one of the two only)"
        print(f"{setting.name} seed {records[0]['seed']}, {num_iterations} iterations: {state}", flush=True)
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", nargs="?", choices=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=ONE_SEED_PER_FOLD)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--check", type=int, metavar="ITERATIONS", help="compare with the records")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all records")
    args = parser.parse_args()
    if args.group is None:
        print("\n".join(list_groups(args.results)))
    elif args.check is not None:
        sys.exit(0 if check(args.group, args.check, args.results) else 1)
    else:
        run(args.group, args.seeds, args.jobs, args.threads, args.results)
