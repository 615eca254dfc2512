"""Numbers about a run: means of scores, the metrics of a rollout, and the time it took."""

import math
import resource
import time

import torch


def mean(values):
    """Mean over the values that are not NaN, NaN when there is none."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else math.nan


def summarise(scores, metadata, suffix):
    """{"eval/<reward><suffix>": mean over all rows, "eval/<reward><suffix>/<tag>": over the rows of a tag}.

    scores: {reward: {row: value}}. The means of a reward are over the rows it judged; where it judged none,
    they are left out.
    """
    means = {}
    total = scores["reward"]
    for name, values in scores.items():
        # NaN beside a total that is a number: another reward judged this row.
        judged = {row: v for row, v in values.items() if not math.isnan(v) or math.isnan(total[row])}
        if not judged:
            continue
        means[f"eval/{name}{suffix}"] = mean(judged.values())
        tags = sorted({metadata[row]["tag"] for row in judged if "tag" in metadata[row]})
        for tag in tags:
            tagged = [value for row, value in judged.items() if metadata[row].get("tag") == tag]
            means[f"eval/{name}{suffix}/{tag}"] = mean(tagged)
    return means


def reward_metrics(scores, group_sizes):
    """The charts/ and rewards/ metrics of a rollout.

    scores: {reward: (B,)}, of which "reward" is trained on. group_sizes: images of each prompt, in the order
    of the scores; their sum is B. Raises FloatingPointError when more than a tenth of the rewards are NaN.
    """
    rewards = scores["reward"]
    nan_fraction = rewards.isnan().float().mean().item()
    if nan_fraction > 0.1:
        raise FloatingPointError(f"{nan_fraction:.0%} of the rewards are NaN")
    groups = [group[~group.isnan()] for group in rewards.split(group_sizes)]
    spread = torch.stack([group.std(correction=0) for group in groups if len(group)])
    values = torch.cat(groups)
    metrics = {}
    for name, parts in scores.items():
        average = parts.nanmean().item()
        if name != "reward" and not math.isnan(average):  # NaN: this reward judged none of the images
            metrics[f"rewards/{name}"] = average
    metrics["charts/reward_mean"] = values.mean().item()
    metrics["charts/reward_std"] = spread.mean().item()  # the mean of the groups' standard deviations
    metrics["charts/zero_std_fraction"] = (spread < 1e-6).float().mean().item()
    metrics["charts/nan_fraction"] = nan_fraction
    return metrics


def check_finite(values):
    """Raises FloatingPointError unless all values, a dict of tensors, are finite."""
    for name, value in values.items():
        if not value.isfinite():
            raise FloatingPointError(f"the loss or its gradient is not finite ({name})")


class Clock:
    """Seconds per phase: stop(phase) books the time since the last call, once the device has finished."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = time.perf_counter()

    def stop(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0) + now - self.last
        self.last = now

    def metrics(self, num_images):
        """The perf/ metrics: seconds per phase, images per second without evaluation, peak memory."""
        training = sum(seconds for phase, seconds in self.seconds.items() if phase != "evaluate")
        metrics = {f"perf/seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        metrics["perf/images_per_second"] = num_images / training if training else 0.0
        if self.device.type == "cuda":
            metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            metrics["perf/peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return metrics
