"""How different are images of one prompt? Reinforcement learning may buy its reward with diversity.

    python -m benchmark.diversity [RUN ...]

For the base model and each run's folder: 16 images of each of 24 short evaluation prompts (what a prompt
leaves open is where images can differ), ODE sampler, fixed noise. Prints a JSON line for each: `pixels`, the
mean root-mean-square distance of two images of a prompt, `places`, that of their objects' centres from their
mean, in pixels, and `colors`, the entropy in bits of an object's colour where the prompt names none.
"""

import json
import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

import flow_grpo
import rewards
from rewards.tiny_world.shapes import detect

COUNT, STEPS = 16, 10


def entropy(counts):
    """Entropy in bits of a Counter."""
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@torch.no_grad()
def diversity(transformer_folder):
    """{"pixels", "places", "colors"} of the tiny model with the transformer of a folder, None for its own."""
    pipe, transformer, _ = flow_grpo.load_model(flow_grpo.Args(), torch.device("cpu"), torch.float32)
    if transformer_folder:
        transformer = SD3Transformer2DModel.from_pretrained(transformer_folder)
    prompts = sorted(
        set(rewards.prompts.load_prompts("tiny/prompts/eval.jsonl")[0]), key=lambda p: (len(p), p)
    )[:24]
    sigmas = flow_grpo.get_sigmas(pipe.scheduler, STEPS)
    pixels, places, colors = [], [], []
    for row, prompt in enumerate(prompts):
        embeds = flow_grpo.encode_prompts(pipe, [prompt] * COUNT, 0, {})
        noise = flow_grpo.draw_noise(range(row * COUNT, (row + 1) * COUNT), 1, (8, 8, 8), seed=1, iteration=0)

        def velocity_at(x_t, t, embeds=embeds):
            return flow_grpo.predict_velocity(transformer, x_t, t, embeds, None, 1.0)

        images = flow_grpo.decode(pipe, flow_grpo.rollout(velocity_at, noise, sigmas, (), 0.0, "flow")[0])
        pixels += [(a - b).square().mean().sqrt().item() for a, b in combinations(images, 2)]
        found = [thing for things in detect(images) for thing in things]
        for shape in {thing.class_name for thing in found if thing.class_name in prompt}:
            things = [thing for thing in found if thing.class_name == shape]
            box = torch.tensor([thing.box for thing in things])
            centres = (box[:, :2] + box[:, 2:]) / 2
            places.append((centres - centres.mean(0)).square().sum(1).mean().sqrt().item())
            if not any(f"{color} {shape}" in prompt for color in {thing.color for thing in things}):
                colors.append(entropy(Counter(thing.color for thing in things)))
    parts = {"pixels": pixels, "places": places, "colors": colors}
    return {name: round(sum(values) / len(values), 4) for name, values in parts.items()}


if __name__ == "__main__":
    for run in [None, *sys.argv[1:]]:
        folder = run and Path(run) / "transformer"
        print(json.dumps({"run": run and Path(run).name} | diversity(folder)), flush=True)
