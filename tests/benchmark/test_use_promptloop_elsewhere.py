"""Policies of PromptLoop used elsewhere, with a stand-in for the evaluation."""

import json

import pytest

from benchmark import use_promptloop_elsewhere
from rewards import report


def test_seconds_are_kept_apart_by_how_images_were_sampled(monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "eval/geneval_strict_loop": 0.5}\n')
    clock = iter([0.0, 1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 2.0])
    drawn = []

    def evaluate(name, sample, file, reward, batch_size):
        return sample("prompts", "rows")

    def train(args):
        assert (args.evaluate, args.num_refinements, args.num_iterations) == ("X", 2, 0)
        for name in ("eval", "eval", "eval_loop", "eval_apriori"):
            images = report.evaluate(name, lambda *batch: drawn.append(batch), None, None, 64)
            assert images is None
        return tmp_path

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(use_promptloop_elsewhere.promptloop, "train", train)
    monkeypatch.setattr(use_promptloop_elsewhere.time, "perf_counter", lambda: next(clock))
    scores, seconds = use_promptloop_elsewhere.evaluate("X", num_refinements=2)
    assert scores == {"eval/geneval_strict_loop": 0.5}
    assert seconds == {"plain": 1.0, "loop": 3.0, "apriori": 2.0}
    assert drawn == [("prompts", "rows")] * 4 and report.evaluate is evaluate


def test_all_uses_are_recorded_for_the_trained_and_the_untrained_policy(monkeypatch, tmp_path):
    monkeypatch.setattr(use_promptloop_elsewhere, "newest_run", lambda setting, seed: tmp_path / f"{seed}")
    monkeypatch.setattr(use_promptloop_elsewhere, "evaluate", lambda policy, **flags: ([str(policy)], flags))
    use_promptloop_elsewhere.use_elsewhere([2], tmp_path / "records")
    record = json.loads((tmp_path / "records" / "promptloop_elsewhere" / "seed-2.json").read_text())
    assert len(record["uses"]) == 2 * len(use_promptloop_elsewhere.USES)
    lora = record["uses"]["flow_grpo_untrained"]
    assert lora == {"scores": [""], "seconds": {"flow_lora": str(tmp_path / "2" / "lora")}}
    assert record["uses"]["refinements_5_trained"]["scores"] == [str(tmp_path / "2")]


def test_a_missing_policy_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmark.records.RUNS", use_promptloop_elsewhere.ROOT / "runs" / "nothing")
    with pytest.raises(SystemExit, match="benchmark.run_seeds promptloop/default promptloop.py"):
        use_promptloop_elsewhere.use_elsewhere([1], tmp_path)
