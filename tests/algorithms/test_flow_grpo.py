"""flow_grpo.py against closed forms: its own functions, no trained model, seconds on a CPU.

The Gaussian world: x_0 ~ N(mu, s^2), so x_t ~ N(m_t, V_t) with m_t = (1 - t) mu, V_t = (1 - t)^2 s^2 + t^2.
The velocity is then affine in x, and so is every step: x' = A x + B + std z. Mean and variance pass through a
whole sampler exactly, without sampling: m' = A m + B, V' = A^2 V + std^2.
"""

import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig
from torch.distributions import Normal, kl_divergence
from torch.multiprocessing import spawn

import fdfo
import flow_grpo
import promptrl
import superflow
from flow_grpo import (
    Args,
    Conditions,
    TrainedStep,
    add_to,
    base_weights,
    clipped_loss,
    decoupled_advantages,
    diagnostics,
    draw_noise,
    draw_prompts,
    draw_window,
    encode_prompts,
    gaussian_kl,
    get_sigmas,
    group_advantages,
    load_model,
    log_prob,
    normalised_log_ratio,
    predict_sd3_velocity,
    rollout,
    split_images,
    step_mean_std,
    sum_over_processes,
    trained_parameters,
)
from rewards import BadInput
from rewards.prompts import PromptFile
from rewards.tiny_world.shapes import PALETTE
from small_runs import metrics

F64 = torch.float64
TYPES = ["flow", "cps"]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def uniform_grid(n):
    return [1 - i / n for i in range(n)] + [0.0]


def shifted_grid(n):
    return get_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), n)


def gaussian_velocity(x, t, mu=1.0, s=0.5):
    """E[eps - x_0 | x_t = x]."""
    m_t, V_t = (1 - t) * mu, (1 - t) ** 2 * s**2 + t**2
    return -mu + (t - (1 - t) * s**2) / V_t * (x - m_t)


def affine_step(sigmas, i, noise_level, sde_type, velocity=gaussian_velocity):
    """A, B, std of a step, read off at x = 0 and x = 1."""
    x = tensor(0.0, 1.0)
    mean, std = step_mean_std(x, velocity(x, sigmas[i]), sigmas, i, noise_level, sde_type)
    return (mean[1] - mean[0]).item(), mean[0].item(), std


def propagate(sigmas, noise_level, sde_type="flow", steps=None):
    """Mean and variance of the sampler's result; all steps, the last one too, are SDE steps."""
    m, V = 0.0, 1.0
    for i in range(len(sigmas) - 1 if steps is None else steps):
        A, B, std = affine_step(sigmas, i, noise_level, sde_type)
        m, V = A * m + B, A**2 * V + std**2
    return m, V


# A step whose numbers were worked out by hand: x = .3, v = -.4, from t = .6 to .5. Its index is 1, since
# index 0 stands for t = 1.
GOLDEN = (tensor(0.3), tensor(-0.4), [1.0, 0.6, 0.5], 1)


# === flow ===


@pytest.mark.parametrize(
    "n, sde, ode",
    [
        (10, 0.22996, 0.18557),
        (40, 0.24737, 0.23214),
        (160, 0.25091, 0.24541),
        (640, 0.25103, 0.24885),
        (2560, 0.25066, 0.24971),
    ],
)
def test_the_sde_keeps_the_marginals(n, sde, ode):
    # towards the true mean 1 and variance .25. In the end the SDE's error falls like N^(-a^2), not 1 / N:
    # near t = 1 the k-th step has the variance a^2 / k, whatever N
    for noise_level, variance in ((0.7, sde), (0.0, ode)):
        m, V = propagate(uniform_grid(n), noise_level)
        assert m == pytest.approx(1, abs=1e-10)
        assert V == pytest.approx(variance, abs=6e-6)


@pytest.mark.parametrize("n, sde, ode", [(10, 0.1773, 0.1290), (40, 0.2298, 0.2158), (400, 0.2486, 0.2464)])
def test_the_sde_keeps_the_marginals_on_the_grid_of_sd3(n, sde, ode):
    assert propagate(shifted_grid(n), 0.7) == pytest.approx((1, sde), abs=6e-5)
    assert propagate(shifted_grid(n), 0.0) == pytest.approx((1, ode), abs=6e-5)


@pytest.mark.parametrize("n, variance", [(10, 0.124), (40, 0.149), (160, 0.158), (2560, 0.163)])
def test_cps_keeps_the_mean_but_not_the_variance(n, variance):
    assert propagate(uniform_grid(n), 0.8, "cps") == pytest.approx((1, variance), abs=6e-4)


