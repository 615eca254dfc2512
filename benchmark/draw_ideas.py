"""Draws a picture per idea for the pages of the algorithms, with the functions that train.

    python -m benchmark.draw_ideas

flow_grpo.png: noise that is added with and without a correction, and which steps a window trains.
superflow.png: how uncertain a prompt is, how many images it gets, and how much a step counts.
fdfo.png: pairs of paths from one start, and where their difference points.
They are written to docs/ideas/. Its pictures of PromptRL and PromptLoop come from runs:

    python -m benchmark.draw_ideas --promptrl RUN --promptloop RUN
"""

import argparse
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from PIL import Image

import fdfo
import flow_grpo
import superflow
from benchmark.records import ROOT

FOLDER = ROOT / "docs/ideas"
CENTRES = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])  # the data are two clouds in the plane
SPREAD = 0.2


def velocity_at(x_t, t):
    """The exact velocity E[noise - x_0 | x_t] of the two clouds, (B, 2, 1, 1)."""
    variance = ((1 - t) * SPREAD) ** 2 + t**2
    offset = x_t.flatten(1)[:, None] - (1 - t) * CENTRES  # (B, clouds, 2)
    weight = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)  # which cloud it will be
    x_0 = CENTRES + (1 - t) * SPREAD**2 / variance * offset
    noise = t / variance * offset
    return (weight[..., None] * (noise - x_0)).sum(1).view_as(x_t)


def uncorrected_rollout(noise, sigmas, noise_level):
    """The ODE's steps, with the noise of the SDE and without its correction of the mean."""
    x_t = noise[:, 0]
    for i in range(len(sigmas) - 1):
        velocity = velocity_at(x_t, sigmas[i])
        _, std = flow_grpo.step_mean_std(x_t, velocity, sigmas, i, noise_level, "flow")
        x_t = x_t + (sigmas[i + 1] - sigmas[i]) * velocity
        if i < len(sigmas) - 2:  # the last step has no noise
            x_t = x_t + std * noise[:, 1 + i]
    return x_t


def draw_flow_grpo(num_points=4000, num_steps=40, noise_level=0.7):
    """Three samplers of the two clouds, and the windows of the first iterations of a default run."""
    sigmas = torch.linspace(1, 0, num_steps + 1).tolist()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_points, num_steps, 2, 1, 1, generator=generator)
    ode, _ = flow_grpo.rollout(velocity_at, noise, sigmas, (), noise_level, "flow")
    sde, _ = flow_grpo.rollout(velocity_at, noise, sigmas, range(num_steps - 1), noise_level, "flow")
    wrong = uncorrected_rollout(noise, sigmas, noise_level)
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    samples = {"ODE: no noise": ode, "noise, not corrected": wrong, "the corrected SDE": sde}
    for axes, (title, points) in zip(panels, samples.items()):
        x, y = points.flatten(1).T
        axes.scatter(x, y, s=1)
        axes.set(title=title, xlim=(-3.5, 3.5), ylim=(-2.5, 2.5), xlabel=f"spread of a cloud {y.std():.2f}")
    draw_windows(panels[3])
    return figure


def draw_windows(axes, num_iterations=12):
    """Which steps are stochastic and trained in the first iterations of a default run."""
    args = flow_grpo.Args()
    is_trained = np.zeros((num_iterations, args.num_inference_steps))
    for iteration in range(1, num_iterations + 1):
        window = flow_grpo.draw_window(
            args.num_inference_steps, args.sde_window, args.seed, iteration=iteration
        )
        is_trained[iteration - 1, list(window)] = 1
    step_edges = np.arange(args.num_inference_steps + 1) - 0.5
    iteration_edges = np.arange(num_iterations + 1) + 0.5
    axes.pcolormesh(
        step_edges, iteration_edges, is_trained, cmap="Oranges", vmax=1.5, edgecolor="white", linewidth=1
    )
    axes.invert_yaxis()
    axes.set(title="steps with noise, trained", xlabel="denoising step", ylabel="iteration")


