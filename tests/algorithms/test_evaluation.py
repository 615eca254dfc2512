"""How each algorithm file evaluates: from which noises, and what that leaves alone."""

import importlib
import json

import pytest

import rewards
from small_runs import ALGORITHMS, Brightness, metrics

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(params=ALGORITHMS)
def run(request, small, lm_folder, monkeypatch):
    """run(num_iterations=1): folder of a small run of one of the files, rewarded by brightness."""
    monkeypatch.setattr(rewards, "build", lambda *_: Brightness(levels=None))
    module = importlib.import_module(request.param)
    flags = {"lm": lm_folder, "max_new_tokens": 4} if hasattr(module.Args, "lm") else {}
    if request.param == "promptloop":
        flags["num_refinements"] = 2
    if request.param == "promptrl":
        flags["sde_window"] = 2

    def train(**changes):
        return module.train(module.Args(**small(**flags, **changes)))

    return train


def evaluated(run_dir):
    """{(evaluation, number of the noise): rewards of the rows} before any training."""
    rewards_of = {}
    for line in (run_dir / "scores" / "000000.jsonl").read_text().splitlines():
        image = json.loads(line)
        rewards_of.setdefault((image["evaluation"], image["noise"]), []).append(image["reward"])
    return rewards_of


def test_each_evaluation_seed_has_noises_of_its_own(run):
    one = evaluated(run(num_iterations=0))
    again = evaluated(run(num_iterations=0, seed=7))
    other = evaluated(run(num_iterations=0, eval_seed=7))
    both = evaluated(run(num_iterations=0, eval_noises=2))
    assert one == again
    assert one.keys() == other.keys() and len(both) == 2 * len(one)
    for name, _ in one:
        assert len(one[name, 0]) == 3
        assert both[name, 0] == pytest.approx(one[name, 0], abs=1e-4)
        different = (other[name, 0], both[name, 1])
        assert all(abs(a - b) > 1e-4 for values in different for a, b in zip(one[name, 0], values))


def test_the_evaluation_seed_changes_nothing_in_training(run):
    rows = [metrics(run(num_iterations=1, eval_seed=seed))[1] for seed in (0, 7)]
    trained = [{name: row[name] for name in row if not name.startswith(("eval", "pictures"))} for row in rows]
    assert trained[0] == trained[1]
    assert rows[0] != rows[1]


def test_nothing_is_warned_of_that_the_user_did_not_do(run, caplog):
    """A newcomer's first lines are about the run, and not about how a library would like to be called."""
    run(num_iterations=0)
    assert [record.getMessage() for record in caplog.records] == []