@pytest.mark.parametrize("t", [1.0, 0.95, 0.6, 0.3, 0.05])
def test_the_noise_is_balanced_by_the_score(t):
    # the drift that the noise adds is std^2 / 2 times the score, -(x - m_t) / V_t = -(x + (1 - t) v) / t
    sigmas, i = ([1.0, 0.9], 0) if t == 1 else ([1.0, t, t - 0.04], 1)
    x = torch.linspace(-2, 2, 9, dtype=F64)
    v = gaussian_velocity(x, t)
    with_noise, std = step_mean_std(x, v, sigmas, i, 0.7, "flow")
    score = (with_noise - step_mean_std(x, v, sigmas, i, 0.0, "flow")[0]) / (std**2 / 2)
    torch.testing.assert_close(score, -(x - (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2), rtol=0, atol=1e-12)
    torch.testing.assert_close(score, -(x + (1 - t) * v) / t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t, excess", [(0.9, 0.109025), (0.5, 0.012201), (0.1, 0.0061855)])
@pytest.mark.parametrize("sde_type, noise_level", [("flow", 0.7), ("cps", 0.3), ("cps", 0.8), ("cps", 1.0)])
def test_a_point_mass(t, excess, sde_type, noise_level):
    # x_0 = mu: from the exact marginal N((1 - t) mu, t^2), flow overshoots the next variance, cps hits it
    mu, t_next = 1.5, t - 0.1
    A, B, std = affine_step(
        [1.0, t, t_next], 1, noise_level, sde_type, lambda x, t: gaussian_velocity(x, t, mu, 0.0)
    )
    assert A * (1 - t) * mu + B == pytest.approx((1 - t_next) * mu, abs=1e-12)
    expected = t_next**2 + (excess if sde_type == "flow" else 0)
    assert A**2 * t**2 + std**2 == pytest.approx(expected, abs=6e-7 if sde_type == "flow" else 1e-12)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("t_next", [0.99, 0.9601, 0.8, 0.5])
def test_the_first_step(noise_level, t_next):
    def coefficient(x, v):
        return step_mean_std(tensor(x), tensor(v), [1.0, t_next], 0, noise_level, "flow")[0].item()

    std = step_mean_std(tensor(0.0), tensor(0.0), [1.0, t_next], 0, noise_level, "flow")[1]
    assert std == pytest.approx(noise_level, abs=1e-12)
    assert coefficient(1.0, 0.0) == pytest.approx(1 - noise_level**2 / 2, abs=1e-12)
    assert coefficient(0.0, 1.0) == pytest.approx(-(1 - t_next), abs=1e-12)
    # from N(0, 1): the variance 1 + a^4 / 4, 1.060025 for a = .7
    assert coefficient(1.0, 0.0) ** 2 + std**2 == pytest.approx(1 + noise_level**4 / 4, abs=1e-12)


@pytest.mark.parametrize("sde_type", TYPES)
def test_without_noise_a_step_is_euler(sde_type):
    generator, sigmas = torch.Generator().manual_seed(0), shifted_grid(10)
    for i in range(10):
        x, v = torch.randn(2, 2, 3, 4, 4, dtype=F64, generator=generator)
        mean, std = step_mean_std(x, v, sigmas, i, 0.0, sde_type)
        assert std == 0
        torch.testing.assert_close(mean, x + (sigmas[i + 1] - sigmas[i]) * v, rtol=0, atol=1e-12)


def test_full_cps_noise_forgets_the_old_noise():
    mean, std = step_mean_std(*GOLDEN, 1.0, "cps")
    assert mean.item() == pytest.approx(0.5 * (0.3 + 0.6 * 0.4), abs=1e-12)
    assert std == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    "sde_type, noise_level, mean, std",
    [("flow", 0.7, 0.331425, 0.27110883), ("cps", 0.8, 0.29163119, 0.47552826)],
)
def test_golden_step(sde_type, noise_level, mean, std):
    actual_mean, actual_std = step_mean_std(*GOLDEN, noise_level, sde_type)
    assert actual_mean.item() == pytest.approx(mean, abs=6e-9)
    assert actual_std == pytest.approx(std, abs=6e-9)


@pytest.mark.parametrize(
    "sde_type, noise_level, value", [("flow", 0.7, 0.02195946), ("cps", 0.8, -0.25680839)]
)
def test_golden_log_prob(sde_type, noise_level, value):
    # cps too has the true density; the official code's would be -(x' - mean)^2 = -.03672251
    mean, std = step_mean_std(*GOLDEN, noise_level, sde_type)
    x = tensor(0.1)
    assert log_prob(x[None], mean[None], std).item() == pytest.approx(value, abs=6e-9)
    if sde_type == "cps":
        assert -((x - mean) ** 2).item() == pytest.approx(-0.03672251, abs=6e-9)


def test_log_prob_is_the_mean_of_the_normal_density():
    generator = torch.Generator().manual_seed(1)
    x, mean = torch.randn(2, 5, 3, 4, 4, dtype=F64, generator=generator)
    mean.requires_grad_()
    actual = log_prob(x, mean, 0.37)
    torch.testing.assert_close(actual, Normal(mean, 0.37).log_prob(x).mean((1, 2, 3)), rtol=0, atol=1e-12)
    actual.sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / (0.37**2 * 48), rtol=0, atol=1e-12)


def test_kl_at_the_golden_step():
    x, v, sigmas, i = GOLDEN
    t, dt = 0.6, 0.1
    v, reference_v = v.clone().requires_grad_(), v + 0.05
    mean, std = step_mean_std(x, v, sigmas, i, 0.7, "flow")
    reference_mean, _ = step_mean_std(x, reference_v, sigmas, i, 0.7, "flow")
    kl = gaussian_kl(mean[None], reference_mean[None], std)
    assert kl.item() == pytest.approx(2.636097e-4, abs=6e-11)
    assert kl.item() * dt == pytest.approx(2.636097e-5, abs=6e-12)  # what the official code has
    sigma_t = 0.7 * math.sqrt(t / (1 - t))
    paper = dt / 2 * (sigma_t * (1 - t) / (2 * t) + 1 / sigma_t) ** 2 * 0.05**2
    assert kl.item() == pytest.approx(paper, rel=1e-12)
    kl.sum().backward()
    assert v.grad.item() == pytest.approx(2 * paper / -0.05, rel=1e-9)


def test_kl_is_torchs():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=F64, generator=generator)
    expected = kl_divergence(Normal(a, 0.4), Normal(b, 0.4)).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(a, b, 0.4), expected, rtol=1e-12, atol=0)


def test_the_grid_of_sd3():
    sigmas = shifted_grid(10)
    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert sigmas == pytest.approx(expected, abs=1e-4)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    x = torch.zeros(1)
    stds = [step_mean_std(x, x, sigmas, i, 0.7, "flow")[1] for i in range(10)]
    expected = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert stds == pytest.approx(expected, abs=6e-4)
    assert stds[-1] == pytest.approx(0.0063, abs=6e-5)


# === draws ===


