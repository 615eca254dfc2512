"""The folder of a run: a new one, or one to resume from. Nothing in it is written here.

All that a resumed run reads is checked here, before any model is loaded. Whether the checkpoint fits the
model is checked once there is one.
"""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

from rewards import BadInput, parse_spec
from rewards.command_line import check_ranges, flag, process_number, say
from rewards.report.checkpoint import read_checkpoint
from rewards.report.inputs import describe_inputs, find_changes
from rewards.report.lock import lock
from rewards.report.rows import read_rows
from rewards.report.tracking import check_tracking


def open_run(args, script):
    """(args, run_dir) of a new run, or of the run that args.resume names: its saved flags replace all others.

    Nothing is written. Raises BadInput when a flag is out of its range, when no folder can be made, or when
    the folder to resume from is missing, damaged, in use, another algorithm's, or made from other inputs.
    """
    check_ranges(args)
    if args.resume:
        return resume_run(args, script)
    first_reward = next(iter(parse_spec(args.rewards))).rpartition(":")[2]  # a function's, without its module
    name = f"{Path(script).stem}-{first_reward}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.output_dir) / name
    number = 1
    while os.path.lexists(run_dir):  # another run began in this second
        number += 1
        run_dir = Path(args.output_dir) / f"{name}-{number}"
    if process_number() == 0:
        check_folder(run_dir)
        if args.track:
            check_tracking()
    return args, run_dir


def resume_run(args, script):
    """(args, run_dir) of the run that args.resume names, after all of its files were checked."""
    run_dir = Path(args.resume)
    saved = read_args(run_dir, type(args), script, args.resume_anyway)
    saved = dataclasses.replace(saved, resume=args.resume, resume_anyway=args.resume_anyway)
    if process_number() == 0:
        lock(run_dir)
    iteration = read_checkpoint(run_dir)["progress"]["iteration"]
    if iteration > saved.num_iterations:
        raise BadInput(f"cannot resume {run_dir}: its checkpoint is of iteration {iteration}, after its end")
    read_rows(run_dir, iteration)
    before = read_record(run_dir).get("inputs")
    if not isinstance(before, dict):  # with resume_anyway
        before = {}
    changes = find_changes(before, describe_inputs(saved, script))
    if changes:
        line = f"{', '.join(changes)} changed since the run began"
        if not args.resume_anyway:
            raise BadInput(f"cannot resume {run_dir}: {line}. To resume all the same, add --resume-anyway")
        say(f"note: {line}")
    ignored = ignored_flags(args, saved)
    if ignored:
        say(f"note: ignored, since a resumed run keeps its own flags: {', '.join(ignored)}")
    if process_number() == 0 and saved.track:
        check_tracking()
    return saved, run_dir


def read_record(run_dir):
    """The contents of args.json: {"algorithm", "inputs" and the name of every flag: its value}."""
    path = run_dir / "args.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot resume {run_dir}: {path.name} is missing or damaged ({error})") from None
    if not isinstance(record, dict):
        raise BadInput(f"cannot resume {run_dir}: {path.name} is not an object")
    return record


def read_args(run_dir, Args, script, resume_anyway=False):
    """The flags of a run, of which nothing but args.json is read.

    resume_anyway: whether a flag that a newer version of the script has added takes its default.
    Raises BadInput where the file is damaged, another algorithm's, or has a flag that does not exist.
    """
    run_dir = Path(run_dir)
    record = read_record(run_dir)
    algorithm = record.pop("algorithm", "unknown")
    inputs = record.pop("inputs", None)
    names = [field.name for field in dataclasses.fields(Args)]
    unknown = [flag(name) for name in record if name not in names]
    missing = [flag(name) for name in names if name not in record]
    try:
        if algorithm != Path(script).stem:
            raise BadInput(f"another algorithm made it: {algorithm}")
        if unknown:
            raise BadInput(f"args.json has flags that do not exist: {', '.join(unknown)}")
        if missing and not resume_anyway:
            raise BadInput(
                f"args.json lacks {', '.join(missing)}. With --resume-anyway they have their defaults"
            )
        if not isinstance(inputs, dict) and not resume_anyway:
            raise BadInput(
                "args.json does not say what it was made from. --resume-anyway takes what is there"
            )
        args = Args(**record)
        check_ranges(args)
    except BadInput as error:
        raise BadInput(f"cannot resume {run_dir}: {error}") from None
    return args


def ignored_flags(args, saved):
    """The flags of a resumed run that say something else than the run's own. One that was given its default
    cannot be told from one that was not given."""
    ignored = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value != field.default and value != getattr(saved, field.name):
            ignored.append(f"{flag(field.name)} {value}")
    return ignored


def check_folder(run_dir):
    """Raises BadInput if a folder cannot be made. It is made, and removed: rights are not the only reason."""
    made = []
    try:
        for folder in reversed([run_dir, *run_dir.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"--output-dir {run_dir.parent}: cannot make a folder there ({reason})") from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run began in it just now
                folder.rmdir()
