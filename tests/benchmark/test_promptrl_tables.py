"""Tables of PromptRL, from made-up runs."""

import pytest

from benchmark import promptrl_tables
from benchmark.promptrl_tables import ENHANCED
from benchmark.seed_statistics import SCORE


@pytest.fixture
def with_rewrites(make_run):
    """with_rewrites(plain, enhanced): a run with scores of the prompts as they are and with rewrites."""

    def make(plain, enhanced):
        run = make_run(plain)
        for row, better in zip(run["metrics"][::2], enhanced):
            row |= {SCORE + "_paraphrased": 0.4, ENHANCED: better, SCORE + "_paraphrased_enhanced": 0.3}
        return run

    return make


@pytest.fixture
def runs(make_run, with_rewrites):
    flow_only = make_run([0.4, 0.5, 0.6])
    for row in flow_only["metrics"][::2]:
        row[SCORE + "_paraphrased"] = 0.2
    last = (0.4, 0.5, 0.6)
    return {
        "promptrl/flow_only": [flow_only] * 3,
        "promptrl/frozen_lm": [with_rewrites([0.4, 0.5, 0.5], [0.4, 0.7, 0.8])] * 3,
        "promptrl/0_original_prompts": [with_rewrites([0.4, 0.4, 0.4], [0.4, 0.7, 0.8])] * 3,
        "promptrl/4_original_prompts": [with_rewrites([0.4, 0.4, end], [0.4, 0.7, 0.8]) for end in last],
        "promptrl/default": [with_rewrites([0.4, 0.4, 0.5], [0.4, 0.8, 0.9])] * 3,
    }


def test_parts_are_compared_with_the_flow_model_alone(runs):
    _, _, first, _, _, full, _ = promptrl_tables.parts(runs)
    assert "| 0.400, 0.600 [0.600, 0.600] |  | 0.200, 0.200 [0.200, 0.200] |  | 100% [100%, 100%] |" in first
    # 0.6 is half way between 0.4 and 0.8, at 100 of 400 images
    assert "| 0.400, 0.500 [0.500, 0.500] | 0.400, 0.900 [0.900, 0.900] | 0.400, 0.400" in full
    assert full.endswith("| 0.300, 0.300 [0.300, 0.300] | 25% [25%, 25%] | .94 |")


def test_claims_are_judged_by_their_intervals(runs):
    swaps = []
    for untrained in (0.8, 0.7, 0.75):
        scores = {"both": 0.9, "flow": untrained, "other": 0.85, "lm": 0.4}
        swaps.append({title: {ENHANCED: value} for title, value in scores.items()})
    lines = promptrl_tables.claims(runs, swaps)[2:]
    flow_only, frozen, m0, m4, untrained, other, moved = lines
    assert flow_only.endswith("| 25% [25%, 25%] | holds here |")
    # 0.8 is at 200 images of 400
    assert "| 50% [50%, 50%] |" in frozen
    assert "m = 0 |" in m0 and m0.endswith("| +0.100 [+0.100, +0.100] | holds here |")
    assert "m = 4 |" in m4 and "+0.000 [-0.100, +0.100] | not seen here" in m4
    assert untrained.endswith("| -0.150 [-0.200, -0.100] | holds here |")
    assert "| -0.050 [-0.050, -0.050] |" in other
    assert "| +0.000 [+0.000, +0.000] | not seen here" in moved


def test_trials_are_listed_with_their_flags(make_run, with_rewrites):
    trial = with_rewrites([0.4, 0.5], [0.4, 0.7]) | {"commit": "abc", "seed": 4}
    trial["command"] = "python promptrl.py --num-iterations 16 --seed 4"
    trial["metrics"][-1]["losses/lm_entropy"] = 0.25
    flow_only = make_run([0.4, 0.6]) | {"commit": "abc", "seed": 5, "command": "python promptrl.py --seed 5"}
    flow_only["metrics"][-1]["losses/lm_entropy"] = 0.0
    runs = {
        "promptrl_trials/flow_only_window_4": [flow_only],
        "promptrl_trials/lm_learning_rate_1": [trial],
        "promptrl/default": [trial],
    }
    lines = promptrl_tables.trials(runs)
    assert lines[3:] == ["| `--num-iterations 16` | abc | 4 | 200 | 0.500 | 0.700 | 0.250 |"]
    assert lines[2].endswith("| abc | 5 | 200 | 0.600 |  |  |")


def scored(before, after, names):
    """A run with these rewards' scores, with rewrites, before and after."""
    rows = []
    for images, value in ((0, before), (256, after)):
        row = {"charts/num_images": images}
        for name in names:
            row[f"{promptrl_tables.TAG_SCORES[name]}_enhanced"] = value
        rows.append(row)
    return {"metrics": rows}


def test_tags_compare_a_specialist_with_several_at_once():
    names = list(promptrl_tables.TAG_SCORES)
    runs = {f"promptrl_tags/{name}": [scored(0.4, 0.7, names)] * 3 for name in names}
    runs["promptrl_tags/all"] = [scored(0.4, 0.6, names)] * 3
    runs["promptrl_tags/two"] = [scored(0.4, 0.8, ["geneval", "ocr"])] * 3
    geneval, ocr, jpeg = promptrl_tables.tags(runs)[2:]
    alone = "| 0.400, 0.700 [0.700, 0.700] |"
    all_three = "| 0.400, 0.600 [0.600, 0.600] | -0.100 [-0.100, -0.100] |"
    for line in (geneval, ocr):
        assert f"{alone} 0.400, 0.800 [0.800, 0.800] | +0.100 [+0.100, +0.100] {all_three}" in line
    assert f"{alone}  |  {all_three}" in jpeg
    for line in (geneval, ocr, jpeg):
        assert line.endswith("| does not hold here |")
