"""Counts what the tiny world's splits hold, and checks its detector.

    python -m benchmark.describe_world

Prints, for every fold and split: the distinct contents per tag, and the effective number of prompts (the
square of the sum of weights over the sum of squared weights, where a prompt weighs as many lines as it has).
Then what any two splits share, which must be nothing, and the share of ground-truth pictures in which the
detector finds exactly what was drawn.
"""

import itertools
import random
from collections import Counter

import torch
from einops import rearrange

from rewards.geneval.detection import TAGS
from rewards.geneval.rule import passes
from rewards.prompts import load_prompts
from rewards.tiny_world.shapes import detect
from tiny import splits, world

PICTURES_PER_TAG = 1000


def load(fold, name):
    """A prompt file of a fold."""
    return load_prompts(splits.PROMPTS / f"fold_{fold}" / f"{name}.jsonl")


def effective_number(prompts):
    """How many equally frequent prompts would average as well as these lines do."""
    counts = Counter(prompts).values()
    return sum(counts) ** 2 / sum(count**2 for count in counts)


def describe_split(fold, name):
    """One line on a split: its lines, its effective prompts and its distinct contents per tag."""
    file = load(fold, name)
    contents = {tag: set() for tag in TAGS}
    for row in file.metadata:
        contents[row["tag"]].add(world.facts(row))
    per_tag = ", ".join(f"{tag} {len(own)}" for tag, own in contents.items())
    effective = effective_number(file.prompts)
    print(
        f"fold {fold}, {name:5s} {len(file.prompts)} lines, {effective:5.1f} effective; contents: {per_tag}"
    )


def keys_of(fold, name):
    """{kind of key: keys} of everything that no two splits may share."""
    edits = load(fold, f"edit_{name}")
    return {
        "contents": {world.facts(row) for row in load(fold, name).metadata},
        "texts": {row["text"] for row in load(fold, f"text_{name}").metadata},
        "instructions": set(edits.prompts),
        "results of edits": {world.facts(row) for row in edits.metadata},
        "images to edit": {row["source"] for row in edits.metadata},
    }


def count_shared(fold):
    """One line: how many keys of each kind two splits of a fold share."""
    shared = Counter()
    keys = {name: keys_of(fold, name) for name in ("train", "dev", "test")}
    for first, second in itertools.combinations(keys, 2):
        for kind in keys[first]:
            shared[kind] += len(keys[first][kind] & keys[second][kind])
    print(f"fold {fold}, shared by two splits:", ", ".join(f"{kind} {n}" for kind, n in shared.items()))


def measure_detector(tag):
    """The share of ground-truth pictures of a tag that fulfil their own content exactly."""
    rng = random.Random(f"detector {tag}")
    exact = 0
    for _ in range(PICTURES_PER_TAG // 100):
        contents = [rng.choice(world.CONTENTS[tag]) for _ in range(100)]
        pictures = [torch.from_numpy(world.draw(world.realise(content, rng))) for content in contents]
        pictures = rearrange(torch.stack(pictures), "b h w c -> b c h w") / 255
        for content, detections in zip(contents, detect(pictures)):
            exact += passes(detections, content, exact=True)
    return exact / PICTURES_PER_TAG


if __name__ == "__main__":
    for fold in range(splits.FOLDS):
        for name in ("train", "dev", "test"):
            describe_split(fold, name)
        count_shared(fold)
    for tag in TAGS:
        print(f"detector, {tag}: {measure_detector(tag):.4f} of {PICTURES_PER_TAG} pictures exact")
