"""Several rewards as one: their weighted sum."""

import math

import torch

from rewards import BadInput
from rewards.prompts import check_tags, judged_rows


def check_images(images, prompts, metadata):
    """Raises ValueError unless the arguments are what every reward takes."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise BadInput(f"images must be (B, 3, H, W) floats, got {tuple(images.shape)} {images.dtype}")
    if not len(images) == len(prompts) == len(metadata):
        raise BadInput(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata rows")
    flat = images.flatten(1)
    bad = ~((flat >= 0) & (flat <= 1)).all(dim=1)  # also true for NaN
    if bad.any():
        raise BadInput(f"image of row {int(bad.nonzero()[0])} has pixels outside [0, 1] or not finite")


class WeightedSum:
    """The weighted sum of several rewards, itself a reward; at a tagged row the named reward's own value.

    A reward is called on the rows it judges; its values are NaN at the others. NaN in a reward that judges a
    row makes the row's sum NaN.
    """

    def __init__(self, parts, names=None):
        self.parts = parts  # {name: (reward, weight)}
        self.names = names or {}  # {name: keys of its details}, for batches without a row that it judges

    def details(self, images, prompts, metadata):
        """{"reward": the weighted sum, and each part's raw values by name}: each (B,) float32."""
        check_images(images, prompts, metadata)
        check_tags(prompts, metadata, self.parts)
        total = torch.zeros(len(images), device=images.device)
        values = {"reward": total}
        for name, (reward, weight) in self.parts.items():
            rows = judged_rows(name, metadata)
            found = dict.fromkeys(self.names.get(name, [name]), total[rows])
            if rows:
                batch = images if len(rows) == len(images) else images[rows]
                asked = batch, [prompts[i] for i in rows], [metadata[i] for i in rows]
                found = reward.details(*asked) if hasattr(reward, "details") else {name: reward(*asked)}
            for key, value in found.items():
                values[key] = torch.full_like(total, math.nan)
                values[key][rows] = value.to(total)
            weights = [weight if metadata[i].get("reward") is None else 1.0 for i in rows]
            total[rows] += total.new_tensor(weights) * values[name][rows]
        return values

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["reward"]
