"""Intervals and verdicts against textbook values, and how often they are wrong on simulated runs."""

import math

import numpy as np
import pytest

from benchmark import inference
from benchmark.inference import Comparison, claim_row, compare, verdict


@pytest.mark.parametrize(
    "probability, df, expected",
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 7, 2.3646),
        (0.95, 11, 1.7959),
        (0.8, 3, 0.9785),
        (0.975, 1000, 1.9623),
    ],
)
def test_quantiles_of_students_t(probability, df, expected):
    assert inference.student_quantile(probability, df) == pytest.approx(expected, rel=2e-3)
    assert inference.student_cdf(expected, df) == pytest.approx(probability, abs=2e-4)
    assert inference.student_quantile(1 - probability, df) == pytest.approx(-expected, rel=2e-3)


def test_a_comparison_by_hand():
    """0.1, 0.2, 0.3 have mean 0.2, standard error 0.1 / sqrt 3, and t = 3.4641 with 2 degrees of freedom."""
    found = compare([0.1, 0.2, 0.3])
    error = 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(4.3027 * error, rel=1e-3)
    assert found.mean - found.low == pytest.approx(4.3027 * error, rel=1e-3)
    assert found.p == pytest.approx(0.0742, abs=2e-4)
    assert found.detectable == pytest.approx((4.3027 + 1.0607) * error, rel=1e-3)
    assert found.num_seeds == 3


def test_equal_differences_have_an_interval_of_no_width():
    assert compare([0.1, 0.1])[:4] == (0.1, 0.1, 0.1, 0.0)
    assert compare([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.001, 0.2, "supported"),
        (0.001, 0.002, "supported"),
        (-0.2, -0.001, "contradicted"),
        (-0.029, 0.029, "equivalent"),
        (-0.031, 0.029, "inconclusive"),
        (-0.029, 0.031, "inconclusive"),
        (-0.2, 0.2, "inconclusive"),
        (0.0, 0.0, "equivalent"),
    ],
)
def test_the_four_verdicts(low, high, expected):
    assert verdict(Comparison((low + high) / 2, low, high, 0.5, 0.1, 5)) == expected


def test_holms_method_by_hand():
    adjusted = inference.holm([0.04, 0.01, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.06, 0.03, 0.06, 0.02])
    np.testing.assert_allclose(inference.holm([0.5, 0.9]), [1.0, 1.0])


def test_probability_of_improvement_by_hand():
    ours = [[1.0, 0.5], [3.0, 0.5]]
    theirs = [[2.0, 0.5], [0.0, 0.7]]
    # first task: 1 > 2 no, 1 > 0 yes, 3 > 2 yes, 3 > 0 yes; second: tie, worse, tie, worse
    assert inference.probability_of_improvement(ours, theirs) == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_what_the_base_leaves_open():
    np.testing.assert_allclose(inference.normalised([0.5, 0.75, 1.0, 0.25], 0.5), [0, 0.5, 1, -0.5])


def test_the_middle_half():
    assert inference.interquartile_mean([0, 1, 2, 100]) == 1.5
    # of six values the middle three: half of the second, the third, the fourth, half of the fifth
    middle = (0.5 * 1 + 2 + 3 + 0.5 * 4) / 3
    assert inference.interquartile_mean([[0, 1], [2, 3], [4, 100]]) == pytest.approx(middle)


def test_cost_to_reach_and_relative_cost():
    costs, scores = [0, 10, 20], [0.4, 0.5, 0.7]
    assert inference.cost_to_reach(costs, scores, 0.4) == 0
    assert inference.cost_to_reach(costs, scores, 0.6) == pytest.approx(15)
    assert inference.cost_to_reach(costs, scores, 0.71) == math.inf
    faster = ([0, 10, 20], [0.4, 0.7, 0.8])
    # half the reference's gain is 0.55: it needs 12.5 and the faster one 5
    assert inference.relative_cost(faster, (costs, scores), 0.5) == pytest.approx(5 / 12.5)
    assert inference.relative_cost((costs, scores), (costs, scores), 0.75) == pytest.approx(1)
    assert inference.relative_cost((costs, [0.4, 0.4, 0.4]), (costs, scores), 0.25) == math.inf


@pytest.mark.parametrize("num_seeds", [4, 8])
def test_intervals_hold_the_truth_and_nothing_is_rarely_called_something(num_seeds):
    nothing = inference.simulate(num_seeds, effect=0.0)
    assert nothing.coverage >= 0.93 and nothing.false_verdicts <= 0.06
    assert inference.simulate(num_seeds, effect=0.2).coverage >= 0.93


def test_verdicts_that_are_too_bold_would_be_noticed(monkeypatch):
    """The same simulation with normal quantiles in place of Student's finds too many differences."""
    monkeypatch.setattr(inference, "student_quantile", lambda probability, _: 1.96)
    assert inference.simulate(4, effect=0.0).false_verdicts > 0.1


def test_a_claim_is_judged_by_its_interval():
    row = claim_row("a claim", [0.1, 0.12, 0.11])
    assert row == ["a claim", "+0.100, +0.120, +0.110", "+0.110 [+0.085, +0.135]", "supported"]
    assert claim_row("a claim", [0.1, -0.1, 0.11])[3].startswith("inconclusive (could have seen 0.")
