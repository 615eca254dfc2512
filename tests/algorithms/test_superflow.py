"""superflow.py: what it adds to flow_grpo.py against closed forms, then tiny runs of it.

What it took over unchanged is tested in test_flow_grpo.py and test_runs.py.
"""

import math
from pathlib import Path

import pytest
import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler

import flow_grpo
import rewards
import superflow
from rewards import BadInput
from rewards.prompts import load_prompts
from small_runs import Brightness, ScoresWhenWaitedFor, metrics, saved
from superflow import (
    Args,
    choose_group_sizes,
    choose_prompts,
    clipped_loss,
    draw_prompts,
    draw_window,
    gaussian_kl,
    get_sigmas,
    step_mean_std,
    step_weights,
    tracker_advantages,
    train,
    uncertainty,
    update_tracker,
)

NUM_PROMPTS = 10  # training prompts of the tiny runs
SHIFTED = get_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
UNSHIFTED = [1.0, 0.75, 0.5, 0.25, 0.0]
NAN = float("nan")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_of(counts):
    return counts[..., 0] / counts.sum(-1)


def step_stds(sigmas, noise_level=0.7):
    """The noise of every step, the last one too: s_t = a sqrt(t / (1 - t)) sqrt(dt)."""
    return [step_mean_std(0.0, 0.0, sigmas, i, noise_level, "flow")[1] for i in range(len(sigmas) - 1)]


# === the tracker ===


def test_one_reward_is_a_step_of_a_moving_average():
    counts = update_tracker(tensor([4, 4]), torch.tensor([0]), torch.tensor([1.0]), forgetting=0.9)
    assert counts[0].tolist() == pytest.approx([4.6, 3.6])
    assert value_of(counts).item() == pytest.approx(0.5609756, abs=1e-7)
    assert value_of(counts).item() == pytest.approx(0.5 + (1 - 0.5) / 8.2)  # v + k (r - v), k = 1 / 8.2


def test_a_group_is_forgotten_once_and_not_once_a_reward():
    values = torch.tensor([1.0] * 18 + [0.0] * 6)
    counts = update_tracker(tensor([4, 4]), torch.zeros(24, dtype=int), values, forgetting=0.9)
    assert counts[0].tolist() == pytest.approx([21.6, 9.6])
    assert value_of(counts).item() == pytest.approx(0.6923077, abs=1e-7)


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_a_constant_reward_is_approached_geometrically(reward):
    # v_n - r = rho^n (v_0 - r) when the counts' sum starts at 1 / (1 - rho), where it then stays
    rho, start = 0.9, 0.8
    counts = tensor([start, 1 - start]) / (1 - rho)
    for n in range(1, 12):
        counts = update_tracker(counts, torch.tensor([0]), tensor(reward), rho)
        assert value_of(counts).item() - reward == pytest.approx(rho**n * (start - reward))
        assert counts.sum().item() == pytest.approx(1 / (1 - rho))


def test_the_counts_sum_goes_to_images_per_visit_over_what_is_forgotten():
    counts, rows = tensor([0.5, 0.5]), torch.zeros(6, dtype=int)
    for _ in range(300):
        counts = update_tracker(counts, rows, torch.rand(6), forgetting=0.9)
    assert counts.sum().item() == pytest.approx(6 / (1 - 0.9))


def test_all_images_of_a_prompt_count_wherever_they_are_in_the_batch():
    rows, values = torch.tensor([2, 0, 2, 0, 2]), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.25])
    counts = update_tracker(tensor([4, 4], [2, 5], [3, 1]), rows, values, forgetting=1.0)
    assert counts.tolist() == [[5, 5], [2, 5], [4.25, 2.75]]
    counts = update_tracker(tensor([4, 4], [2, 5], [3, 1]), rows, values, forgetting=0.5)
    assert counts.tolist() == [[3, 3], [2, 5], [2.75, 2.25]]  # the middle one was not visited


