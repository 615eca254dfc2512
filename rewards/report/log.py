"""The log of a run: metrics.jsonl, pictures, lines on the terminal, and Weights & Biases if asked for."""

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

from rewards import BadInput
from rewards.command_line import CannotWrite, process_number
from rewards.report.files import make_folder, remove_leftovers, write_aside, write_text
from rewards.report.inputs import describe_inputs
from rewards.report.lock import lock, unlock
from rewards.report.looks import changed_looks, summarise_looks
from rewards.report.metrics import summarise
from rewards.report.pictures import open_picture, save_before_after, save_curve, save_films, save_samples
from rewards.report.rows import read_rows, to_row, write_rows, write_scores
from rewards.report.tracking import start_tracking, track


def print_folder(run_dir):
    """The first line of a run, once its flags are known to be good: where its files will be."""
    if process_number() == 0:
        print(f"folder {run_dir}", flush=True)


@contextlib.contextmanager
def announce(what):
    """Says what is being done before it is done, and how long it took: "loading tiny/sd3 ... 1.2 s"."""
    began = time.time()
    is_first = process_number() == 0
    if is_first:
        print(f"{what} ...", end="", flush=True)
    try:
        yield
    except BaseException:
        if is_first:
            print(flush=True)  # what went wrong is said on a line of its own
        raise
    if is_first:
        print(f" {time.time() - began:.1f} s", flush=True)


