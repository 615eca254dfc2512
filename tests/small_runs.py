"""Running an algorithm file in a test, and reading what the run left behind. Works for any of the files.

The fixtures that go with it are in conftest.py. This is a module of its own because processes that a test
starts import it, and because there may be several conftest.py.
"""

import functools
import importlib
import json
import os
import socket
import sys
from pathlib import Path

import torch

from rewards import report

ROOT = Path(__file__).resolve().parents[1]
# The files that are tested. A file of your own beside them is left alone, until you add it here.
ALGORITHMS = ("flow_grpo", "superflow", "fdfo", "promptrl", "promptloop")


# === what a run gets ===


def command(script, flags):
    """The command line that runs a script of the root with these flags."""
    words = [sys.executable, script]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):  # a switch: --flag or --no-flag
            words.append("--" + flag if value else "--no-" + flag)
        else:
            words += ["--" + flag, str(value)]
    return words


class ScoresWhenWaitedFor:
    """A reward of a run, without rewards.build. Subclasses have `details`."""

    def start_scoring(self, images, prompts, metadata):
        return functools.partial(self.details, images, prompts, metadata)


class Brightness(ScoresWhenWaitedFor):
    """A reward without a model: weight times the mean of the pixels.

    It is rounded to 1 / levels, so that it does not notice which images shared a batch. levels=None: not
    rounded, so that no two images are equal. weight=0 makes it constant.
    """

    def __init__(self, weight=1.0, levels=200):
        self.weight = weight
        self.levels = levels

    def details(self, images, prompts, metadata):
        brightness = images.flatten(1).mean(1)
        if self.levels is not None:
            brightness = (self.levels * brightness).round() / self.levels
        return {"reward": self.weight * brightness}


def brightness(images, prompts, metadata):
    """The same as a function, which other processes find as small_runs:brightness. It is not rounded."""
    return images.flatten(1).mean(1)


# === what a run leaves behind ===


def metrics(run_dir):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = []
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if not name.startswith("perf/")})
    return rows


def saved(run_dir):
    """The state in a run's checkpoint."""
    return report.read_checkpoint(Path(run_dir))


# === several processes ===


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun_environments(count):
    """The variables that torchrun sets, a dict per process. Its own rendezvous takes minutes on a machine
    whose name does not resolve."""
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def work(algorithm, flags, prepare):
    """What each process does: `prepare`, then the run."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    module = importlib.import_module(algorithm)
    module.train(module.Args(**flags))
