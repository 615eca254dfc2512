"""The command line: ranges of flags, one line for each mistake, signals, and --help in groups."""

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

import rewards.command_line as command_line
from rewards import BadInput
from rewards.command_line import (
    CannotWrite,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_ranges,
    execute,
)
from rewards.flag_groups import parse_in_groups, read_groups

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Args:
    seed: Seed = 1
    """Seeds all noise."""
    count: PositiveInt = 1
    """How many."""
    rest: NonNegativeInt = 0
    """How many are left."""
    open_range: Annotated[int, Range(0, 10, above_low=True, below_high=True)] = 5
    """Between two ends."""

    # Model and data
    rate: PositiveFloat = 0.5
    """How fast."""
    weight: NonNegativeFloat = 0.0
    """How much."""
    plain: float = 1.0
    """Any number."""
    name: str = "x"
    """What it is called,
    in two lines."""
    team: str | None = None
    """Who."""
    fraction: Annotated[float, Range(0, 1)] | None = None
    """How much of it."""

    # Sampling
    kind: Literal["a", "b"] = "a"
    """Which one."""
    level: Literal[1, 2] = 1
    """Which level."""
    quick: bool = False
    """Whether to hurry."""
    resume: str = ""
    """What to resume."""


GOOD = {
    "seed": [0, 2**63 - 1],
    "count": [1, 1_000_000],
    "rest": [0, 1_000_000],
    "open_range": [1, 9],
    "rate": [1e-300, 5e-324, 1_000_000, 1],
    "weight": [0, 0.0, -0.0, 1e6],
    "plain": [-1e308, 0, 3],
    "name": ["", "{prompt}", "ä\n", "日本", "🙂"],
    "team": [None, "us"],
    "fraction": [None, 0, 1, 0.5],
    "kind": ["a", "b"],
    "level": [1, 2],
    "quick": [True, False],
    "resume": [""],
}
NO_NUMBERS = ["1", None, True, False, [1], (1,), {}, 1j, b"1", object()]
BAD_INTS = [*NO_NUMBERS, 1.0, 0.5, math.nan, math.inf, -1, 10**30, 10**400, 10**5000, -(10**400)]
BAD_FLOATS = [*NO_NUMBERS, math.nan, math.inf, -math.inf]
BAD_TEXTS = [None, 1, True, b"x", ["x"], "\0", "a\0b", "\ud800", "a\udcff"]
BAD = {
    "seed": [*BAD_INTS, 2**63, -(2**63)],
    "count": [*BAD_INTS, 0, 1_000_001],
    "rest": [*BAD_INTS, 1_000_001],
    "open_range": [*BAD_INTS, 0, 10],
    "rate": [*BAD_FLOATS, 0, 0.0, -0.0, -1, 1e7, 1e308, 10**400],
    "weight": [*BAD_FLOATS, -1e-9, -1, 1e308, 10**400],
    "plain": BAD_FLOATS,
    "name": BAD_TEXTS,
    "team": [value for value in BAD_TEXTS if value is not None],
    "fraction": [value for value in BAD_FLOATS if value is not None] + [-0.1, 1.1, 2],
    "kind": ["c", "", "A", None, 1, True, ["a"]],
    "level": [0, 3, "1", True, 1.0, None],
    "quick": [0, 1, "true", None, "False", 1.0],
    "resume": BAD_TEXTS,
}


@pytest.mark.parametrize("name", GOOD)
def test_what_a_field_may_hold(name):
    for value in GOOD[name]:
        check_ranges(Args(**{name: value}))


@pytest.mark.parametrize("name", BAD)
def test_what_a_field_may_not_hold(name):
    for value in BAD[name]:
        with pytest.raises(BadInput) as error:
            check_ranges(Args(**{name: value}))
        assert str(error.value).startswith("--" + name.replace("_", "-") + " must "), value
        assert len(str(error.value)) < 400


def test_every_field_is_enumerated():
    assert set(GOOD) == set(BAD) == {field.name for field in dataclasses.fields(Args)}


def test_a_range_says_its_ends():
    assert str(Range(1, 1_000_000)) == "at least 1 and at most 1,000,000"
    assert str(Range(0, 0.5, above_low=True, below_high=True)) == "above 0 and below 0.5"


# === execute ===


