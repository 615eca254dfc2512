"""What the pretraining scripts share: their options, and a training loop that resumes exactly.

Everything here is supervised. No reward is ever seen in pretraining.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm


def parse_options(description, stages, models, argv=None):
    """The options of a pretraining script. stages: names of what it can do. models: of what it can train.

    Sets the number of threads, and makes the folder for checkpoints.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=stages, help="what to do; see above")
    parser.add_argument("--model", choices=models, default=models[0], help="which model to train")
    parser.add_argument("--seed", type=int, default=0, help="seeds the weights, the data and their order")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps; 0: the stage's own number")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step of the flow model")
    parser.add_argument(
        "--dataset-size", type=int, default=65536, help="images that the flow model learns from"
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--work", default="runs/pretrain", help="folder for checkpoints")
    parser.add_argument("--folder", help="folder of the model; default: its own in tiny/")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.folder = args.folder or str(Path(__file__).parent / args.model)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    return args


def learning_rate(step, num_steps, peak, warmup=100, decay_share=0.25):
    """Rises to the peak, stays there, and falls to zero over the last quarter, which sharpens the most."""
    rising = (step + 1) / warmup
    falling = (num_steps - step) / (decay_share * num_steps)
    return peak * min(rising, falling, 1)


def fit(name, modules, loss_at, args, num_steps, peak, ema_decay=0.0):
    """Minimises loss_at(step) over the modules' weights, then leaves the weights' moving average in them.

    Writes a checkpoint every args.save_every steps and resumes from it. loss_at draws its data from the step
    number alone, so an interrupted run continues as if it had not been interrupted.
    """
    path = Path(args.work) / f"{name}.pt"
    parameters = []
    for module in modules:
        parameters.extend(module.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        copy_into(parameters, state["parameters"])
        print(f"{name}: resumes at step {start}")

    smooth_loss = None
    bar = tqdm(range(start, num_steps), initial=start, total=num_steps, desc=name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # In the first steps the average follows faster: it starts from random weights.
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        if smooth_loss is None:
            smooth_loss = loss.item()
        smooth_loss = 0.99 * smooth_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == num_steps:
            state = {
                "step": step + 1,
                "parameters": [parameter.detach() for parameter in parameters],
                "average": average,
                "optimizer": optimizer.state_dict(),
            }
            # Written aside and moved, so that a kill at any moment leaves a whole checkpoint.
            temporary = path.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(path)
    copy_into(parameters, average)


@torch.no_grad()
def copy_into(parameters, tensors):
    """Copies tensors into parameters, one by one."""
    for parameter, tensor in zip(parameters, tensors):
        parameter.copy_(tensor)
