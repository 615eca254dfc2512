"""What a run leaves behind: metrics.jsonl, pictures, a line an iteration, a summary at the end, and W&B if
asked for.

Only the first process of a run makes a Report. Every logged name is explained in docs/.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import textwrap
import time
from pathlib import Path

import matplotlib.figure
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from einops import rearrange
from PIL import Image

from rewards import BadInput, parse_spec
from rewards.report.evaluation import evaluate, gather  # noqa: F401


def mean(values):
    """Mean over the values that are not NaN, NaN when there is none."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else float("nan")


def summarise(scores, metadata, suffix):
    """Means, "eval/<name><suffix>" of all rows and ".../<tag>" of a tag's. scores: {name: {row: value}}.

    A reward's means are over the rows it judged; where there are none, they are left out.
    """
    means, total = {}, scores["reward"]
    for name, values in scores.items():
        # NaN next to a total that is a number: another reward judged this row
        values = {k: v for k, v in values.items() if not math.isnan(v) or math.isnan(total[k])}
        if not values:
            continue
        means[f"eval/{name}{suffix}"] = mean(values.values())
        for tag in sorted({metadata[row]["tag"] for row in values if "tag" in metadata[row]}):
            tagged = [value for row, value in values.items() if metadata[row].get("tag") == tag]
            means[f"eval/{name}{suffix}/{tag}"] = mean(tagged)
    return means


