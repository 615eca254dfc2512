"""Means of scores: of an evaluation and of a rollout."""

import pytest
import torch

import flow_grpo
from rewards import report

NAN = float("nan")


@pytest.mark.parametrize("values, expected", [([1, 2, NAN, 6], 3), ([NAN], NAN), ([], NAN), ([0], 0)])
def test_mean_leaves_nan_out(values, expected):
    assert report.mean(values) == pytest.approx(expected, nan_ok=True)


def test_summarise_gives_means_over_all_and_per_tag():
    metadata = [{"tag": "colors"}, {"tag": "position"}, {"tag": "colors"}, {}, {"tag": "counting"}]
    scores = {
        "reward": {0: 1.0, 1: 0.5, 2: NAN, 3: 0.0, 4: NAN},
        "jpeg": {2: -4.0, 0: -2.0, 1: -1.0, 3: 0.0, 4: NAN},
    }
    expected = {
        "eval/reward": 0.5,
        "eval/reward/colors": 1.0,
        "eval/reward/position": 0.5,
        "eval/reward/counting": NAN,
        "eval/jpeg": -7 / 4,
        "eval/jpeg/colors": -3.0,
        "eval/jpeg/position": -1.0,
        "eval/jpeg/counting": NAN,
    }
    assert report.summarise(scores, metadata, "") == pytest.approx(expected, nan_ok=True)


def test_summarise_leaves_out_what_another_reward_judged():
    metadata = [{"tag": "colors"}, {"tag": "text"}, {"tag": "text"}, {"tag": "colors"}, {"tag": "text"}]
    scores = {
        "reward": {0: 1.0, 1: -4.0, 2: NAN, 3: 0.0, 4: -2.0},
        "geneval": {0: 1.0, 1: NAN, 2: NAN, 3: 0.0, 4: NAN},
        "jpeg": {0: NAN, 1: -4.0, 2: NAN, 3: NAN, 4: -2.0},
        "ocr": {0: NAN, 1: NAN, 3: NAN, 4: NAN},
    }
    means = report.summarise(scores, metadata, "")
    expected = {"eval/geneval": 0.5, "eval/geneval/colors": 0.5, "eval/geneval/text": NAN}
    expected |= {"eval/jpeg": -3.0, "eval/jpeg/text": -3.0}
    expected |= {"eval/reward": -5 / 4, "eval/reward/colors": 0.5, "eval/reward/text": -3.0}
    assert means == pytest.approx(expected, nan_ok=True)


def test_reward_metrics_are_means_over_the_rows_a_reward_judged():
    scores = {
        "reward": torch.tensor([1.0, 3, -8, -4, 5, 5, 5, 5, 0, 2, 4, NAN]),
        "geneval": torch.tensor([1.0, 3] + 6 * [NAN] + [0, 2, 4, NAN]),
        "jpeg": torch.tensor([NAN, NAN, -8, -4] + 8 * [NAN]),
        "ocr": torch.full((12,), NAN),
    }
    row = report.reward_metrics(scores, [2] * 6)
    assert row["rewards/geneval"] == 2 and row["rewards/jpeg"] == -6 and "rewards/ocr" not in row
    assert row["charts/nan_fraction"] == pytest.approx(1 / 12)
    assert row["charts/reward_mean"] == pytest.approx(18 / 11)
    assert row["charts/zero_std_fraction"] == pytest.approx(3 / 6)


def test_the_runs_folder_is_named_after_the_first_reward(tmp_path):
    args = flow_grpo.Args(rewards="clipscore@org/name:0.5,jpeg", output_dir=str(tmp_path), seed=7)
    run_dir = report.open_run(args, "flow_grpo.py")[1]
    assert run_dir.parent == tmp_path and run_dir.name.startswith("flow_grpo-clipscore-7-")


def test_summarise_puts_the_suffix_before_the_tag():
    means = report.summarise({"reward": {0: 0.25}}, [{"tag": "colors"}], "_paraphrased")
    assert means == {"eval/reward_paraphrased": 0.25, "eval/reward_paraphrased/colors": 0.25}
