"""fdfo.py: its functions against closed forms, then runs of a second or two on the tiny world.

The Gaussian world: x_0 ~ N(mu, s^2), so x_t ~ N(m_t, V_t) with m_t = (1 - t) mu, V_t = (1 - t)^2 s^2 + t^2.
The velocity is then affine in x, and so is every step: x' = A x + B + std z. Mean, variance, and covariance
of a pair (the same start, private noise z) pass through a whole sampler exactly, without sampling:
m' = A m + B, V' = A^2 V + std^2, C' = A^2 C.
"""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

import fdfo
import rewards
from fdfo import (
    Args,
    churn_schedule,
    churned_rollout,
    churned_step,
    deal_tuples,
    diagnostics,
    draw_churn,
    draw_noise,
    finite_difference,
    get_sigmas,
    pseudo_log_ratio,
    spo_loss,
    train,
)
from rewards import BadInput
from small_runs import Brightness, ScoresWhenWaitedFor, metrics, saved

F64 = torch.float64
KINDS = ["raw", "logit-normal", "dirac"]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def uniform_grid(n):
    return [1 - i / n for i in range(n)] + [0.0]


def sd3_grid(n):
    """SD3's times: the shift f is applied to the smallest time twice."""

    def f(s):
        return 3 * s / (1 + 2 * s)

    return [f(s) for s in torch.linspace(1, f(0.001), n, dtype=F64).tolist()] + [0.0]


def gaussian_velocity(x, t, mu=0.7, s=0.5):
    """E[eps - x_0 | x_t = x]."""
    m_t, V_t = (1 - t) * mu, (1 - t) ** 2 * s**2 + t**2
    return -mu + (t - (1 - t) * s**2) / V_t * (x - m_t)


# === flow: one step ===


def coefficients(t, t_next, gamma):
    """Of x_t, of the velocity and of the noise in a step's result."""
    rows = [churned_step(*parts[:2], t, t_next, tensor(gamma), parts[2]) for parts in torch.eye(3, dtype=F64)]
    return [row.item() for row in rows]


def test_step_golden():
    # s = .5, gamma = .0025: r = .49937578, keep = 1 / (1 + gamma r)
    keep, slope, std = coefficients(0.8, 0.5, 0.0025)
    assert (1 / keep - 1) / 0.0025 == pytest.approx(0.49937578, abs=1e-8)
    assert slope / keep == pytest.approx(0.49937578 - 0.8, abs=1e-8)
    assert std == pytest.approx(0.03528921, abs=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.0025, 0.3, 5.0])
def test_the_last_step_is_eulers_and_takes_no_noise(gamma):
    x, v, noise = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(churned_step(x, v, 0.25, 0.0, tensor(gamma), noise), x - 0.25 * v)


@pytest.mark.parametrize("t, t_next", [(1.0, 0.9), (0.8, 0.5), (0.02, 0.01)])
def test_without_churn_a_step_is_eulers(t, t_next):
    x, v, noise = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = x + (t_next - t) * v
    torch.testing.assert_close(
        churned_step(x, v, t, t_next, tensor(0.0), noise), expected, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("seed", range(8))
def test_step_identities(seed):
    # with sigma(t) = t / (1 - t): sigma(r) (1 + gamma) = sigma(s), and noise is added up to time s again:
    # the signal (1 - r) keep = 1 - s, the variance of all noise (r keep)^2 + std^2 = s^2
    s, gamma = torch.rand(2, dtype=F64, generator=torch.Generator().manual_seed(seed)).tolist()
    keep, slope, std = coefficients(0.99, s, gamma)
    r = 0.99 + slope / keep
    assert r / (1 - r) * (1 + gamma) == pytest.approx(s / (1 - s), rel=1e-12)
    assert (1 - r) * keep == pytest.approx(1 - s, abs=1e-12)
    assert (r * keep) ** 2 + std**2 == pytest.approx(s**2, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.0025, 0.3])
def test_churn_of_the_prior_keeps_its_variance(gamma):
    # z / (1 + gamma) + sqrt((1 + gamma)^2 - 1) / (1 + gamma) e: variance 1, correlation (1 + gamma)^-2
    keep, _, std = coefficients(1.0, 1.0, gamma)
    assert keep**2 + std**2 == pytest.approx(1, abs=1e-12)
    assert keep**2 == pytest.approx((1 + gamma) ** -2, abs=1e-12)
    if gamma == 0.0025:
        assert keep**2 == pytest.approx(0.99502, abs=5e-6)


# === flow: whole samplers ===


def propagate(sigmas, gamma, mu=0.7, step=churned_step):
    """Mean, standard deviation and correlation of a pair at the end, each for s = 1, .5 and .2.

    Churn gamma at the start and on arrival at every time but 0.
    """
    x, noise, s = tensor(0.0, 1.0, 0.0), tensor(0.0, 0.0, 1.0), tensor(1.0, 0.5, 0.2).view(3, 1)
    parts = step(x, 0.0, 1.0, 1.0, tensor(gamma), noise)
    m, V, C = tensor(0.0, 0.0, 0.0), (parts[1:] ** 2).sum().expand(3), (parts[1] ** 2).expand(3)
    for t, t_next in zip(sigmas, sigmas[1:]):
        parts = step(x, gaussian_velocity(x, t, mu, s), t, t_next, tensor(gamma), noise).T
        A, B, std = parts[1] - parts[0], parts[0], parts[2] - parts[0]
        m, V, C = A * m + B, A**2 * V + std**2, A**2 * C
    return m, V.sqrt(), C / V


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, tensor(*expected), rtol=0, atol=atol)


