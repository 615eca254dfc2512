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
import math


class BadInput(ValueError):
    """A mistake of the caller's, with one line that says what is wrong and what to do about it."""


REGISTRY = {  # name in a spec -> "module:factory", imported on demand; factory(metadata, device[, model])
    "geneval": "rewards.geneval.reward:make_geneval",
    "ocr": "rewards.ocr.reward:make_ocr",
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


def build(spec, prompts, metadata, device="cpu"):
    """Makes the reward that a spec describes and checks that every prompt has what it needs.

    spec: as for `parse_spec`. prompts, metadata: as from `load_prompts`; they are what the reward will be
    asked about. Raises BadInput (unknown name or tag, row that cannot be scored, weights that are not there).
    """
    import torch  # here, not above: a script that writes prompts must not wait for it

    from rewards import prompts as prompt_files
    from rewards.weighted_sum import WeightedSum

    entries, parts, names = parse_spec(spec), {}, {}
    prompt_files.check_tags(prompts, metadata, entries)
    for name, (weight, model) in entries.items():
        module, factory = REGISTRY[name].split(":")
        factory = getattr(importlib.import_module(module), factory)
        if model and "model" not in inspect.signature(factory).parameters:
            raise BadInput(f"reward {name!r} takes no model, remove @{model}")
        rows = prompt_files.judged_rows(name, metadata)
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
