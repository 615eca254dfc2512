"""Every write of a run, interrupted in every way: a kill, a Ctrl-C, a full disk. Nothing is torn or lost.

Python announces each file operation to audit hooks. A hook that is installed in a child process counts those
that change the run's folder, and interrupts the one with a given number.
"""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import miniature
import pytest

from conftest import hash_folder, in_a_child
from rewards.command_line import execute

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Watch:
    """An audit hook that calls interrupt(path) at the operation with a number."""

    def __init__(self, number, interrupt):
        self.number = number
        self.interrupt = interrupt
        self.seen = 0

    def __call__(self, event, arguments):
        if event not in OPERATIONS or not self.changes_the_run(event, arguments):
            return
        number = self.seen
        self.seen += 1  # before the interruption, which may write itself
        if number == self.number:
            self.interrupt(event, Path(os.fsdecode(arguments[0])))

    def changes_the_run(self, event, arguments):
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or "runs" not in os.fsdecode(path):
            return False
        return event != "open" or arguments[2] & os.O_CREAT != 0


def kill(event, path):
    """A kill in the middle of a write: half of it is there."""
    if event == "open":
        path.write_text("torn")
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c(event, path):
    raise KeyboardInterrupt


def fill_disk(event, path):
    if event in ("open", "os.mkdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def run_watched(args, watch, count=None):
    """Runs or resumes the miniature, watched, in a child process. Returns the exit code."""

    def run():
        sys.addaudithook(watch)
        sys.stdout = open(os.devnull, "w")
        execute(miniature.train, args)
        if count is not None:
            Path(count).write_text(str(watch.seen))

    return in_a_child(run)


def finish(args):
    """Resumes the run of these args if it has a checkpoint, or begins a new one, undisturbed."""
    for run_dir in Path(args.output_dir).glob("*"):
        if (run_dir / "checkpoint/state.pt").exists():
            args = miniature.Args(resume=str(run_dir))
        else:
            shutil.rmtree(run_dir)
    return miniature.train(args)


def contents(run_dir):
    """The hashes of a run's files; args.json names the output folder, which differs between runs."""
    hashes = hash_folder(run_dir)
    hashes.pop("args.json")
    return hashes


def draw_nothing(path, rows):
    """In place of the curve, which takes most of the miniature's time."""
    path.write_text(str(len(rows)))


@pytest.fixture
def expected(world, monkeypatch):
    """(hashes of an undisturbed run, number of its operations)."""
    monkeypatch.setattr("rewards.report.log.save_curve", draw_nothing)
    args = miniature.Args(model="model", output_dir="runs_whole")
    assert run_watched(args, Watch(-1, kill), count="count") == 0
    (run_dir,) = Path("runs_whole").glob("*")
    operations = int(Path("count").read_text())
    assert operations > 50
    return contents(run_dir), operations


@pytest.mark.parametrize("interrupt", [kill, press_ctrl_c, fill_disk])
def test_a_run_interrupted_at_any_write_resumes_to_the_same_files(expected, interrupt):
    hashes, operations = expected
    interrupted = 0
    for number in range(operations):
        args = miniature.Args(model="model", output_dir=f"runs_{number}")
        code = run_watched(args, Watch(number, interrupt))
        if interrupt is kill:
            assert code == -signal.SIGKILL
        else:
            assert code in (0, 1, 2), f"operation {number}"
        if code == 2:
            assert not Path(args.output_dir).exists(), f"operation {number}"
        if interrupt is fill_disk:
            assert not list(Path(args.output_dir).rglob("*.tmp")), f"operation {number}"
        interrupted += code != 0
        for picture in Path(args.output_dir).glob("*/**/*.png"):
            assert picture.read_bytes() != b"torn", f"operation {number}"
        assert contents(finish(args)) == hashes, f"operation {number}"
        shutil.rmtree(args.output_dir)
    assert interrupted > operations / 4


def test_a_resumed_run_killed_at_any_write_resumes_to_the_same_files(expected):
    hashes, _ = expected
    whole = next(Path("runs_whole").glob("*"))
    early = miniature.train(
        miniature.Args(model="model", num_iterations=2, save_every=2, output_dir="runs_early")
    )
    for name in ("metrics.jsonl.tmp", "weights.old.tmp", "samples/000000.png.tmp", "checkpoint/state.pt.tmp"):
        (early / name).write_text("left by a kill")
    number = 0
    code = None
    while code != 0:
        again = Path("runs_again") / whole.name
        shutil.copytree(early, again)
        args = miniature.Args(resume=str(again))
        code = run_watched(args, Watch(number, kill))
        assert contents(miniature.train(args)) == hashes, f"operation {number}"
        shutil.rmtree("runs_again")
        number += 1
    assert number > 20