def test_churn_keeps_the_marginals_on_a_fine_grid():
    m, std, _ = propagate(uniform_grid(2000), 5e-5)
    assert_close(m, [0.7] * 3, 1e-10)
    assert_close(std, [0.99935, 0.49962, 0.19974], 6e-6)
    assert_close(std, propagate(uniform_grid(2000), 0.0)[1].tolist(), 1e-4)


@pytest.mark.parametrize(
    "gamma, stds", [(0.0, [0.95507, 0.46452, 0.17078]), (0.0025, [0.95443, 0.46418, 0.17066])]
)
def test_churn_keeps_the_marginals_on_the_grid_of_sd3(gamma, stds):
    # the true ones are 1, .5 and .2: what is missing is the error of 40 Euler steps
    m, std, _ = propagate(sd3_grid(40), gamma)
    assert_close(m, [0.7] * 3, 1e-10)
    assert_close(std, stds, 6e-6)


def test_the_pipelines_grid_is_that_of_sd3():
    sigmas = get_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 40)
    assert len(sigmas) == 41 and sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas == pytest.approx(sd3_grid(40), abs=1e-6)
    assert sigmas[1:3] + sigmas[-3:-1] == pytest.approx([0.99133, 0.98236, 0.08105, 0.00893], abs=5e-6)


def step_with_a_wrong_overshoot(x_t, velocity, t, t_next, churn, noise):
    r = t_next / (1 + churn)  # divides t and not sigma(t) by 1 + gamma
    x_r = x_t + (r - t) * velocity
    return (x_r + r * ((1 + churn) ** 2 - 1).sqrt() * noise) / (1 + churn * r)


def assert_mean_survives_strong_churn(step):
    assert_close(propagate(sd3_grid(40), 0.3, step=step)[0], [0.7] * 3, 1e-10)


def test_strong_churn_keeps_the_mean_and_a_wrong_overshoot_does_not():
    assert_mean_survives_strong_churn(churned_step)
    with pytest.raises(AssertionError):
        assert_mean_survives_strong_churn(step_with_a_wrong_overshoot)


def pair_correlation(sigmas, gamma, s):
    """(1 + gamma)^-2 prod (s^2 + sigma(r_i)^2) / (s^2 + sigma(t_i)^2), sigma(r) = sigma(t) / (1 + gamma)."""
    t = tensor(*sigmas[1:-1])
    above = (t / (1 - t)) ** 2
    return ((1 + gamma) ** -2 * ((s**2 + above / (1 + gamma) ** 2) / (s**2 + above)).prod()).item()


def test_correlation_of_a_pair():
    exact = [pair_correlation(sd3_grid(40), 0.0025, s) for s in (1, 0.5, 0.2)]
    assert exact == pytest.approx([0.86654, 0.84886, 0.83408], abs=6e-6)
    assert_close(propagate(sd3_grid(40), 0.0025)[2], [0.86559, 0.84808, 0.83342], 6e-6)  # Euler's
    # with exact steps the two agree
    exact = [pair_correlation(uniform_grid(2000), 5e-5, s) for s in (1, 0.5, 0.2)]
    assert_close(propagate(uniform_grid(2000), 5e-5)[2], exact, 2e-4)


# === flow: schedules ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.03, 1.0])
def test_schedule_has_a_churn_for_each_time_and_none_for_the_last(kind, weight):
    gammas = churn_schedule(sd3_grid(12), kind, weight, centre=1.0)
    assert gammas.shape == (13,) and gammas[-1] == 0 and (gammas >= 0).all()
    assert gammas.any() == (weight > 0)


def test_raw_schedule_is_constant():
    assert churn_schedule(sd3_grid(5), "raw", 0.03, centre=1.0).tolist() == [0.03] * 5 + [0.0]


def test_dirac_schedule_churns_the_prior_alone():
    expected = [math.exp(0.4) - 1, 0, 0, 0, 0, 0]
    assert churn_schedule(sd3_grid(5), "dirac", 0.4, centre=1.0).tolist() == pytest.approx(
        expected, abs=1e-15
    )


@pytest.mark.parametrize("centre", [-1.5, 0.0, 2.5])
def test_logit_normal_schedule_follows_its_density_at_the_times(centre):
    sigmas, weight = sd3_grid(40), 0.8
    gammas = torch.from_numpy(churn_schedule(sigmas, "logit-normal", weight, centre))
    density = TransformedDistribution(Normal(tensor(centre), tensor(0.25)), SigmoidTransform())
    p = density.log_prob(tensor(*sigmas[1:-1])).exp()
    assert_close(gammas, [0, *(weight * p / p.sum()).expm1(), 0], 1e-9)
    assert (1 + gammas).prod().item() == pytest.approx(math.exp(weight), abs=1e-6)


@pytest.mark.parametrize("centre", [-60.0, 60.0])
def test_logit_normal_schedule_without_a_time_near_its_centre_is_uniform(centre):
    gammas = churn_schedule(sd3_grid(8), "logit-normal", 0.8, centre)
    assert gammas.tolist() == pytest.approx([math.exp(0.1) - 1] * 8 + [0], abs=1e-12)


# === rollout ===


