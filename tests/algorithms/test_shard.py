"""--shard: the weights are split among processes, and nothing else changes."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration

import fdfo
import flow_grpo
import promptloop
import promptrl
import superflow
from rewards import BadInput
from small_runs import metrics, saved

FLAGS = {  # what a run of a file needs beside --lora-rank
    "flow_grpo": {"kl_coef": 0.1, "gradient_checkpointing": True},
    "superflow": {"start_images": 1, "model": "tiny/flux"},
    "fdfo": {},
    "promptrl": {"sde_window": 2, "lm_lora_rank": 2, "lm_kl_coef": 0.1},
}
MODULES = {"flow_grpo": flow_grpo, "superflow": superflow, "fdfo": fdfo, "promptrl": promptrl}


def learning_flags(small, name, **changes):
    """Flags of a run whose images differ in their reward, and whose eval rows do not divide by two."""
    flags = small(num_iterations=1, num_prompts_per_iteration=8, lora_rank=2, save_every=1)
    return flags | {"rewards": "small_runs:brightness"} | FLAGS[name] | changes


@pytest.mark.parametrize("name", FLAGS)
def test_a_sharded_run_equals_one_that_is_not(small, start_processes, tmp_path, name):
    runs = []
    for shard in (False, True):
        flags = learning_flags(small, name, shard=shard, output_dir=str(tmp_path / str(shard)))
        runs.append(start_processes(MODULES[name], flags)())
    plain, sharded = runs
    assert metrics(sharded) == metrics(plain)
    states = [flow_grpo.report.read_checkpoint(run) for run in runs]
    weights = [state.get("weights", state.get("transformer")) for state in states]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    "name, model",
    [
        ("flow_grpo", "tiny/sd3"),
        ("flow_grpo", "tiny/flux"),
        ("fdfo", "tiny/sd3"),
        ("promptrl", "tiny/sd3"),
    ],
)
def test_so_does_one_that_trains_all_weights(small, start_processes, tmp_path, name, model):
    """Gradients are added in another order, so the numbers may differ in their last digits."""
    runs = []
    for shard in (False, True):
        changes = {"model": model, "lora_rank": 0, "kl_coef": 0.1, "output_dir": str(tmp_path / str(shard))}
        if name == "promptrl":
            changes["lm_lora_rank"] = 0
        runs.append(start_processes(MODULES[name], learning_flags(small, name, shard=shard, **changes))())
    for plain, sharded in zip(metrics(runs[0]), metrics(runs[1]), strict=True):
        assert sharded == pytest.approx(plain, abs=1e-6)

    configs = [json.loads((run / "transformer" / "config.json").read_text()) for run in runs]
    assert configs[0] == configs[1]
    plain, sharded = [AutoModel.from_pretrained(str(run / "transformer")) for run in runs]
    for key, weights in plain.state_dict().items():
        assert torch.allclose(sharded.state_dict()[key], weights, atol=1e-6), key
    if name == "promptrl":
        plain, sharded = [Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "lm") for run in runs]
        for key, weights in plain.state_dict().items():
            assert torch.allclose(sharded.state_dict()[key], weights, atol=1e-6), key


def refined_steps(groups, seed, iteration):
    """The steps before which any of these groups is refined, of 4 with 2 refinements."""
    return set().union(*[promptloop.draw_schedule(group, 2, 4, seed, iteration) for group in groups])


@pytest.mark.parametrize("rank", [2, 0])
def test_so_does_promptloop_where_one_process_refines_before_more_steps(
    small, start_processes, tmp_path, rank
):
    """Pictures are seen before the later steps alone, so processes also differ in who sees any."""
    flags = {"seed": 16, "num_prompts_per_iteration": 4, "num_refinements": 2, "lm_lora_rank": rank}
    flags |= {"lm_kl_coef": 0.1, "rewards": "small_runs:brightness", "save_every": 1}
    assert [len(refined_steps(groups, 16, 1)) for groups in ((0, 1), (2, 3))] == [4, 2]
    runs = []
    for shard in (False, True):
        own = small(shard=shard, output_dir=str(tmp_path / str(shard)), **flags)
        runs.append(start_processes(promptloop, own)())
    plain, sharded = map(metrics, runs)
    states = [flow_grpo.report.read_checkpoint(run)["lm"] for run in runs]
    assert states[0].keys() == states[1].keys()
    if rank > 0:
        assert sharded == plain
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        return
    for plain_row, sharded_row in zip(plain, sharded, strict=True):
        assert sharded_row == pytest.approx(plain_row, abs=1e-6)
    for key, weights in states[0].items():  # Adam divides by gradients, of which some are nearly 0
        assert torch.allclose(states[1][key], weights, atol=3e-6), key
    Qwen2_5_VLForConditionalGeneration.from_pretrained(runs[1] / "lm")


def test_superflow_is_refused_where_a_process_would_have_fewer_passes(monkeypatch):
    """With a micro-batch of one image, a group of 8 takes 8 passes, and the smallest group has 5 images."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {"shard": True, "lora_rank": 4, "num_images_per_prompt": 8, "num_bins": 4}
    superflow.check_args(superflow.Args(micro_batch_size=2, **flags))
    with pytest.raises(BadInput, match="--shard needs as many micro-batches in all processes"):
        superflow.check_args(superflow.Args(micro_batch_size=1, **flags))