def test_a_nan_reward_adds_nothing():
    rows = torch.tensor([0, 0, 1])
    counts = update_tracker(tensor([4, 4], [3, 1]), rows, torch.tensor([NAN, 1.0, NAN]), forgetting=0.9)
    assert counts[0].tolist() == pytest.approx([4.6, 3.6])
    assert value_of(counts)[1].item() == pytest.approx(0.75)


@pytest.mark.parametrize("values", [[0.5, -0.01], [1.01, 0.5], [NAN, 1.5], [-2.0, NAN]])
def test_a_reward_outside_of_0_to_1_is_refused(values):
    with pytest.raises(BadInput, match=r"rewards in \[0, 1\]"):
        update_tracker(tensor([4, 4]), torch.tensor([0, 0]), torch.tensor(values), 0.9)


def test_the_tracker_makes_new_counts():
    counts = tensor([4, 4], [3, 1])
    new = update_tracker(counts, torch.tensor([1, 1]), torch.tensor([0.0, 1.0]), 0.9)
    assert counts.tolist() == [[4, 4], [3, 1]] and new.dtype == torch.float64


# === prompts and group sizes ===


def test_uncertainty_has_its_constant_inside_of_the_root():
    weights = uncertainty(tensor(0.0, 0.5, 1.0))
    assert weights.tolist() == pytest.approx([0.22361, 0.54772, 0.22361], abs=1e-5)
    assert (weights[1] / weights[0]).item() == pytest.approx(2.449, abs=1e-3)  # outside it would be 11


CANDIDATES = torch.tensor([7, 3, 9, 1, 5, 0])


def test_chosen_prompts_are_distinct_and_in_the_candidates_order():
    for iteration in range(1, 100):
        chosen = choose_prompts(CANDIDATES, tensor(6, 5, 4, 3, 2, 1), 3, seed=1, iteration=iteration).tolist()
        assert chosen == [row for row in CANDIDATES.tolist() if row in chosen] and len(chosen) == 3


def test_the_choice_depends_on_seed_and_iteration_alone():
    def choices(seed):
        weights = tensor(6, 5, 4, 3, 2, 1)
        return [
            choose_prompts(CANDIDATES, weights, 3, seed, iteration).tolist() for iteration in range(1, 20)
        ]

    assert choices(1) == choices(1) != choices(2)
    assert len({tuple(chosen) for chosen in choices(1)}) > 5


def test_probabilities_are_proportional_to_the_weights():
    weights, n = tensor(6, 5, 4, 3, 2, 0), 4000
    chosen = torch.cat([choose_prompts(CANDIDATES, weights, 1, seed=1, iteration=i) for i in range(n)])
    frequencies = torch.stack([(chosen == row).double().mean() for row in CANDIDATES])
    assert frequencies.tolist() == pytest.approx((weights / 20).tolist(), abs=4 * math.sqrt(0.25 / n))
    pairs = torch.cat([choose_prompts(CANDIDATES, weights, 2, seed=1, iteration=i) for i in range(1000)])
    counts = [(pairs == row).sum().item() for row in CANDIDATES]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_without_a_pool_all_candidates_are_taken_as_they_are(iteration):
    chosen = choose_prompts(CANDIDATES, tensor(6, 5, 4, 3, 2, 1), 6, seed=1, iteration=iteration)
    assert torch.equal(chosen, CANDIDATES)


@pytest.mark.parametrize(
    "value, size", [(0.5, 24), (0.55, 24), (0.75, 23), (0.84, 23), (0.95, 21), (0.05, 21), (0, 21), (1, 21)]
)
def test_group_sizes_of_24_images_and_4_bins(value, size):
    # b = min(4, 1 + floor(4 (1 - 2 v)^2)), m = 24 - b + 1
    assert choose_group_sizes(tensor(value), largest_group=24, num_bins=4).tolist() == [size]