class Log:
    """Begins or continues a run's folder. On resume, rows after the checkpoint's iteration are dropped."""

    def __init__(self, run_dir, script, args, iteration):
        self.run_dir = Path(run_dir)
        self.began = time.time()
        self.wandb = None
        self.rows = []  # of metrics.jsonl
        self.num_iterations = args.num_iterations
        self.first = None  # (iteration, time) of the first row that this process has written
        if args.resume:
            self.rows = read_rows(self.run_dir, iteration)
            remove_leftovers(self.run_dir)
            make_folder(self.run_dir / "samples")
            make_folder(self.run_dir / "scores")
            write_rows(self.run_dir, self.rows)
            self.draw_overview()
            if args.track:
                self.wandb = start_tracking(self.run_dir, args)
            print(f"resuming after iteration {iteration} of {self.num_iterations}", flush=True)
        else:
            self.begin(Path(script), args)
            print(f"iteration 0 of {self.num_iterations}: evaluating before any training", flush=True)

    def begin(self, script, args):
        """Makes the folder of a new run, or leaves none behind."""
        inputs = describe_inputs(args, script)
        try:
            self.run_dir.mkdir(parents=True)
        except FileExistsError:
            raise BadInput(f"{self.run_dir} exists: another run began that second, try again") from None
        except OSError as error:
            raise CannotWrite(f"cannot make {self.run_dir}: {error.strerror}") from None
        try:
            make_folder(self.run_dir / "samples")
            make_folder(self.run_dir / "scores")
            with write_aside(self.run_dir / script.name) as temporary:
                shutil.copy(script, temporary)
            record = {"algorithm": script.stem, "inputs": inputs} | vars(args)
            write_text(self.run_dir / "args.json", json.dumps(record, indent=1))
            lock(self.run_dir)
            write_rows(self.run_dir, self.rows)
            if args.track:
                self.wandb = start_tracking(self.run_dir, args)
        except BaseException:
            unlock(self.run_dir)
            shutil.rmtree(self.run_dir, ignore_errors=True)
            raise

    def write(self, metrics, evaluations):
        """Adds a row, {name: number}, and the scores and pictures of the evaluations."""
        sheets = []
        for evaluation in evaluations:
            suffix = evaluation.name.removeprefix("eval")
            metrics |= summarise(evaluation.scores, evaluation.metadata, suffix)
            metrics |= summarise_looks(evaluation.looks, suffix)
            path = self.sheet(metrics["iteration"], suffix)
            if evaluation.pictures:
                with write_aside(path) as temporary:
                    save_samples(temporary, evaluation)
                sheets.append(path)
            if evaluation.films:
                with write_aside(self.sheet(metrics["iteration"], suffix + "_films")) as temporary:
                    save_films(temporary, evaluation)
        if evaluations:
            write_scores(self.run_dir, metrics["iteration"], evaluations)
        self.rows.append(to_row(metrics))
        write_rows(self.run_dir, self.rows)
        if evaluations:
            self.draw_overview()
        if self.wandb:
            track(self.wandb, metrics, sheets)
        self.print_row(metrics)
        if self.first is None:
            self.first = (metrics["iteration"], time.time())

    def sheet(self, iteration, suffix=""):
        """The path of a sheet of samples."""
        return self.run_dir / "samples" / f"{iteration:06d}{suffix}.png"

    def evaluated_rows(self):
        """The rows of iterations with an evaluation."""
        evaluated = []
        for row in self.rows:
            if any(name.startswith("eval/") for name in row):
                evaluated.append(row)
        return evaluated

    def draw_overview(self):
        """Draws reward.png and before_after.png: the samples of the base model above the latest ones."""
        evaluated = self.evaluated_rows()
        if not evaluated:
            return
        with write_aside(self.run_dir / "reward.png") as temporary:
            save_curve(temporary, self.rows)
        before, after = evaluated[0], evaluated[-1]
        paths = {self.sheet(before["iteration"]): before, self.latest_sheet(after["iteration"]): after}
        sheets = {}
        for path, row in paths.items():
            image = open_picture(path)
            if image is not None:  # one that is missing or torn is left out
                sheets[sheet_title(path, row, self.num_iterations)] = image
        if sheets:
            with write_aside(self.run_dir / "before_after.png") as temporary:
                save_before_after(temporary, sheets)

    def latest_sheet(self, iteration):
        """The sheet of an iteration that is compared with the base model's.

        The last in the order of names: the one with rewritten prompts comes after the plain one. Paraphrased
        and hard prompts are others than the base model's.
        """
        paths = []
        for path in sorted(self.run_dir.glob(f"samples/{iteration:06d}*.png")):
            if not any(part in path.stem for part in ("_films", "_paraphrased", "_hard")):
                paths.append(path)
        return paths[-1] if paths else self.sheet(iteration)

    def print_row(self, metrics):
        """A line for the rollout, and one for each way of evaluating, with the base model's reward beside it.

        The other scores of an evaluation are in metrics.jsonl, and `close` prints them.
        """
        iteration = metrics["iteration"]
        start = f"[{iteration}/{self.num_iterations}]"
        if "charts/reward_mean" in metrics:
            line = f"{start} reward {metrics['charts/reward_mean']:.3f}"
            line += f", {metrics['perf/images_per_second']:.0f} images/s"
            print(line + self.time_left(iteration), flush=True)
        for name in sorted(metrics):
            if re.fullmatch(r"eval/reward[^/]*", name):
                line = f"{start} {name} {metrics[name]:.3f}"
                base = self.rows[0].get(name)
                if iteration > 0 and base is not None:
                    line += f" (base model {base:.3f})"
                print(line, flush=True)
        for name, factor in changed_looks(self.rows[0], metrics):
            print(
                f"{start} warning: the {name} of the pictures is {factor:.2f} times the base model's. "
                "The reward may be hacked: look at before_after.png",
                flush=True,
            )

    def time_left(self, iteration):
        """The words ", 5 min left", from the time that iterations have taken so far; "" if none has."""
        if self.first is None:
            return ""
        first_iteration, began = self.first
        seconds_per_iteration = (time.time() - began) / (iteration - first_iteration)
        seconds = seconds_per_iteration * (self.num_iterations - iteration)
        return f", {format_duration(seconds)} left"

    def close(self):
        """Prints the scores before and after, and the time, and where to look."""
        evaluated = self.evaluated_rows()
        print()
        if evaluated:
            print_change(evaluated[0], evaluated[-1])
        if self.rows:
            images = self.rows[-1].get("charts/num_images", 0)
            print(f"{images} images, {time.time() - self.began:.0f} s, folder {self.run_dir}")
        print(f"look at {self.run_dir / 'before_after.png'} (base model above, trained below) and reward.png")
        if self.wandb:
            self.wandb.finish()
        unlock(self.run_dir)


def format_duration(seconds):
    """A duration in words: 40 s, 5 min or 7.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def sheet_title(path, row, num_iterations):
    """What is written above a sheet in before_after.png."""
    number, _, mode = path.stem.partition("_")
    title = "Base model" if int(number) == 0 else f"Iteration {int(number)} of {num_iterations}"
    if mode:
        title += f" ({mode})"
    reward = row.get(f"eval/reward_{mode}" if mode else "eval/reward")
    score = "not scored" if reward is None else f"{reward:.3f}"
    return f"{title}: mean held-out reward {score}"


def print_change(before, after):
    """Prints the evaluated rewards of two rows of metrics.jsonl."""
    for name in sorted(before):
        if name.startswith("eval/") and name.count("/") == 1:
            end = after.get(name, before[name])  # an image model that is not trained is scored once
            if before[name] is None or end is None:
                print(f"{name:36s} not scored")
            else:
                change = end - before[name]
                print(f"{name:36s} before {before[name]:.3f}   after {end:.3f}   change {change:+.3f}")