def test_churn_depends_on_seed_iteration_and_pair_alone():
    sigmas = sd3_grid(12)
    churn = draw_churn(range(0, 8, 2), sigmas, "logit-normal", 0.5, seed=1, iteration=3)
    assert churn.shape == (8, 13) and churn.dtype == torch.float32
    assert torch.equal(churn[::2], churn[1::2])  # the two of a pair are neighbours
    assert len(churn[::2].unique(dim=0)) == 4
    split = [draw_churn(pairs, sigmas, "logit-normal", 0.5, 1, 3) for pairs in ([0], [2, 4, 6])]
    assert torch.equal(churn, torch.cat(split))
    for seed, iteration in ((1, 4), (2, 3)):
        assert not torch.equal(
            churn, draw_churn(range(0, 8, 2), sigmas, "logit-normal", 0.5, seed, iteration)
        )


@pytest.mark.parametrize("kind", ["raw", "dirac"])
def test_churn_that_is_not_drawn_is_the_same_for_all(kind):
    sigmas = sd3_grid(12)
    expected = torch.from_numpy(churn_schedule(sigmas, kind, 0.5, centre=0.0)).float()
    assert torch.equal(draw_churn([0, 2], sigmas, kind, 0.5, 1, 3), expected.expand(4, -1))


def pairs_noise(pairs, draws, shape, iteration=1):
    """Noise of pairs that share their start, as train makes it."""
    noise = draw_noise(range(2 * pairs), draws, shape, seed=1, iteration=iteration)
    noise[1::2, 0] = noise[::2, 0]
    return noise


def uneven_churn(B, T):
    """(B, T + 1), a different gamma everywhere."""
    return torch.arange(1, B * (T + 1) + 1).view(B, T + 1) / 100


def test_rollout_without_churn_is_eulers_and_pairs_are_identical():
    sigmas, noise = sd3_grid(6), pairs_noise(3, 7, (2, 3, 4))
    x_0, states, velocities = churned_rollout(gaussian_velocity, noise, sigmas, torch.zeros(6, 7))
    for result in (x_0, states, velocities):
        assert torch.equal(result[::2], result[1::2]) and result.dtype == torch.float32
    x_t = noise[:, 0]
    for t, t_next in zip(sigmas, sigmas[1:]):
        x_t = x_t + (t_next - t) * gaussian_velocity(x_t, t)
    torch.testing.assert_close(x_0, x_t, rtol=0, atol=1e-6)
    direction, dR = finite_difference(x_0, torch.arange(6.0))
    assert not direction.any() and not dR.any()


def test_rollout_returns_what_its_steps_went_through():
    T, sigmas, noise, churn = 6, sd3_grid(6), pairs_noise(2, 7, (2, 3, 4)), uneven_churn(4, 6)
    x_0, states, velocities = churned_rollout(gaussian_velocity, noise, sigmas, churn)
    assert states.shape == velocities.shape == (4, T, 2, 3, 4) and x_0.shape == (4, 2, 3, 4)
    gamma = churn.view(4, T + 1, 1, 1, 1)  # gamma_0 at the start, gamma_i on arrival at the i-th time
    torch.testing.assert_close(
        states[:, 0],
        (noise[:, 0] + ((1 + gamma[:, 0]) ** 2 - 1).sqrt() * noise[:, 1]) / (1 + gamma[:, 0]),
    )
    for i, t in enumerate(sigmas[:-1]):
        assert torch.equal(velocities[:, i], gaussian_velocity(states[:, i], t))
        fresh = noise[:, 2 + i] if i < T - 1 else torch.full_like(x_0, 1e3)  # the last step has no noise
        expected = churned_step(states[:, i], velocities[:, i], t, sigmas[i + 1], gamma[:, i + 1], fresh)
        assert torch.equal(states[:, i + 1] if i < T - 1 else x_0, expected)


def test_rollout_uses_each_draw_of_noise_once_and_in_order():
    T, sigmas, noise, churn = 5, sd3_grid(5), pairs_noise(1, 6, (1, 2, 2)), uneven_churn(2, 5)
    _, states, _ = churned_rollout(gaussian_velocity, noise, sigmas, churn)
    for draw in range(T + 1):  # draws 0 and 1 make the first state, draw i + 1 the i-th
        other = noise.clone()
        other[:, draw] += 1
        changed = churned_rollout(gaussian_velocity, other, sigmas, churn)[1] != states
        first = max(draw - 1, 0)
        assert not changed[:, :first].any() and changed[:, first].all()


def test_rollout_gives_pairs_the_correlation_of_the_closed_form():
    # E[mean(dx^2)] = V (1 - correlation) / 2. 80,000 pairs of numbers: two standard errors are .002
    sigmas, noise = sd3_grid(40), pairs_noise(1000, 41, (80, 1, 1))
    churn = draw_churn(range(0, 2000, 2), sigmas, "raw", 0.0025, seed=1, iteration=1)
    x_0 = churned_rollout(lambda x, t: gaussian_velocity(x, t, mu=0.7, s=1.0), noise, sigmas, churn)[0]
    assert x_0.mean().item() == pytest.approx(0.7, abs=0.015)
    assert x_0.std().item() == pytest.approx(0.95443, abs=0.01)
    half = (x_0[::2] - x_0[1::2]) / 2
    expected = 0.95443**2 * (1 - 0.86559) / 2
    assert half.square().mean().item() == pytest.approx(expected, rel=0.02)


# === algorithm ===


