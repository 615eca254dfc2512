"""The folder of a run: a new one, or one to resume from."""

import dataclasses
import json
import time
from pathlib import Path

from rewards import BadInput, parse_spec
from rewards.command_line import check_ranges


def open_run(args, script):
    """(args, run_dir) of a new run, or of the run that args.resume names: its saved flags replace all others.

    Nothing is written. Raises BadInput when a flag is out of its range, or when the folder to resume from is
    missing, damaged or another algorithm's.
    """
    check_ranges(args)
    algorithm = Path(script).stem
    if not args.resume:
        first_reward = next(iter(parse_spec(args.rewards)))
        name = f"{algorithm}-{first_reward}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        return args, Path(args.output_dir) / name
    run_dir = Path(args.resume)
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        if saved.pop("algorithm") != algorithm:
            raise ValueError("another algorithm made it")
        args = dataclasses.replace(type(args)(**saved), resume=args.resume)
        check_ranges(args)
        return args, run_dir
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"cannot resume {run_dir}: {error}") from None