def check_shares():
    """In each process: all weights of each model are shared out, block by block, and a LoRA is whole."""
    for module in (flow_grpo, promptrl):
        monitor_shard(module)


def monitor_shard(module):
    """Checks what the function `shard` of an algorithm file leaves behind."""
    original = module.shard

    def shard(model, device):
        original(model, device)
        sharded = [own for own in model.modules() if isinstance(own, FSDPModule)]
        assert len(sharded) == 1 + sum(module.is_block(model, own) for own in model.modules()) > 3
        own = total = 0
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) != (".lora_" in name), name
            if isinstance(parameter, DTensor):
                own += parameter.to_local().numel()
                total += parameter.numel()
        assert own <= 1.02 * total / dist.get_world_size(), (own, total)

    module.shard = shard


@pytest.mark.parametrize(
    "name, count, changes",
    [
        ("flow_grpo", 2, {"lora_rank": 2}),
        ("flow_grpo", 4, {"lora_rank": 2}),
        ("flow_grpo", 2, {"lora_rank": 0}),
        ("flow_grpo", 4, {"lora_rank": 0}),
        ("promptrl", 2, {"lm_lora_rank": 0, "dtype": "bfloat16"}),
    ],
)
def test_each_process_holds_its_share(small, start_processes, name, count, changes):
    flags = learning_flags(small, name, shard=True, **changes)
    start_processes(MODULES[name], flags, count=count, prepare=check_shares)()


def end_after_an_iteration():
    """In each process: the run ends as soon as its first iteration has been saved."""
    original = flow_grpo.save_checkpoint

    def save_checkpoint(run_dir, pipe, optimizer, progress):
        original(run_dir, pipe, optimizer, progress)
        if progress["iteration"] == 1:
            sys.exit(0)

    flow_grpo.save_checkpoint = save_checkpoint


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_sharded_run_resumes_with_another_number_of_processes(small, start_processes, tmp_path, lora_rank):
    """It gets to where a run gets that was never interrupted."""
    flags = learning_flags(small, "flow_grpo", shard=True, lora_rank=lora_rank, num_iterations=2)
    whole = start_processes(flow_grpo, flags | {"output_dir": str(tmp_path / "whole")})()

    run_dir = start_processes(flow_grpo, flags, prepare=end_after_an_iteration)()
    assert len(metrics(run_dir)) == 2
    start_processes(flow_grpo, {"resume": str(run_dir)}, count=4)()
    for expected, found in zip(metrics(whole), metrics(run_dir), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    expected, found = saved(whole), saved(run_dir)
    for name, weights in expected["weights"].items():
        assert torch.allclose(found["weights"][name], weights, atol=1e-6), name
    for number, state in expected["optimizer"]["state"].items():
        for name, values in state.items():
            assert torch.allclose(found["optimizer"]["state"][number][name], values, atol=1e-6), name
    assert (run_dir / ("lora" if lora_rank else "transformer")).is_dir()


@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=str)
def test_what_cannot_be_sharded_is_refused(small, monkeypatch, changes):
    if changes:
        monkeypatch.setenv("WORLD_SIZE", "2")
    for module in MODULES.values():
        with pytest.raises(BadInput, match="--shard needs several processes"):
            module.check_args(module.Args(shard=True, **{"lora_rank": 4} | changes))