def pairs(*differences, rewards=None):
    """Latents (2n, D, 1, 1) of pairs with dx = +-difference, rewards (2n,) with dR = +-rewards."""
    dx = torch.stack([torch.stack([d, -d]) for d in map(lambda d: tensor(*d), differences)]).flatten(0, 1)
    centre = torch.randn(len(differences), dx.shape[1], dtype=F64, generator=torch.Generator().manual_seed(5))
    x_0 = (dx + centre.repeat_interleave(2, dim=0)).view(*dx.shape, 1, 1)
    values = [3.0 + sign * dR for dR in rewards or [0.5] * len(differences) for sign in (1, -1)]
    return x_0, tensor(*values)


def losses(x_0, values, change, clip_range=0.03):
    """The loss of each image where the velocity is `change` away from the old one."""
    direction, dR = finite_difference(x_0, values)
    old = torch.randn(x_0.shape, dtype=F64, generator=torch.Generator().manual_seed(6))
    return spo_loss(pseudo_log_ratio(old + change, old, direction), dR, clip_range)


def gradients(x_0, values, change=0.0):
    """Of the sum of the losses by the velocity of each image."""
    change = torch.zeros_like(x_0).add(change).requires_grad_()
    losses(x_0, values, change).sum().backward()
    return change.grad


GOLDEN = pairs((0.3, -0.1, 0.2, 0.0))  # m = mean(dx^2) = .035, dR = .5


def test_golden_direction():
    h, dR = finite_difference(*GOLDEN)
    expected = tensor(8.5712, -2.8571, 5.7141, 0.0)  # dx / (m + 1e-6)
    torch.testing.assert_close(h.squeeze(), torch.stack([expected, -expected]), rtol=0, atol=1e-4)
    torch.testing.assert_close(dR, tensor(0.5, -0.5))


def test_golden_loss_and_gradient_on_policy():
    # L = -dR, dL/dv = 2 dR h / D, for both of a pair: two signs make none
    torch.testing.assert_close(losses(*GOLDEN, 0.0), tensor(-0.5, 0.5))
    expected = tensor(2.1428, -0.71427, 1.42853, 0.0).expand(2, 4)
    torch.testing.assert_close(gradients(*GOLDEN).squeeze(), expected, rtol=0, atol=1e-4)


def ratio_along_dx(c):
    """rho at v = v_old - c dx: log rho = 2 c - c^2 m, but for the 1e-6 in h."""
    h, _ = finite_difference(*GOLDEN)
    dx = (GOLDEN[0] - GOLDEN[0].flip(0)) / 2
    return pseudo_log_ratio(-c * dx, torch.zeros_like(dx), h).exp()


@pytest.mark.parametrize("c, ratio", [(0.0147836, 1.03), (-0.0152260, 0.97), (0.0, 1.0)])
def test_golden_ratio(c, ratio):
    torch.testing.assert_close(ratio_along_dx(c), tensor(ratio, ratio), rtol=0, atol=2e-6)


def test_loss_is_least_where_the_ratio_leaves_the_trust_region():
    # at rho = 1 + eps with L = -dR (1 + eps / 2), or 1 - eps with |dR| (1 - eps / 2), whatever |dR|
    for dR in (0.5, -0.5, 7.0):
        best = 1.03 if dR > 0 else 0.97
        log_ratio = tensor(best).log().requires_grad_()
        loss = spo_loss(log_ratio, tensor(dR), 0.03)
        loss.backward()
        assert log_ratio.grad.item() == pytest.approx(0, abs=1e-12)
        assert loss.item() == pytest.approx(-dR * (best + 1) / 2)
        for ratio in (0.9, 0.96, 0.98, 1.0, 1.02, 1.04, 1.1):
            assert spo_loss(tensor(ratio).log(), tensor(dR), 0.03) > loss
    c = tensor(0.0147836).requires_grad_()
    spo_loss(ratio_along_dx(c)[:1].log(), tensor(0.5), 0.03).sum().backward()
    assert c.grad.item() == pytest.approx(0, abs=1e-3)  # on policy it is -1


