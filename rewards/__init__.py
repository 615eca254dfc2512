"""Rewards: the environment that the algorithm files share.

A reward is any callable with one signature,

    reward(images (B, 3, H, W) float in [0, 1], prompts: list[str], metadata: list[dict]) -> (B,) numbers

NaN marks a row that could not be scored, such as after a fault of an engine. The numbers may be a tensor, an
array or a list; `WeightedSum` checks them. A reward may have three more methods: `check(prompt, metadata)`
raises ValueError where a row lacks what the reward needs, before any image model is loaded;
`details(images, prompts, metadata)` returns a dict of such numbers for the logs, its own value among them;
`start_scoring(images, prompts, metadata)` begins to score in the background, and returns a function that
waits for the numbers. A training run asks for them when all images of an iteration are sampled.

`build("geneval:1,jpeg:0.2", ...)` makes one reward of a spec. `my_rewards:warmth` in a spec is the function
`warmth` of the module `my_rewards`. A prompt with a tag, "reward": "jpeg" in its metadata, is judged by that
reward alone. `rewards.prompts.load_prompts` reads prompt files.
"""

import importlib
import inspect
import math
import os
import sys

from rewards.errors import BadInput, RewardError, reward_failure

__all__ = ["REGISTRY", "BadInput", "RewardError", "build", "parse_spec"]

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
    "edit": "rewards.tiny_world.edit:make_edit",
    "editreward": "rewards.hpsv3:make_editreward",
}
# Sizes of a weight. Beyond them a sum in float32 would lose one reward beside another, or overflow.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9


def parse_spec(spec):
    """'geneval' or 'geneval:1,vlm@hub/id-or-folder:0.2' -> {name: (weight, model)}, model "" where none is.

    The name of a function of one's own has its module in it: 'my_rewards:warmth' or 'my_rewards:warmth:0.2'.
    Raises BadInput for an unknown name, a name that comes twice or a bad weight.
    """
    entries = {}
    for part in spec.split(","):
        head, weight = split_entry(part.strip())
        name, at, model = head.partition("@")
        if name not in REGISTRY and not is_function(name):
            known = ", ".join(REGISTRY)
            raise BadInput(
                f"unknown reward {name!r}, expected one of {known}, or module:function of your own"
            )
        if name in entries:
            raise BadInput(f"reward {name!r} is named twice in {spec!r}")
        if at and not model:
            raise BadInput(f"reward {name!r} has no model after its @: give a hub id or a folder")
        value = 1.0 if weight is None else parse_weight(name, weight)
        entries[name] = value, model
    return entries


def split_entry(entry):
    """(name with its model, weight) of one entry of a spec, as text; the weight is None where none is given.

    A colon stands before the weight, and also between the module and the function of a reward of one's own.
    """
    head, *rest = entry.split(":")
    is_registered = head.partition("@")[0] in REGISTRY
    if rest and not is_registered and is_function(f"{head}:{rest[0]}"):
        function = rest.pop(0)
        head = f"{head}:{function}"
    weight = ":".join(rest) if rest else None
    return head, weight


def is_function(name):
    """Whether this is module:function, as a reward of one's own is named."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def parse_weight(name, text):
    """The weight of a reward as a number. Raises BadInput unless it is one that can be trained with."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise BadInput(f"the weight {text!r} of reward {name!r} is not a number")
    if weight == 0:
        raise BadInput(f"the weight of reward {name!r} is zero, so it would not count: remove it")
    if not SMALLEST_WEIGHT <= abs(weight) <= LARGEST_WEIGHT:
        raise BadInput(
            f"the weight {text!r} of reward {name!r} must be between {SMALLEST_WEIGHT:g} and "
            f"{LARGEST_WEIGHT:g}, or the negative of such a number"
        )
    return weight


def build(spec, prompts, metadata, device="cpu"):
    """Makes the reward that a spec describes and checks that every prompt has what it needs.

    spec: as for `parse_spec`. prompts, metadata: as from `load_prompts`; they are what the reward will be
    asked about. Returns a `WeightedSum`. Raises BadInput for an unknown name or tag, for a row that cannot be
    scored, and for weights that are not there.
    """
    # Here and not above: a script that writes prompts must not wait for torch.
    from rewards import prompts as prompt_files
    from rewards.weighted_sum import WeightedSum

    entries = parse_spec(spec)
    prompt_files.check_tags(prompts, metadata, entries)
    parts = {}
    for name, (weight, model) in entries.items():
        rows = prompt_files.judged_rows(name, metadata)
        if not rows:
            raise BadInput(f"reward {name!r} judges no prompt, all are tagged with others: remove it")
        reward = make_reward(name, model, [metadata[row] for row in rows], device)
        if hasattr(reward, "check"):
            for row in rows:
                check_row(name, reward, row, prompts[row], metadata[row])
        parts[name] = (reward, weight)
    total = WeightedSum(parts)
    total.learn_names(prompts, metadata, device)
    return total


def make_reward(name, model, metadata, device):
    """One reward of the registry, or a function of one's own. Raises BadInput where it cannot be made."""
    options = {"model": model} if model else {}
    try:
        if is_function(name):
            return load_function(name, model)
        module, _, factory = REGISTRY[name].partition(":")
        factory = getattr(importlib.import_module(module), factory)
        if model and "model" not in inspect.signature(factory).parameters:
            raise BadInput(f"reward {name!r} takes no model, remove @{model}")
        reward = factory(metadata, device, **options)
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        raise reward_failure(name, error) from error
    if not callable(getattr(reward, "details", reward)):
        kind = type(reward).__name__
        raise RewardError(f"{REGISTRY[name]}, the factory of reward {name!r}, returned a {kind}, no reward")
    return reward


def load_function(name, model):
    """The function that module:function names. The module is one that `import` finds, also in this folder.

    Raises BadInput where there is none. What goes wrong inside of the module is left to the caller.
    """
    module, _, function = name.partition(":")
    if model:
        raise BadInput(f"reward {name!r} takes no model, remove @{model}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(missing + "."):
            raise  # the module is there, and what it imports is not
        raise BadInput(
            f"reward {name!r}: there is no module {module!r} in this folder or elsewhere"
        ) from None
    if not callable(getattr(found, function, None)):
        raise BadInput(f"reward {name!r}: {found.__file__} has no function {function!r}")
    return getattr(found, function)


def check_row(name, reward, row, prompt, metadata):
    """Raises BadInput where a row lacks what the reward needs."""
    from rewards.prompts import describe_row

    try:
        reward.check(prompt, metadata)
    except ValueError as error:
        raise BadInput(f"{describe_row(row, prompt, metadata)}: {error}") from None
    except Exception as error:
        raise reward_failure(name, error) from error
