"""The statistics behind docs/results.md, against values worked out by hand."""

import numpy as np
import pytest

from benchmark import seed_statistics
from benchmark.seed_statistics import SCORE


def test_evaluations_are_read_at_their_images_and_seconds_of_training(make_run):
    images, seconds, scores = seed_statistics.evaluations(make_run([0.4, 0.5, 0.7]), SCORE)
    assert images == [0, 200, 400] and scores == [0.4, 0.5, 0.7]
    assert seconds == [2.0, 6.0, 10.0]  # of all the rows so far, the evaluations' own time left out


def test_curves_end_where_the_shortest_run_does(make_run):
    images, seconds, scores = seed_statistics.curves([make_run([0.4, 0.5, 0.7]), make_run([0.4, 0.6])], SCORE)
    assert scores.tolist() == [[0.4, 0.5], [0.4, 0.6]] and images.shape == seconds.shape == (2, 2)
    assert images.tolist() == [[0, 200], [0, 200]] and seconds.tolist() == [[2.0, 6.0], [2.0, 6.0]]


@pytest.mark.parametrize(
    "target, expected", [(0.4, 0.0), (0.45, 50.0), (0.6, 125.0), (0.8, 175.0), (0.81, np.inf), (0.3, 0.0)]
)
def test_cost_to_reach_interpolates_the_first_crossing(target, expected):
    # up, down and up again: 0.6 is first passed between 100 and 150
    images, scores = [0, 100, 150, 175], [0.4, 0.5, 0.7, 0.8]
    assert seed_statistics.cost_to_reach(images, scores, target) == pytest.approx(expected)


def test_cost_to_reach_takes_the_first_of_several_crossings():
    assert seed_statistics.cost_to_reach([0, 10, 20, 30], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(5)


def test_efficiency_of_a_method_that_is_twice_as_fast(make_run):
    slow = [make_run([0.4, 0.5, 0.6, 0.7, 0.8])] * 3
    fast = [make_run([0.4, 0.6, 0.8, 0.9, 0.9])] * 3
    never = [make_run([0.4, 0.5, 0.6, 0.7, 0.7])] * 3
    assert seed_statistics.efficiency(fast, slow) == pytest.approx((0.5, 0.5, 0.5))
    assert seed_statistics.efficiency(slow, slow) == pytest.approx((1.0, 1.0, 1.0))
    assert seed_statistics.efficiency(never, slow) == (np.inf,) * 3


def test_efficiency_has_an_interval_that_may_end_at_never(make_run):
    slow = [make_run([0.4, 0.5, 0.6])] * 2
    runs = [make_run([0.4, 0.8, 0.8]), make_run([0.4, 0.45, 0.5])]
    estimate, low, high = seed_statistics.efficiency(runs, slow)
    # means 0.4, 0.625, 0.65: at 0.6 after 8/9 of 200 of 400 images; resampled, half of that or never
    assert estimate == pytest.approx(4 / 9) and low == pytest.approx(0.25) and high == np.inf


def test_interval_of_a_mean_over_seeds():
    low, high = seed_statistics.interval(np.array([[0.0, 5.0], [1.0, 5.0]]))
    assert low.tolist() == [0.0, 5.0] and high.tolist() == [1.0, 5.0]
    spread = seed_statistics.interval(np.linspace(-1, 1, 101))
    # of 101 values with a deviation of 0.583 the mean is within +-1.96 * 0.058
    assert spread == pytest.approx((-0.114, 0.114), abs=0.015)


@pytest.mark.parametrize(
    "values, expected",
    [(range(12), 5.5), ([0, 1, 5, 9], 3.0), ([1, 2, 9], (0.25 + 2 + 2.25) / 1.5), ([4], 4)],
)
def test_interquartile_mean(values, expected):
    assert seed_statistics.interquartile_mean(np.array(values, float)) == pytest.approx(expected)


def test_interquartile_mean_ignores_an_outlier():
    assert seed_statistics.interquartile_mean(np.array([0, 1, 1, 1, 1, 1, 1, 1e9])) == 1


def test_first_and_last_values(make_run):
    runs = [make_run([0.4, 0.9, 0.5]), make_run([0.4, 0.1, 0.7])]
    assert seed_statistics.last(runs, SCORE).tolist() == [0.5, 0.7]
    assert seed_statistics.change(runs, SCORE) == pytest.approx([0.1, 0.3])
    assert seed_statistics.num_images(runs, SCORE) == 400
