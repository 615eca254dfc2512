"""Rewards: the environment that the algorithm files share.

A reward is any callable with one signature,

    reward(images (B, 3, H, W) float in [0, 1], prompts: list[str], metadata: list[dict]) -> (B,) float32

NaN marks a row that could not be scored (an engine fault); a caller's mistake raises ValueError with the
row's number. Two optional methods: `check(prompt, metadata)` raises ValueError when a row lacks what the
reward needs, before any model is loaded; `details(images, prompts, metadata)` returns a dict of (B,) tensors,
its own value among them, for logs.

`build("geneval:1,jpeg:0.2", ...)` makes one callable of a spec; a prompt with a tag, "reward": "jpeg" in its
metadata, is judged by that reward alone. `load_prompts` reads prompt files.
"""

import importlib
import inspect
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class BadInput(ValueError):
    """A mistake of the caller's, with one line that says what is wrong and what to do about it."""


REGISTRY = {  # name in a spec -> "module:factory", imported on demand; factory(metadata, device[, model])
    "geneval": "rewards.geneval:make_geneval",
    "ocr": "rewards.ocr:make_ocr",
    "jpeg": "rewards.jpeg:make_compressibility",
    "jpeg_incompressibility": "rewards.jpeg:make_incompressibility",
    "clipscore": "rewards.clip:make_clipscore",
    "pickscore": "rewards.clip:make_pickscore",
    "hpsv2": "rewards.clip:make_hpsv2",
    "aesthetic": "rewards.clip:make_aesthetic",
    "imagereward": "rewards.imagereward:make_imagereward",
    "vlm": "rewards.vlm:make_vlm",
    "vlm_judge": "rewards.vlm:make_vlm_judge",
    "hpsv3": "rewards.hpsv3:make_hpsv3",
    "editreward": "rewards.hpsv3:make_editreward",
}


def parse_spec(spec):
    """'geneval' or 'geneval:1,vlm@hub/id-or-folder:0.2' -> {name: (weight, model)}, model "" where none is.

    Raises BadInput for an unknown name, a name that comes twice or a bad weight.
    """
    entries = {}
    for part in spec.split(","):
        head, _, weight = part.strip().partition(":")
        name, _, model = head.partition("@")
        if name not in REGISTRY:
            raise BadInput(f"unknown reward {name!r}, expected one of {', '.join(REGISTRY)}")
        if name in entries:
            raise BadInput(f"reward {name!r} is named twice in {spec!r}")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BadInput(f"the weight {weight!r} of reward {name!r} is not a number")
        entries[name] = value, model
    return entries


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


def check_tags(prompts, metadata, names):
    """Raises BadInput for a prompt whose tag, metadata["reward"], is none of these rewards."""
    for row, (prompt, data) in enumerate(zip(prompts, metadata), start=1):
        if (tag := data.get("reward")) not in (None, *names):
            raise BadInput(f'prompt {row} ({prompt!r}) has the tag "reward": {tag!r}, name it in --rewards')


def judged_rows(name, metadata):
    """The rows that a reward judges: those without a tag, and those tagged with its name."""
    return [i for i, row in enumerate(metadata) if row.get("reward") in (None, name)]


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


def build(spec, prompts, metadata, device="cpu"):
    """Makes the reward that a spec describes and checks that every prompt has what it needs.

    spec: as for `parse_spec`. prompts, metadata: as from `load_prompts`; they are what the reward will be
    asked about. Raises BadInput (unknown name or tag, row that cannot be scored, weights that are not there).
    """
    entries, parts, names = parse_spec(spec), {}, {}
    check_tags(prompts, metadata, entries)
    for name, (weight, model) in entries.items():
        module, factory = REGISTRY[name].split(":")
        factory = getattr(importlib.import_module(module), factory)
        if model and "model" not in inspect.signature(factory).parameters:
            raise BadInput(f"reward {name!r} takes no model, remove @{model}")
        rows = judged_rows(name, metadata)
        if not rows:
            raise BadInput(f"reward {name!r} judges no prompt, all are tagged with others: remove it")
        texts, data = [prompts[i] for i in rows], [metadata[i] for i in rows]
        reward = factory(data, device, **({"model": model} if model else {}))
        for row in rows if hasattr(reward, "check") else ():
            try:
                reward.check(prompts[row], metadata[row])
            except ValueError as error:
                raise BadInput(f"prompt {row + 1} ({prompts[row]!r}): {error}") from None
        if len(rows) < len(metadata) and hasattr(reward, "details"):
            # batches of which it judges no row need the keys too: ask about a black image
            names[name] = list(reward.details(torch.zeros(1, 3, 64, 64, device=device), texts[:1], data[:1]))
        parts[name] = (reward, weight)
    return WeightedSum(parts, names)
