"""metrics.jsonl: a row per iteration, each an object of numbers. It is valid JSON always: NaN is null."""

import json
import math

from rewards import BadInput
from rewards.report.files import write_text


def to_row(metrics):
    """Metrics, {name: number}, as JSON can hold them: NaN and infinity become None."""
    row = {}
    for name, value in metrics.items():
        is_number = value is not None and math.isfinite(value)
        row[name] = value if is_number else None
    return row


def write_rows(run_dir, rows):
    """Writes metrics.jsonl whole, so that a kill cannot leave half a row. A thousand rows are a megabyte."""
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    write_text(run_dir / "metrics.jsonl", "".join(lines))


def write_scores(run_dir, iteration, evaluations):
    """Writes scores/<iteration>.jsonl: an object per image of the evaluations, with its prompt's row in the
    prompt file (from 0), the number of its initial noise, its tag, if it has one, and all of its scores."""
    lines = []
    for evaluation in evaluations:
        num_rows = len(evaluation.metadata) // evaluation.num_noises
        for number in sorted(evaluation.scores["reward"]):
            image = {"evaluation": evaluation.name, "row": number % num_rows, "noise": number // num_rows}
            if "tag" in evaluation.metadata[number]:
                image["tag"] = evaluation.metadata[number]["tag"]
            image |= to_row({name: values.get(number) for name, values in evaluation.scores.items()})
            lines.append(json.dumps(image, allow_nan=False) + "\n")
    write_text(run_dir / "scores" / f"{iteration:06d}.jsonl", "".join(lines))


def read_rows(run_dir, iteration):
    """The rows of iterations 0 to `iteration`. Raises BadInput if one is missing or damaged.

    What follows is not read: a run that resumes from this iteration writes it anew.
    """
    path = run_dir / "metrics.jsonl"
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[: iteration + 1]):
            row = json.loads(line.decode("utf-8"))
            check_row(row, number)
            rows.append(to_row(row))
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        place = f"line {len(rows) + 1} of {path}" if path.is_file() else path
        raise BadInput(f"cannot resume: {place} is missing or damaged ({error})") from None
    if len(rows) <= iteration:
        raise BadInput(f"cannot resume: {path} ends before iteration {iteration}, that of the checkpoint")
    return rows


def check_row(row, iteration):
    """Raises ValueError unless this is the row of an iteration."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    if type(row.get("iteration")) is not int or row["iteration"] != iteration:
        raise ValueError(f"it is not that of iteration {iteration}")
    for name, value in row.items():
        if type(value) not in (int, float, type(None)):
            raise ValueError(f"{name} is not a number")