@pytest.mark.parametrize("num_bins", [1, 2, 4, 24])
def test_group_sizes_are_symmetric_integers_that_fall_from_the_middle(num_bins):
    value = torch.arange(65, dtype=torch.float64) / 64
    sizes = choose_group_sizes(value, 24, num_bins)
    assert not sizes.is_floating_point()
    assert torch.equal(sizes, choose_group_sizes(1 - value, 24, num_bins))
    assert sizes[32] == 24 and sizes[0] == 24 - num_bins + 1
    assert (sizes[:33].diff() >= 0).all()


def test_one_bin_gives_every_prompt_the_whole_group():
    assert (choose_group_sizes(torch.rand(100), 24, num_bins=1) == 24).all()


# === advantages ===


def lone_advantages(rewards, baselines, advantage_std="global"):
    """tracker_advantages where each image is the only one of its prompt."""
    return tracker_advantages(rewards.unsqueeze(1), baselines.unsqueeze(1), advantage_std).squeeze(1)


def test_advantages_of_a_group_without_variance_beside_another():
    # r - v = (.5, .5, -.5, .5): mean .25, population standard deviation .4330; Flow-GRPO has 0 there
    advantages = tracker_advantages(tensor([1, 1], [0, 1]).float(), tensor([0.5], [0.5]), "global")
    expected = [0.57735, 0.57735, -1.73205, 0.57735]
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert advantages.dtype == torch.float32


def test_every_prompt_has_its_own_baseline():
    values, baseline = torch.tensor([1.0, 0.0, 1.0]), tensor(0.6, 0.2, 0.9)
    expected = tensor(0.4, -0.2, 0.1)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert lone_advantages(values, baseline).tolist() == pytest.approx(expected.tolist())
    groups = tracker_advantages(values.unsqueeze(1).expand(3, 4), baseline.unsqueeze(1), "global")
    torch.testing.assert_close(groups, expected.float().unsqueeze(1).expand(3, 4))


@pytest.mark.parametrize(
    "values, baseline",
    [
        ([1.0] * 4, tensor(0.9, 0.9, 0.9, 0.9)),
        ([0.9, 0.5, 0.7, 0.3], tensor(0.8, 0.4, 0.6, 0.2)),  # equal but for rounding
        ([0.3], tensor(0.9)),
    ],
)
def test_a_batch_of_equal_advantages_gets_exactly_zero(values, baseline):
    assert lone_advantages(torch.tensor(values), baseline).tolist() == [0.0] * len(values)


def test_a_nan_reward_gets_zero_and_counts_nowhere():
    values, baseline = torch.tensor([1.0, 0.0, NAN, 0.3]), tensor(0.7, 0.2, 0.1, 0.5)
    advantages, rest = lone_advantages(values, baseline), [0, 1, 3]
    assert advantages[2] == 0
    assert torch.equal(advantages[rest], lone_advantages(values[rest], baseline[rest]))


@pytest.mark.parametrize("sign", [1, -1])
def test_advantages_are_limited(sign):
    values = torch.tensor([0.5 + 0.5 * sign] + [0.5] * 99)  # unlimited, the first is sqrt(99) = 9.95
    advantages = lone_advantages(values, torch.full((100,), 0.5))
    assert advantages[0] == 5 * sign
    assert advantages[1].item() == pytest.approx(-sign / math.sqrt(99), rel=1e-5)


@pytest.mark.parametrize("advantage_std", ["global", "group"])
def test_what_fills_up_a_smaller_group_changes_nothing(advantage_std):
    rewards, baselines = (
        torch.rand(3, 4, generator=torch.Generator().manual_seed(0)),
        tensor([0.6], [0.2], [0.5]),
    )
    advantages = tracker_advantages(rewards, baselines, advantage_std)
    filled = torch.cat([rewards, torch.full((3, 2), NAN)], dim=1)
    found = tracker_advantages(filled, baselines, advantage_std)
    torch.testing.assert_close(found[:, :4], advantages)
    assert not found[:, 4:].any()


