"""Kills runs at random and at aimed moments, resumes them, and compares them with runs that nobody disturbed.

    python -m benchmark.kills --kills 100 [--algorithms flow_grpo ...] [--processes 1 2] [--seed 1]

A run is a few iterations of the tiny world, on the CPU. Each one is killed twice, the second time after it
has been resumed, and then resumed to its end. A random kill comes at any time, more often late than early,
since a run begins with seconds of imports. An aimed one comes within 30 ms of a file operation: opening,
moving or removing a file of the run, as Python announces it to audit hooks. It goes to the process that
writes. With two processes, a random SIGKILL goes to one of them or to all, and SIGTERM and SIGINT go to
torchrun.

After each kill no file may be torn and, soon, no process left. At the end all metrics, checkpoints, exported
weights and pictures must be those of the undisturbed run, bit for bit, and no temporary file may be left.
Prints a table of the faults and exits with 1 if there is any. Linux only: it looks for processes in /proc.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ["flow_grpo", "superflow", "fdfo", "promptrl", "promptloop"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
FAULTS = ["metrics", "checkpoint", "exports", "pictures", "torn files", "leftovers", "processes", "failures"]
COLUMNS = ["kills", "missed"] + FAULTS
PATIENCE = 60  # seconds in which all processes of a killed run must end; torchrun gives its own 30

COMMON_FLAGS = """
    --device cpu --num-iterations 3 --eval-every 2 --save-every 1 --num-prompts-per-iteration 8
    --num-images-per-prompt 4 --micro-batch-size 8 --num-inference-steps 6 --eval-num-inference-steps 6
""".split()
VARIANTS = {  # of each algorithm, flags that lead to other exports
    "flow_grpo": ["", "--lora-rank 4"],
    "superflow": ["--start-images 1", "--start-images 1 --lora-rank 4"],
    "fdfo": ["", "--lora-rank 4"],
    "promptrl": ["", "--lora-rank 4 --lm-lora-rank 4"],
    "promptloop": ["--num-refinements 2", "--num-refinements 2 --lm-lora-rank 4"],
}

# Runs a script as Python would, and sends a signal soon after a file operation in the run's folder. With a
# number that is never reached, it only counts.
AIMED = """
import atexit, os, runpy, sys, threading
from pathlib import Path

_, folder, number, signal, delay, *sys.argv = sys.argv
seen = 0


def hook(event, arguments):
    global seen
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    if not isinstance(arguments[0], (str, bytes, os.PathLike)) or folder not in os.fsdecode(arguments[0]):
        return
    if event == "open" and not arguments[2] & os.O_CREAT:
        return
    seen += 1
    if seen == int(number):
        threading.Timer(float(delay), os.kill, (os.getpid(), int(signal))).start()


if os.environ.get("RANK", "0") == "0":
    sys.addaudithook(hook)
    atexit.register(lambda: Path(folder + ".count").write_text(str(seen)))
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Setting(NamedTuple):
    """What is run."""

    algorithm: str
    flags: str
    processes: int


class Whole(NamedTuple):
    """An undisturbed run, to compare with."""

    contents: dict  # as from `read_contents`
    seconds: float
    operations: int  # on files


class Kill(NamedTuple):
    """What interrupts a run, and when: so many seconds after its start, or after a file operation."""

    signal: int
    seconds: float
    operation: int | None


# === processes ===


