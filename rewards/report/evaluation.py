"""Scoring a prompt file, shared among the processes of a run."""

import torch
import torch.distributed as dist
from tqdm import tqdm


def gather(values):
    """Concatenates a (B,) tensor over the processes, in their order, to the CPU; B may differ."""
    if not dist.is_initialized():
        return values.cpu()
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values.cpu())
    return torch.cat(parts)


def evaluate(sample, prompts, metadata, reward, batch_size):
    """Scores a prompt file. sample(texts, rows) -> images (B, 3, H, W); processes of torch.distributed share
    the rows.

    Returns ({name: {row: value}}, {row: image (3, H, W) on the CPU}), complete in every process.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows, scores, pictures = range(rank, len(prompts), world_size), {}, {}
    for i in tqdm(range(0, len(rows), batch_size), desc="evaluate", leave=False, disable=None):
        batch = rows[i : i + batch_size]
        texts = [prompts[row] for row in batch]
        images = sample(texts, batch)
        pictures.update(zip(batch, images.cpu()))
        for name, values in reward.details(images, texts, [metadata[row] for row in batch]).items():
            scores.setdefault(name, {}).update(zip(batch, values.tolist()))
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, (scores, pictures))
        names = {name for part, _ in parts for name in part}  # a process without rows has none
        scores = {
            name: {k: v for part, _ in parts for k, v in part.get(name, {}).items()} for name in sorted(names)
        }
        pictures = {row: picture for _, part in parts for row, picture in part.items()}
    return scores, pictures
