"""Runs one setting of an algorithm on several seeds and keeps the evaluations, one JSON file a run.

    python -m benchmark.run NAME FILE.py --seeds 1 2 3 [--jobs 2 --threads 1] [-- FLAGS OF THE FILE]

Writes benchmark/results/NAME-SEED.json: the command, commit, date, machine, seconds, and the rows of
metrics.jsonl. A run whose file exists is skipped, so a grid that was cut off goes on where it stopped.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmark.diversity import diversity

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"


def processor():
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def circumstances(threads):
    """Commit, date and machine of a measurement, for its record; threads in words."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{processor()}, {os.cpu_count()} cores, {threads}"
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": machine}


def start(name, seed, script, flags, threads):
    """Starts a run in the background: (process, the record its results will join)."""
    output_dir = ROOT / "runs" / "benchmark" / f"{name}-{seed}-{int(time.time())}"
    words = [script, *flags, "--seed", str(seed)]
    record = {
        "name": name,
        "seed": seed,
        "command": " ".join(["python", *words]),
        **circumstances(f"{threads} threads a run"),
        "output_dir": output_dir,
        "began": time.time(),
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, *words, "--output-dir", str(output_dir)]
    return subprocess.Popen(words, cwd=ROOT, env=environment), record


def finish(process, record, measure_diversity):
    """Waits for a run and writes its file."""
    if process.wait() != 0:
        raise SystemExit(f"{record['command']} failed with exit code {process.returncode}")
    (run_dir,) = record.pop("output_dir").iterdir()
    record["seconds"] = round(time.time() - record.pop("began"), 1)
    record["metrics"] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if measure_diversity and "eval/geneval" in record["metrics"][-1] and (run_dir / "transformer").exists():
        record["diversity"] = {"before": diversity(None), "after": diversity(run_dir / "transformer")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{record['name']}-{record['seed']}.json").write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the setting, the stem of its files")
    parser.add_argument("script", help="algorithm file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--no-diversity", action="store_true", help="leave the images' diversity out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    missing = [seed for seed in args.seeds if not (RESULTS / f"{args.name}-{seed}.json").exists()]
    running = []
    for seed in missing:
        if len(running) == args.jobs:
            finish(*running.pop(0), not args.no_diversity)
        running.append(start(args.name, seed, args.script, flags, args.threads))
    for run in running:
        finish(*run, not args.no_diversity)