def test_the_groups_own_deviation():
    # r - v = (.5, -.5), (.2, .1), (.1, .1): the mean is 1/12, the deviations are .5, .05 and none
    rewards, baselines = torch.tensor([[1.0, 0.0], [0.5, 0.4], [1.0, 1.0]]), tensor([0.5], [0.3], [0.9])
    advantages = tracker_advantages(rewards, baselines, "group")
    expected = [
        (0.5 - 1 / 12) / 0.5,
        (-0.5 - 1 / 12) / 0.5,
        (0.2 - 1 / 12) / 0.05,
        (0.1 - 1 / 12) / 0.05,
        0,
        0,
    ]
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("advantage_std", ["global", "group"])
def test_against_the_groups_mean_they_are_those_of_flow_grpo(advantage_std):
    # but for the constants under the deviation; and "global" there is the deviation of the rewards
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    rewards[1, 2] = rewards[4, 4:] = NAN
    if advantage_std == "global":
        rewards -= rewards.nanmean(1, keepdim=True)
    advantages = tracker_advantages(rewards, rewards.nanmean(1, keepdim=True), advantage_std)
    expected = flow_grpo.group_advantages(rewards, advantage_std)
    torch.testing.assert_close(advantages, expected, rtol=2e-3, atol=1e-5)


# === step weights ===


def test_the_noise_of_four_unshifted_steps():
    # .35 (2, sqrt 3, 1, 1 / sqrt 3); the first step takes the next time in its denominator
    assert step_stds(UNSHIFTED) == pytest.approx([0.7, 0.60622, 0.35, 0.20207], abs=1e-5)


# The grid of SD3 with 10 steps: t, s_t, s_t over the mean of all 10. The last step is not trained.
TABLE = """
1.0000 .9601 .9133 .8577 .7904 .7073 .6022 .4649 .2780 .0089
 .7000 .7430 .5362 .4459 .3918 .3528 .3191 .2820 .2254 .0063
 1.749 1.856 1.340 1.114  .979  .882  .797  .705  .563  .016
"""


def test_weights_on_the_grid_of_sd3():
    times, expected, normalised = (
        [float(word) for word in line.split()] for line in TABLE.strip().splitlines()
    )
    stds = step_stds(SHIFTED)
    assert SHIFTED[:-1] == pytest.approx(times, abs=1e-4)
    assert stds == pytest.approx(expected, abs=1e-4)
    assert step_weights(stds) == pytest.approx(normalised, abs=1e-3)
    trained = step_weights(stds[:-1])  # mean .4440, eta = 2.252
    assert trained == pytest.approx([2.252 * std for std in expected[:-1]], abs=1e-3)


@pytest.mark.parametrize("stds", [step_stds(SHIFTED)[:-1], step_stds(UNSHIFTED)[:-1], [0.3], [1e-3, 5.0]])
def test_weights_have_mean_one_and_the_proportions_of_the_noise(stds):
    weights = step_weights(stds)
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-12)
    assert [w / weights[0] for w in weights] == pytest.approx([std / stds[0] for std in stds])
    assert min(weights) > 0


@pytest.mark.parametrize("i", range(1, 10))
def test_the_velocity_has_the_same_factor_at_every_step_but_the_first(i):
    # 1 + g^2 (1 - t) / (2 t) = 1 + a^2 / 2: times std, a step's gradient is the step size times a constant
    def mean_over_dt(i):
        return step_mean_std(0.0, -1.0, SHIFTED, i, 0.7, "flow")[0] / (SHIFTED[i] - SHIFTED[i + 1])

    assert mean_over_dt(i) == pytest.approx(1.245)
    assert mean_over_dt(0) == pytest.approx(1)


@pytest.mark.parametrize("weight", [0.05, 0.563, 1.856])
def test_weighing_an_advantage_is_weighing_its_loss(weight):
    log_ratio = tensor(-0.3, -1e-4, 0, 1e-4, 0.3)  # inside and outside of the clip range
    for advantages in (tensor(2, 0.1, -1, 3, 5), tensor(-2, -0.1, 1, -3, -5)):
        weighed = clipped_loss(log_ratio, weight * advantages, 1e-3)
        torch.testing.assert_close(weighed, weight * clipped_loss(log_ratio, advantages, 1e-3))


