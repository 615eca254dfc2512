"""What a model scores before any training: the baselines that stand beside every result.

    python -m benchmark.measure_baselines [--model tiny/sd3] [--fold 0] [--split test] [--noises 4]

None of these learns anything:
    base                    the prompt as it is, at the guidance scale --base-guidance
    guidance 1, 1.5, ...    the same at other scales
    scripted                the world's own detailed wording, with a random layout that fits the prompt
    scripted, guidance 2    both
    best of 4, best of 16   the image with the best reward out of so many, which asks the reward at every use
    paraphrased, hard       other wordings of the same rows

The texts of the fold are measured apart, by the OCR reward. A model that edits is measured on the fold's
edits as well, by the reward `edit`. Their *scripted* instructions say where the object is that they name.
*Reworded* are the same edits in synonyms.

Every setting is measured with several initial noises. The base is measured with twenty, to show how much one
noise matters. benchmark/results/baselines/<model>/fold-<fold>-<split>.json holds the score of every image:
per setting a list with one string per noise, which has a 1 for each row that fulfils its prompt exactly.
Under "ocr" it holds the mean score of the texts at each guidance scale, and under "edits" the settings of
the edits.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from einops import rearrange

import rewards
from benchmark.records import RESULTS, circumstances
from flow_grpo import draw_noise
from rewards.prompts import load_prompts, resolve_sources
from rewards.sources import load_source
from rewards.tiny_world import shapes
from tiny import pretrain_flux, splits, vlm_world, world
from tiny.image_model import NO_T5

NUM_INFERENCE_STEPS = 10
BATCH_SIZE = 64
NUM_BASE_NOISES = 20
BEST_OF = (4, 16)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
FLUX_GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)


def scripted_prompts(metadata):
    """A detailed wording for each row, of a random scene that shows what the row asks for."""
    rng = random.Random(0)
    return [vlm_world.scene(row, rng)[1] for row in metadata]


def scripted_instructions(file):
    """Instructions that say where the object is that they name, or where to put a new one.

    The objects of a source are those that the detector finds in it. An added one gets a random place of the
    image in which nothing is yet.
    """
    rng = random.Random(0)
    sources = torch.stack([load_source(row["source"], world.SIZE) for row in file.metadata])
    instructions = []
    for instruction, row, objects in zip(file.prompts, file.metadata, shapes.detect(sources)):
        if row["tag"] == "add":
            taken = [thing.place for thing in objects]
            free = [place for place in world.PLACE_WORDS if place not in taken]
            instruction = f"{instruction} {rng.choice(free)}"
        else:
            for thing in objects:
                name = f"the {thing.color} {thing.class_name}"
                instruction = instruction.replace(name, f"{name} {thing.place}", 1)
        instructions.append(instruction)
    return instructions


def draw_by_sd3(pipe, prompts, metadata, noise, guidance_scale):
    """Images (B, 3, H, W) in [0, 1] from noise (B, C, h, w), by plain diffusers."""
    return pipe(
        prompts,
        latents=noise,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        output_type="pt",
    ).images


def draw_by_flux(pipe, prompts, metadata, noise, guidance_scale):
    """The same by FLUX.1-Kontext, whose pipeline wants its noise packed. Rows with a source are edits."""
    tokens = rearrange(noise, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    return pretrain_flux.draw(pipe, prompts, metadata, guidance_scale, latents=tokens)


class Model:
    """A pipeline of the tiny world, and what a measurement has to know about its family."""

    def __init__(self, folder):
        family = DiffusionPipeline.load_config(folder)["_class_name"]
        self.edits = family == FluxKontextPipeline.__name__
        self.guidance_scales = FLUX_GUIDANCE_SCALES if self.edits else GUIDANCE_SCALES
        self.draw = draw_by_flux if self.edits else draw_by_sd3
        missing = {} if self.edits else NO_T5
        self.pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **missing)
        self.pipe.set_progress_bar_config(disable=True)
        side = world.SIZE // self.pipe.vae_scale_factor
        self.latent_shape = (self.pipe.vae.config.latent_channels, side, side)


class Scorer:
    """Draws one image for each row of a prompt file, and scores it by a reward."""

    def __init__(self, model, file, reward_name):
        self.model = model
        self.metadata = file.metadata
        self.reward = rewards.build(reward_name, file.prompts, file.metadata, "cpu")

    @torch.no_grad()
    def scores(self, prompts, guidance_scale, noise_number):
        """The reward's scores, {name: (rows,)}. The noises 0, 1, ... of a row are those of --eval-noises."""
        parts = {}
        for first in range(0, len(prompts), BATCH_SIZE):
            rows = range(first, min(first + BATCH_SIZE, len(prompts)))
            numbers = [noise_number * len(prompts) + row for row in rows]
            noise = draw_noise(numbers, 1, self.model.latent_shape, seed=0, iteration=0)
            own_prompts = [prompts[row] for row in rows]
            own_metadata = [self.metadata[row] for row in rows]
            images = self.model.draw(self.model.pipe, own_prompts, own_metadata, noise[:, 0], guidance_scale)
            for name, values in self.reward.details(images, own_prompts, own_metadata).items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}

    def scores_of_noises(self, prompts, guidance_scale, num_noises, name):
        """One score of the reward for several noises: (noises, rows)."""
        scores = [self.scores(prompts, guidance_scale, number)[name] for number in range(num_noises)]
        return torch.stack(scores)


