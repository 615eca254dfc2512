"""An iteration against its bare parts."""

import json

import pytest

from benchmark import measure_iteration_overhead
from benchmark.measure_iteration_overhead import BareParts, flow_grpo
from benchmark.records import FIRST_EDITION

SMALL = {"num_inference_steps": 3, "num_prompts_per_iteration": 2, "num_images_per_prompt": 3}
PROMPT = {"prompt": "a circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}


@pytest.mark.parametrize("micro_batch_size, num_batches, batch_size", [(64, 1, 6), (4, 2, 4), (6, 1, 6)])
def test_bare_parts_have_the_shapes_of_the_run(micro_batch_size, num_batches, batch_size):
    bare_parts = BareParts(flow_grpo.Args(micro_batch_size=micro_batch_size, **SMALL))
    assert bare_parts.num_batches == num_batches and len(bare_parts.x_t) == batch_size
    assert bare_parts.decode().shape == (batch_size, 3, 64, 64)
    assert bare_parts.num_trained_steps == 2


def test_few_images_are_measured_and_no_record_is_touched(tmp_path, monkeypatch):
    record = FIRST_EDITION / "speed" / "iteration_overhead.json"
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