@pytest.mark.parametrize("i", [0, 1, 5, 8])
def test_the_kl_with_the_steps_noise_is_the_one_with_its_coefficient_over_dt(i):
    # dividing by sigma_t^2 instead of std^2 = sigma_t^2 dt, as is common, gives a KL that is dt times ours
    dt = SHIFTED[i] - SHIFTED[i + 1]
    std = step_mean_std(0.0, 0.0, SHIFTED, i, 0.7, "flow")[1]
    mean, other = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    ratio = gaussian_kl(mean, other, std / math.sqrt(dt)) / gaussian_kl(mean, other, std)
    assert ratio.tolist() == pytest.approx([dt] * 3)


def test_weights_raise_the_signal_to_noise_of_a_shared_parameter():
    # x' = x + kappa theta + s z, reward the last x: squared SNR (u.s)^2 / (|u|^2 V + (u.s)^2), u = w / s
    s = tensor(*step_stds(UNSHIFTED))

    def snr(weights):
        u = tensor(*weights) / s
        return ((u @ s) ** 2 / (u @ u * (s @ s) + (u @ s) ** 2)).item()

    assert snr([1.0] * 4) == pytest.approx(0.2952, abs=1e-4)
    assert snr(step_weights(s.tolist())) == pytest.approx(0.4582, abs=1e-4)
    assert snr((s**2).tolist()) == pytest.approx(0.5)  # the optimum


# === runs ===


@pytest.fixture
def small(small, without_pictures):
    """Flags of a run that takes a second: small(num_iterations=3) -> dict for Args."""
    return lambda **changes: small(**{"start_images": 1} | changes)


class Lopsided(ScoresWhenWaitedFor):
    """Rewards 1 for the even prompts and brightness for the odd: after a start image groups of 3 and of 4.

    nan: the row that cannot be scored. Coarse, so that it does not notice which images share a batch.
    """

    def __init__(self, training_prompts, nan=None):
        self.prompts = training_prompts
        self.nan, self.seen = nan, []  # (row, image, value) of the training prompts

    def details(self, images, prompts, metadata):
        rows = [self.prompts.index(prompt) if prompt in self.prompts else 1 for prompt in prompts]
        brightness = ((20 * images.flatten(1).mean(1)).round() / 20).clamp(0.1, 0.9)
        values = torch.where(torch.tensor(rows) % 2 == 0, 1.0, brightness)
        values[[i for i, row in enumerate(rows) if row == self.nan]] = NAN
        if prompts[0] in self.prompts:
            self.seen += zip(rows, images, values.tolist())
        return {"reward": values}


def training_prompts(flags):
    return load_prompts(flags["prompts"]).prompts


def progress_of(run_dir):
    return saved(run_dir)["progress"]


@pytest.mark.parametrize("start_images", [0, 2])
def test_the_tracker_starts_from_images_of_the_base_model(small, monkeypatch, start_images):
    reward = Lopsided(training_prompts(small()), nan=2)
    monkeypatch.setattr(rewards, "build", lambda *_: reward)
    progress = progress_of(train(Args(**small(num_iterations=0, start_images=start_images, forgetting=0.8))))
    assert (progress["iteration"], progress["num_images"]) == (0, start_images * NUM_PROMPTS)
    scores = torch.zeros(NUM_PROMPTS, 2, dtype=torch.float64)  # sums of r and of 1 - r
    for row, _, value in reward.seen:
        if row != 2:
            scores[row] += tensor(value, 1 - value)
    # alpha = N_0 (S + 1/2) / (n + 1), beta = N_0 (n - S + 1/2) / (n + 1), N_0 = 1 / (1 - .8) = 5
    images = torch.full((NUM_PROMPTS, 1), start_images).index_fill(0, torch.tensor([2]), 0)
    torch.testing.assert_close(progress["counts"], 5 * (scores + 0.5) / (images + 1))
    assert progress["counts"][2].tolist() == pytest.approx([2.5, 2.5])
    if start_images:
        first = {row: image for row, image, _ in reward.seen[:NUM_PROMPTS]}
        second = {row: image for row, image, _ in reward.seen[NUM_PROMPTS : 2 * NUM_PROMPTS]}
        assert sorted(first) == sorted(second) == list(range(NUM_PROMPTS))
        assert all(not torch.equal(first[row], second[row]) for row in range(NUM_PROMPTS))