def best_of(rewards_of_images, strict, count):
    """The strict score of the image with the best reward, out of each `count` images of a row.

    rewards_of_images, strict (noises, rows) -> (noises // count, rows).
    """
    chosen = []
    for first in range(0, len(strict) - count + 1, count):
        best = rewards_of_images[first : first + count].argmax(dim=0, keepdim=True)
        chosen.append(strict[first : first + count].gather(0, best)[0])
    return torch.stack(chosen)


def as_bits(strict):
    """(noises, rows) -> one string of 0 and 1 for each noise."""
    return ["".join(str(int(value)) for value in row) for row in strict.tolist()]


def means_of_tags(strict, tags):
    """{tag: mean strict score over noises and rows}."""
    means = {}
    for tag in sorted(set(tags)):
        rows = torch.tensor([own == tag for own in tags])
        means[tag] = round(strict[:, rows].mean().item(), 4)
    return means


def measure_settings(model, file, reward_name, scripted, base_guidance, num_noises):
    """{setting: (noises, rows) strict scores} of a prompt file.

    reward_name: "geneval" or "edit". scripted: the scripted prompts of the rows.
    """
    scorer = Scorer(model, file, reward_name)
    strict, best = measure_base(scorer, file.prompts, reward_name, base_guidance)
    settings = {"base": strict}
    show("base", strict)

    def add(name, prompts, guidance_scale):
        settings[name] = scorer.scores_of_noises(prompts, guidance_scale, num_noises, f"{reward_name}_strict")
        show(name, settings[name])

    for guidance_scale in model.guidance_scales:
        if guidance_scale != base_guidance:
            add(f"guidance {guidance_scale:g}", file.prompts, guidance_scale)
    add("scripted", scripted, base_guidance)
    if base_guidance != 2:
        add("scripted, guidance 2", scripted, 2.0)
    return settings | best


def measure_base(scorer, prompts, reward_name, guidance_scale):
    """Strict scores of prompts with many noises, (noises, rows), and those of the best of some, by name."""
    many = [scorer.scores(prompts, guidance_scale, number) for number in range(NUM_BASE_NOISES)]
    rewards_of_images = torch.stack([scores[reward_name] for scores in many])
    strict = torch.stack([scores[f"{reward_name}_strict"] for scores in many])
    best = {f"best of {count}": best_of(rewards_of_images, strict, count) for count in BEST_OF}
    return strict, best


def measure_drawing(model, folder, split, base_guidance, num_noises):
    """The settings of a fold's prompts, other wordings included, and the tag of each row."""
    file = load_prompts(folder / f"{split}.jsonl")
    scripted = scripted_prompts(file.metadata)
    settings = measure_settings(model, file, "geneval", scripted, base_guidance, num_noises)
    for ending in ("paraphrased", "hard"):
        other = load_prompts(folder / f"{split}_{ending}.jsonl")
        scorer = Scorer(model, other, "geneval")
        settings[ending] = scorer.scores_of_noises(other.prompts, base_guidance, num_noises, "geneval_strict")
        show(ending, settings[ending])
    return settings, [row["tag"] for row in file.metadata]