def some_pairs(n, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(2 * n, D, 1, 1, dtype=F64, generator=generator)
    return x_0, torch.randn(2 * n, dtype=F64, generator=generator)


def swapped(values):
    """Each pair's two rows in the other order."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def test_losses_do_not_depend_on_the_order_in_a_pair_or_on_a_reward_for_all():
    x_0, values = some_pairs(5)
    change = 0.01 * some_pairs(5, seed=1)[0]
    loss, gradient = losses(x_0, values, change), gradients(x_0, values, change)
    torch.testing.assert_close(losses(x_0, values + 4, change), loss)
    torch.testing.assert_close(gradients(x_0, values + 4, change), gradient)
    # here the velocity is the same for all images, as where they share parameters
    common = 0.01 * some_pairs(1, seed=2)[0][:1]
    gradient = gradients(x_0, values, common)
    torch.testing.assert_close(gradients(swapped(x_0), swapped(values), common), swapped(gradient))


def test_loss_and_gradient_are_proportional_to_the_reward():
    x_0, values = some_pairs(5)
    change = 0.01 * some_pairs(5, seed=1)[0]
    torch.testing.assert_close(losses(x_0, 3 * values, change), 3 * losses(x_0, values, change))
    torch.testing.assert_close(gradients(x_0, 3 * values, change), 3 * gradients(x_0, values, change))


def test_direction_divides_by_the_mean_square_and_not_its_root():
    x_0, values = some_pairs(5)
    h, _ = finite_difference(x_0, values)
    torch.testing.assert_close(finite_difference(10 * x_0, values)[0], h / 10, rtol=1e-4, atol=0)
    m = ((x_0 - swapped(x_0)) / 2).square().flatten(1).mean(1)
    torch.testing.assert_close(h.square().flatten(1).mean(1), 1 / m, rtol=1e-4, atol=0)


def test_differences_are_from_the_mean_and_not_between_the_two():
    # x_0 = 1 and 0, rewards 5 and 3: dx = +-.5, m = .25, h = +-2, dR = +-1
    h, dR = finite_difference(tensor(1.0, 0.0).view(2, 1, 1, 1), tensor(5.0, 3.0))
    torch.testing.assert_close(h.flatten(), tensor(2.0, -2.0), rtol=0, atol=1e-4)
    assert dR.tolist() == [1.0, -1.0]


def test_step_against_the_gradient_raises_a_linear_reward():
    # g = dR dx / |dx|^2 is the projection of b on dx; x_0 ~ x_t - t v follows -dv = 2 g
    D = 8
    x_0, _ = some_pairs(20_000, D)
    b = torch.linspace(-1, 1, D, dtype=F64)
    dv = -gradients(x_0, x_0.flatten(1) @ b).flatten(1)
    dx = ((x_0 - swapped(x_0)) / 2).flatten(1)
    g = (dx @ b / dx.square().sum(1)).unsqueeze(1) * dx
    torch.testing.assert_close(dv, -2 * g, rtol=0, atol=1e-3)  # the 1e-6 in h
    assert (-dv @ b >= 0).all()
    # equal directions are equally likely: E[g] = b / D
    error = (D * g.mean(0) - b).norm() / b.norm()
    assert error < 0.03
    torch.testing.assert_close(-dv.mean(0) * D / 2, b, rtol=0, atol=0.05)


@pytest.mark.parametrize("change", [0.0, 0.01])
def test_pairs_without_information_have_no_loss_and_leave_the_others_alone(change):
    x_0, values = some_pairs(5)
    alone = losses(x_0[:2], values[:2], change), gradients(x_0[:2], values[:2], change)
    values[2] = values[3]  # a tie
    values[4] = float("nan")
    values[6] = values[7] = float("nan")
    x_0[8] = x_0[9]  # identical images, whose rewards differ by an engine's noise
    loss, gradient = losses(x_0, values, change), gradients(x_0, values, change)
    assert not loss[2:].any() and not gradient[2:].any()
    torch.testing.assert_close(loss[:2], alone[0])
    torch.testing.assert_close(gradient[:2], alone[1])
    assert loss[:2].any() and gradient[:2].any()


def test_pairs_closer_than_rounding_count_as_equal():
    # m = 1e-9 and 4e-8, on both sides of 1e-8
    x_0, values = pairs((10**-4.5,) * 4, (2e-4,) * 4)
    h, dR = finite_difference(x_0, values)
    assert not h[:2].any() and not dR[:2].any()
    assert h[2:].abs().flatten().tolist() == pytest.approx([2e-4 / (4e-8 + 1e-6)] * 8)
    assert dR.tolist()[2:] == [0.5, -0.5]


@pytest.mark.parametrize("sign", [1, -1])
def test_ratio_is_limited(sign):
    # at v_target = v_old - h, log rho = mean(h^2), about 1 / m = 1000
    x_0, values = pairs((0.001**0.5,) * 4)
    h, dR = finite_difference(x_0.float(), values.float())
    velocity = (-sign * 0.2 * h).requires_grad_()
    log_ratio = pseudo_log_ratio(velocity, torch.zeros_like(h), h)
    assert log_ratio.tolist() == [1.0 * sign] * 2
    loss = spo_loss(log_ratio, dR, 0.03)
    loss.sum().backward()
    assert loss.isfinite().all() and not velocity.grad.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_within_the_limit_gradients_stay_moderate(advantage):
    # |dL / dlog rho| is at most e (e - 1) / eps + e = 158 |A|. With a limit of 5 it would be 700,000 |A|
    velocity = torch.linspace(-3, 3, 601, dtype=F64).view(-1, 1, 1, 1).requires_grad_()
    zeros, ones = torch.zeros_like(velocity), torch.ones_like(velocity)
    log_ratio = pseudo_log_ratio(velocity, zeros, ones)
    slope = -2 * (velocity.detach() + 1)  # of log rho = -(v^2 + 2 v)
    spo_loss(log_ratio, tensor(advantage), 0.03).sum().backward()
    steepness = (velocity.grad / slope).nan_to_num(0).abs().max().item()
    assert 100 < steepness < math.e * (math.e - 1) / 0.03 + math.e


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_ratio_is_exactly_one_where_the_velocity_is_the_old_one(dtype):
    v, h = 1000 * torch.randn(2, 6, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    log_ratio = pseudo_log_ratio(v, v.clone(), h)
    assert torch.equal(log_ratio, torch.zeros_like(log_ratio)) and (log_ratio.exp() == 1).all()


@pytest.mark.parametrize("C", [2, 16])
def test_sixteen_steps_are_not_taken_for_sixteen_channels(C):
    # every tuple by itself gives what the flat batch of all tuples gives
    B, T, sigmas = 4, 16, sd3_grid(16)
    noise, churn = pairs_noise(2, 17, (C, 2, 2)), uneven_churn(4, 16) / 10
    x_0, states, velocities = churned_rollout(gaussian_velocity, noise, sigmas, churn)
    assert states.shape == (B, T, C, 2, 2)
    h, dR = finite_difference(x_0, tensor(1.0, 2.0, 5.0, 3.0).float())
    assert h.shape == x_0.shape and dR.tolist() == [-0.5, 0.5, 1.0, -1.0]
    log_ratio = pseudo_log_ratio(
        velocities.flatten(0, 1) + 0.01, velocities.flatten(0, 1), h.repeat_interleave(T, dim=0)
    )
    assert log_ratio.shape == (B * T,)
    for b in range(B):
        for i in range(T):
            one = pseudo_log_ratio(velocities[b : b + 1, i] + 0.01, velocities[b : b + 1, i], h[b : b + 1])
            torch.testing.assert_close(log_ratio[b * T + i], one[0])


def test_neighbours_are_pairs_and_pairs_do_not_mix():
    x_0, values = some_pairs(4)
    h, dR = finite_difference(x_0, values)
    for pair in (slice(k, k + 2) for k in range(0, 8, 2)):
        h_alone, dR_alone = finite_difference(x_0[pair], values[pair])
        assert torch.equal(h[pair], h_alone) and torch.equal(dR[pair], dR_alone)
    torch.testing.assert_close(h[::2], -h[1::2])
    torch.testing.assert_close(dR[::2], -dR[1::2])


def test_diagnostics_count_what_left_the_trust_region_the_way_it_is_pushed():
    ratio, advantages = tensor(1.05, 1.05, 0.9, 0.9, 1.02, 1.05), tensor(1.0, -1.0, 1.0, -1.0, 1.0, 0.0)
    sums = diagnostics(tensor(1.0, 2.0), tensor(0.5, 0.25), ratio.log(), advantages, 0.03)
    assert {name: value.item() for name, value in sums.items()} == {
        "policy_loss": pytest.approx(3.0),
        "kl": pytest.approx(0.75),
        "ratio_mean": pytest.approx(0.37),
        "clipfrac_positive": 1.0,
        "clipfrac_negative": 1.0,
    }


# === algorithm: a small model, end to end ===


class Toy(torch.nn.Module):
    """The exact flow of N(0, I) in two dimensions, plus an MLP that starts at zero."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
        torch.nn.init.zeros_(self.mlp[2].weight)
        torch.nn.init.zeros_(self.mlp[2].bias)

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x_t)).view(-1, 1, 1, 1)
        return (
            gaussian_velocity(x_t, t, mu=0.0, s=1.0)
            + self.mlp(torch.cat([x_t, t], 1).squeeze())[..., None, None]
        )