def test_the_start_keeps_no_pictures(small, monkeypatch):
    # those of every training prompt would not fit in memory
    evaluations = []

    def evaluate(name, *args, **kwargs):
        evaluations.append((name, original(name, *args, **kwargs)))
        return evaluations[-1][1]

    original = superflow.report.evaluate
    monkeypatch.setattr(superflow.report, "evaluate", evaluate)
    train(Args(**small(num_iterations=0, start_images=2)))
    (_, start), (_, evaluation) = evaluations
    assert [name for name, _ in evaluations] == ["start", "eval"]
    assert len(start.scores["reward"]) == 2 * NUM_PROMPTS
    assert not start.pictures and not start.captions
    assert len(evaluation.pictures) == 3


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(lora_rank=2, kl_coef=0.01, guidance_scale=2.0, sde_type="cps", micro_batch_size=3),
        dict(advantage_std="group", ratio_norm=True, baseline="group"),
    ],
    ids=str,
)
def test_a_run_logs_what_it_sampled_and_starts_on_policy(small, changes):
    run_dir = train(Args(**small(**changes)))
    rows = metrics(run_dir)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    images = NUM_PROMPTS
    assert rows[0]["charts/num_images"] == images
    for row in rows[1:]:
        assert 1 <= row["charts/group_size"] <= 4
        images += 2 * row["charts/group_size"]
        assert row["charts/num_images"] == images
        assert 0 <= row["charts/value_error"] <= 1
        assert row["losses/ratio_first"] < 1e-6
    progress = progress_of(run_dir)
    assert progress["num_images"] == images and progress["counts"].shape == (NUM_PROMPTS, 2)


@pytest.mark.parametrize("num_iterations, is_warned", [(1, True), (3, False)])
def test_a_start_that_is_longer_than_the_training_is_warned_of(small, capsys, num_iterations, is_warned):
    """Ten prompts with one start image each, and up to eight images per iteration."""
    train(Args(**small(num_iterations=num_iterations)))
    printed = capsys.readouterr()
    assert ("the tracker starts from 10 images" in printed.out + printed.err) == is_warned


