"""Rewards: the environment that the algorithm files share.

A reward is any callable with one signature,

    reward(images (B, 3, H, W) float in [0, 1], prompts: list[str], metadata: list[dict]) -> (B,) float32

NaN marks a row that could not be scored (an engine fault); a caller's mistake raises ValueError with the
row's number. Two optional methods: `check(prompt, metadata)` raises ValueError when a row lacks what the
reward needs, before any model is loaded; `details(images, prompts, metadata)` returns a dict of (B,) tensors,
its own value among them, for logs.

`build("geneval:1,jpeg:0.2", ...)` makes one callable of a spec. `load_prompts` reads prompt files.
"""

import importlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class BadInput(ValueError):
    """A mistake of the caller's, with one line that says what is wrong and what to do about it."""


REGISTRY = {  # name in a spec -> "module:factory", imported on demand; factory(metadata, device) -> reward
    "geneval": "rewards.geneval:make_geneval",
    "ocr": "rewards.ocr:make_ocr",
    "jpeg": "rewards.jpeg:make_compressibility",
    "jpeg_incompressibility": "rewards.jpeg:make_incompressibility",
}


def parse_spec(spec):
    """'geneval' or 'geneval:1,jpeg:0.2' -> {name: weight}. ValueError for an unknown name or a bad weight."""
    weights = {}
    for part in spec.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in REGISTRY:
            raise BadInput(f"unknown reward {name!r}, expected one of {', '.join(REGISTRY)}")
        if name in weights:
            raise BadInput(f"reward {name!r} is named twice in {spec!r}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise BadInput(f"the weight {weight!r} of reward {name!r} is not a number")
    return weights


def load_prompts(path):
    """Reads a prompt file: .txt with a prompt a line, or .jsonl with "prompt" and metadata a line.

    Returns (prompts, metadata), two lists of equal length; blank lines are skipped. Raises ValueError, with
    the number of the line where there is one, when the file is missing, empty or has a line that is not such
    a record.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"prompt file {path} does not exist")
    prompts, metadata = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise BadInput(f'{path}, line {number}: needs an object with a string "prompt"')
        prompts.append(row["prompt"])
        metadata.append(row)
    if not prompts:
        raise BadInput(f"prompt file {path} is empty")
    return prompts, metadata


def load_prompt_files(prompts, eval_prompts=""):
    """{name: (prompts, metadata)} of "train", "eval" and, where such a file is there, "eval_paraphrased".

    eval_prompts empty: the file of prompts with `train` replaced by `eval` in its name. The paraphrases' file
    is named as the evaluation's with `_paraphrased` at the end of its stem.
    """
    path = Path(prompts)
    eval_path = Path(eval_prompts or path.with_name(path.name.replace("train", "eval")))
    if eval_path == path and not eval_prompts:
        raise BadInput(
            f"--eval-prompts is needed: {path.name} has no `train` in its name to replace by `eval`"
        )
    files = {"train": load_prompts(path), "eval": load_prompts(eval_path)}
    paraphrased = eval_path.with_stem(eval_path.stem + "_paraphrased")
    return files | ({"eval_paraphrased": load_prompts(paraphrased)} if paraphrased.is_file() else {})


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


class WeightedSum:
    """The weighted sum of several rewards, itself a reward. NaN in any part makes the row's sum NaN."""

    def __init__(self, parts):
        self.parts = parts  # {name: (reward, weight)}

    def details(self, images, prompts, metadata):
        """{"reward": the weighted sum, and each part's raw values by name}: each (B,) float32."""
        check_images(images, prompts, metadata)
        values = {"reward": torch.zeros(len(images), device=images.device)}
        for name, (reward, weight) in self.parts.items():
            if hasattr(reward, "details"):
                values |= reward.details(images, prompts, metadata)
            else:
                values[name] = reward(images, prompts, metadata)
            values["reward"] = values["reward"] + weight * values[name]
        return values

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["reward"]


def build(spec, prompts, metadata, device="cpu"):
    """Makes the reward that a spec describes and checks that every prompt has what it needs.

    spec: names with optional weights, 'geneval' or 'geneval:1,jpeg:0.2'. prompts, metadata: as from
    `load_prompts`; they are what the reward will be asked about. Raises ValueError (unknown name, row that
    cannot be scored).
    """
    parts = {}
    for name, weight in parse_spec(spec).items():
        module, factory = REGISTRY[name].split(":")
        reward = getattr(importlib.import_module(module), factory)(metadata, device)
        for row, (prompt, data) in enumerate(zip(prompts, metadata), start=1):
            if hasattr(reward, "check"):
                try:
                    reward.check(prompt, data)
                except ValueError as error:
                    raise BadInput(f"prompt {row} ({prompt!r}): {error}") from None
        parts[name] = (reward, weight)
    return WeightedSum(parts)
