"""The smallest algorithm file: it uses all of rewards/report as the real ones do, and takes milliseconds."""

import dataclasses
import json

import torch

from rewards import report
from rewards.command_line import NonNegativeInt, PositiveFloat, PositiveInt, Seed, check_ranges  # noqa: F401
from rewards.prompts import load_prompt_files


@dataclasses.dataclass
class Args:
    seed: Seed = 1
    output_dir: str = "runs"
    resume: str = ""
    resume_anyway: bool = False
    eval_every: PositiveInt = 2
    eval_wordings: bool = True
    save_every: PositiveInt = 1
    track: bool = False
    wandb_project_name: str = "flow-rl"
    wandb_entity: str | None = None
    model: str = ""
    prompts: str = "train.jsonl"
    eval_prompts: str = ""
    rewards: str = "jpeg"
    num_iterations: NonNegativeInt = 2
    learning_rate: PositiveFloat = 0.1


class Brightness:
    """A reward."""

    def details(self, images, prompts, metadata):
        return {"reward": images.flatten(1).mean(1)}


def export(run_dir, model):
    with report.replace_folder(run_dir / "weights") as folder:
        for name, parameter in model.named_parameters():
            with open(folder / f"{name}.json", "w") as file:
                json.dump(parameter.tolist(), file)


def make_model(args):
    torch.manual_seed(args.seed)
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=args.learning_rate)


def train(args):
    args, run_dir = report.open_run(args, __file__)
    files = load_prompt_files(args.prompts, args.eval_prompts)
    files.pop("train")
    model, optimizer = make_model(args)

    def sample(prompts, metadata, rows):
        values = torch.sigmoid(model(torch.eye(3)[:1])).detach()
        images = values[0, 0].expand(len(rows), 3, 8, 8)
        films = [[(torch.zeros(8, 8, 3), "noise")] for _ in rows]
        return report.Samples(images, captions=prompts, films=films)

    progress = {"iteration": -1}
    if args.resume:
        state = report.read_checkpoint(run_dir)
        report.restore_parameters(dict(model.named_parameters()), state["weights"])
        report.restore_optimizer(optimizer, state["optimizer"])
        progress = state["progress"]
    log = report.Log(run_dir, __file__, args, progress["iteration"])
    if args.resume:
        export(run_dir, model)
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):
        metrics = {"iteration": iteration, "charts/num_images": iteration}
        if iteration > 0:
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(iteration))
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics["losses/loss"] = loss.item()
            metrics["losses/undefined"] = float("nan")
        is_last = iteration == args.num_iterations
        evaluations = []
        for name, file in report.files_to_evaluate(files, iteration, args).items():
            evaluations.append(report.evaluate(name, sample, file, Brightness(), 2, num_shown=1))
        log.write(metrics, evaluations)
        if iteration % args.save_every == 0 or is_last:
            state = {
                "progress": {"iteration": iteration},
                "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
                "optimizer": optimizer.state_dict(),
            }
            report.write_checkpoint(run_dir, state)
            export(run_dir, model)
    log.close()
    return run_dir
