"""How the evaluated pictures look, whatever the reward says of them: an alarm for rewards that are hacked.

A model that exploits its reward often shows it in numbers that nobody trains on: the pictures get darker or
flatter, lose their colours or their edges, or all become alike. These numbers are logged for every evaluation
as pictures/<name>, and a run says so when one of them leaves the base model's behind.
"""

import torch
import torch.nn.functional as F

THUMBNAIL = 8  # side of the small copies whose spread is the variety, in pixels
LARGEST_CHANGE = 1.6  # times the base model's number, or its 1.6th part: our choice


def describe_pictures(images):
    """(B, 4 + 3 * 8 * 8) on the CPU: four numbers of each image (B, 3, H, W) in [0, 1], and a small copy.

    The numbers are the mean of the brightness and its standard deviation over the image, the mean difference
    of the strongest and the weakest channel, and the mean difference of neighbouring pixels.
    """
    images = images.detach().float()
    gray = images.mean(dim=1)
    rows = (gray[:, 1:] - gray[:, :-1]).abs().flatten(1).mean(dim=1)
    columns = (gray[:, :, 1:] - gray[:, :, :-1]).abs().flatten(1).mean(dim=1)
    numbers = [
        gray.flatten(1).mean(dim=1),
        gray.flatten(1).std(dim=1, correction=0),
        (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1),
        rows + columns,
    ]
    thumbnails = F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
    return torch.cat([torch.stack(numbers, dim=1), thumbnails], dim=1).cpu()


def summarise_looks(looks, suffix):
    """{"pictures/<name><suffix>": number} of an evaluation. looks: {row: vector, as of `describe_pictures`}.

    Four of them are means over the images. The variety is how much the small copies differ from image to
    image: the standard deviation over the images, averaged over the pixels.
    """
    if not looks:
        return {}
    vectors = torch.stack([looks[row] for row in sorted(looks)])
    names = ["brightness", "contrast", "saturation", "edges"]
    means = vectors[:, : len(names)].mean(dim=0).tolist()
    numbers = dict(zip(names, means))
    numbers["variety"] = vectors[:, len(names) :].std(dim=0, correction=0).mean().item()
    return {f"pictures/{name}{suffix}": value for name, value in numbers.items()}


def changed_looks(before, after):
    """[(name, factor)] of the numbers in two rows of metrics.jsonl that differ by more than LARGEST_CHANGE.

    The latest way of sampling is compared with the base model: with rewritten prompts, if there are any.
    """
    suffixes = [
        name.removeprefix("pictures/variety") for name in after if name.startswith("pictures/variety")
    ]
    own = [suffix for suffix in suffixes if "_paraphrased" not in suffix and "_hard" not in suffix]
    if not own:
        return []
    suffix = max(own)  # the last in the order of names: _enhanced and _loop come after the plain prompt
    changed = []
    for name in ("brightness", "contrast", "saturation", "edges", "variety"):
        base = before.get(f"pictures/{name}")
        now = after.get(f"pictures/{name}{suffix}")
        if base and now is not None:
            factor = now / base
            if not 1 / LARGEST_CHANGE <= factor <= LARGEST_CHANGE:
                changed.append((name, factor))
    return changed
