"""What a run leaves behind: metrics.jsonl, pictures, a line an iteration, a summary at the end, and W&B if
asked for.

Only the first process of a run makes a Report. Every logged name is explained in docs/.
"""

import dataclasses
import json
import math
import resource
import shutil
import sys
import time
from pathlib import Path

import matplotlib.figure
import torch
from einops import rearrange
from PIL import Image

from rewards import BadInput


def mean(values):
    """Mean over the values that are not NaN, NaN when there is none."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else float("nan")


def summarise(scores, metadata, suffix):
    """Means, "eval/<name><suffix>" of all rows and ".../<tag>" of a tag's. scores: {name: {row: value}}."""
    means = {}
    for name, values in scores.items():
        means[f"eval/{name}{suffix}"] = mean(values.values())
        for tag in sorted({row["tag"] for row in metadata if "tag" in row}):
            tagged = [value for row, value in values.items() if metadata[row].get("tag") == tag]
            means[f"eval/{name}{suffix}/{tag}"] = mean(tagged)
    return means


def save_samples(path, prompts, values, pictures):
    """16 images spread over the file. values {row: reward}, pictures {row: (3, H, W)}."""
    rows = sorted(pictures)[:: max(len(pictures) // 16, 1)][:16]
    sheet = matplotlib.figure.Figure(figsize=(16, 5))
    for axes, row in zip(sheet.subplots(2, 8).flat, rows):
        axes.imshow(rearrange(pictures[row], "c h w -> h w c"), interpolation="nearest")
        axes.set_title(f"{prompts[row][:28]}\n{values[row]:.2f}", fontsize=9)
    for axes in sheet.axes:
        axes.axis("off")
    sheet.tight_layout()
    sheet.savefig(path, dpi=80)


def save_curve(path, metrics):
    """The evaluations so far against images sampled."""
    curve = matplotlib.figure.Figure(figsize=(7, 4))
    axes = curve.subplots()
    for name in sorted(
        {name for row in metrics for name in row if name.startswith("eval/") and name.count("/") == 1}
    ):
        axes.plot(
            *zip(*[(row["charts/num_images"], row[name]) for row in metrics if name in row]), ".-", label=name
        )
    axes.set(xlabel="images sampled", ylabel="held-out score")
    axes.legend(fontsize=7)
    curve.savefig(path, dpi=120, bbox_inches="tight")


def reward_metrics(scores):
    """The charts/ and rewards/ metrics of a rollout. scores: {name: (P, K)}, "reward" is trained on."""
    values = scores["reward"]
    spread = values.nan_to_num(0).std(dim=1, correction=0)
    row = {f"rewards/{name}": value.nanmean().item() for name, value in scores.items() if name != "reward"}
    row["charts/reward_mean"] = values.nanmean().item()
    row["charts/reward_std"] = spread.mean().item()  # the mean of the groups' deviations
    row["charts/zero_std_fraction"] = (spread < 1e-6).float().mean().item()
    row["charts/nan_fraction"] = values.isnan().float().mean().item()
    return row


class Clock:
    """Seconds per phase: stop(phase) books the time since the last call, once the device has finished."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def stop(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.last = self.seconds.get(phase, 0) + now - self.last, now

    def metrics(self, num_images):
        """The perf/ metrics: seconds per phase, images per second without evaluation, peak memory."""
        training = sum(seconds for phase, seconds in self.seconds.items() if phase != "evaluate")
        row = {f"perf/seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        row["perf/images_per_second"] = num_images / training if training else 0.0
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cuda = self.device.type == "cuda"
        row["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else kilobytes / 1e6
        return row


def main(train, args):
    """Runs train(args) from the command line: a mistake in the input ends in one line and exit code 2."""
    try:
        train(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, KeyboardInterrupt) as error:
        print(
            f"stopped: {error or 'Ctrl-C'}. Go on from the last checkpoint with --resume RUN", file=sys.stderr
        )
        sys.exit(1)


def open_run(Args, args, script):
    """(args, run_dir) of the run that args.resume names, whose saved arguments replace all others, or of a
    new run.

    Raises BadInput when the folder to resume is missing, damaged or another algorithm's.
    """
    algorithm = Path(script).stem
    if not args.resume:
        name = f"{algorithm}-{args.rewards.split(',')[0].split(':')[0]}-{args.seed}"
        return args, Path(args.output_dir) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume)
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        if saved.pop("algorithm") != algorithm:
            raise ValueError("another algorithm made it")
        return dataclasses.replace(Args(**saved), resume=args.resume), run_dir
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"cannot resume {run_dir}: {error}") from None


class Report:
    """Starts or goes on with a run's folder. On resume, rows after the checkpoint's iteration are dropped."""

    def __init__(self, run_dir, script, args, iteration):
        self.run_dir, self.began, self.wandb = Path(run_dir), time.time(), None
        self.metrics = []  # the rows of metrics.jsonl
        if args.resume:
            try:
                lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()[: iteration + 1]
                self.metrics = [json.loads(line) for line in lines]
            except (OSError, json.JSONDecodeError) as error:
                raise BadInput(
                    f"cannot resume: {self.run_dir}/metrics.jsonl is missing or damaged ({error})"
                ) from None
        else:
            (self.run_dir / "samples").mkdir(parents=True)
            (self.run_dir / "args.json").write_text(
                json.dumps({"algorithm": Path(script).stem} | vars(args), indent=1)
            )
            shutil.copy(script, self.run_dir)
        # written aside and moved: a kill while the file is cut back must not lose the rows before
        temporary = self.run_dir / "metrics.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.metrics))
        temporary.replace(self.run_dir / "metrics.jsonl")
        if args.track:
            import wandb

            where = dict(project=args.wandb_project_name, entity=args.wandb_entity, dir=self.run_dir)
            name = self.run_dir.name
            self.wandb = wandb.init(**where, name=name, id=name, resume="allow", config=vars(args))

    def write(self, row, evaluations):
        """Adds a row, {name: number}; evaluations: {file: (prompts, metadata, scores, pictures)} or {}."""
        for name, (prompts, metadata, scores, pictures) in evaluations.items():
            row |= summarise(scores, metadata, name.removeprefix("eval"))
            if name == "eval":
                sample = self.run_dir / "samples" / f"{row['iteration']:06d}.png"
                save_samples(sample, prompts, scores["reward"], pictures)
        self.metrics.append(row)
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if evaluations:
            save_curve(self.run_dir / "reward.png", self.metrics)
        if self.wandb:
            import wandb

            picture = {"samples": wandb.Image(str(sample))} if evaluations else {}
            self.wandb.log(row | picture, step=row["iteration"])
        if "charts/reward_mean" in row:
            rate = row["perf/images_per_second"]
            print(
                f"[{row['iteration']}] reward {row['charts/reward_mean']:.3f}, {rate:.0f} images/s",
                flush=True,
            )
        for name in sorted(name for name in row if name.startswith("eval/") and name.count("/") == 1):
            print(f"[{row['iteration']}] {name} {row[name]:.3f}", flush=True)

    def close(self):
        """Prints before, after and time, and makes the picture to look at."""
        evaluated = [row for row in self.metrics if "eval/reward" in row]
        before, after = evaluated[0], evaluated[-1]
        sheets = [
            Image.open(self.run_dir / "samples" / f"{row['iteration']:06d}.png") for row in (before, after)
        ]
        both = Image.new("RGB", (sheets[0].width, 2 * sheets[0].height))
        for i, sheet in enumerate(sheets):
            both.paste(sheet, (0, i * sheet.height))
        both.save(self.run_dir / "before_after.png")
        print()
        for name in sorted(name for name in before if name.startswith("eval/") and name.count("/") == 1):
            change = after[name] - before[name]
            print(f"{name:36s} before {before[name]:.3f}   after {after[name]:.3f}   change {change:+.3f}")
        print(f"{after['charts/num_images']} images, {time.time() - self.began:.0f} s, folder {self.run_dir}")
        print(f"look at {self.run_dir / 'before_after.png'} (base model above, trained below) and reward.png")
        if self.wandb:
            self.wandb.finish()
