"""Published weights: found, loaded with none missing or left, or refused in one line."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import CLIPModel

import flow_grpo
import rewards
from rewards import BadInput, command_line, weights

ROOT = Path(__file__).resolve().parents[2]


def make_unloadable(metadata, device, model="nobody/has-this"):
    return weights.from_hub(CLIPModel.from_pretrained, model)


@pytest.mark.parametrize(
    "spec, named",
    [("unloadable", "nobody/has-this"), ("jpeg,clipscore@nobody/has-that:0.5", "nobody/has-that")],
)
def test_missing_weights_end_a_run_before_it_starts(tmp_path, monkeypatch, capsys, spec, named):
    monkeypatch.setitem(rewards.REGISTRY, "unloadable", f"{__name__}:make_unloadable")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(flow_grpo, "load_model", lambda *_: pytest.fail("the pipeline was loaded"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command_line.execute(flow_grpo.train, flow_grpo.Args(rewards=spec, output_dir=str(tmp_path / "runs")))
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line


def test_a_file_of_weights_cannot_run_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    torch.save({"weight": Code()}, tmp_path / "weights.pt")
    with pytest.raises(BadInput, match="weights.pt is no file of weights"):
        weights.read_state(tmp_path / "weights.pt")
    assert not (tmp_path / "it ran").exists()
