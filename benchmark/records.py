"""The measurements in benchmark/results/: where they are, how they are read, and what each one records.

A setting is a folder, such as flow_grpo/default, with one record per seed: seed-1.json, seed-2.json, ... A
record holds the command, commit, date and machine, and what was measured.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
FIRST_EDITION = RESULTS / "first_edition"  # of the tiny world: see docs/first_edition.md
RUNS = ROOT / "runs" / "benchmark"  # the runs behind new records, with their weights

# Records keep the command as it was typed. These modules have other names since.
NEW_NAMES = {
    "benchmark.run": "benchmark.run_seeds",
    "benchmark.swap": "benchmark.swap_promptrl_models",
    "benchmark.tags": "benchmark.make_tagged_prompts",
    "benchmark.loop": "benchmark.use_promptloop_elsewhere",
    "benchmark.ocr": "benchmark.measure_ocr_speed",
    "benchmark.overhead": "benchmark.measure_iteration_overhead",
}


def processor():
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def commit():
    """The short hash of the commit, with "-dirty" if files were changed since; "unknown" without git."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        output = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "unknown"
    return output.strip() or "unknown"


def circumstances(num_threads):
    """Commit, date and machine of a measurement by so many threads, each run of several by itself."""
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {threads}",
    }


def versions():
    """{package: version} of what the numbers may depend on."""
    names = ("torch", "diffusers", "transformers", "peft", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def hash_of(path):
    """The first half of the SHA-256 of a file, or of all files of a folder and their names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def record_path(setting, seed, results=RESULTS):
    """Where the record of a setting's seed is."""
    return results / setting / f"seed-{seed}.json"


def write_record(path, record):
    """Writes a record, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=0) + "\n")
    print(f"wrote {shown(path)}")


def shown(path):
    """A path as it is printed: from here, where it is inside of this folder."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def missing_seeds(setting, seeds, results=RESULTS):
    """The seeds that have no record yet. Says which ones have one, so that nothing is skipped silently."""
    missing = []
    for seed in seeds:
        path = record_path(setting, seed, results)
        if path.exists():
            print(f"{shown(path)} exists: seed {seed} is not run. To run it again, give another --results")
        else:
            missing.append(seed)
    return missing


def read_records(setting, results=RESULTS):
    """The records of a setting, in the order of their seeds."""
    paths = sorted((results / setting).glob("seed-*.json"), key=seed_of)
    return [json.loads(path.read_text()) for path in paths]


def seed_of(path):
    """The seed in the name of a record's file."""
    return int(path.stem.removeprefix("seed-"))


def read_runs(results=RESULTS):
    """{setting: its records} of all settings of the present weights that hold the metrics of runs."""
    folders = {path.parent for path in results.glob("**/seed-*.json")}
    runs = {}
    for folder in sorted(folders):
        setting = folder.relative_to(results).as_posix()
        records = read_records(setting, results)
        if "metrics" in records[0] and not setting.startswith("earlier_weights/"):
            runs[setting] = records
    return runs


def settings_of(runs, experiment):
    """The runs of one experiment, {setting: records}: those whose folder is in the experiment's."""
    return {setting: records for setting, records in runs.items() if setting.startswith(experiment + "/")}


def current_command(record):
    """The command of a record, with today's names of modules."""
    words = record["command"].split(" ")
    return " ".join(NEW_NAMES.get(word, word) for word in words)


def newest_run(setting, seed):
    """Folder of the newest run of a setting with this seed, made by `run_seeds` on this machine.

    Raises SystemExit, saying what to run first, if there is none.
    """
    folders = list(RUNS.glob(f"{setting}/seed-{seed}-*/*/"))
    if not folders:
        script = "flow_grpo.py" if setting.endswith("flow_grpo_lora") else f"{setting.split('/')[0]}.py"
        folder = (RUNS / setting).relative_to(ROOT)
        raise SystemExit(
            f"{folder} has no run with seed {seed}. Run this first, with the setting's flags after -- (see "
            f"docs/results.md): python -m benchmark.run_seeds {setting} {script} --seeds {seed} "
            "--results runs/records"
        )
    return max(folders, key=lambda path: path.stat().st_mtime)