@pytest.mark.parametrize(
    "changes",
    [{}, dict(pool=1), dict(num_bins=1), dict(baseline="group"), dict(step_credit=False)],
    ids=str,
)
def test_an_iteration_from_inside(small, monkeypatch, changes):
    flags = small(num_iterations=1, num_prompts_per_iteration=4, num_inference_steps=6, **changes)
    args = Args(**flags)
    reward, tracked, terms = Lopsided(training_prompts(flags)), {}, []
    monkeypatch.setattr(rewards, "build", lambda *_: reward)

    def spy_tracker(counts, rows, values, forgetting):
        sampled = ~values.isnan()  # the others fill up smaller groups
        tracked.update(counts=counts.clone(), rows=rows[sampled], values=values[sampled])
        return update_tracker(counts, rows, values, forgetting)

    def spy_advantages(values, baselines, advantage_std):
        assert values.shape == (4, 4) and advantage_std == args.advantage_std
        advantages = torch.linspace(-5, 5, 16).view(4, 4)  # up to the limit, which is before the weights
        tracked.update(baselines=baselines, advantages=advantages[~values.isnan()])
        return advantages

    def spy_loss(log_ratio, advantages, clip_range):
        loss = clipped_loss(log_ratio, advantages, clip_range)
        term = {"advantages": advantages, "loss": loss.detach()}
        loss.register_hook(lambda gradient: term.update(factor=gradient))
        terms.append(term)
        return loss

    for name, spy in (
        ("update_tracker", spy_tracker),
        ("tracker_advantages", spy_advantages),
        ("clipped_loss", spy_loss),
    ):
        monkeypatch.setattr(superflow, name, spy)
    run_dir = train(args)
    row = metrics(run_dir)[1]

    # prompts: the four that the pool gives, in its order, and each one's images together
    value = value_of(tracked["counts"])
    drawn = torch.tensor(draw_prompts(NUM_PROMPTS, args.pool * 4, args.seed, 1))
    drawn = choose_prompts(drawn, uncertainty(value[drawn]), 4, args.seed, 1)
    sizes = choose_group_sizes(value[drawn], 4, args.num_bins)
    assert torch.equal(tracked["rows"], drawn.repeat_interleave(sizes))
    assert [seen for seen, _, _ in reward.seen[NUM_PROMPTS:]] == tracked[
        "rows"
    ].tolist()  # after the start images
    assert sizes.tolist() == ([4] * 4 if args.num_bins == 1 else (3 + drawn % 2).tolist())
    assert row["charts/num_images"] == NUM_PROMPTS + len(tracked["rows"])
    assert row["charts/group_size"] == pytest.approx(sizes.double().mean().item())

    # advantages: against the value of before this batch, or against the group's mean
    means = torch.stack([group.mean() for group in tracked["values"].split(sizes.tolist())])
    baselines = value[drawn] if args.baseline == "tracker" else means
    torch.testing.assert_close(tracked["baselines"], baselines.view(4, 1))
    assert row["charts/value_error"] == pytest.approx((value[drawn] - means).abs().mean().item())
    counts = update_tracker(tracked["counts"], tracked["rows"], tracked["values"], args.forgetting)
    assert torch.equal(progress_of(run_dir)["counts"], counts)

    # losses: two updates of two prompts, two steps each; the mean over an update's images and steps
    sigmas = get_sigmas(FlowMatchEulerDiscreteScheduler.from_pretrained("tiny/sd3/scheduler"), 6)
    weights = step_weights(step_stds(sigmas)[:-1]) if args.step_credit else [1.0] * 5
    window = draw_window(6, 2, args.seed, 1)
    images = sizes.view(2, 2).sum(1).tolist()
    expected = [A * weights[i] for A in tracked["advantages"].split(images) for i in window]
    assert len(terms) == 4
    for term, advantages, count in zip(terms, expected, (images[0], images[0], images[1], images[1])):
        torch.testing.assert_close(term["advantages"], advantages)
        torch.testing.assert_close(term["factor"], torch.full((count,), 1 / (2 * count)))
    losses = [term["loss"].mean().item() for term in terms]
    assert row["losses/policy_loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)


def test_the_switches_on_the_command_line():
    words = "--pool 1 --num-bins 1 --baseline group --no-step-credit".split()
    assert tyro.cli(Args, args=words) == Args(pool=1, num_bins=1, baseline="group", step_credit=False)


@pytest.mark.parametrize("changes", [dict(), dict(advantage_std="group", ratio_norm=True)], ids=str)
def test_with_every_part_off_it_is_flow_grpo(small, monkeypatch, changes):
    # but for the advantages' constant: the deviation is of r - baseline, not of r
    off = dict(pool=1, num_bins=1, baseline="group", step_credit=False, start_images=0) | changes
    super_rows = metrics(train(Args(**small(num_iterations=1, **off))))
    flags = small(output_dir=small()["output_dir"] + "b", **changes)
    del flags["start_images"]
    flow_rows = metrics(flow_grpo.train(flow_grpo.Args(**flags)))
    assert super_rows[1]["charts/reward_mean"] == flow_rows[1]["charts/reward_mean"]

    def same_constant(values, baselines, advantage_std):
        return flow_grpo.group_advantages(values, advantage_std)

    monkeypatch.setattr(superflow, "tracker_advantages", same_constant)
    super_rows = metrics(train(Args(**small(output_dir=small()["output_dir"] + "c", **off))))
    assert len(super_rows) == len(flow_rows) == 3
    for super_row, flow_row in zip(super_rows, flow_rows):
        assert {name: super_row[name] for name in flow_row} == flow_row


def test_resume_after_an_interruption_equals_an_uninterrupted_run(small, interrupted_run):
    flags = small(num_iterations=3, eval_every=3, save_every=1)
    whole = train(Args(**flags | {"output_dir": flags["output_dir"] + "a"}))
    run_dir = interrupted_run(train, Args(**flags))
    assert progress_of(run_dir)["iteration"] == 1
    train(Args(resume=str(run_dir)))
    assert metrics(run_dir) == metrics(whole)
    assert torch.equal(progress_of(run_dir)["counts"], progress_of(whole)["counts"])


def lopsided_rewards():
    """In another process: the rewards of the test below. They know the prompts of its training file."""
    rewards.build = lambda spec, prompts, metadata, device: Lopsided(prompts[:NUM_PROMPTS])


@pytest.mark.parametrize("num_prompts", [4, 8])
def test_two_processes_with_groups_of_unequal_size_do_what_one_does(
    small, monkeypatch, start_processes, num_prompts
):
    # with 4, each process has one prompt per update: there, this once crashed
    flags = small(num_iterations=1, num_prompts_per_iteration=num_prompts, pool=2, seed=2)
    wait = start_processes(superflow, flags, prepare=lopsided_rewards)
    monkeypatch.setattr(rewards, "build", lambda *_: Lopsided(training_prompts(flags)))
    alone = train(Args(**flags | {"output_dir": flags["output_dir"] + "a"}))
    both = wait()
    one, two = metrics(alone)[1], metrics(both)[1]
    assert 3 < one["charts/group_size"] < 4
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-5), name
    torch.testing.assert_close(progress_of(both)["counts"], progress_of(alone)["counts"])


