"""Made-up runs that the tests of the tables share."""

import pytest

from benchmark.seed_statistics import SCORE


@pytest.fixture
def make_run():
    """make_run(scores): the record of a run with an evaluation after every second iteration."""

    def make(scores, images=100, seconds=2.0):
        rows = []
        for number, score in enumerate(scores):
            evaluated = {"charts/num_images": 2 * number * images, SCORE: score}
            evaluated |= {"perf/seconds_train": seconds, "perf/seconds_evaluate": 100.0}
            rows.append(evaluated)
            rows.append({"charts/num_images": (2 * number + 1) * images, "perf/seconds_train": seconds})
        return {"metrics": rows[:-1], "command": "python x.py --seed 1"}

    return make
