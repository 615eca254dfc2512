"""How different are images of one prompt? Reinforcement learning may buy its reward with diversity.

    python -m benchmark.measure_diversity [RUN ...]

For tiny/sd3 and for what each run has made of it: 16 images of each of the 24 shortest evaluation prompts
(images differ in what a prompt leaves open), by the ODE sampler, with fixed noise. Prints one line of JSON
for each:
  pixels   mean root-mean-square distance of two images of a prompt
  places   spread of objects' centres around their mean, in pixels
  colors   entropy in bits of an object's colour, where the prompt names none
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from benchmark.records import ROOT
from rewards.prompts import load_prompts
from rewards.tiny_world.shapes import detect

IMAGES_PER_PROMPT = 16
NUM_PROMPTS = 24
NUM_INFERENCE_STEPS = 10


def entropy(counts):
    """Entropy in bits of a Counter."""
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def shortest_prompts():
    """The shortest distinct evaluation prompts: they leave the most open."""
    prompts, _ = load_prompts(ROOT / "tiny" / "prompts" / "fold_0" / "test.jsonl")
    return sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))[:NUM_PROMPTS]


def initial_noise(first_number):
    """Noise (16, 8, 8, 8) of the images of one prompt, each from a generator of its own."""
    noise = []
    for number in range(first_number, first_number + IMAGES_PER_PROMPT):
        generator = np.random.default_rng((1, 3, 0, number))
        noise.append(generator.standard_normal((8, 8, 8), np.float32))
    return torch.from_numpy(np.stack(noise))


def load_pipeline(transformer_folder):
    """The tiny world's pipeline, with the transformer of a folder unless that is None."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "tiny" / "sd3", dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    if transformer_folder:
        pipe.transformer = SD3Transformer2DModel.from_pretrained(transformer_folder)
    return pipe


def distances(images):
    """Root-mean-square distance of each pair of images."""
    return [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(images, 2)]


def spread_of_places(things):
    """Root-mean-square distance of objects' centres from their mean, in pixels."""
    boxes = torch.tensor([thing.box for thing in things])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return (centres - centres.mean(0)).square().sum(1).mean().sqrt().item()


def names_a_color(prompt, things):
    """Whether the prompt names the colour of one of these objects, which are of one class."""
    phrases = {f"{thing.color} {thing.class_name}" for thing in things}
    return any(phrase in prompt for phrase in phrases)


def diversity(transformer_folder):
    """{"pixels", "places", "colors"} of the tiny model with the transformer of a folder, None for its own."""
    pipe = load_pipeline(transformer_folder)
    pixels = []
    places = []
    colors = []
    for row, prompt in enumerate(shortest_prompts()):
        images = pipe(
            [prompt] * IMAGES_PER_PROMPT,
            latents=initial_noise(row * IMAGES_PER_PROMPT),
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=1,
            max_sequence_length=0,
            output_type="pt",
        ).images
        images = (images * 255).round() / 255  # as when saved
        pixels += distances(images)
        found = list(itertools.chain.from_iterable(detect(images)))
        for shape in sorted({thing.class_name for thing in found if thing.class_name in prompt}):
            things = [thing for thing in found if thing.class_name == shape]
            places.append(spread_of_places(things))
            if not names_a_color(prompt, things):
                colors.append(entropy(Counter(thing.color for thing in things)))
    measures = {"pixels": pixels, "places": places, "colors": colors}
    return {name: round(sum(values) / len(values), 4) for name, values in measures.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folder of a run, all weights trained"
    )
    runs = parser.parse_args().runs
    for run in runs:
        if not (run / "transformer").is_dir():
            raise SystemExit(f"{run} has no transformer/: give the folder of a run without --lora-rank")
    print(json.dumps({"run": None} | diversity(None)), flush=True)
    for run in runs:
        print(json.dumps({"run": run.name} | diversity(run / "transformer")), flush=True)
