"""The log of a run: metrics.jsonl, pictures, lines on the terminal, and Weights & Biases if asked for."""

import json
import shutil
import time
from pathlib import Path

from rewards import BadInput
from rewards.report.metrics import summarise
from rewards.report.pictures import save_before_after, save_curve, save_films, save_samples


class Log:
    """Begins or continues a run's folder. On resume, rows after the checkpoint's iteration are dropped."""

    def __init__(self, run_dir, script, args, iteration):
        self.run_dir = Path(run_dir)
        self.began = time.time()
        self.wandb = None
        self.rows = []  # of metrics.jsonl
        if args.resume:
            self.rows = self.read_rows(iteration)
        else:
            try:
                (self.run_dir / "samples").mkdir(parents=True)
            except FileExistsError:
                raise BadInput(f"{self.run_dir} exists: another run began that second, try again") from None
            flags = {"algorithm": Path(script).stem} | vars(args)
            (self.run_dir / "args.json").write_text(json.dumps(flags, indent=1))
            shutil.copy(script, self.run_dir)
        # Written aside and moved: a kill while the file is cut back must not lose the rows before.
        temporary = self.run_dir / "metrics.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(self.run_dir / "metrics.jsonl")
        if args.track:
            import wandb

            self.wandb = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                dir=self.run_dir,
                name=self.run_dir.name,
                id=self.run_dir.name,
                resume="allow",
                config=vars(args),
            )

    def read_rows(self, iteration):
        """The rows of a resumed run up to the checkpoint's iteration."""
        path = self.run_dir / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()[: iteration + 1]]
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"cannot resume: {path} is missing or damaged ({error})") from None

    def write(self, metrics, evaluations):
        """Adds a row, {name: number}, and the scores and pictures of the evaluations."""
        samples = []
        for evaluation in evaluations:
            suffix = evaluation.name.removeprefix("eval")
            metrics |= summarise(evaluation.scores, evaluation.metadata, suffix)
            if evaluation.pictures:
                samples.append(self.run_dir / "samples" / f"{metrics['iteration']:06d}{suffix}.png")
                save_samples(samples[-1], evaluation)
            if evaluation.films:
                save_films(samples[-1].with_stem(samples[-1].stem + "_films"), evaluation)
        self.rows.append(metrics)
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if evaluations:
            save_curve(self.run_dir / "reward.png", self.rows)
        if self.wandb:
            import wandb

            pictures = {f"samples/{path.stem}": wandb.Image(str(path)) for path in samples}
            self.wandb.log(metrics | pictures, step=metrics["iteration"])
        self.print_row(metrics)

    def print_row(self, metrics):
        """One line for a rollout, and one for each evaluated reward."""
        start = f"[{metrics['iteration']}]"
        if "charts/reward_mean" in metrics:
            rate = metrics["perf/images_per_second"]
            print(f"{start} reward {metrics['charts/reward_mean']:.3f}, {rate:.0f} images/s", flush=True)
        for name in sorted(metrics):
            if name.startswith("eval/") and name.count("/") == 1:
                print(f"{start} {name} {metrics[name]:.3f}", flush=True)

    def close(self):
        """Prints the scores before and after, and the time, and makes the picture to look at."""
        evaluated = [row for row in self.rows if any(name.startswith("eval/") for name in row)]
        before, after = evaluated[0], evaluated[-1]
        first = self.run_dir / "samples" / f"{before['iteration']:06d}.png"
        # The last in the order of names: the one with rewritten prompts comes after the plain one.
        sheets = self.run_dir.glob(f"samples/{after['iteration']:06d}*.png")
        last = sorted(path for path in sheets if not path.stem.endswith("_films"))[-1]
        save_before_after(self.run_dir / "before_after.png", first, last)
        print()
        for name in sorted(before):
            if name.startswith("eval/") and name.count("/") == 1:
                end = after.get(name, before[name])  # an image model that is not trained is scored once
                change = end - before[name]
                print(f"{name:36s} before {before[name]:.3f}   after {end:.3f}   change {change:+.3f}")
        seconds = time.time() - self.began
        print(f"{after['charts/num_images']} images, {seconds:.0f} s, folder {self.run_dir}")
        print(f"look at {self.run_dir / 'before_after.png'} (base model above, trained below) and reward.png")
        if self.wandb:
            self.wandb.finish()
