"""Scoring a prompt file, shared among the processes of a run."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from rewards.prompts import PromptFile
from rewards.report.looks import describe_pictures


class Samples(NamedTuple):
    """What an algorithm draws for a batch of rows of a prompt file."""

    images: torch.Tensor  # (B, 3, H, W) float in [0, 1]
    captions: list  # what to write above each image, beside its reward
    films: list | None = None  # per image, [(picture (H, W, 3) or None, caption)]: how it came about


class Evaluation(NamedTuple):
    """A scored prompt file, complete in every process."""

    name: str  # "eval", or with what was done differently: "eval_paraphrased"
    metadata: list  # of the rows
    scores: dict  # {reward: {row: value}}; "reward" is what is trained on
    captions: dict  # {row: text}, of the rows that are shown
    pictures: dict  # {row: (3, H, W) on the CPU}, likewise
    films: dict  # {row: [(picture, caption)]}, likewise, where there are any
    num_noises: int = 1  # the file's rows stand here once per noise, one pass through the file after another
    looks: dict | None = None  # {row: how its image looks, a vector as of `describe_pictures`}


def gather(values):
    """Concatenates a (B,) tensor over the processes, in their order, to the CPU; B may differ."""
    values = values.cpu()
    return torch.cat(gather_objects(values))


def gather_objects(value):
    """[value of process 0, value of process 1, ...], in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_scores(batches):
    """Rewards of micro-batches, [{name: (B,)}], as one {name: (B,)} over all processes."""
    scores = {}
    for name in batches[0]:
        scores[name] = gather(torch.cat([batch[name] for batch in batches]))
    return scores


def shown_rows(num_rows, num_shown):
    """Which rows of a prompt file are shown: at most num_shown, spread over the file."""
    if num_shown == 0:
        return []
    step = max(num_rows // num_shown, 1)
    return list(range(0, num_rows, step))[:num_shown]


def files_to_evaluate(prompt_files, iteration, args):
    """{name: PromptFile} of the prompt files that are evaluated at an iteration; often there are none.

    The held-out prompts are evaluated every --eval-every iterations, and before and after the training. With
    --eval-wordings, their other wordings are evaluated before and after, too.
    """
    is_first_or_last = iteration in (0, args.num_iterations)
    if is_first_or_last and args.eval_wordings:
        return prompt_files
    if is_first_or_last or iteration % args.eval_every == 0:
        return {"eval": prompt_files["eval"]}
    return {}


def evaluate(name, sample, file, reward, batch_size, num_noises=1, num_shown=16):
    """Scores a PromptFile; the processes share its rows. Returns an Evaluation.

    sample: a function (prompts, metadata, numbers) -> Samples, where a number stands for an image's initial
    noise. num_noises: how many images are drawn for each row: image `number` is of row number % rows.
    num_shown: how many pictures are kept, spread over the file; all pictures of a large file would not fit in
    memory.
    """
    file = PromptFile(file.prompts * num_noises, file.metadata * num_noises)
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world_size = dist.get_world_size()
    rows = range(rank, len(file.prompts), world_size)
    shown = set(shown_rows(len(file.prompts) // num_noises, num_shown))
    share = Evaluation(name, [], {}, {}, {}, {}, looks={})
    most_rows = math.ceil(len(file.prompts) / world_size)  # that a process has
    starts = range(0, most_rows, batch_size)
    for start in tqdm(starts, desc=f"evaluate {name}", leave=False, disable=None):
        batch = rows[start : start + batch_size]
        if not batch:  # a process without rows left takes part, since --shard needs all in a forward pass
            sample(file.prompts[:1], file.metadata[:1], [0])
            continue
        prompts = [file.prompts[row] for row in batch]
        metadata = [file.metadata[row] for row in batch]
        samples = sample(prompts, metadata, batch)
        for reward_name, values in reward.details(samples.images, prompts, metadata).items():
            share.scores.setdefault(reward_name, {}).update(zip(batch, values.tolist()))
        share.looks.update(zip(batch, describe_pictures(samples.images)))
        for k, row in enumerate(batch):
            if row in shown:
                share.captions[row] = samples.captions[k]
                # A copy: a picture that is part of its batch would keep the whole batch in memory.
                share.pictures[row] = samples.images[k].to("cpu", copy=True)
                if samples.films:
                    share.films[row] = samples.films[k]
    return merge(gather_objects(share), file.metadata)._replace(num_noises=num_noises)


def merge(shares, metadata):
    """One Evaluation of those of all processes, each with its own rows."""
    whole = Evaluation(shares[0].name, metadata, {}, {}, {}, {}, looks={})
    names = set()
    for share in shares:  # a process without rows has no names
        names.update(share.scores)
    for name in sorted(names):
        whole.scores[name] = {}
        for share in shares:
            whole.scores[name].update(share.scores.get(name, {}))
    for share in shares:
        whole.captions.update(share.captions)
        whole.pictures.update(share.pictures)
        whole.films.update(share.films)
        whole.looks.update(share.looks or {})
    return whole
