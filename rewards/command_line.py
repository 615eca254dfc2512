"""The command line of every script: what a flag may hold, and one line where something is wrong.

A field of an Args dataclass is declared with its range, as in `num_iterations: PositiveInt = 96`, and
`check_ranges` enforces all ranges at once, whether the values come from a command line, from a caller in
Python or from the folder of a resumed run.
"""

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import signal
import sys
import time
import types
import typing
import warnings
from typing import Annotated, Literal, NamedTuple

from rewards import BadInput


class CannotWrite(Exception):
    """A file that the disk does not take, with one line that says which one and why."""


# === what a flag may hold ===


class Range(NamedTuple):
    """The numbers that a field may hold. NaN and infinity are in no range."""

    low: float
    high: float
    above_low: bool = False  # whether low itself is left out
    below_high: bool = False  # whether high itself is left out

    def contains(self, value):
        # Comparisons with NaN are false. An integer of any size can be compared, but not made a float.
        low_enough = value < self.high if self.below_high else value <= self.high
        high_enough = value > self.low if self.above_low else value >= self.low
        return low_enough and high_enough

    def __str__(self):
        low = f"above {self.low:,}" if self.above_low else f"at least {self.low:,}"
        high = f"below {self.high:,}" if self.below_high else f"at most {self.high:,}"
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
            raise BadInput(f"{flag(field.name)} {problem}, not {shorten(value)}")


def find_problem(value, hint):
    """What is wrong with the value of a field that was declared with this type; "" if nothing is."""
    allowed = []
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        allowed = [note for note in notes if isinstance(note, Range)]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        same = [choice for choice in choices if type(choice) is type(value) and choice == value]
        return "" if same else f"must be one of {', '.join(map(str, choices))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        problems = [find_problem(value, choice) for choice in typing.get_args(hint)]
        return "" if "" in problems else problems[0]
    whole_for_float = hint is float and type(value) is int
    if type(value) is not hint and not whole_for_float:  # type(), since isinstance(True, int) is true
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return f"must be {names.get(hint, hint.__name__)}"
    if hint is str:
        return find_problem_of_text(value)
    for numbers in allowed:
        if not numbers.contains(value):
            return f"must be {numbers}"
    if type(value) is float and not math.isfinite(value):
        return "must be a finite number"
    return ""


def find_problem_of_text(value):
    """What is wrong with a text that becomes a path, a name or a prompt; "" if nothing is."""
    if "\0" in value:
        return "must not contain a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, or bytes of a command line that are no UTF-8
        return "must be valid Unicode"
    return ""


def shorten(value, limit=200):
    """A value as it may stand in an error message."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= limit else text[:limit] + "..."


# === running a script ===


def run(main, Args, description, prog=None):
    """Parses the flags and runs main(args). A mistake in the input ends in one line and exit code 2.

    description: the script's docstring, shown by --help. prog: how the script is called.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    args = parse(Args, description, prog)
    execute(main, args)


def parse(Args, description, prog=None):
    """Args with the flags of this process's command line."""
    from rewards.flag_groups import parse_in_groups

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse_in_groups(
                Args, description=description, prog=prog, console_outputs=process_number() == 0
            )
    except SystemExit as stop:
        if stop.code:
            say(f"error: {text_of_box(box.getvalue())} (see --help)")
        raise


def text_of_box(box):
    """The message in a box that tyro draws around an error, as one line: all up to the box's first rule."""
    colourless = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = []
    for line in colourless.splitlines()[1:]:
        text = line.strip("│╰─╯ ")
        if not text:
            break
        lines.append(text)
    return " ".join(lines)


def execute(main, args):
    """Runs main(args). Exit code 2 is for bad input, 1 for a run that was stopped; its checkpoint is kept.

    Ctrl-C and SIGTERM are safe at any moment, as is a kill: every file of a run is written aside and then
    moved into place (rewards/report/files.py). So no signal is held back.
    """
    handle_signals()
    advice = ". Resume from the last checkpoint with --resume RUN" if hasattr(args, "resume") else ""
    try:
        try:
            check_ranges(args)
            main(args)
            sys.stdout.flush()  # here, where it may fail: Python would report it as it ends, in its own way
        except BadInput as error:
            say_error("error", error)
            sys.exit(2)
        except (FloatingPointError, CannotWrite) as error:
            say_error("stopped", f"{error}{advice}")
            sys.exit(1)
        except RuntimeError as error:
            if "by peer" not in str(error):  # gloo: Connection closed by peer, or reset by it
                raise
            say_error("stopped", f"another process of this run has ended{advice}")
            sys.exit(1)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
                raise
            name = error.filename or "the output"
            say_error("stopped", f"cannot write {name}: {error.strerror}{advice}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still has to write
            sys.exit(1)
    except KeyboardInterrupt:
        say(f"Interrupted{advice}")
        sys.exit(1)
    finally:
        leave_process_group()


def leave_process_group():
    """Ends what torch.distributed runs in the background: a process that exits without this may abort."""
    distributed = sys.modules.get("torch.distributed")  # not imported: then there is nothing to end
    if distributed and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


class Interruption:
    """A signal handler. The first signal raises KeyboardInterrupt, a later one ends the process at once."""

    def __init__(self):
        self.began = None

    def __call__(self, number, frame):
        now = time.monotonic()
        if self.began is None:
            self.began = now
            raise KeyboardInterrupt
        # torchrun passes on the Ctrl-C that a process may have had from the terminal: the two are one.
        if now - self.began > 1:
            os._exit(1)


def handle_signals():
    """Makes SIGTERM, a polite request to stop, end a run as Ctrl-C does."""
    handler = Interruption()
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: a shell's background job
        signal.signal(signal.SIGINT, handler)


def process_number():
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def say(message):
    """Prints one line to stderr, from the first process only."""
    if process_number() == 0:
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)


def say_error(kind, message, patience=5):
    """Prints one line, once for all processes, about what ends this one.

    Most errors are found by all processes at once, and the first one says so: once it has ended, torchrun
    ends the others, within the seconds that they wait here. What only another process finds, it says itself.
    """
    number = process_number()
    if number > 0:
        time.sleep(patience)
        message = f"process {number}: {message}"
    print(f"{kind}: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)
