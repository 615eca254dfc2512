"""The comparison of runs, from made-up folders."""

import json

import pytest
from PIL import Image

from benchmark import compare_runs


@pytest.fixture
def make_folder(tmp_path):
    def make(name, **scores):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = []
        for number in range(3):
            row = {
                "charts/num_images": 100 * number,
                "perf/seconds_train": 60.0,
                "perf/seconds_evaluate": 30.0,
            }
            rows.append(row | {f"eval/{key}": values[number] for key, values in scores.items()})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return make


def test_runs_are_listed_with_the_best_first(make_folder):
    plain = make_folder("plain", reward=(0.5, 0.6, 0.7))
    rewritten = make_folder("rewritten", reward=(0.5, 0.5, 0.5), reward_enhanced=(0.4, 0.7, 0.9))
    curves = compare_runs.compare([plain, rewritten], "reward")
    assert curves["plain"] == ("eval/reward", [0, 100, 200], [1, 2, 3], [0.5, 0.6, 0.7])
    assert compare_runs.comparison_table(curves)[2:] == [
        "| rewritten | eval/reward_enhanced | 0.400 | 0.900 | +0.500 | 200 | 3.0 |",
        "| plain | eval/reward | 0.500 | 0.700 | +0.200 | 200 | 3.0 |",
    ]


def test_an_evaluation_without_a_score_is_left_out_and_its_time_is_not(make_folder):
    curves = compare_runs.compare([make_folder("a", reward=(0.5, None, 0.7))], "reward")
    assert curves["a"][1:] == ([0, 200], [1, 3], [0.5, 0.7])


def test_runs_of_the_same_name_keep_their_folders(make_folder):
    first, second = make_folder("x/run", reward=(0, 0, 1)), make_folder("y/run", reward=(0, 0, 1))
    assert list(compare_runs.compare([first, second], "reward")) == [first, second]


def test_the_picture_has_both_runs(make_folder, tmp_path):
    curves = compare_runs.compare([make_folder("a", reward=(0, 0.5, 1))], "reward")
    compare_runs.save_curves(tmp_path / "one.png", curves, "reward")
    curves |= compare_runs.compare([make_folder("b", reward=(1, 0.5, 0))], "reward")
    compare_runs.save_curves(tmp_path / "two.png", curves, "reward")
    one, two = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "two.png")
    assert len(two.convert("RGB").getcolors(10**6)) > len(one.convert("RGB").getcolors(10**6))


def test_what_is_no_run_is_named(make_folder, tmp_path):
    with pytest.raises(SystemExit, match="nothing is no run: it has no metrics.jsonl"):
        compare_runs.compare([str(tmp_path / "nothing")], "reward")
    with pytest.raises(SystemExit, match="b has no evaluation whose eval/reward is a number"):
        compare_runs.compare([make_folder("b", reward=(None, None, None))], "reward")
    with pytest.raises(SystemExit, match="a has no score 'ocr', but eval/reward"):
        compare_runs.compare([make_folder("a", reward=(0, 0, 1))], "ocr")