def start(work, folder, setting, flags, kill=None):
    """Starts a run whose output folder is `folder`, to be killed if that is at a file operation."""
    aimed = work / "aimed.py"
    aimed.write_text(AIMED)
    command = [sys.executable]
    if setting.processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={setting.processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    if kill is not None and kill.operation is not None:
        command += [str(aimed), str(folder), str(kill.operation), str(int(kill.signal)), str(kill.seconds)]
    else:
        command += [str(aimed), str(folder), "-1", "0", "0"]
    command += [str(ROOT / f"{setting.algorithm}.py")] + flags
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def find_processes(folder):
    """The numbers of all processes that have this folder in their command line."""
    numbers = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if str(folder).encode() in words:
            numbers.append(int(path.parent.name))
    return numbers


def send(process, folder, number, everywhere):
    """Sends a signal: SIGKILL to a process that trains, or to all; another to what a user has started."""
    targets = [process.pid]
    if number == signal.SIGKILL:
        trainers = [pid for pid in find_processes(folder) if pid != process.pid] or [process.pid]
        targets = [*trainers, process.pid] if everywhere else [random.choice(trainers)]
    for pid in targets:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_for_all(process, folder, seconds):
    """Whether all processes of a run end within these seconds. Those that do not are killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None and not find_processes(folder):
            return True
        time.sleep(0.1)
    for pid in find_processes(folder):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return False


# === what a run leaves behind ===


def find_run(folder):
    """The run's folder, if it has been made."""
    folders = list(folder.glob("*"))
    return folders[0] if folders else None


def find_torn_files(run_dir):
    """The files that are not whole. Temporary ones are allowed to be."""
    torn = []
    for path in run_dir.rglob("*"):
        if path.is_dir() or ".tmp" in str(path.relative_to(run_dir)):
            continue
        try:
            read_whole(path)
        except Exception as error:
            torn.append(f"{path.name} ({error})")
    return torn


def read_whole(path):
    """Raises an error unless a file is whole."""
    if path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            json.loads(line)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    elif path.suffix == ".py":
        compile(path.read_text(), path.name, "exec")


def read_contents(run_dir):
    """{kind of file: {file: its content}} of what must be the same after kills."""
    contents = {"metrics": {}, "checkpoint": {}, "exports": {}, "pictures": {}, "leftovers": {}}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if ".tmp" in name:
            contents["leftovers"][name] = "left"
        elif path.suffix == ".png":
            contents["pictures"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".pt":
            contents["checkpoint"][name] = digest_tensors(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            contents["exports"][name] = digest_tensors(load_file(path))
        elif path.name == "config.json":
            contents["exports"][name] = path.read_text()
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if not key.startswith("perf/")})
    contents["metrics"]["metrics.jsonl"] = rows
    return contents


def digest_tensors(value):
    """Tensors, and containers of them, with a digest in place of each tensor."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, dict):
        return {name: digest_tensors(value[name]) for name in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [digest_tensors(part) for part in value]
    return value


# === the campaign ===


def write_prompts(work):
    """Writes small prompt files."""
    for name, step in (("train", 24), ("dev", 32)):
        lines = (ROOT / f"tiny/prompts/fold_0/{name}.jsonl").read_text().splitlines(keepends=True)
        (work / f"{name}.jsonl").write_text("".join(lines[::step]))


def flags_of_new_run(work, folder, setting):
    flags = COMMON_FLAGS + setting.flags.split()
    return flags + ["--prompts", str(work / "train.jsonl"), "--output-dir", str(folder)]


def run_whole(work, setting):
    """A run that nobody disturbs."""
    folder = work / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    process = start(work, folder, setting, flags_of_new_run(work, folder, setting))
    if process.wait() != 0:
        raise SystemExit(f"{setting} fails without any kill: {last_lines(folder)}")
    seconds = time.monotonic() - began
    operations = int(Path(f"{folder}.count").read_text())
    return Whole(read_contents(find_run(folder)), seconds, operations)


def last_lines(folder):
    """The end of what the runs in a folder have printed."""
    lines = Path(f"{folder}.log").read_text().strip().splitlines()
    return "\n".join(lines[-3:])


def next_flags(work, folder, setting):
    """The flags that resume a run, or begin it where there is no checkpoint yet."""
    run_dir = find_run(folder)
    if run_dir is not None and (run_dir / "checkpoint/state.pt").exists():
        return ["--resume", str(run_dir)]
    shutil.rmtree(folder, ignore_errors=True)
    return flags_of_new_run(work, folder, setting)


def strike(work, folder, setting, kill):
    """Starts or resumes a run and kills it. Returns (whether it was still running, faults)."""
    flags = next_flags(work, folder, setting)
    process = start(work, folder, setting, flags, kill)
    patience = 600
    if kill.operation is None:
        patience = PATIENCE
        time.sleep(kill.seconds)
        if process.poll() is None:
            send(process, folder, kill.signal, everywhere=random.random() < 0.5)
    faults = {}
    if not wait_for_all(process, folder, patience):
        faults["processes"] = "some were left"
    run_dir = find_run(folder)
    torn = find_torn_files(run_dir) if run_dir is not None else []
    if torn:
        faults["torn files"] = ", ".join(torn)
    return process.returncode != 0, faults


def finish(work, folder, setting, whole):
    """Resumes a run to its end. Returns the faults: what differs from the undisturbed run."""
    process = start(work, folder, setting, next_flags(work, folder, setting))
    if not wait_for_all(process, folder, 600):
        return {"processes": "the resumed run does not end"}
    if process.returncode != 0:
        return {"failures": last_lines(folder)}
    contents = read_contents(find_run(folder))
    faults = {}
    for kind, files in contents.items():
        expected = whole.contents[kind]
        different = [name for name in files | expected if files.get(name) != expected.get(name)]
        if different:
            faults[kind] = ", ".join(different)
    return faults


def draw_kill(index, whole, resumed):
    """The kill with this number: signals take turns, and so do random and aimed moments."""
    number = SIGNALS[index % len(SIGNALS)]
    remaining = 0.5 if resumed else 1.0  # of the run, or a kill would often come too late
    if index // len(SIGNALS) % 2:
        operation = random.randint(1, int(whole.operations * remaining))
        return Kill(number, random.uniform(0, 0.03), operation)
    end = whole.seconds * remaining
    return Kill(number, random.triangular(0, end, end), None)


def describe(kill):
    name = signal.Signals(kill.signal).name
    if kill.operation is None:
        return f"{name} after {kill.seconds:.1f} s"
    return f"{name} {1000 * kill.seconds:.0f} ms after operation {kill.operation}"


def run_campaign(work, settings, num_kills):
    """Kills until there were enough. Returns {setting: {fault: count}}, with "kills" and "missed" in it."""
    wholes = {}
    counts = {}
    for setting in settings:
        counts[setting] = dict.fromkeys(COLUMNS, 0)
    index = 0
    run_number = 0
    while sum(count["kills"] for count in counts.values()) < num_kills:
        setting = settings[run_number % len(settings)]
        run_number += 1
        if setting not in wholes:
            wholes[setting] = run_whole(work, setting)
        count = counts[setting]
        folder = work / f"run_{run_number}"
        found = []
        for resumed in (False, True):
            kill = draw_kill(index, wholes[setting], resumed)
            index += 1
            hit, faults = strike(work, folder, setting, kill)
            count["kills" if hit else "missed"] += 1
            found.append(faults)
            outcome = "hit" if hit else "missed"
            print(f"{setting.algorithm} {setting.flags}, {setting.processes}: {describe(kill)}, {outcome}")
        found.append(finish(work, folder, setting, wholes[setting]))
        for faults in found:
            for kind, text in faults.items():
                count[kind] += 1
                print(f"  FAULT, {kind}: {text}")
        if not any(found):
            shutil.rmtree(folder)
        sys.stdout.flush()
    return counts


def print_table(counts):
    """The table of kills and faults."""
    print()
    print(f"{'algorithm':52s} processes", end="")
    for column in COLUMNS:
        print(f"  {column}", end="")
    print()
    for setting, count in counts.items():
        name = f"{setting.algorithm} {setting.flags}"
        print(f"{name:52s} {setting.processes:9d}", end="")
        for column in COLUMNS:
            print(f"  {count[column]:{len(column)}d}", end="")
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--folder", help="to work in; runs with a fault stay there")
    args = parser.parse_args()
    random.seed(args.seed)
    # A shell lets its background jobs ignore SIGINT, and they would pass that on to the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = Path(args.folder or tempfile.mkdtemp(prefix="kills-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(work)
    settings = []
    for algorithm in args.algorithms:
        for flags in VARIANTS[algorithm]:
            for processes in args.processes:
                settings.append(Setting(algorithm, flags, processes))
    counts = run_campaign(work, settings, args.kills)
    print_table(counts)
    kills = sum(count["kills"] for count in counts.values())
    faults = 0
    for kind in FAULTS:
        faults += sum(count[kind] for count in counts.values())
    print(f"\n{kills} kills, {faults} faults, runs in {work}")
    sys.exit(1 if faults else 0)
