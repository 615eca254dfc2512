"""benchmark/gpu.py: on tiny sizes and the CPU, and the page that it writes."""

import json

import pytest
import torch

from benchmark import gpu


def test_the_page_has_the_tables_of_the_records():
    page = (gpu.ROOT / "docs" / "gpu.md").read_text()
    assert gpu.write_tables(page) == page
    assert gpu.write_tables(page.replace("NVIDIA", "AMD")) == page  # what stands between markers is made anew


def test_flops_grow_as_those_of_layers_and_attention():
    # With four times the image's tokens, layers take four times the FLOPs and attention sixteen times.
    small, _ = gpu.count_flops("tiny", 64, tokens=1)
    large, _ = gpu.count_flops("tiny", 128, tokens=1)
    assert 3.6 * small < large < 16 * small
    # Gradients flow to inputs of all blocks, but only the LoRA's weights have gradients of their own.
    forward, backward = gpu.count_flops("tiny", 64, tokens=8)
    assert 0.8 * forward < backward < 2 * forward


@pytest.mark.parametrize("size", ["tiny", "tiny-flux"])
def test_the_parts_are_timed(size):
    words = ["parts", "--size", size, "--micro-batch-sizes", "1", "2", "--ways", "plain", "checkpointing"]
    records = list(gpu.time_parts(gpu.parse_args(words + ["--commit", "x"]), torch.device("cpu")))
    assert [(record["way"], record["micro_batch_size"]) for record in records] == [
        ("plain", 1),
        ("plain", 2),
        ("checkpointing", 1),
        ("checkpointing", 2),
    ]
    assert all(record["forward_s"] > 0 and record["mfu_both"] > 0 for record in records)


FLAGS_OF_FILES = {
    "flow_grpo.py": "--lora-rank 2 --kl-coef 0.1",
    "superflow.py": "--lora-rank 2 --pool 1 --num-bins 1 --start-images 1",
    "fdfo.py": "--lora-rank 2",
    "promptrl.py": "--lm-lora-rank 2 --lora-rank 2 --num-original-prompts 1 --sde-window 2",
    "promptloop.py": "--lm-lora-rank 2 --num-refinements 2",
}


@pytest.mark.parametrize(
    "script, size", [(script, "tiny") for script in FLAGS_OF_FILES] + [("flow_grpo.py", "tiny-flux")]
)
def test_a_file_is_run_and_its_metrics_are_read(script, size, tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    flags = (
        "--num-prompts-per-iteration 2 --num-images-per-prompt 2 --num-inference-steps 4 --guidance-scale 2 "
    )
    flags += FLAGS_OF_FILES[script]
    words = ["run", script, "--size", size, "--num-iterations", "2", "--commit", "x"]
    gpu.main(words + ["--output", str(output), "--"] + flags.split())
    record = json.loads(output.read_text())
    assert record["images_per_second"] > 0
    assert record["flags"] == flags and record["commit"] == "x"
    if script == "promptloop.py":
        assert "mfu_train" not in record  # its image model is not trained
        return
    assert record["ratio_first"] == 0
    # MFU is the counted work over the time that it took
    forward, backward = gpu.count_flops(size, 64, gpu.num_text_tokens(size))
    trained_steps = {"flow_grpo.py": 2, "superflow.py": 2, "fdfo.py": 4, "promptrl.py": 2}[script]
    passes = {"tiny": 2, "tiny-flux": 1}[size]  # guidance is an input of FLUX.1
    work = forward + backward
    if script in ("flow_grpo.py", "fdfo.py"):
        work += forward  # of the base model, for the KL penalty
    work *= 4 * trained_steps * passes
    assert record["mfu_train"] == pytest.approx(work / record["seconds_train"] / 989e12)
    assert "mfu_train" in capsys.readouterr().out
