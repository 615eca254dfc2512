"""Tables of PromptLoop, from made-up runs."""

import pytest

from benchmark import promptloop_tables
from benchmark.promptloop_tables import APRIORI, LOOP
from benchmark.seed_statistics import SCORE


def ends_at(score):
    """A run whose score in the loop rises, or falls, from 0.3 to this."""
    before = {"charts/num_images": 0, SCORE: 0.4, LOOP: 0.3, APRIORI: 0.2}
    after = {"charts/num_images": 512, LOOP: score, APRIORI: score - 0.1}
    return {"metrics": [before, after]}


@pytest.fixture
def runs():
    return {
        "promptloop/one_refinement": [ends_at(0.5)] * 3,
        "promptloop/no_previews": [ends_at(0.5)] * 3,
        "promptloop/shuffled_previews": [ends_at(0.7)] * 3,
        "promptloop/default": [ends_at(0.6)] * 3,
    }


def test_parts_are_judged_by_the_difference_of_their_runs(runs):
    lines = promptloop_tables.parts(runs)
    assert lines[2] == "| the image model alone |  | 0.400 |  | .082 |"
    assert lines[3] == "| 5 refinements by the untrained policy |  | 0.300 | 0.200 | -.232 |"
    assert "| 512 | 0.600 [0.600, 0.600] | 0.500 [0.500, 0.500] | .632 |" in lines[7]
    harms, trained, once, training, several, helps, content, all_of_it = lines[-8:]
    assert harms.endswith("| -0.313 | -0.100 | holds here |")
    assert "| +0.200 [" in trained and "| +0.100 [" in once and "| +0.300 [" in training
    assert "| +0.000 [+0.000, +0.000] | not seen here" in several
    assert helps.endswith("| +0.141 | +0.100 [+0.100, +0.100] | holds here |")
    assert "| -0.100 [-0.100, -0.100] | does not hold here" in content
    assert "| +0.198 | +0.100 [" in all_of_it


def test_trials_are_listed_with_their_flags(runs):
    trial = ends_at(0.6) | {"seed": 4, "commit": "abc"}
    trial["metrics"][-1]["losses/lm_entropy"] = 0.25
    trial["command"] = "python promptloop.py --lm-learning-rate 1 --seed 4"
    plain = trial | {"seed": 5, "command": "python promptloop.py --seed 5"}
    trials = {
        "promptloop_trials/prompts_16": [plain],
        "promptloop_trials/try": [trial],
        "promptloop/default": [trial],
    }
    assert promptloop_tables.trials(trials)[2:] == [
        "|  | abc | 5 | 512 | 0.600 | 0.500 | 0.250 |",
        "| `--lm-learning-rate 1` | abc | 4 | 512 | 0.600 | 0.500 | 0.250 |",
    ]


def use(before, after, factor=1.0):
    """Scores and seconds of one use of a policy."""
    scores = {SCORE: before, LOOP: after, APRIORI: before}
    return {"scores": scores, "seconds": {"plain": 2.0, "loop": 2.0 * factor}}


def test_other_uses_are_measured_by_what_they_keep_of_the_gain(runs):
    titles = {f"refinements_{count}": use(0.4, 0.5, 1 + count / 10) for count in (1, 2, 3, 5)}
    titles |= {"second_model": use(0.2, 0.3), "flow_grpo": use(0.5, 0.6)}
    record = {}
    for title, value in titles.items():
        record[f"{title}_trained"] = value
        record[f"{title}_untrained"] = value
    record["second_model_untrained"] = use(0.2, 0.25)
    lines = promptloop_tables.uses(runs, [record] * 3)
    assert lines[2].startswith("| 1 | 0.500") and lines[2].endswith("| 1.10 [1.10, 1.10] | 1.05 |")
    # in training the gain was 0.6 - 0.4: half of it is kept
    assert "| 0.400, 0.600 [0.600, 0.600] | -0.100 | +0.200" in lines[9]
    assert "| 0.200, 0.300 [0.300, 0.300] | +0.050 | +0.100 [+0.100, +0.100] | 50% [50%, 50%] |" in lines[10]
    assert lines[11].endswith("| 50% [50%, 50%] | 69 to 80% |")
    more, time, unseen, kept = lines[-4:]
    assert more.endswith("| rises | +0.000 [+0.000, +0.000] | not seen here: the interval has zero in it |")
    assert time.endswith("| 1.23 | 1.50 [1.50, 1.50] | does not hold here |")
    assert unseen.endswith("| +0.100 [+0.100, +0.100] | holds here |")
    assert kept.endswith("| 69 to 80% | 50% [50%, 50%] | does not hold here |")
