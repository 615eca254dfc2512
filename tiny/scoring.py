"""What a pretrained pipeline scores on the development prompts, for the stage `eval` of the pretraining."""

import torch

import rewards
from rewards.prompts import load_prompts, resolve_sources
from tiny import splits, world

NUM_NOISES = 4
HEADLINES = {"geneval": "geneval_strict", "ocr": "ocr", "edit": "edit_strict"}  # of each reward
TAGS = {"geneval": world.TAGS, "edit": world.EDITS}


def print_scores(draw, rewards_of_files, guidance_scales):
    """Prints the mean score of each file at each guidance scale, the range over the noises, and the tags.

    draw(prompts, metadata, guidance_scale, generator) makes one image for each prompt, (B, 3, H, W) in
    [0, 1]. rewards_of_files: {name of a prompt file of fold 0: the reward that scores it}.
    """
    for name, spec in rewards_of_files.items():
        path = splits.PROMPTS / "fold_0" / f"{name}.jsonl"
        file = resolve_sources(path, load_prompts(path))
        for guidance_scale in guidance_scales:
            per_noise = []
            for noise_seed in range(NUM_NOISES):
                scores = score_file(draw, file, spec, guidance_scale, noise_seed)
                per_noise.append(scores[HEADLINES[spec]])
            per_noise = torch.stack(per_noise)  # (noises, rows)
            means = per_noise.mean(dim=1)
            print(f"{name}, guidance {guidance_scale}: {per_noise.mean():.3f},", end=" ")
            print(f"noises {means.min():.3f} to {means.max():.3f}", flush=True)
            if spec in TAGS:
                print_tags(per_noise.mean(dim=0), file.metadata, TAGS[spec])


@torch.no_grad()
def score_file(draw, file, spec, guidance_scale, noise_seed):
    """{name: (rows,)} of a reward's scores of one image for each row of a PromptFile."""
    reward = rewards.build(spec, file.prompts, file.metadata, "cpu")
    generator = torch.Generator().manual_seed(noise_seed)
    parts = {}
    for first in range(0, len(file.prompts), 64):
        prompts = file.prompts[first : first + 64]
        metadata = file.metadata[first : first + 64]
        images = draw(prompts, metadata, guidance_scale, generator)
        for key, values in reward.details(images, prompts, metadata).items():
            parts.setdefault(key, []).append(values)
    return {key: torch.cat(values) for key, values in parts.items()}


def print_tags(scores, metadata, tags):
    """Prints one line with the mean score of each tag. scores: (rows,)."""
    means = []
    for tag in tags:
        rows = torch.tensor([row["tag"] == tag for row in metadata])
        means.append(f"{tag} {scores[rows].mean():.3f}")
    print("    " + ", ".join(means), flush=True)