def draw_superflow():
    """The uncertainty of a prompt, the size of its group, and the weight of each step."""
    args = superflow.Args()
    value = torch.linspace(0, 1, 401)
    figure = matplotlib.figure.Figure(figsize=(12, 3), layout="constrained")
    chance, size, credit = figure.subplots(1, 3)
    chance.plot(value, superflow.uncertainty(value))
    chance.set(title="chance to be chosen, not normalised", xlabel="value of the prompt", ylim=(0, 0.6))
    sizes = superflow.choose_group_sizes(value, args.num_images_per_prompt, args.num_bins)
    size.plot(value, sizes, drawstyle="steps-mid")
    size.set(title="images of the prompt", xlabel="value of the prompt", ylim=(0, None))
    sigmas = np.linspace(1, 0, args.num_inference_steps + 1).tolist()
    steps = range(args.num_inference_steps - 1)
    x_t = torch.zeros(1, 1, 1, 1)
    stds = [
        superflow.step_mean_std(x_t, x_t, sigmas, step, args.noise_level, args.sde_type)[1] for step in steps
    ]
    credit.bar(steps, [float(weight) for weight in superflow.step_weights(stds)])
    credit.set(title="weight of a step's advantage", xlabel="denoising step")
    return figure


def draw_fdfo(num_pairs=4, num_steps=12, weight=0.05):
    """Pairs of paths that begin at one point, each in a panel. The reward grows to the right.

    The churn is weaker than the default's, so that the paths can be followed.
    """
    sigmas = torch.linspace(1, 0, num_steps + 1).tolist()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2 * num_pairs, 2 + num_steps, 2, 1, 1, generator=generator)
    noise[1::2, 0] = noise[0::2, 0]  # the two paths of a pair have the same first noise
    churn = fdfo.draw_churn(range(num_pairs), sigmas, "raw", weight, seed=1, iteration=1)
    rollout = fdfo.churned_rollout(velocity_at, noise, sigmas, churn)
    rewards = rollout.x_0[:, 0, 0, 0]
    direction, difference = fdfo.finite_difference(rollout.x_0, rewards)
    gradients = (difference.view(-1, 1, 1, 1) * direction).flatten(1) / 2  # a latent has 2 elements here
    points = [noise[:, :1, :], rollout.states, rollout.x_0[:, None]]
    paths = torch.cat(points, dim=1).flatten(2)  # (B, 1 + T + 1, 2)
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    for pair, axes in enumerate(figure.subplots(1, num_pairs, sharey=True)):
        images = [2 * pair, 2 * pair + 1]
        better, worse = sorted(images, key=lambda image: rewards[image], reverse=True)
        for image, color, label in ((better, "tab:green", "better"), (worse, "tab:red", "worse")):
            axes.plot(*paths[image].T, color=color, lw=1, alpha=0.7)
            axes.plot(*paths[image, -1], "o", color=color, ms=6, label=label)
        axes.plot(*paths[better, 0], "kx", ms=7, label="first noise")
        middle = paths[images, -1].mean(0)
        arrow = {"arrowstyle": "->", "color": "black", "lw": 1.5}
        axes.annotate("", middle + gradients[better], middle, arrowprops=arrow)
        axes.set(xlim=(-2.8, 2.8), ylim=(-2.2, 2.2), xlabel="reward")
    axes.legend(fontsize=8)
    return figure


def picture_of_run(run, pattern):
    """The last sheet of samples of a run whose name fits the pattern."""
    return Image.open(sorted((run / "samples").glob(pattern))[-1])


def first_films(image, count=3, films=6):
    """The first films of a sheet of PromptLoop's films, which stand below each other."""
    return image.crop((0, 0, image.width, image.height * count // films))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--promptrl", type=Path, help="folder of a run whose rewrites are shown")
    parser.add_argument("--promptloop", type=Path, help="folder of a run whose films are shown")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    drawings = {"flow_grpo": draw_flow_grpo, "superflow": draw_superflow, "fdfo": draw_fdfo}
    for name, draw in drawings.items():
        draw().savefig(FOLDER / f"{name}.png", dpi=100)
    if args.promptrl:
        picture_of_run(args.promptrl, "*[0-9]_enhanced.png").save(FOLDER / "promptrl.png")
    if args.promptloop:
        first_films(picture_of_run(args.promptloop, "*[0-9]_loop_films.png")).save(FOLDER / "promptloop.png")