def test_every_pass_has_every_prompt_once():
    n, count = 12, 5
    stream = [row for iteration in range(1, 13) for row in draw_prompts(n, count, 7, iteration)]
    passes = [stream[i : i + n] for i in range(0, 60, n)]
    assert all(sorted(order) == list(range(n)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5
    assert stream[10:15] == draw_prompts(n, count, 7, 3)  # an iteration alone, as after a resume
    assert (
        stream[:12] != [row for iteration in (1, 2, 3) for row in draw_prompts(n, count, 8, iteration)][:12]
    )


@pytest.mark.parametrize("num_prompts, count", [(1, 1), (1, 5), (4, 10), (7, 7), (12, 5), (384, 16)])
def test_the_stream_is_one_permutation_per_epoch(num_prompts, count):
    iterations = 3 * num_prompts // count + 2
    drawn = [draw_prompts(num_prompts, count, 7, iteration) for iteration in range(1, iterations + 1)]
    epochs = range(iterations * count // num_prompts + 1)
    orders = [np.random.default_rng((7, 1, epoch)).permutation(num_prompts) for epoch in epochs]
    stream = np.concatenate(orders)[: iterations * count]
    assert np.concatenate(drawn).tolist() == stream.tolist()
    assert all(type(index) is int for index in drawn[0])  # of NumPy's numbers, JSON knows none


def test_more_prompts_than_the_file_has():
    rows = draw_prompts(4, 10, 1, 1)
    assert sorted(rows[:4]) == sorted(rows[4:8]) == [0, 1, 2, 3] and len(rows) == 10


def test_every_image_has_its_own_noise():
    keys = [(seed, iteration, index) for seed in range(4) for iteration in range(4) for index in range(6)]
    draws = [draw_noise([index], 3, (2, 4, 4), seed, iteration)[0] for seed, iteration, index in keys]
    noise = torch.stack(draws)  # (96, 3, 2, 4, 4)
    assert noise.dtype == torch.float32
    assert len(noise.flatten(0, 1).flatten(1).unique(dim=0)) == len(keys) * 3
    assert len(noise.unique()) > 0.99 * noise.numel()  # no part of one in another
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.numel())
    again = torch.stack(
        [draw_noise([index], 3, (2, 4, 4), seed, iteration)[0] for seed, iteration, index in keys]
    )
    assert torch.equal(again, noise)


@pytest.mark.parametrize("parts", [[range(8)], [range(3), range(3, 8)], [[i] for i in range(8)]])
def test_noise_does_not_depend_on_the_split(parts):
    whole = draw_noise(range(8), 2, (3, 4, 4), 5, 9)
    assert whole.shape == (8, 2, 3, 4, 4)
    assert torch.equal(torch.cat([draw_noise(part, 2, (3, 4, 4), 5, 9) for part in parts]), whole)


SPLITS = {  # group sizes, updates
    "equal": ([3] * 8, 2),
    "unequal": ([1, 5, 3, 2, 4, 4, 1, 5], 2),
    "one update": ([4, 1, 3, 2], 1),
    "one prompt per share": ([2, 3, 5, 1, 4, 2, 1, 3], 2),
    "one image per group": ([1] * 16, 4),
}

DIVISIBLE = [  # check_args refuses the others
    (name, world_size)
    for name, (sizes, num_updates) in SPLITS.items()
    for world_size in (1, 2, 4)
    if len(sizes) % (num_updates * world_size) == 0
]


def split_among(sizes, num_updates, micro_batch_size, world_size):
    """Per process: the image numbers of each update, as a list of micro-batches."""
    processes = []
    for rank in range(world_size):
        numbers, updates = split_images(sizes, max(sizes), num_updates, micro_batch_size, rank, world_size)
        batches = [[numbers[images] for images in micro_batches] for micro_batches in updates]
        # the slices are of whole batches, one after the other, up to the end
        slices = [images for micro_batches in updates for images in micro_batches]
        assert [images.start for images in slices] == [0, *(images.stop for images in slices[:-1])]
        assert slices[-1].stop == len(numbers)
        assert sum((numbers[images] for images in slices), []) == numbers
        processes.append(batches)
    return processes


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("name, world_size", DIVISIBLE)
def test_every_image_is_sampled_once_with_its_group(name, world_size, micro_batch_size):
    sizes, num_updates = SPLITS[name]
    K = max(sizes)
    expected = [prompt * K + k for prompt, size in enumerate(sizes) for k in range(size)]
    processes = split_among(sizes, num_updates, micro_batch_size, world_size)
    owner = {}
    for rank, updates in enumerate(processes):
        assert len(updates) == num_updates
        for update, micro_batches in enumerate(updates):
            assert all(1 <= len(batch) <= micro_batch_size for batch in micro_batches)
            most = max(len(process[update]) for process in processes)
            assert len(micro_batches) == min(most, sum(map(len, micro_batches)))  # as many in all processes
            if world_size == 1:
                assert all(len(batch) == micro_batch_size for batch in micro_batches[:-1])
            for number in sum(micro_batches, []):
                assert number not in owner
                owner[number] = rank, update
    assert sorted(owner) == expected
    for prompt, size in enumerate(sizes):  # a group stays in one process and in one update
        assert len({owner[prompt * K + k] for k in range(size)}) == 1


@pytest.mark.parametrize("name, world_size", DIVISIBLE)
def test_an_update_has_the_same_images_for_any_number_of_processes(name, world_size):
    sizes, num_updates = SPLITS[name]

    def images_of_updates(world_size, micro_batch_size):
        processes = split_among(sizes, num_updates, micro_batch_size, world_size)
        updates = []
        for update in range(num_updates):
            batches = sum((process[update] for process in processes), [])
            updates.append(sum(batches, []))
        return updates

    alone = images_of_updates(1, 64)
    assert sum(alone, []) == sorted(sum(alone, []))  # updates take the prompts in their order
    for micro_batch_size in (1, 3, 64):
        assert images_of_updates(world_size, micro_batch_size) == alone


def test_a_split_worked_out_by_hand():
    # prompts 0 to 3 with 2, 3, 1 and 2 images, of 3 at most; two processes, two updates, micro-batches of 2
    first = split_images([2, 3, 1, 2], 3, 2, 2, 0, 2)
    second = split_images([2, 3, 1, 2], 3, 2, 2, 1, 2)
    # the first process has two images where the second has three, and cuts them in two as well
    assert first == ([0, 1, 6], [[slice(0, 1), slice(1, 2)], [slice(2, 3)]])
    assert second == ([3, 4, 5, 9, 10], [[slice(0, 2), slice(2, 3)], [slice(3, 5)]])


@pytest.mark.parametrize("steps, width", [(2, 1), (5, 2), (8, 2), (8, 4), (10, 3), (10, 1), (40, 6)])
def test_the_window_is_in_the_noisy_half(steps, width):
    windows = [draw_window(steps, width, 3, iteration) for iteration in range(1, 401)]
    assert all(len(window) == width and window.step == 1 for window in windows)
    assert {window.start for window in windows} == set(range(steps // 2 - width + 1))  # all, none later
    assert max(window.stop for window in windows) == steps // 2
    assert windows == [draw_window(steps, width, 3, iteration) for iteration in range(1, 401)]


def test_no_window_has_the_last_step():
    for steps in range(2, 12):
        assert draw_window(steps, 0, 1, 1) == range(steps - 1)
        for width in range(1, steps):
            window = draw_window(steps, width, 1, 1)
            assert len(window) == width and 0 <= window.start and window.stop <= steps - 1


# === rollout ===


def curved_velocity(x, t):
    return torch.sin(3 * x) + t * x.flip(-1)


@pytest.mark.parametrize("sde_type", TYPES)
@pytest.mark.parametrize("window", [range(0), range(0, 2), range(2, 4), range(7)])
def test_rollout_is_ode_outside_of_the_window(window, sde_type):
    sigmas, a = shifted_grid(8), 0.7
    noise = draw_noise(range(3), 1 + len(window), (2, 4, 4), 1, 1)
    x_0, path = rollout(curved_velocity, noise, sigmas, window, a, sde_type)
    assert len(path) == len(window)
    x, steps = noise[:, 0], iter(path)
    for i in range(8):
        v = curved_velocity(x, sigmas[i])
        if i in window:
            step = next(steps)
            assert isinstance(step, TrainedStep) and step.index == i
            expected, std = step_mean_std(x, v, sigmas, i, a, sde_type)
            assert torch.equal(step.x_t, x) and torch.equal(step.mean, expected)
            assert torch.equal(step.x_next, step.mean + std * noise[:, 1 + i - window.start])
            assert torch.equal(step.log_prob, log_prob(step.x_next, step.mean, std))
            assert all(tensor.dtype == torch.float32 for tensor in step[1:])
            x = step.x_next
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert torch.equal(x, x_0)


@pytest.mark.parametrize("sde_type", TYPES)
def test_the_path_is_contiguous(sde_type):
    noise = draw_noise(range(3), 8, (2, 4, 4), 1, 1)
    x_0, path = rollout(curved_velocity, noise, shifted_grid(8), range(7), 0.7, sde_type)
    assert torch.equal(path[0].x_t, noise[:, 0])
    assert all(torch.equal(a.x_next, b.x_t) for a, b in zip(path, path[1:]))
    assert not torch.equal(path[-1].x_next, x_0)  # an ODE step follows


def test_rollout_without_noise_is_the_ode_for_both_types():
    noise = draw_noise(range(3), 1, (2, 4, 4), 1, 1)
    flow, cps = (rollout(curved_velocity, noise, shifted_grid(8), (), 0.0, sde_type)[0] for sde_type in TYPES)
    assert torch.equal(flow, cps) and flow.isfinite().all()


@pytest.mark.parametrize("sde_type", TYPES)
def test_samples_have_the_propagated_moments(sde_type):
    n, sigmas = 40_000, uniform_grid(10)
    m, V = propagate(sigmas, 0.7, sde_type, steps=9)
    A, B, _ = affine_step(sigmas, 9, 0.0, "flow")  # the last step is an ODE step
    m, V = A * m + B, A**2 * V
    noise = torch.randn(n, 10, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x_0, _ = rollout(gaussian_velocity, noise, sigmas, range(9), 0.7, sde_type)
    assert abs(x_0.mean() - m) < 4 * math.sqrt(V / n)
    assert abs(x_0.var() - V) < 4 * V * math.sqrt(2 / n)


# === algorithm ===


REWARDS = tensor(1.0, 3.0, 2.0, 2.0).view(2, 2)


@pytest.mark.parametrize("advantage_std, value", [("group", 0.99990001), ("global", 1.41401359)])
def test_advantages(advantage_std, value):
    expected = torch.tensor([[-value, value], [0, 0]])
    torch.testing.assert_close(group_advantages(REWARDS, advantage_std), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("advantage_std", ["group", "global"])
def test_advantages_do_not_depend_on_the_order(advantage_std):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 8, generator=generator) + 10 * torch.randn(6, 1, generator=generator)
    advantages = group_advantages(values, advantage_std)
    assert advantages.sum(1).abs().max() < 1e-5
    rows, columns = torch.randperm(6, generator=generator), torch.randperm(8, generator=generator)
    shuffled = group_advantages(values[rows][:, columns], advantage_std)
    torch.testing.assert_close(shuffled, advantages[rows][:, columns], rtol=0, atol=1e-6)
    # a shift of a group changes nothing
    torch.testing.assert_close(group_advantages(values + 7, advantage_std), advantages, rtol=0, atol=1e-5)


def test_group_std_ignores_the_scale_of_a_group_and_global_std_does_not():
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    group, everything = (group_advantages(values, name) for name in ("group", "global"))
    torch.testing.assert_close(group[1], group[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(everything[1], 10 * everything[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("advantage_std", ["group", "global"])
def test_nan_rewards_count_nowhere(advantage_std):
    nan = math.nan
    values = torch.tensor([[1.0, nan, 3.0], [2.0, 2.5, 2.0], [nan, nan, nan], [nan, 4.0, nan]])
    advantages = group_advantages(values, advantage_std)
    assert (advantages[values.isnan()] == 0).all() and advantages.isfinite().all()
    assert (advantages[3] == 0).all()  # one reward alone is its own mean
    std = 1.0 if advantage_std == "group" else tensor(1, 3, 2, 2.5, 2, 4).std(correction=0).item()
    expected = torch.tensor([-1, 0, 1]) / (std + 1e-4)
    torch.testing.assert_close(advantages[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("advantage_std", ["group", "global"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3])
def test_a_group_of_equal_rewards_gets_zero(value, advantage_std):
    for values in (torch.full((1, 24), value), torch.tensor([[value] * 24, [0.0, 1.0] * 12])):
        assert group_advantages(values, advantage_std)[0].abs().max() < 1e-9


def test_decoupled_advantages_are_those_of_each_reward_added():
    """Two groups of two images. By hand: each reward has z-scores of -1 and 1 in each group."""
    scores = {"a": tensor(0, 1, 3, 1).view(2, 2), "b": tensor(100, 300, 0, 50).view(2, 2)}
    z = {"a": tensor(-1, 1, 1, -1).view(2, 2), "b": tensor(-1, 1, -1, 1).view(2, 2)}
    for weight in (1.0, 0.5, -2.0):
        total = z["a"] + weight * z["b"]
        expected = (total / total.double().std(correction=0)).float()
        found = decoupled_advantages(scores, {"a": 1.0, "b": weight})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_decoupled_advantages_do_not_depend_on_the_scale_of_a_reward():
    """That is what they are for. The advantages of the weighted sum do depend on it."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 8, generator=generator)
    weights = {"a": 1.0, "b": 1.0}
    plain = decoupled_advantages({"a": a, "b": b}, weights)
    scaled = decoupled_advantages({"a": a, "b": 1000 * b + 7}, weights)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=2e-3)
    of_the_sum = group_advantages(a + 1000 * b + 7, "group")
    assert (of_the_sum - group_advantages(a + b, "group")).abs().max() > 0.5


def test_decoupled_advantages_tell_apart_what_a_sum_does_not():
    """The example of the paper: one of two rewards, or both, is earned by one image of two."""
    both = {"a": tensor(0, 1).view(1, 2), "b": tensor(0, 1).view(1, 2)}
    one = {"a": tensor(0, 1).view(1, 2), "b": tensor(0, 0).view(1, 2)}
    sums = [group_advantages(scores["a"] + scores["b"], "group") for scores in (one, both)]
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=2e-4)
    together = {name: torch.cat([one[name], both[name]]) for name in ("a", "b")}
    advantages = decoupled_advantages(together, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(advantages[1], 2 * advantages[0], rtol=0, atol=1e-3)


def test_decoupled_advantages_of_rows_that_a_reward_does_not_judge():
    nan = math.nan
    scores = {"a": tensor(0, 1, nan, nan).view(2, 2), "b": tensor(nan, nan, 5, 3).view(2, 2)}
    advantages = decoupled_advantages(scores, {"a": 1.0, "b": 1.0})
    expected = tensor(-1, 1, 1, -1).view(2, 2).float()
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-3)


def test_a_run_trains_on_decoupled_advantages(small, spy):
    calls = spy(flow_grpo, "decoupled_advantages")
    flags = small(rewards="geneval:1,jpeg:0.1", decouple_rewards=True, num_iterations=1)
    rows = metrics(flow_grpo.train(Args(**flags)))
    (((scores, weights), _),) = calls
    assert weights == {"geneval": 1.0, "jpeg": 0.1} and list(scores) == ["geneval", "jpeg"]
    assert rows[1]["losses/grad_norm"] > 0 and rows[1]["losses/ratio_first"] == 0


def test_advantages_are_limited():
    values = torch.zeros(1, 100)
    values[0, 3] = 1
    advantages = group_advantages(values, "group")
    assert advantages.max() == 5 and advantages.min() > -0.2
    assert group_advantages(-values, "group").min() == -5


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_statistics_of_the_ratio(std):
    # D elements, means that moved by r std: log ratio ~ N(-r^2 / 2, r^2 / D), Guard's ~ N(0, (r std)^2 / D)
    n, D, r = 40, 65_536, 0.1
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    old_mean = torch.zeros(n, D)
    mean = old_mean + r * std
    log_ratio = log_prob(std * z, mean, std) - log_prob(std * z, old_mean, std)
    guarded = normalised_log_ratio(log_ratio, mean, old_mean, std)
    for values, centre, spread in ((log_ratio, -(r**2) / 2, r / 256), (guarded, 0, r * std / 256)):
        assert abs(values.mean() - centre) < 4 * spread / math.sqrt(n)
        assert values.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * n))
    # sample by sample it is the mean of z times the move
    torch.testing.assert_close(guarded, (z * r * std).mean(1), rtol=0, atol=1e-6)


def test_the_normalised_ratio_on_policy_is_exactly_one():
    mean = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x, std = mean.detach() + 0.3, 0.3
    old = log_prob(x, mean, std).detach()
    log_ratio = normalised_log_ratio(log_prob(x, mean, std) - old, mean, mean.detach(), std)
    assert (log_ratio == 0).all()
    log_ratio.sum().backward()  # the gradient of log_prob, times std
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / std / 192)


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient",  # the gradient with respect to the log-ratio, -A rho unless clipped
    [(1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5), (-1, 0.5, 0.8, 0), (-1, 1.5, 1.5, 1.5), (2, 1.1, -2.2, -2.2)],
)
def test_clipped_loss(advantage, ratio, loss, gradient):
    log_ratio = tensor(math.log(ratio)).requires_grad_()
    actual = clipped_loss(log_ratio, tensor(advantage), 0.2)
    actual.sum().backward()
    assert actual.item() == pytest.approx(loss, abs=1e-12)
    assert log_ratio.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("clip_range", [0.2, 1e-4])
def test_on_policy_gradient_is_reinforce(clip_range):
    generator = torch.Generator().manual_seed(0)
    x, features = torch.randn(2, 6, 2, 3, 3, dtype=F64, generator=generator)
    advantages = torch.randn(6, dtype=F64, generator=generator)
    theta, std = tensor(0.3, -0.2).requires_grad_(), 0.4
    mean = theta[0] * features + theta[1] * features**2
    new = log_prob(x, mean, std)
    loss = clipped_loss(new - new.detach(), advantages, clip_range).mean()
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-12)
    (actual,) = torch.autograd.grad(loss, theta, retain_graph=True)
    # by hand: d log p / d theta = mean over elements of (x - mean) / std^2 * d mean / d theta
    residual = (x - mean.detach()) / std**2
    by_hand = torch.stack([(residual * features**k).mean((1, 2, 3)) for k in (1, 2)])
    torch.testing.assert_close(actual, -(advantages * by_hand).mean(1), rtol=1e-12, atol=1e-14)
    (reinforce,) = torch.autograd.grad(-(advantages * new).mean(), theta)
    torch.testing.assert_close(actual, reinforce, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sde_type", TYPES)
@pytest.mark.parametrize("c", [1.0, -0.4])
def test_the_exact_policy_gradient(sde_type, c):
    # one step of one number, reward -(x - c)^2: dE[reward] / dv = -2 (mean - c) dmean/dv
    n, (x_t, v, sigmas, i) = 100_000, GOLDEN
    velocity = v.repeat(n, 1).requires_grad_()
    mean, std = step_mean_std(x_t, velocity, sigmas, i, 0.7, sde_type)
    z = torch.randn(n, 1, dtype=F64, generator=torch.Generator().manual_seed(3))
    x_next = mean.detach() + std * z
    reward = -((x_next - c) ** 2).squeeze(1)
    new = log_prob(x_next, mean, std)
    clipped_loss(new - new.detach(), reward + c**2, 1e-3).sum().backward()  # a constant baseline
    estimates = -velocity.grad.squeeze(1)
    slope = (
        step_mean_std(x_t, v + 1, sigmas, i, 0.7, sde_type)[0]
        - step_mean_std(x_t, v, sigmas, i, 0.7, sde_type)[0]
    )
    exact = -2 * (mean[0].item() - c) * slope.item()
    error = estimates.std().item() / math.sqrt(n)
    assert abs(exact) > 20 * error  # otherwise the next line would prove nothing
    assert abs(estimates.mean().item() - exact) < 3 * error


@pytest.mark.parametrize("ratio_norm", [False, True])
def test_a_linear_velocity_learns_the_target(ratio_norm):
    # one step from noise; the best mean is c everywhere, the reward left is then -std^2
    sigmas, a, c, K = [1.0, 0.5], 0.7, 1.0, 256
    theta = torch.zeros(2, requires_grad=True)  # v = w x + b
    optimizer, generator = torch.optim.Adam([theta], lr=0.1), torch.Generator().manual_seed(0)

    def excess():  # E[reward] = -std^2 - E[(mean - c)^2]
        w, b = theta.tolist()
        return (1 - a**2 / 2 - w / 2) ** 2 + (-b / 2 - c) ** 2

    assert excess() > 1
    for _ in range(100):
        noise = torch.randn(K, 2, 1, 1, 1, generator=generator)
        x_0, path = rollout(lambda x, t: theta[0] * x + theta[1], noise, sigmas, range(1), a, "flow")
        old, reward = path[0], -((x_0 - c) ** 2).view(1, K)
        advantages = group_advantages(reward, "group")[0]
        for _ in range(2):
            mean, std = step_mean_std(old.x_t, theta[0] * old.x_t + theta[1], sigmas, 0, a, "flow")
            log_ratio = log_prob(old.x_next, mean, std) - old.log_prob
            if ratio_norm:
                log_ratio = normalised_log_ratio(log_ratio, mean, old.mean, std)
            optimizer.zero_grad()
            clipped_loss(log_ratio, advantages, 0.2).mean().backward()
            optimizer.step()
    assert excess() < 0.02
    assert reward.mean().item() == pytest.approx(-(a**2), abs=0.02 + 4 * math.sqrt(2 / K) * a**2)


def test_diagnostics():
    ratio, advantages = tensor(1.5, 1.3, 0.5, 0.5, 1.5, 1.05), tensor(1.0, 2.0, 1.0, -1.0, -1.0, 1.0)
    policy_loss, kl = tensor(1, 2, 3, 4, 5, 6), tensor(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    # clipped: a ratio above 1.2 with a positive advantage (2), one below 0.8 with a negative one (1)
    sums = diagnostics(policy_loss, kl, ratio.log(), advantages, 0.2)
    assert all(value.shape == () for value in sums.values())
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {"policy_loss": 21, "kl": 2.1, "ratio_mean": 2.35, "clipfrac_positive": 2, "clipfrac_negative": 1}
    )


def test_diagnostics_count_what_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = 0.3 * torch.randn(2, 1000, generator=generator)
    log_ratio.requires_grad_()
    clipped_loss(log_ratio, advantages, 0.2).sum().backward()
    clipped = log_ratio.grad == 0
    zeros = torch.zeros(1000)
    sums = diagnostics(zeros, zeros, log_ratio, advantages, 0.2)
    assert sums["clipfrac_positive"] == (clipped & (advantages > 0)).sum() > 50
    assert sums["clipfrac_negative"] == (clipped & (advantages < 0)).sum() > 50


def test_sums_of_micro_batches_add_up_by_name():
    generator = torch.Generator().manual_seed(0)
    loss, kl, log_ratio, advantages = torch.randn(4, 12, dtype=F64, generator=generator)
    whole = diagnostics(loss, kl, log_ratio, advantages, 0.2)
    totals = {}
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        add_to(totals, diagnostics(loss[rows], kl[rows], log_ratio[rows], advantages[rows], 0.2))
    assert list(totals) == list(whole)
    for name, value in whole.items():
        torch.testing.assert_close(totals[name], value, rtol=1e-12, atol=1e-12)


def test_adding_leaves_other_names_and_what_is_added_alone():
    totals, values = {"kl": tensor(1.0), "loss": tensor(5.0)}, {"kl": tensor(2.0), "clipped": tensor(3.0)}
    add_to(totals, values)
    assert totals == {"kl": tensor(3.0), "loss": tensor(5.0), "clipped": tensor(3.0)}
    assert values == {"kl": tensor(2.0), "clipped": tensor(3.0)}
    add_to(totals, values)
    assert totals["clipped"] == 6 and values["clipped"] == 3


def test_one_process_sums_nothing():
    tensors = [tensor(1.0, 2.0), tensor(3.0)]
    sum_over_processes(tensors)
    assert tensors[0].tolist() == [1, 2] and tensors[1].tolist() == [3]


def sum_tensors(rank, count, init_file, result_file):
    """One of several processes: sums a scalar, a gradient and a float64, each different in every process."""
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=count)
    tensors = [torch.tensor(rank + 2.0), torch.full((2, 3), 10.0**rank), tensor(0.5 * rank, -rank)]
    sum_over_processes(tensors)
    torch.save(tensors, f"{result_file}{rank}")
    dist.destroy_process_group()


def test_a_sum_over_two_processes_is_the_same_in_each(tmp_path):
    spawn(sum_tensors, args=(2, str(tmp_path / "init"), str(tmp_path / "sums")), nprocs=2)
    for rank in range(2):
        tensors = torch.load(tmp_path / f"sums{rank}", weights_only=True)
        assert tensors[0] == 5  # in place: what train holds is what it gets
        assert torch.equal(tensors[1], torch.full((2, 3), 11.0))
        assert torch.equal(tensors[2], tensor(0.5, -1.0))


# === model ===


def tiny_transformer(lora=False, seed=0):
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=8,
        pos_embed_max_size=8,
    )
    if lora:
        transformer.requires_grad_(False)
        targets = [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_k_proj",
            "attn.add_v_proj",
        ]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian")
        transformer.add_adapter(config)
        for name, p in transformer.named_parameters():
            if "lora_B" in name:  # zeros at first: the LoRA would change nothing
                torch.nn.init.normal_(p.data, std=0.3)
    return transformer.train()


def inputs(count, seed=0, tokens=5):
    """x_t (B, C, h, w), the Conditions of B prompts and of one negative prompt."""
    torch.manual_seed(seed)
    x_t = torch.randn(count, 8, 8, 8)
    conditions = Conditions(torch.randn(count, tokens, 32), torch.randn(count, 16))
    return x_t, conditions, Conditions(torch.randn(1, tokens, 32), torch.randn(1, 16))


def in_dtype(conditions, dtype):
    return Conditions(conditions.embeds.to(dtype), conditions.pooled.to(dtype))


def call(transformer, x_t, t, embeds, pooled, source=None):
    timestep = torch.full((len(x_t),), 1000 * t)
    return transformer(x_t, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=timestep).sample


def test_guidance_one_is_the_conditional_velocity():
    transformer, (x_t, conditions, negative) = tiny_transformer(), inputs(3)
    velocity = predict_sd3_velocity(transformer, x_t, 0.7, conditions, negative, 1.0)
    assert velocity.dtype == torch.float32 and velocity.shape == x_t.shape and velocity.requires_grad
    assert torch.equal(velocity, call(transformer, x_t, 0.7, *conditions))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1])
def test_up_to_a_scale_of_one_there_is_no_guidance(scale):
    # diffusers' rule. A scale of 0 must not draw without the prompt
    transformer, (x_t, conditions, _) = tiny_transformer(), inputs(3)
    velocity = predict_sd3_velocity(
        transformer, x_t, 0.7, conditions, None, scale
    )  # the negative prompt is unused
    assert torch.equal(velocity, call(transformer, x_t, 0.7, *conditions))


@pytest.mark.parametrize("w", [1.25, 2.0, 4.5])
def test_guidance_is_classifier_free(w):
    transformer, (x_t, conditions, negative) = tiny_transformer(), inputs(3)
    conditional = call(transformer, x_t, 0.7, *conditions)
    unconditional = call(
        transformer, x_t, 0.7, *(tensor.expand(3, *tensor.shape[1:]) for tensor in negative[:2])
    )
    expected = unconditional + w * (conditional - unconditional)
    actual = predict_sd3_velocity(transformer, x_t, 0.7, conditions, negative, w)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - conditional).abs().max() > 1e-2  # the prompt matters, even to a random network


def test_guidance_has_gradient_in_both_branches():
    transformer, (x_t, conditions, negative) = tiny_transformer(), inputs(3)
    parts = [tensor.requires_grad_() for tensor in (*conditions[:2], *negative[:2])]
    predict_sd3_velocity(transformer, x_t, 0.7, conditions, negative, 4.5).square().sum().backward()
    assert all(part.grad.abs().max() > 0 for part in parts)


@pytest.mark.parametrize(
    "dtype, limit",  # bfloat16 rounds too much for a tenth: rollout and loss must use the same batches
    [(torch.float32, Args.clip_range / 10), (torch.bfloat16, Args.clip_range)],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_log_prob_does_not_depend_on_the_batch(dtype, limit, guidance_scale):
    transformer, (x_t, conditions, negative) = tiny_transformer().to(dtype), inputs(4)
    conditions, negative = in_dtype(conditions, dtype), in_dtype(negative, dtype)
    sigmas, z = shifted_grid(10), torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1))

    def log_probs(rows, i, x_next=None):
        x, parts = x_t[rows], Conditions(conditions.embeds[rows], conditions.pooled[rows])
        with torch.no_grad():
            velocity = predict_sd3_velocity(transformer, x, sigmas[i], parts, negative, guidance_scale)
        assert velocity.dtype == torch.float32
        mean, std = step_mean_std(x, velocity, sigmas, i, 0.7, "flow")
        x_next = mean + std * z[rows] if x_next is None else x_next[rows]
        return x_next, log_prob(x_next, mean, std)

    for i in (0, 4, 8):
        x_next, together = log_probs(slice(0, 4), i)
        alone = torch.cat([log_probs(slice(j, j + 1), i, x_next)[1] for j in range(4)])
        assert (alone - together).abs().max() < limit


@pytest.mark.parametrize("sde_type", TYPES)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("kind", ["all weights", "lora", "checkpointing", "bfloat16"])
def test_the_first_ratio_is_exactly_one(kind, guidance_scale, sde_type):
    transformer, (_, conditions, negative) = tiny_transformer(lora=kind == "lora"), inputs(4)
    if kind == "checkpointing":
        transformer.enable_gradient_checkpointing()
    if kind == "bfloat16":
        conditions, negative = in_dtype(conditions, torch.bfloat16), in_dtype(negative, torch.bfloat16)
    sigmas, window = shifted_grid(6), range(5)
    noise = draw_noise(range(4), 1 + len(window), (8, 8, 8), 1, 1)

    def velocity_at(x_t, t):
        return predict_sd3_velocity(transformer, x_t, t, conditions, negative, guidance_scale)

    _, path = rollout(velocity_at, noise, sigmas, window, 0.7, sde_type)
    assert [old.index for old in path] == list(window)
    for old in path:
        velocity = velocity_at(old.x_t, sigmas[old.index])
        mean, std = step_mean_std(old.x_t, velocity, sigmas, old.index, 0.7, sde_type)
        log_ratio = log_prob(old.x_next, mean, std) - old.log_prob
        assert mean.requires_grad and not old.mean.requires_grad
        assert torch.equal(mean, old.mean)
        assert torch.equal(log_ratio.exp(), torch.ones(4))
        assert torch.equal(normalised_log_ratio(log_ratio, mean, old.mean, std), torch.zeros(4))


def test_the_base_model_is_the_lora_switched_off():
    transformer, (x_t, conditions, _) = tiny_transformer(lora=True), inputs(3)
    plain = tiny_transformer()  # the same weights, never had a LoRA
    with_lora = call(transformer, x_t, 0.7, *conditions)
    with base_weights(transformer, None) as network:
        without = call(network, x_t, 0.7, *conditions)
    torch.testing.assert_close(without, call(plain, x_t, 0.7, *conditions), rtol=0, atol=1e-6)
    assert (with_lora - without).abs().max() > 1e-2
    assert torch.equal(call(transformer, x_t, 0.7, *conditions), with_lora)


def test_the_base_model_leaves_the_loras_gradient_alone():
    # as in train: forward, base model, backward
    def gradients(visit_base):
        transformer, (x_t, conditions, _) = tiny_transformer(lora=True), inputs(3)
        trained = list(trained_parameters(transformer))
        velocity = call(transformer, x_t, 0.7, *conditions)
        if visit_base:
            with torch.no_grad(), base_weights(transformer, None) as network:
                assert not call(network, x_t, 0.7, *conditions).requires_grad
        velocity.square().sum().backward()
        found = {name: parameter.grad for name, parameter in trained_parameters(transformer).items()}
        assert list(found) == trained and all("lora" in name for name in trained)
        return found

    expected, actual = gradients(False), gradients(True)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_base_model_is_the_frozen_copy_where_there_is_one():
    transformer = tiny_transformer()
    reference = copy.deepcopy(transformer)
    with base_weights(transformer, reference) as network:
        assert network is reference


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_lora_is_on_again_after_an_error_in_the_base_model(error):
    transformer, (x_t, conditions, _) = tiny_transformer(lora=True), inputs(3)
    with_lora = call(transformer, x_t, 0.7, *conditions)
    with pytest.raises(error), base_weights(transformer, None):
        assert not torch.equal(call(transformer, x_t, 0.7, *conditions), with_lora)
        raise error
    assert torch.equal(call(transformer, x_t, 0.7, *conditions), with_lora)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_parameters_are_those_with_gradient(lora):
    transformer, (x_t, conditions, _) = tiny_transformer(lora), inputs(3)
    call(transformer, x_t, 0.7, *conditions).square().sum().backward()
    parameters = trained_parameters(transformer)
    everything = dict(transformer.named_parameters())
    assert all(everything[name] is parameter for name, parameter in parameters.items())
    with_gradient = {name for name, parameter in everything.items() if parameter.grad is not None}
    assert set(parameters) == with_gradient
    assert all(("lora" in name) == lora for name in parameters)
    expected = [name for name in everything if "lora" in name] if lora else list(everything)
    assert list(parameters) == expected


def test_a_prompts_embeddings_do_not_depend_on_what_is_cached():
    """Else a resumed run, whose cache starts empty, would round differently. Batches have 16 prompts."""
    pipe, _, _ = load_model(Args(), torch.device("cpu"), torch.float32)
    prompts = [f"a {color} {shape}" for color in PALETTE for shape in ("circle", "cross", "hourglass")]
    expected = encode_prompts(pipe, prompts, 0, {})
    assert expected[0].flatten(1).unique(dim=0).shape[0] == len(prompts) == 24
    backwards = encode_prompts(pipe, prompts[::-1], 0, {})
    cache = {}
    by_threes = [encode_prompts(pipe, prompts[first : first + 3], 0, cache) for first in range(0, 24, 3)]
    for part in (0, 1):
        assert torch.equal(expected[part], backwards[part].flip(0))
        assert torch.equal(expected[part], torch.cat([three[part] for three in by_threes]))


def test_no_cached_prompt_keeps_its_whole_batch_in_memory():
    pipe, _, _ = load_model(Args(), torch.device("cpu"), torch.float32)
    cache = {}
    encode_prompts(pipe, ["a circle", "a cross"], 0, cache)
    for embeds, pooled in cache.values():
        assert embeds.untyped_storage().nbytes() == embeds.nbytes
        assert pooled.untyped_storage().nbytes() == pooled.nbytes


@pytest.mark.parametrize("module", [flow_grpo, superflow, fdfo, promptrl], ids=lambda module: module.__name__)
def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(module, monkeypatch):
    args = module.Args(compile=True, model=str(Path(__file__).resolve().parents[2] / "tiny/sd3"))
    file = PromptFile(["a circle"], [{}])
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "clang" else None)
    module.check_model(args, file)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="C.. compiler"):
        module.check_model(args, file)
