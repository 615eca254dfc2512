"""The pictures of docs/results.md: what is drawn, from records made up here and from the real ones."""

import numpy as np
import pytest

from benchmark import draw_results, write_tables
from rewards.geneval.detection import TAGS


def test_the_running_mean_has_whole_stretches_only():
    np.testing.assert_allclose(draw_results.running_mean(np.array([1.0, 2, 6, 7]), 3), [3, 5])


def test_a_curve_adds_up_the_seconds_and_leaves_the_evaluation_before_training_out():
    part = {"perf/seconds_sample": 2.0, "perf/seconds_reward": 0.5, "perf/seconds_train": 1.0}
    rows = [{"iteration": 0, "eval/reward": 0.5}]
    for iteration in (1, 2):
        row = {"iteration": iteration, "charts/num_images": 8 * iteration}
        rows.append(row | {"rewards/geneval_strict": 0.1 * iteration, "perf/seconds_evaluate": 9.0} | part)
    images, seconds, scores = draw_results.training_curve({"metrics": rows})
    assert images.tolist() == [8, 16]
    assert seconds.tolist() == [3.5, 7.0]
    assert scores.tolist() == pytest.approx([0.1, 0.2])


def test_a_point_per_seed_stands_at_its_score():
    runs = write_tables.read_test_runs("default")
    axes = draw_results.draw_tags(runs).axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(points) == len(TAGS) * len(runs)
    first = runs["flow_grpo"]
    expected = [record["metrics"][-1][f"eval/geneval_strict/{TAGS[0]}"] for record in first]
    assert list(points[0].get_ydata()) == expected
    assert len(draw_results.draw_learning(runs).axes[0].lines) == sum(map(len, runs.values()))
