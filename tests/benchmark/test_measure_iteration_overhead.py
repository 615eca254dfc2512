"""An iteration against its bare parts."""

import json

from benchmark import measure_iteration_overhead
from benchmark.records import RESULTS

PROMPT = {"prompt": "a circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}


def test_few_images_are_measured_and_no_record_is_touched(tmp_path, monkeypatch):
    record = RESULTS / "speed" / "iteration_overhead.json"
    before = record.read_bytes()
    monkeypatch.setattr(measure_iteration_overhead, "ITERATIONS", 4)
    monkeypatch.setattr(measure_iteration_overhead, "RUNS", tmp_path / "runs")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(PROMPT) + "\n")
    flags = ["--num-prompts-per-iteration", "2", "--num-images-per-prompt", "2"]
    flags += ["--num-inference-steps", "3", "--eval-prompts", str(prompts)]
    measure_iteration_overhead.main(flags)
    assert record.read_bytes() == before
    measured = json.loads((tmp_path / "runs" / "iteration_overhead.json").read_text())
    assert measured["command"].endswith(" ".join(flags))
    assert measured["iterations"] == 1  # of 4, two warm up, and the last one ends in an evaluation
    assert measured["phases"].keys() == {"sample", "reward", "train"}
    assert measured["parts"].keys() == {"forward", "decode", "reward", "forward and backward"}
    assert all(seconds > 0 for seconds in measured["parts"].values()) and measured["ratio"] > 0
