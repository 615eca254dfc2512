"""Counted memory: against tensors whose sizes are known, a real pass, and what was measured on a GPU."""

import pytest
import torch

from benchmark import count_memory
from benchmark.count_memory import Memory, Setting
from benchmark.gpu import TINY

SETTING = Setting("tiny", TINY, 64, 12)


def test_what_autograd_keeps_is_counted_once():
    x = torch.ones(1000, requires_grad=True)
    y = torch.ones(1000, requires_grad=True)

    def run():
        # The product keeps both; y is kept by both products and counted once; x is a weight.
        return (x * y + 3 * x * y).sum()

    # 3 * x, a new tensor, is kept beside y.
    assert count_memory.saved_bytes(run, [x]) == 4000 + 4000
    assert count_memory.saved_bytes(run, []) == 4000 + 4000 + 4000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_without_content_keeps_what_a_real_one_keeps(checkpointing):
    torch.manual_seed(0)
    transformer = count_memory.build(TINY).to_empty(device="cpu")
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    inputs = count_memory.make_inputs(transformer, SETTING, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            transformer(**inputs)

    weights = [*transformer.parameters(), *transformer.buffers()]
    real = count_memory.saved_bytes(run, weights)
    counted = count_memory.count(SETTING, 3)
    expected = counted.saved_with_checkpointing if checkpointing else counted.saved
    assert expected == pytest.approx(real, rel=0.02)


def test_the_count_is_what_was_measured():
    """docs/gpu.md: 44.0 GB on an H200, and 8.5 with checkpointing, for SD3.5-medium at a batch of 16."""
    memory = count_memory.count(count_memory.SETTINGS[0], 16)
    fixed = memory.weights + memory.lora
    assert (fixed + memory.saved) / 1e9 == pytest.approx(44.0, rel=0.03)
    assert (fixed + memory.saved_with_checkpointing + memory.block) / 1e9 == pytest.approx(8.5, rel=0.03)


def test_the_largest_micro_batch():
    memory = Memory(weights=10e9, lora=1e9, saved=4e9, saved_with_checkpointing=1e9, block=1e9)
    # 24 - 10 - 1 - 0.3 - 2 = 10.7 GB are left, and an image takes 2 GB, or 1 with checkpointing.
    assert count_memory.largest_micro_batch(memory, 2, 512, 24, checkpointing=False) == 5
    assert count_memory.largest_micro_batch(memory, 2, 512, 24, checkpointing=True) == 10
    # At 1024 pixels, decoding takes 3.2 GB per image, more than either.
    assert count_memory.largest_micro_batch(memory, 2, 1024, 24, checkpointing=True) == 3
    assert count_memory.largest_micro_batch(memory, 2, 512, 12, checkpointing=True) == 0


def test_the_page_has_the_table_that_the_script_writes(monkeypatch):
    monkeypatch.setattr(count_memory, "SETTINGS", count_memory.SETTINGS[:1])
    for line in count_memory.lines():
        assert line in count_memory.PAGE.read_text()