def trained_toy(reward, iterations=15, T=8):
    """(its first weights, the model): the loop of train, with one optimiser step per rollout."""
    torch.manual_seed(0)
    model, sigmas = Toy(), uniform_grid(T)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    times = torch.tensor(sigmas[:-1]).repeat(128)  # of all tuples, a pair's steps in a row
    for iteration in range(1, iterations + 1):
        noise = pairs_noise(64, 1 + T, (2, 1, 1), iteration)
        churn = draw_churn(range(0, 128, 2), sigmas, "raw", 0.03, seed=1, iteration=iteration)
        x_0, states, velocities = churned_rollout(model, noise, sigmas, churn)
        direction, dR = (values.repeat_interleave(T, dim=0) for values in finite_difference(x_0, reward(x_0)))
        velocity = model(states.flatten(0, 1), times)
        loss = spo_loss(pseudo_log_ratio(velocity, velocities.flatten(0, 1), direction), dR, 0.03).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, model


@torch.no_grad()
def sampled_mean(model, T=8):
    noise = draw_noise(range(500), 1 + T, (2, 1, 1), seed=2, iteration=0)
    return churned_rollout(model, noise, uniform_grid(T), torch.zeros(500, T + 1))[0].mean(0).flatten()


def test_training_moves_the_samples_along_the_reward():
    b = torch.tensor([0.6, -0.8])
    _, model = trained_toy(lambda x_0: x_0.flatten(1) @ b)
    moved = sampled_mean(model) - sampled_mean(Toy())
    along = (moved @ b).item()
    assert along > 0.2
    assert (moved - along * b).norm() < along / 3


def test_training_on_a_constant_reward_changes_nothing():
    before, model = trained_toy(lambda x_0: torch.full((len(x_0),), 0.3), iterations=2)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


# === runs ===