@pytest.mark.parametrize(
    "error, code, line",
    [
        (BadInput("no\nsuch file"), 2, "error: no such file"),
        (FloatingPointError("NaN"), 1, "stopped: NaN. Resume from the last checkpoint with --resume RUN"),
        (CannotWrite("full"), 1, "stopped: full. Resume from the last checkpoint with --resume RUN"),
        (KeyboardInterrupt(), 1, "Interrupted. Resume from the last checkpoint with --resume RUN"),
        (
            RuntimeError("gloo: Connection closed by peer [127.0.0.1]:22949"),
            1,
            "stopped: another process of this run has ended. "
            "Resume from the last checkpoint with --resume RUN",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stops_a_run_is_one_line(capsys, error, code, line):
    def fail(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        execute(fail, Args())
    assert stopped.value.code == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_script_without_runs_does_not_speak_of_resuming(capsys):
    @dataclasses.dataclass
    class Few:
        seed: Seed = 1

    def fail(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        execute(fail, Few())
    assert capsys.readouterr().err == "Interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("shape"), OSError(errno.ENOENT, "gone"), KeyError("x")])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(error):
    def fail(args):
        raise error

    with pytest.raises(type(error)):
        execute(fail, Args())


def test_ranges_are_checked_before_main(capsys):
    with pytest.raises(SystemExit) as stopped:
        execute(lambda args: pytest.fail("called"), Args(count=0))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --count must be at least 1 and at most 1,000,000, not 0\n"


def test_another_process_says_what_only_it_has_found(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        execute(lambda args: None, Args(count=0))
    assert stopped.value.code == 2 and waited == [5]
    assert capsys.readouterr().err.startswith("error: process 3: --count must")


def test_another_process_that_is_ended_while_it_waits_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        execute(lambda args: None, Args(count=0))
    assert capsys.readouterr().err == ""


# === whole processes ===

SCRIPT = """
'''A script.'''
import dataclasses, os, signal, sys, time, warnings
sys.path.insert(0, {root!r})
from rewards import BadInput, command_line
from rewards.command_line import PositiveInt

@dataclasses.dataclass
class Args:
    count: PositiveInt = 1
    kind: str = "x"
    resume: str = ""

def main(args):
    warnings.warn("a library is old", FutureWarning)
    {body}

command_line.run(main, Args, __doc__)
"""


@pytest.fixture
def start(tmp_path):
    """start(body, *flags, ...) -> a process that runs a script with this body of main."""

    def start(body, *flags, stdout=subprocess.PIPE):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), body=body))
        environment = dict(os.environ)
        environment.pop("PYTHONUNBUFFERED", None)
        return subprocess.Popen(
            [sys.executable, script, *flags],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--count", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--count", "nan"], "'nan'"),
        (["--count", "1.5"], "'1.5'"),
        (["--count", "0"], "--count must be at least 1"),
        (["--count", "9" * 400], "--count must be at least 1 and at most 1,000,000"),
        (["--count"], "--count"),
        (["--cuont", "3"], "--cuont"),
        (["count"], "count"),
        (["--kind", b"\xff"], "--kind must be valid Unicode"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(start, flags, line):
    process = start("pass", *flags)
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: ") and line in err and err.count("\n") == 1


def test_library_warnings_are_not_shown(start):
    process = start("raise BadInput('too bad')")
    assert process.communicate() == ("", "error: too bad\n")


WAIT = "print('ready', flush=True); time.sleep(60)"
LINE = "Interrupted. Resume from the last checkpoint with --resume RUN\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_run_in_one_line(start, number):
    process = start(WAIT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == LINE
    assert process.returncode == 1


def test_two_signals_at_once_are_one(start):
    process = start(WAIT)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == LINE
    assert process.returncode in (1, -signal.SIGTERM)  # the latter if the interpreter was ending


def test_a_second_ctrl_c_ends_a_run_that_does_not_end(start):
    body = """
    while True:
        try:
            print('ready', flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    """
    process = start(body)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.readline()
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize("flush", [True, False])
def test_output_that_nobody_takes_ends_in_one_line(start, flush):
    process = start(f"time.sleep(1)\n    [print('x' * 1000, flush={flush}) for _ in range(5)]")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert err.startswith("stopped: cannot write the output: Broken pipe. Resume") and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("flush", [True, False])
def test_output_to_a_full_disk_ends_in_one_line(start, flush):
    with open("/dev/full", "w") as full:
        process = start(f"print('x')\n    print('y', flush={flush})", stdout=full)
        err = process.communicate()[1]
    assert process.returncode == 1
    assert err.startswith("stopped: cannot write the output: No space left") and err.count("\n") == 1


# === --help ===


def test_the_headings_among_the_fields_are_the_groups_of_help():
    groups = read_groups(Args)
    assert list(groups) == ["Run", "Model and data", "Sampling"]
    assert list(groups["Sampling"]) == ["kind", "level", "quick", "resume"]
    assert groups["Model and data"]["name"] == "What it is called, in two lines."


def test_args_are_parsed_in_groups_as_without(capsys):
    words = ["--seed", "3", "--name", "a", "--kind", "b", "--quick", "--team", "us", "--rate", "2"]
    assert parse_in_groups(Args, args=words) == tyro.cli(Args, args=words)
    assert parse_in_groups(Args, args=[]) == Args()
    with pytest.raises(SystemExit):
        parse_in_groups(Args, args=["--help"])
    shown = capsys.readouterr().out
    for text in ("model-and-data options", "sampling options", "--open-range", "What it is called, in two"):
        assert text in shown


def test_a_class_without_docstrings_is_parsed_too():
    @dataclasses.dataclass
    class Plain:
        seed: int = 1  # of all noise

    assert parse_in_groups(Plain, args=["--seed", "4"]) == Plain(4)


def test_only_the_first_process_shows_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            command_line.parse(Args, "A script.")
        assert stopped.value.code == 0
        assert ("A script." in capsys.readouterr().out) == (rank == "0")


# === processes ===


@pytest.mark.parametrize("error", [BadInput("wrong"), FloatingPointError("not finite"), KeyboardInterrupt()])
def test_a_process_group_ends_with_its_process(monkeypatch, error):
    ended = []
    distributed = types.SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: "gloo",
        destroy_process_group=lambda: ended.append(True),
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)

    def fail(args):
        raise error

    with pytest.raises(SystemExit):
        command_line.execute(fail, dataclasses.make_dataclass("Args", [])())
    assert ended == [True]