def test_it_learns_what_is_rewarded_and_what_to_expect(small, monkeypatch):
    # 14 rollouts of 32 images or fewer: held-out images get brighter, by more than a tenth, and the tracker's
    # values come close to the rewards
    monkeypatch.setattr(rewards, "build", lambda *_: Brightness(levels=None))
    flags = dict(num_iterations=14, num_prompts_per_iteration=4, num_images_per_prompt=8, learning_rate=3e-3)
    rows = metrics(train(Args(**small(eval_num_inference_steps=4, **flags))))
    assert rows[-1]["eval/reward"] > 1.1 * rows[0]["eval/reward"]
    assert rows[-1]["charts/reward_mean"] > 1.1 * rows[1]["charts/reward_mean"]
    assert rows[1]["charts/value_error"] > 0.1 and rows[-1]["charts/value_error"] < 0.06


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_bins=0),
        dict(num_bins=5),
        dict(pool=0),
        dict(start_images=-1),
        dict(forgetting=1.0),
        dict(forgetting=-0.1),
        dict(pool=1001),
    ],
    ids=str,
)
def test_bad_flags_are_refused_before_the_model_is_loaded(small, monkeypatch, changes):
    monkeypatch.setattr(superflow, "load_model", lambda *_: pytest.fail("loads the model"))
    (name,) = changes
    with pytest.raises(BadInput, match="--" + name.replace("_", "-")):
        train(Args(**small(**changes)))
    assert not Path(small()["output_dir"]).exists()


def test_a_pool_too_large_for_memory_is_refused(small):
    with pytest.raises(BadInput, match="--pool times --num-prompts-per-iteration"):
        train(Args(**small(pool=1000, num_prompts_per_iteration=1002)))


@pytest.mark.parametrize("start_images", [0, 1])
def test_a_run_with_rewards_outside_of_0_to_1_is_refused(small, start_images):
    with pytest.raises(BadInput, match=r"rewards in \[0, 1\]"):
        train(Args(**small(rewards="jpeg", start_images=start_images)))