@pytest.fixture
def small(small, write_prompts, monkeypatch, without_pictures):
    """Flags of a short run: small(num_iterations=3) -> dict for Args. The reward has no ties, and rounding
    hardly shows on it."""
    monkeypatch.setattr(rewards, "build", lambda *_: Brightness(10.0, levels=None))
    flags = dict(
        prompts=write_prompts(eval=2),
        num_images_per_prompt=2,
        num_inference_steps=3,
        num_iterations=1,
        num_updates_per_iteration=2,
        learning_rate=1e-4,
        churn_weight=0.03,
        kl_coef=0.0,
    )
    return lambda **changes: small(**flags | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(churn="raw", guidance_scale=2.0, gradient_checkpointing=True),
        dict(churn="logit-normal", churn_weight=0.5, kl_coef=0.01),
        dict(churn="dirac", churn_weight=0.5, kl_coef=0.01, lora_rank=4),
    ],
    ids=str,
)
def test_every_variant_runs_and_starts_on_policy(small, spy, changes):
    rollouts = spy(fdfo, "churned_rollout")
    flags = small(num_images_per_prompt=4, num_iterations=2, num_updates_per_iteration=1, **changes)
    rows = metrics(train(Args(**flags)))
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows[1:]:
        assert row["losses/ratio_first"] < 1e-5 and row["losses/grad_norm"] > 0
    # the first update starts at the base model; a LoRA that stayed off would keep the second there
    assert 0 <= rows[1]["losses/kl"] < 1e-8
    assert (rows[2]["losses/kl"] > 1e-8) == ("kl_coef" in changes)

    weight, seen = flags["churn_weight"], 0
    for (_, noise, sigmas, churn), _ in rollouts:
        if len(sigmas) == 3:  # evaluations
            assert not churn.any()
            continue
        seen += 1
        assert noise.shape[:2] == (8, 4) and churn.shape == (8, 4)
        assert torch.equal(noise[::2, 0], noise[1::2, 0]) and torch.equal(churn[::2], churn[1::2])
        assert len(noise[:, 0].flatten(1).unique(dim=0)) == 4
        assert len(noise[:, 1:].flatten(0, 1).flatten(1).unique(dim=0)) == 8 * 3
        if changes["churn"] == "raw":
            assert churn.tolist() == [pytest.approx([weight] * 3 + [0.0])] * 8
        else:
            torch.testing.assert_close((1 + churn).prod(1), torch.full((8,), math.exp(weight)))
            assert (churn[:, 0] > 0).all() or changes["churn"] == "logit-normal"
    assert seen == 2


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("case", ["no churn", "constant reward"])
def test_without_differences_there_is_no_step(small, monkeypatch, spy, case, kl_coef):
    differences = spy(fdfo, "finite_difference")
    if case == "constant reward":
        monkeypatch.setattr(rewards, "build", lambda *_: Brightness(0.0))
    else:
        monkeypatch.setattr(fdfo, "draw_churn", lambda *arguments: torch.zeros_like(draw_churn(*arguments)))
    # at this learning rate even the weight decay of a step with gradient zero would show
    run_dir = train(Args(**small(learning_rate=0.1, kl_coef=kl_coef)))
    for (x_0, _), (_, dR) in differences:
        assert torch.equal(x_0[::2], x_0[1::2]) == (case == "no churn")
        assert not dR.any()
    row = metrics(run_dir)[1]
    assert row["losses/policy_loss"] == row["losses/kl"] == row["losses/grad_norm"] == 0
    assert row["losses/ratio_mean"] == 0
    weights = saved(run_dir)["weights"]
    base = SD3Transformer2DModel.from_pretrained("tiny/sd3/transformer").state_dict()
    assert len(weights) > 20 and all(torch.equal(base[name], value) for name, value in weights.items())


class OneDiffers(ScoresWhenWaitedFor):
    """Of eight images, one has another reward than the rest."""

    def details(self, images, prompts, metadata):
        return {"reward": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])[: len(images)]}


def test_a_lone_pair_with_a_difference_is_trained_on(small, monkeypatch, spy):
    # ties are left out, also when none are left for an update or a batch
    monkeypatch.setattr(rewards, "build", lambda *_: OneDiffers())
    calls = spy(fdfo, "spo_loss")
    flags = small(num_images_per_prompt=4, num_prompts_per_iteration=2, num_inference_steps=2)
    row = metrics(train(Args(**flags)))[1]
    used = torch.cat([advantages for (_, advantages, _), _ in calls])
    assert sorted(used.tolist()) == [-0.5] * 2 + [0.5] * 2
    assert row["losses/grad_norm"] > 0


def test_tuples_are_dealt_once_and_in_one_order_for_any_number_of_processes():
    dR = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 0.0, 3.0, -3.0])
    whole = deal_tuples(range(8), dR, 8, 6, 3, seed=1, iteration=2)
    found = []
    for update in whole:
        found += zip(update.images.tolist(), update.steps.tolist())
    assert len(whole) == 3 and found != sorted(found)
    assert sorted(found) == [(image, step) for image in (0, 1, 2, 3, 6, 7) for step in range(6)]
    for first in (0, 4):
        part = deal_tuples(range(first, first + 4), dR[first : first + 4], 8, 6, 3, seed=1, iteration=2)
        for update, own in zip(whole, part):
            is_here = (update.images >= first) & (update.images < first + 4)
            assert torch.equal(update.images[is_here] - first, own.images)
            assert torch.equal(update.steps[is_here], own.steps)
    for seed, iteration in ((1, 3), (2, 2)):
        other = deal_tuples(range(8), dR, 8, 6, 3, seed, iteration)
        assert not torch.equal(other[0].images, whole[0].images)