def save_samples(path, prompts, values, pictures):
    """16 images spread over the file. values {row: reward}, pictures {row: (3, H, W)}."""
    rows = sorted(pictures)[:: max(len(pictures) // 16, 1)][:16]
    titles = [
        [
            *(line for part in prompts[row].split("\n") for line in textwrap.wrap(part, 28)[:3]),
            f"{values[row]:.2f}",
        ]
        for row in rows
    ]
    sheet = matplotlib.figure.Figure(figsize=(16, 4.2 + 0.35 * max(map(len, titles))))
    for axes, row, title in zip(sheet.subplots(2, 8).flat, rows, titles):
        axes.imshow(rearrange(pictures[row], "c h w -> h w c"), interpolation="nearest")
        axes.set_title("\n".join(title), fontsize=9, parse_math=False)
    for axes in sheet.axes:
        axes.axis("off")
    sheet.tight_layout()
    sheet.savefig(path, dpi=80)


def save_films(run_dir, iteration, films, prompts, metadata, scores, pictures):
    """Six prompts spread over the file, a line each: what was seen and written at each refinement, the image.

    films: promptloop.py's batches, (rows of the file, steps, record of their refinements); the others as in
    `Report.write`.
    """
    shots = {}  # row -> [(preview or None, its title)]
    for rows, steps, record in films:
        for part, step, texts, _, (_, previews, *_) in record:
            for k, (j, text) in enumerate(zip(part, texts)):
                seen = None if previews is None else previews[k]
                shots.setdefault(rows[j], []).append((seen, f"{step / steps:.0%}: {text}"))
    rows = sorted(shots)[:: max(len(shots) // 6, 1)][:6]
    columns = 1 + len(shots[rows[0]])
    sheet = matplotlib.figure.Figure(figsize=(2.2 * columns, 2.7 * len(rows)))
    for row, line in zip(rows, sheet.subplots(len(rows), columns, squeeze=False)):
        final = rearrange(pictures[row], "c h w -> h w c")
        shots[row].append((final, f"{prompts[row]}\n{scores['reward'][row]:.2f}"))
        for axes, (picture, title) in zip(line, shots[row]):
            if picture is not None:
                axes.imshow(picture, interpolation="nearest")
            lines = [line for part in title.split("\n") for line in textwrap.wrap(part, 30)]
            axes.set_title("\n".join(lines), fontsize=7, parse_math=False)
            axes.axis("off")
    sheet.tight_layout()
    sheet.savefig(run_dir / "samples" / f"{iteration:06d}_films.png", dpi=80)


def save_curve(path, metrics):
    """The reward's evaluations so far against images sampled; metrics.jsonl has all other scores."""
    curve = matplotlib.figure.Figure(figsize=(7, 4))
    axes = curve.subplots()
    for name in sorted({name for row in metrics for name in row if re.fullmatch(r"eval/reward[^/]*", name)}):
        points = [(row["charts/num_images"], row[name]) for row in metrics if name in row]
        axes.plot(*zip(*points), ".-", label=name)
    axes.set(xlabel="images sampled", ylabel="held-out reward")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves
    curve.savefig(path, dpi=120, bbox_inches="tight")


def reward_metrics(scores, group_sizes):
    """The charts/ and rewards/ metrics of a rollout. scores: {name: (B,)}, "reward" is trained on.

    group_sizes: images of each prompt, in the order of the scores; sum B. Raises FloatingPointError when more
    than a tenth of the rewards are NaN.
    """
    nan_fraction = scores["reward"].isnan().float().mean().item()
    if nan_fraction > 0.1:
        raise FloatingPointError(f"{nan_fraction:.0%} of the rewards are NaN")
    groups = [group[~group.isnan()] for group in scores["reward"].split(group_sizes)]
    spread = torch.stack([group.std(correction=0) for group in groups if len(group)])
    values = torch.cat(groups)
    row = {f"rewards/{name}": value.nanmean().item() for name, value in scores.items() if name != "reward"}
    row = {name: value for name, value in row.items() if not math.isnan(value)}  # NaN: it judged none
    row["charts/reward_mean"] = values.mean().item()
    row["charts/reward_std"] = spread.mean().item()  # the mean of the groups' deviations
    row["charts/zero_std_fraction"] = (spread < 1e-6).float().mean().item()
    row["charts/nan_fraction"] = nan_fraction
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


def open_run(Args, args, script):
    """(args, run_dir) of the run that args.resume names, whose saved arguments replace all others, or of a
    new run.

    Raises BadInput when the folder to resume is missing, damaged or another algorithm's.
    """
    algorithm = Path(script).stem
    if not args.resume:
        name = f"{algorithm}-{next(iter(parse_spec(args.rewards)))}-{args.seed}"
        return args, Path(args.output_dir) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume)
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        if saved.pop("algorithm") != algorithm:
            raise ValueError("another algorithm made it")
        return dataclasses.replace(Args(**saved), resume=args.resume), run_dir
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"cannot resume {run_dir}: {error}") from None


def open_device(args):
    """(device, dtype of the frozen weights, rank, world size), from the flags and torchrun's environment."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32"
    return device, getattr(torch, dtype), rank, world_size


def check_args(args, families):
    """Raises BadInput for sizes and models that cannot work, before any model is loaded.

    families: names of the pipeline classes that the algorithm file supports.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    P, share = args.num_prompts_per_iteration, world_size * getattr(args, "num_updates_per_iteration", 1)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is no CUDA device here, use --device cpu")
    if P < 1 or P % share:
        raise BadInput(f"--num-prompts-per-iteration {P} is no multiple of {share} (processes times updates)")
    if args.num_images_per_prompt < 2:
        raise BadInput("--num-images-per-prompt must be at least 2: the images of a prompt are compared")
    if args.num_inference_steps < 2:
        raise BadInput("--num-inference-steps must be at least 2")
    if not 0 <= getattr(args, "sde_window", 0) < args.num_inference_steps:
        raise BadInput(f"--sde-window {args.sde_window} must be below --num-inference-steps")
    if getattr(args, "noise_level", 1) <= 0:
        raise BadInput("--noise-level must be above 0: a step without noise has no log-probability")
    steps = min(args.num_inference_steps, args.eval_num_inference_steps)
    if not 1 <= getattr(args, "num_refinements", 1) <= steps:
        raise BadInput(f"--num-refinements {args.num_refinements} must be 1 to {steps}, the steps")
    if getattr(args, "max_new_tokens", 1) < 1:
        raise BadInput("--max-new-tokens must be at least 1")
    try:
        config = DiffusionPipeline.load_config(args.model)
        family = config["_class_name"]
    except Exception:  # the hub's and the file system's errors have no common base
        raise BadInput(f"--model {args.model} is no diffusers pipeline: it has no model_index.json") from None
    if family not in families:
        raise BadInput(f"--model {args.model} is a {family}; supported: {', '.join(families)}")
    if not re.fullmatch("(FlowMatch)?EulerDiscreteScheduler", config["scheduler"][1]):
        raise BadInput(f"--model {args.model} has a {config['scheduler'][1]}; steps must be Euler's")


@contextlib.contextmanager
def uninterrupted():
    """Inside, Ctrl-C waits: a write in progress is finished."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def write_state(path, state):
    """Saves tensors, numbers and containers of them; moved into place: a kill leaves the last good file."""
    path.parent.mkdir(exist_ok=True)
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


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
            try:
                (self.run_dir / "samples").mkdir(parents=True)
            except FileExistsError:
                raise BadInput(f"{self.run_dir} exists: another run began that second, try again") from None
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
            if name in ("eval", "eval_enhanced", "eval_loop"):
                sample = self.run_dir / "samples" / f"{row['iteration']:06d}{name.removeprefix('eval')}.png"
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
        evaluated = [row for row in self.metrics if any(name.startswith("eval/") for name in row)]
        before, after = evaluated[0], evaluated[-1]
        # a rewritten prompt's picture sorts after the plain one's
        paths = [self.run_dir / "samples" / f"{before['iteration']:06d}.png"]
        paths += sorted(self.run_dir.glob(f"samples/{after['iteration']:06d}*.png"))[-1:]
        sheets = [Image.open(path) for path in paths]
        both = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)))
        for sheet, top in zip(sheets, (0, sheets[0].height)):  # rewrites make the second one higher
            both.paste(sheet, (0, top))
        both.save(self.run_dir / "before_after.png")
        print()
        for name in sorted(name for name in before if name.startswith("eval/") and name.count("/") == 1):
            end = after.get(name, before[name])  # without training of the image model it is scored once
            change = end - before[name]
            print(f"{name:36s} before {before[name]:.3f}   after {end:.3f}   change {change:+.3f}")
        print(f"{after['charts/num_images']} images, {time.time() - self.began:.0f} s, folder {self.run_dir}")
        print(f"look at {self.run_dir / 'before_after.png'} (base model above, trained below) and reward.png")
        if self.wandb:
            self.wandb.finish()
