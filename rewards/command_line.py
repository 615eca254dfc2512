"""The command line of every script: what a flag may hold, and one line where the input is wrong.

A field of an Args dataclass is declared with its range, as in `num_iterations: PositiveInt = 96`, and
`check_ranges` enforces all ranges at once, whether the values come from a command line, from a caller in
Python or from the folder of a resumed run.
"""

import dataclasses
import math
import os
import signal
import sys
import types
import typing
import warnings
from typing import Annotated, Literal, NamedTuple

from rewards import BadInput


class Range(NamedTuple):
    """The numbers that a field may hold. NaN and infinity are in no range."""

    low: float
    high: float
    above_low: bool = False  # whether low itself is left out
    below_high: bool = False  # whether high itself is left out

    def contains(self, value):
        if not math.isfinite(value):
            return False
        low_enough = value < self.high if self.below_high else value <= self.high
        high_enough = value > self.low if self.above_low else value >= self.low
        return low_enough and high_enough

    def __str__(self):
        low = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below_high else f"at most {self.high:g}"
        return f"{low} and {high}"


# The upper ends are no recommendations: beyond them a run would end in an overflow, or never begin.
PositiveInt = Annotated[int, Range(1, 1_000_000)]
NonNegativeInt = Annotated[int, Range(0, 1_000_000)]
PositiveFloat = Annotated[float, Range(0, 1_000_000, above_low=True)]
NonNegativeFloat = Annotated[float, Range(0, 1_000_000)]
Seed = Annotated[int, Range(0, 2**63 - 1)]  # what both NumPy and PyTorch take


def flag(name):
    """The flag of a field: num_iterations -> --num-iterations."""
    return "--" + name.replace("_", "-")


def check_ranges(args):
    """Raises BadInput unless every field of a dataclass has its declared type and is in its range."""
    hints = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        problem = find_problem(value, hints[field.name])
        if problem:
            raise BadInput(f"{flag(field.name)} {problem}, not {value!r}")


def find_problem(value, hint):
    """What is wrong with the value of a field that was declared with this type; "" if nothing is."""
    allowed = None
    if typing.get_origin(hint) is Annotated:
        hint, allowed = typing.get_args(hint)[:2]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else f"must be one of {', '.join(map(str, choices))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        problems = [find_problem(value, choice) for choice in typing.get_args(hint)]
        return "" if "" in problems else problems[0]
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return f"must be {names.get(hint, hint.__name__)}"
    if hint is str and "\0" in value:
        return "must not contain a NUL character"
    if allowed is not None and not allowed.contains(value):
        return f"must be {allowed}"
    return ""


def run(main, Args, description, prog=None):
    """Parses the flags and runs main(args). A mistake in the input ends in one line and exit code 2.

    description: the script's docstring, shown by --help. prog: how the script is called. Under torchrun, where every process finds the same
    mistake, only the first one says so.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    import tyro

    args = tyro.cli(Args, description=description, prog=prog)
    execute(main, args)


def execute(main, args):
    """Runs main(args). Exit code 2 is for bad input, 1 for an interruption or a loss that diverged."""
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    try:
        check_ranges(args)
        main(args)
    except BadInput as error:
        say(f"error: {error}")
        sys.exit(2)
    except FloatingPointError as error:
        say(f"stopped: {error}. Resume from the last checkpoint with --resume RUN")
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. Resume from the last checkpoint with --resume RUN")
        sys.exit(1)


def raise_keyboard_interrupt(number, frame):
    """A signal handler: a polite request to stop (SIGTERM) ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def say(message):
    """Prints to stderr, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)