def measure_editing(model, folder, split, base_guidance, num_noises):
    """The settings of a fold's edits, and the tag of each row."""
    path = folder / f"edit_{split}.jsonl"
    file = resolve_sources(path, load_prompts(path))
    scripted = scripted_instructions(file)
    settings = measure_settings(model, file, "edit", scripted, base_guidance, num_noises)
    path = folder / f"edit_reworded_{split}.jsonl"
    other = resolve_sources(path, load_prompts(path))
    scorer = Scorer(model, other, "edit")
    strict, best = measure_base(scorer, other.prompts, "edit", base_guidance)
    settings["reworded"] = strict
    for name, own in best.items():
        settings[f"reworded, {name}"] = own
    show("reworded", strict)
    return settings, [row["tag"] for row in file.metadata]


def measure_texts(model, folder, split, num_noises):
    """{guidance scale: (noises, rows) OCR scores} of the fold's texts."""
    file = load_prompts(folder / f"text_{split}.jsonl")
    scorer = Scorer(model, file, "ocr")
    scores = {}
    for guidance_scale in model.guidance_scales:
        own = scorer.scores_of_noises(file.prompts, guidance_scale, num_noises, "ocr")
        scores[guidance_scale] = own
        show(f"OCR, guidance {guidance_scale:g}", own)
    return scores


def mean_and_spread(scores):
    """(mean, standard deviation of the noises' means or None) of scores (noises, rows)."""
    per_noise = scores.mean(dim=1)
    spread = round(per_noise.std().item(), 4) if len(per_noise) > 1 else None
    return round(scores.mean().item(), 4), spread


def show(name, strict):
    """Prints one line about a setting."""
    per_noise = strict.mean(dim=1)
    print(f"{name:22s} {strict.mean():.3f}, {len(strict)} noises: ", end="")
    print(f"{per_noise.min():.3f} to {per_noise.max():.3f}", flush=True)


def settings_record(settings, tags):
    """What a record holds of each setting."""
    record = {}
    for name, strict in settings.items():
        mean, spread = mean_and_spread(strict)
        record[name] = {
            "strict": mean,
            "std_over_noises": spread,
            "tags": means_of_tags(strict, tags),
            "images": as_bits(strict),
        }
    return record


def measure(args):
    """Measures everything, and writes the record."""
    command = (
        f"python -m benchmark.measure_baselines --model {args.model} --fold {args.fold} "
        f"--split {args.split} --noises {args.noises}"
    )
    if args.base_guidance != 1:
        command += f" --base-guidance {args.base_guidance:g}"
    record = {"command": command} | circumstances(torch.get_num_threads())
    model = Model(args.model)
    folder = splits.PROMPTS / f"fold_{args.fold}"
    settings, tags = measure_drawing(model, folder, args.split, args.base_guidance, args.noises)
    record["base_guidance"] = args.base_guidance
    record["settings"] = settings_record(settings, tags)
    record["ocr"] = {}
    for guidance_scale, scores in measure_texts(model, folder, args.split, args.noises).items():
        mean, spread = mean_and_spread(scores)
        record["ocr"][f"{guidance_scale:g}"] = {"mean": mean, "std_over_noises": spread}
    if model.edits:
        print("edits")
        settings, tags = measure_editing(model, folder, args.split, args.base_guidance, args.noises)
        record["edits"] = settings_record(settings, tags)
    path = args.results / "baselines" / Path(args.model).name / f"fold-{args.fold}-{args.split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=0) + "\n")
    print(f"wrote {path}")


def parse(words=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny/sd3", help="folder of a pipeline: tiny/sd3, sd3b or flux")
    parser.add_argument("--fold", type=int, choices=range(splits.FOLDS), default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--noises", type=int, default=4, help="initial noises per row")
    parser.add_argument("--base-guidance", type=float, default=1.0, help="the guidance scale of the base")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure(parse())
