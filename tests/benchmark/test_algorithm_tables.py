"""Tables of Flow-GRPO, SuperFlow and FDFO, from made-up runs."""

import pytest

from benchmark import algorithm_tables
from benchmark.seed_statistics import SCORE, TAGS


@pytest.fixture
def with_details(make_run):
    """A run with the scores that the headline shows, all of them `scores`."""

    def make(scores, bits):
        run = make_run(scores)
        for row, score in zip(run["metrics"][::2], scores):
            for name in ["_paraphrased"] + [f"/{tag}" for tag in TAGS]:
                row[SCORE + name] = score
        return run | {"diversity": {"before": {"colors": 2.0}, "after": {"colors": bits}}}

    return make


def test_the_headline_compares_with_flow_grpo(with_details):
    runs = {
        "flow_grpo/default": [with_details([0.4, 0.5, 0.6], 1.5)] * 3,
        "superflow/default": [with_details([0.4, 0.4, 0.5], 1.0)] * 3,
        "fdfo/default": [with_details([0.4, 0.6, 0.7], 1.0)] * 3,
    }
    _, _, flow_grpo, superflow, fdfo, _, _, _, superflow_claim, fdfo_claim = algorithm_tables.headline(runs)
    assert flow_grpo == (
        "| Flow-GRPO | 3 | 400 | 0.400, 0.600 | +0.200 [+0.200, +0.200] | 0.600 [0.600, 0.600] | "
        "+0.200 [+0.200, +0.200] | -0.50 [-0.50, -0.50] |"
    )
    assert superflow.startswith("| SuperFlow | 3 | 400 | 0.400, 0.500 |")
    assert superflow_claim.endswith("| does not hold here |") and "not reached [" in superflow_claim
    assert "| 50% [50%, 50%] |" in fdfo_claim and "holds in part" in fdfo_claim
    assert fdfo.endswith("| -1.00 [-1.00, -1.00] |")


def test_learning_rates_show_each_seed(make_run):
    runs = {}
    for script in algorithm_tables.ALGORITHMS:
        for rate in algorithm_tables.LEARNING_RATES:
            runs[f"learning_rates/{script}_{rate}"] = [make_run([0.4, 0.5]), make_run([0.4, 0.7])]
    lines = algorithm_tables.learning_rates(runs)
    assert len(lines) == 6 and lines[2].startswith("| 1.5e-4 | +0.200 (+0.100, +0.300) |")


def test_superflows_parts_are_compared_seed_by_seed(make_run):
    runs = {setting: [make_run([0.4, 0.5])] * 2 for setting in algorithm_tables.SUPERFLOW_PARTS}
    runs["superflow_parts/all"] = [make_run([0.4, 0.8])] * 2
    lines = algorithm_tables.superflow_parts(runs)
    assert lines[2].endswith("| 200 | +0.100 [+0.100, +0.100] |  |")
    assert lines[-1] == "| all four | 200 | +0.400 [+0.400, +0.400] | +0.300 [+0.300, +0.300] |"
