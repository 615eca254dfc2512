"""benchmark/gpu.py: on tiny sizes and the CPU, and the page that it writes."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

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


def test_a_pipeline_of_random_weights_loads_and_the_parts_are_timed(tmp_path):
    torch.manual_seed(0)
    device = torch.device("cpu")
    gpu.make_pipeline("tiny", tmp_path / "pipeline", device)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.transformer.config.num_layers == 2 and pipe.text_encoder_3 is not None
    words = ["parts", "--size", "tiny", "--micro-batch-sizes", "1", "2", "--ways", "plain", "checkpointing"]
    records = list(gpu.time_parts(gpu.parse_args(words + ["--commit", "x"]), tmp_path, device))
    assert [(record["way"], record["micro_batch_size"]) for record in records] == [
        ("plain", 1),
        ("plain", 2),
        ("checkpointing", 1),
        ("checkpointing", 2),
    ]
    assert all(record["forward_s"] > 0 and record["mfu_both"] > 0 for record in records)


def test_a_file_is_run_and_its_metrics_are_read(tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    flags = "--lora-rank 2 --num-prompts-per-iteration 2 --num-images-per-prompt 2 --num-inference-steps 4"
    words = ["run", "flow_grpo.py", "--size", "tiny", "--commit", "x", "--output", str(output), "--"]
    gpu.main(words + flags.split())
    record = json.loads(output.read_text())
    assert record["ratio_first"] == 0 and record["images_per_second"] > 0
    assert record["flags"] == flags and record["commit"] == "x"
    # MFU is the counted work over the time that it took
    forward, backward = gpu.count_flops("tiny", 64, 77 + 128)
    work = 4 * 2 * (forward + backward)  # images, trained steps
    assert record["mfu_train"] == pytest.approx(work / record["seconds_train"] / 989e12)
    assert "mfu_train" in capsys.readouterr().out
