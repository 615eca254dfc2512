"""Trained parts of PromptRL put together anew, with a stand-in for the training."""

import json
from pathlib import Path

import pytest

from benchmark import swap_promptrl_models
from benchmark.swap_promptrl_models import evaluate


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("trained")
    metrics = {"iteration": 0, "eval/geneval_strict": 0.5, "eval/reward": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return folder


def test_a_swap_puts_the_trained_transformer_into_a_whole_pipeline(monkeypatch, run_dir):
    seen = {}

    def train(args):
        model = Path(args.model)
        seen[args.lm] = (model / "transformer" / "config.json").read_text(), (model / "vae").is_dir()
        assert args.num_iterations == 0
        return run_dir

    monkeypatch.setattr(swap_promptrl_models.promptrl, "train", train)
    assert evaluate(run_dir, run_dir) == evaluate(None, None) == {"eval/geneval_strict": 0.5}
    assert seen[str(run_dir / "lm")] == ("trained", True)
    assert seen["tiny/vlm"][0] != "trained" and seen["tiny/vlm"][1]


def test_the_other_rewriter_is_that_of_the_next_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(swap_promptrl_models, "newest_run", lambda setting, seed: (setting, seed))
    monkeypatch.setattr(swap_promptrl_models, "evaluate", lambda flow, lm: [flow, lm])
    swap_promptrl_models.swap([1, 2, 3], tmp_path)
    record = json.loads((tmp_path / "promptrl_swapped_models" / "seed-3.json").read_text())
    assert record["swaps"]["other"] == [["promptrl/default", 3], ["promptrl/default", 1]]
    assert record["swaps"]["lm"] == [None, ["promptrl/default", 3]]
    assert record["swaps"]["flow_only"] == [["promptrl/flow_only", 3], None]


def test_missing_runs_are_asked_for_before_anything_is_evaluated(monkeypatch, tmp_path):
    monkeypatch.setattr(swap_promptrl_models, "evaluate", None)
    monkeypatch.setattr("benchmark.records.RUNS", swap_promptrl_models.ROOT / "runs" / "nothing")
    with pytest.raises(SystemExit, match="benchmark.run_seeds promptrl/flow_only promptrl.py"):
        swap_promptrl_models.swap([1], tmp_path)
    assert not list(tmp_path.iterdir())