def test_each_tuple_is_used_once_with_its_own_direction_and_reward(small, monkeypatch, spy):
    P, K, T, U = 2, 4, 3, 2
    B, events, seen = P * K, [], []

    def tagged(x_0, values):
        tags = torch.arange(1.0, B + 1)
        return tags.view(-1, 1, 1, 1).expand_as(x_0), tags

    def log_ratio(velocity, old_velocity, direction):
        seen.append((velocity.detach(), old_velocity, direction[:, 0, 0, 0]))
        return pseudo_log_ratio(velocity, old_velocity, direction / 100)

    def loss(log_ratio, advantages, clip_range):
        assert torch.equal(advantages, seen[-1][2])
        events.append(len(advantages))
        return spo_loss(log_ratio, advantages, clip_range)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: [events.append("step"), step(*args)][1])
    monkeypatch.setattr(fdfo, "finite_difference", tagged)
    monkeypatch.setattr(fdfo, "pseudo_log_ratio", log_ratio)
    monkeypatch.setattr(fdfo, "spo_loss", loss)
    rollouts = spy(fdfo, "churned_rollout")
    flags = dict(num_inference_steps=T, num_updates_per_iteration=U, num_images_per_prompt=K)
    train(Args(**small(micro_batch_size=5, **flags)))

    assert events == [5, 5, 2, "step"] * U
    velocity, old_velocity, tags = (torch.cat(parts) for parts in zip(*seen))
    half = B * T // U
    torch.testing.assert_close(velocity[:half], old_velocity[:half], rtol=0, atol=1e-4)  # so has its prompt
    assert (velocity[half:] - old_velocity[half:]).abs().max() > 1e-3  # after the first step
    # every tuple once, with the tag of its image, in no order
    stored = [result for (_, _, sigmas, _), result in rollouts if len(sigmas) == T + 1]
    velocities = torch.cat([velocities for _, _, velocities in stored])
    found = []
    for old, tag in zip(old_velocity, tags):
        (row,) = (velocities == old).flatten(2).all(2).nonzero().tolist()
        assert row[0] + 1 == tag
        found.append(tuple(row))
    assert found != sorted(found) and sorted(found) == [(b, i) for b in range(B) for i in range(T)]


def test_micro_batches_that_split_pairs_do_not_change_the_result(small):
    whole, parts = (
        metrics(train(Args(**small(micro_batch_size=n, output_dir=small()["output_dir"] + str(n)))))
        for n in (64, 3)
    )
    assert parts[1] == pytest.approx(whole[1], rel=1e-3, abs=1e-4)


def test_resume_after_an_interruption_equals_an_uninterrupted_run(small, interrupted_run):
    flags = small(num_iterations=3, save_every=1, eval_every=3)
    expected = metrics(train(Args(**flags | {"output_dir": flags["output_dir"] + "a"})))
    run_dir = interrupted_run(train, Args(**flags))
    assert len(metrics(run_dir)) == 3
    train(Args(resume=str(run_dir)))
    assert metrics(run_dir) == expected
    assert [row["iteration"] for row in expected] == [0, 1, 2, 3]


def unrounded_brightness():
    """In another process: the reward of `small`."""
    rewards.build = lambda *_: Brightness(10.0, levels=None)


def test_two_processes_give_the_first_loss_of_one(small, start_processes):
    # pairs differ in their churn, which the second process must not draw as if its pairs were the first
    flags = small(num_prompts_per_iteration=4, churn="logit-normal", churn_weight=0.5)
    wait = start_processes(fdfo, flags, prepare=unrounded_brightness)
    alone = train(Args(**flags | {"output_dir": flags["output_dir"] + "a"}))
    both = wait()
    one, two = metrics(alone)[1], metrics(both)[1]
    for name in ("losses/policy_loss", "losses/ratio_first", "charts/reward_mean"):
        assert two[name] == pytest.approx(one[name], rel=0, abs=1e-5), name
    assert two["losses/grad_norm"] == pytest.approx(one["losses/grad_norm"], rel=1e-2) != 0


class OnePrompt(Brightness):
    """Images of one prompt have different rewards, all others the same."""

    def __init__(self, prompt):
        super().__init__(10.0, levels=None)
        self.prompt = prompt

    def details(self, images, prompts, metadata):
        brightness = super().details(images, prompts, metadata)["reward"]
        is_prompt = torch.tensor([prompt == self.prompt for prompt in prompts])
        return {"reward": torch.where(is_prompt, brightness, 1.0)}


def one_prompt_counts():
    """In each process: rewards that differ for the first drawn prompt alone, which the first process has."""
    row = fdfo.draw_prompts(10, 4, seed=1, iteration=1)[0]
    rewards.build = lambda spec, prompts, metadata, device: OnePrompt(prompts[row])


def test_a_process_without_tuples_takes_part_in_every_update(small, monkeypatch, start_processes):
    flags = small(num_prompts_per_iteration=4)
    wait = start_processes(fdfo, flags, prepare=one_prompt_counts)
    monkeypatch.setattr(rewards, "build", rewards.build)  # to be restored
    one_prompt_counts()
    alone = train(Args(**flags | {"output_dir": flags["output_dir"] + "a"}))
    one, two = metrics(alone)[1], metrics(wait())[1]
    assert one["charts/zero_std_fraction"] == 0.75 and one["losses/grad_norm"] > 0
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-2, abs=1e-5), name


def test_several_updates_at_a_high_rate_do_not_explode(small, spy):
    ratios = spy(fdfo, "pseudo_log_ratio")
    flags = dict(num_prompts_per_iteration=16, num_updates_per_iteration=4, learning_rate=3e-3)
    row = metrics(train(Args(**small(**flags))))[1]
    largest = max(log_ratio.abs().max().item() for _, log_ratio in ratios)
    assert largest == 1.0
    assert row["losses/grad_norm"] < 100


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_images_per_prompt=3), "--num-images-per-prompt 3 must be even"),
        (dict(num_images_per_prompt=0), "--num-images-per-prompt must be at least 2"),
        (dict(churn_weight=-0.01), "--churn-weight must be at least 1e-06"),
        (dict(churn_weight=0.0), "--churn-weight must be at least 1e-06"),  # pairs would be identical
    ],
    ids=str,
)
def test_bad_input_is_refused_before_a_model_is_loaded(small, spy, changes, message):
    loaded = spy(fdfo, "load_model")
    with pytest.raises(BadInput, match=message):
        train(Args(**small(**changes)))
    assert not loaded and not Path(small()["output_dir"]).exists()
