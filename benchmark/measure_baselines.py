"""What a model scores before any training: the baselines that stand beside every result.

    python -m benchmark.measure_baselines [--model tiny/sd3] [--fold 0] [--split test] [--noises 4]

None of these learns anything:
    base                    the prompt as it is, at guidance 1
    guidance 1.5, 2, 3      the same with classifier-free guidance
    scripted                the world's own detailed wording, with a random layout that fits the prompt
    scripted, guidance 2    both
    best of 4, best of 16   the image with the best reward out of so many, which asks the reward at every use
    paraphrased, hard       other wordings of the same rows, at guidance 1

The texts of the fold are measured apart, by the OCR reward, at guidance 1, 1.5, 2 and 3.

Every setting is measured with several initial noises. The base is measured with twenty, to show how much one
noise matters. benchmark/results/baselines/<model>/fold-<fold>-<split>.json holds the score of every image:
per setting a list with one string per noise, which has a 1 for each row that fulfils its prompt exactly.
Under "ocr" it holds the mean score of the texts at each guidance scale.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import rewards
from benchmark.records import RESULTS, circumstances
from flow_grpo import draw_noise
from rewards.prompts import load_prompts
from tiny import splits, vlm_world
from tiny.image_model import NO_T5

NUM_INFERENCE_STEPS = 10
BATCH_SIZE = 64
NUM_BASE_NOISES = 20
BEST_OF = (4, 16)
GUIDANCE_SCALES = (1.5, 2.0, 3.0)


def scripted_prompts(metadata):
    """A detailed wording for each row, of a random scene that shows what the row asks for."""
    rng = random.Random(0)
    return [vlm_world.scene(row, rng)[1] for row in metadata]


class Scorer:
    """Draws one image for each row of a prompt file, and scores it by a reward."""

    def __init__(self, folder, file, reward_name):
        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **NO_T5)
        self.pipe.set_progress_bar_config(disable=True)
        self.metadata = file.metadata
        self.reward = rewards.build(reward_name, file.prompts, file.metadata, "cpu")
        side = self.pipe.transformer.config.sample_size
        self.latent_shape = (self.pipe.transformer.config.in_channels, side, side)

    @torch.no_grad()
    def scores(self, prompts, guidance_scale, noise_number):
        """The reward's scores, {name: (rows,)}. The noises 0, 1, ... of a row are those of --eval-noises."""
        parts = {}
        for first in range(0, len(prompts), BATCH_SIZE):
            rows = range(first, min(first + BATCH_SIZE, len(prompts)))
            numbers = [noise_number * len(prompts) + row for row in rows]
            noise = draw_noise(numbers, 1, self.latent_shape, seed=0, iteration=0)
            images = self.pipe(
                [prompts[row] for row in rows],
                latents=noise[:, 0],
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=guidance_scale,
                max_sequence_length=0,
                output_type="pt",
            ).images
            details = self.reward.details(
                images, [prompts[row] for row in rows], [self.metadata[row] for row in rows]
            )
            for name, values in details.items():
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


def measure(model, fold, split, num_noises):
    """{setting: (noises, rows) strict scores}, and the tag of each row."""
    folder = splits.PROMPTS / f"fold_{fold}"
    file = load_prompts(folder / f"{split}.jsonl")
    scorer = Scorer(model, file, "geneval")
    settings = {}

    def add(name, prompts, guidance_scale):
        settings[name] = scorer.scores_of_noises(prompts, guidance_scale, num_noises, "geneval_strict")
        show(name, settings[name])

    many = [scorer.scores(file.prompts, 1.0, number) for number in range(NUM_BASE_NOISES)]
    rewards_of_images = torch.stack([scores["geneval"] for scores in many])
    strict = torch.stack([scores["geneval_strict"] for scores in many])
    settings["base"] = strict
    show("base", strict)
    for guidance_scale in GUIDANCE_SCALES:
        add(f"guidance {guidance_scale:g}", file.prompts, guidance_scale)
    scripted = scripted_prompts(file.metadata)
    add("scripted", scripted, 1.0)
    add("scripted, guidance 2", scripted, 2.0)
    for count in BEST_OF:
        settings[f"best of {count}"] = best_of(rewards_of_images, strict, count)
        show(f"best of {count}", settings[f"best of {count}"])
    for ending in ("paraphrased", "hard"):
        other = load_prompts(folder / f"{split}_{ending}.jsonl")
        add(ending, other.prompts, 1.0)
    return settings, [row["tag"] for row in file.metadata]


def measure_texts(model, fold, split, num_noises):
    """{guidance scale: (noises, rows) OCR scores} of the fold's texts."""
    file = load_prompts(splits.PROMPTS / f"fold_{fold}" / f"text_{split}.jsonl")
    scorer = Scorer(model, file, "ocr")
    scores = {}
    for guidance_scale in (1.0, *GUIDANCE_SCALES):
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny/sd3", help="folder of a pipeline without T5")
    parser.add_argument("--fold", type=int, choices=range(splits.FOLDS), default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--noises", type=int, default=4, help="initial noises per row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    args = parser.parse_args()
    settings, tags = measure(args.model, args.fold, args.split, args.noises)
    texts = measure_texts(args.model, args.fold, args.split, args.noises)
    record = {
        "command": f"python -m benchmark.measure_baselines --model {args.model} --fold {args.fold} "
        f"--split {args.split} --noises {args.noises}"
    }
    record |= circumstances(torch.get_num_threads())
    record["settings"] = {}
    for name, strict in settings.items():
        mean, spread = mean_and_spread(strict)
        record["settings"][name] = {
            "strict": mean,
            "std_over_noises": spread,
            "tags": means_of_tags(strict, tags),
            "images": as_bits(strict),
        }
    record["ocr"] = {}
    for guidance_scale, scores in texts.items():
        mean, spread = mean_and_spread(scores)
        record["ocr"][f"{guidance_scale:g}"] = {"mean": mean, "std_over_noises": spread}
    path = args.results / "baselines" / Path(args.model).name / f"fold-{args.fold}-{args.split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=0) + "\n")
    print(f"wrote {path}")
