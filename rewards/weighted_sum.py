"""Several rewards as one: their weighted sum. What a reward returns is checked here, and only here."""

import functools
import math
import numbers
import warnings

import numpy as np
import torch

from rewards.errors import BadInput, RewardError, reward_failure
from rewards.prompts import check_tags, judged_rows


def check_images(images, prompts, metadata):
    """Raises BadInput unless the arguments are what every reward takes."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise BadInput(f"images must be (B, 3, H, W) floats, got {tuple(images.shape)} {images.dtype}")
    if not len(images) == len(prompts) == len(metadata):
        raise BadInput(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata rows")
    flat = images.flatten(1)
    bad = ~((flat >= 0) & (flat <= 1)).all(dim=1)  # also true for NaN
    if bad.any():
        raise BadInput(f"image of row {int(bad.nonzero()[0])} has pixels outside [0, 1] or not finite")


def read_scores(value, count, source):
    """What a reward returned, as a detached float32 tensor (count,).

    value: a tensor, an array, a list or a tuple of count numbers; NaN, bool and int are numbers. source: what
    to call it, such as "reward 'jpeg'". Raises RewardError, naming source, for anything else.
    """
    scores = as_vector(value)
    if scores is None or len(scores) != count:
        raise RewardError(
            f"{source} returned {describe(value)}; it must return a tensor, array or list of {count} "
            "numbers, one per image, NaN where an image cannot be scored"
        )
    return scores.to(torch.float32, copy=True)


def as_vector(value):
    """A one-dimensional tensor of real numbers with the content of value, or None where it is none."""
    if isinstance(value, torch.Tensor):
        dense = value.layout == torch.strided and value.device.type != "meta" and not value.is_quantized
        return value.detach() if dense and value.ndim == 1 and not value.is_complex() else None
    if isinstance(value, (list, tuple)):
        items = [as_number(item) for item in value]
        return None if None in items else torch.tensor(items, dtype=torch.float64)
    if not hasattr(value, "__array__"):
        return None
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        return None
    return torch.from_numpy(array.astype(np.float64))


def as_number(item):
    """An item of a list as a float, or None where it is no single number."""
    if isinstance(item, torch.Tensor):
        item = item.detach()
        is_number = item.ndim == 0 and item.layout == torch.strided and not item.is_complex()
    else:
        is_number = isinstance(item, (numbers.Real, np.bool_))
    try:
        return float(item) if is_number else None
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def describe(value):
    """What came instead of numbers, in a few words."""
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype}{layout})"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} ({value.dtype})"
    if isinstance(value, (list, tuple)):
        wrong = [item for item in value if as_number(item) is None]
        other = f", among them a {type(wrong[0]).__name__}" if wrong else ""
        return f"a {type(value).__name__} of {len(value)}{other}"
    return "None" if value is None else f"a {type(value).__name__}"


class WeightedSum:
    """The weighted sum of several rewards, itself a reward; at a tagged row the named reward's own value.

    A reward is called on the rows it judges; its values are NaN at the others. NaN in a reward that judges a
    row makes the row's sum NaN, and infinity counts as NaN. Rewards get copies: whatever one does to its
    images or metadata, the next one and the pictures of a run are not changed by it.
    """

    def __init__(self, parts):
        self.parts = parts  # {name: (reward, weight)}
        self.names = {}  # {name: the names in its details}, from its first call
        self.warned = set()  # names of scores that were infinite

    def details(self, images, prompts, metadata):
        """{"reward": the weighted sum, and each part's raw values by name}: each (B,) float32.

        Raises BadInput for images that are none or a tag that was not built, and RewardError for a reward
        that fails or returns anything but numbers.
        """
        return self.start_scoring(images, prompts, metadata)()

    def start_scoring(self, images, prompts, metadata):
        """Begins to score. Returns a function that waits for the scores, and gives what `details` gives.

        A reward that has this method too, such as ocr, goes on in the background. The others have scored
        when this returns.
        """
        check_images(images, prompts, metadata)
        check_tags(prompts, metadata, self.parts)
        waits = {}
        for name in self.parts:
            rows = judged_rows(name, metadata)
            if rows:
                waits[name] = self.start_part(name, rows, images, prompts, metadata)
        zeros = torch.zeros(len(images), device=images.device)
        return functools.partial(self.add_up, waits, zeros, metadata)

    def add_up(self, waits, total, metadata):
        """What `details` gives, of parts that have begun to score.

        waits: {name of a part: a function that waits for its scores}, without parts that judge no row.
        total: (B,) zeros.
        """
        values = {"reward": total}
        for name, (_, weight) in self.parts.items():
            rows = judged_rows(name, metadata)
            if rows:
                found = waits[name]()
            else:
                found = dict.fromkeys(self.names.get(name, [name]), total[rows])
            for key, scores in found.items():
                if key in values:
                    raise RewardError(f"details of reward {name!r} has {key!r}, a name already in use")
                values[key] = torch.full_like(total, math.nan)
                values[key][rows] = scores.to(total)
            weights = [weight if metadata[row].get("reward") is None else 1.0 for row in rows]
            total[rows] += total.new_tensor(weights) * values[name][rows]
        self.mask_infinity("the weighted sum", total)
        return values

    def __call__(self, images, prompts, metadata):
        return self.details(images, prompts, metadata)["reward"]

    def start_part(self, name, rows, images, prompts, metadata):
        """Lets one reward begin to score some rows of a batch. Returns a function that waits for its scores.

        They are {name in its details: (rows,) float32}.
        """
        reward, _ = self.parts[name]
        some_images = images[rows]  # a copy, also where these are all rows
        some_prompts = [prompts[row] for row in rows]
        some_metadata = [dict(metadata[row]) for row in rows]
        batch = (some_images, some_prompts, some_metadata)
        if hasattr(reward, "start_scoring"):
            wait = self.call(name, reward.start_scoring, *batch)
            return lambda: self.read(name, {name: self.call(name, wait)}, len(rows))
        if hasattr(reward, "details"):
            found = self.call(name, reward.details, *batch)
        else:
            found = {name: self.call(name, reward, *batch)}
        scores = self.read(name, found, len(rows))
        return lambda: scores

    def call(self, name, function, *arguments):
        """The result of a function of one reward. Raises RewardError, with the reward's name, if it fails."""
        try:
            return function(*arguments)
        except BadInput:
            raise
        except (Exception, SystemExit) as error:
            raise reward_failure(name, error) from error

    def read(self, name, found, num_rows):
        """What one reward returned, checked: {name in its details: (num_rows,) float32}."""
        self.check_names(name, found)
        scores = {}
        for key, value in found.items():
            source = f"reward {name!r}" if key == name else f"details of reward {name!r} for {key!r}"
            scores[key] = read_scores(value, num_rows, source)
            self.mask_infinity(source, scores[key])
        return scores

    def check_names(self, name, found):
        """Raises RewardError unless details are a dict with the same proper names at every call."""
        if not isinstance(found, dict):
            raise RewardError(f"details of reward {name!r} returned {describe(found)}; it must return a dict")
        if name not in found:
            raise RewardError(f"details of reward {name!r} lacks {name!r}, its own value")
        for key in found:
            if not isinstance(key, str) or not key or "/" in key:
                raise RewardError(
                    f"details of reward {name!r} has the name {key!r}; names are text without /"
                )
        names = self.names.setdefault(name, list(found))
        if set(names) != set(found):
            raise RewardError(
                f"details of reward {name!r} has {', '.join(found)}; in earlier batches it was "
                f"{', '.join(names)}"
            )

    def mask_infinity(self, source, scores):
        """Replaces infinity by NaN, with a warning once per source."""
        infinite = scores.isinf()
        if infinite.any():
            scores.masked_fill_(infinite, math.nan)
            if source not in self.warned:
                self.warned.add(source)
                warnings.warn(f"{source} is infinite for an image; infinity counts as NaN", stacklevel=2)

    def learn_names(self, prompts, metadata, device):
        """Asks every reward that judges some rows only about a black image, to know the names of its details.

        A batch of which it judges no row needs these names as well.
        """
        for name in self.parts:
            rows = judged_rows(name, metadata)
            if len(rows) < len(metadata) and hasattr(self.parts[name][0], "details"):
                black = torch.zeros(1, 3, 64, 64, device=device)
                first = rows[0]
                self.start_part(name, [0], black, [prompts[first]], [metadata[first]])()
