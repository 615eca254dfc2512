"""tiny/pretrain_image_model.py: stages that resume exactly, and pipelines that load as they are."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tiny import pretrain_image_model, splits
from tiny.image_model import NO_T5
from tiny.pretraining import parse_options

TINY = splits.PROMPTS.parent


def pretrain_vae(folder, steps):
    flags = ["--steps", "3", "--save-every", "1", "--threads", "1"]
    flags += ["--work", str(folder / "work"), "--folder", str(folder)]
    args = parse_options("", ["vae"], ["sd3"], ["vae"] + flags)
    if steps < 3:
        fit = pretrain_image_model.fit

        def cut_off(name, modules, loss_at, args, num_steps, **options):
            def loss_until(step):
                if step == steps:
                    raise KeyboardInterrupt
                return loss_at(step)

            return fit(name, modules, loss_until, args, num_steps, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain_image_model, "fit", cut_off)
            pretrain_image_model.pretrain_vae(args)
        return None
    pretrain_image_model.pretrain_vae(args)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_stage_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    whole = pretrain_vae(tmp_path / "whole", steps=3)
    pretrain_vae(tmp_path / "parts", steps=2)
    assert pretrain_vae(tmp_path / "parts", steps=3) == whole


def test_the_flow_model_asks_for_the_autoencoder(tmp_path):
    flags = ["flow", "--folder", str(tmp_path), "--work", str(tmp_path / "work")]
    args = parse_options("", ["flow"], ["sd3"], flags)
    with pytest.raises(SystemExit, match="run the stage `vae` first"):
        pretrain_image_model.pretrain_flow(args)


def distill(tmp_path, monkeypatch, steps=2):
    """(the pipeline before, the pipeline after) some steps of distillation of a copy of tiny/sd3."""
    folder = tmp_path / "sd3"
    shutil.copytree(TINY / "sd3", folder)
    flags = ["distill", "--steps", str(steps), "--dataset-size", "64", "--batch-size", "4"]
    flags += ["--threads", "1", "--folder", str(folder), "--work", str(tmp_path / "work")]
    pretrain_image_model.distill(parse_options("", ["distill"], ["sd3"], flags))
    load = StableDiffusion3Pipeline.from_pretrained
    return load(TINY / "sd3", **NO_T5), load(folder, **NO_T5)


def is_same(before, after):
    pairs = zip(before.state_dict().values(), after.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


def test_distillation_changes_the_transformer_alone(tmp_path, monkeypatch):
    before, after = distill(tmp_path, monkeypatch)
    assert str(tmp_path) not in (tmp_path / "sd3" / "model_index.json").read_text()
    assert is_same(before.text_encoder, after.text_encoder)
    assert is_same(before.vae, after.vae)
    assert not is_same(before.transformer, after.transformer)


@pytest.mark.parametrize("guidance_scale, is_zero", [(1.0, True), (3.0, False)])
def test_a_student_that_is_its_teacher_is_right_at_guidance_1_only(monkeypatch, guidance_scale, is_zero):
    monkeypatch.setattr(pretrain_image_model, "DISTILLED_GUIDANCE", guidance_scale)
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY / "sd3", **NO_T5)
    dataset = pretrain_image_model.Dataset(pipe.vae, 0, 64)
    with torch.no_grad():
        loss = pretrain_image_model.distill_loss(pipe, pipe.transformer, dataset, 4, 0, 0)
    assert (loss.item() < 1e-9) == is_zero


@pytest.mark.parametrize("name", ["sd3", "sd3b"])
def test_a_shipped_pipeline_loads_in_one_precision_and_draws(name):
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY / name, **NO_T5)
    pipe.set_progress_bar_config(disable=True)
    networks = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    assert {network.dtype for network in networks} == {torch.float32}
    (image,) = pipe("a red circle", num_inference_steps=2, output_type="pt").images
    assert image.shape == (3, 64, 64) and image.isfinite().all()


def test_what_the_script_saves_loads_in_one_precision(tmp_path):
    for encoder in ("text_encoder", "text_encoder_2"):
        (tmp_path / encoder).mkdir()
        config = json.loads((TINY / "sd3" / encoder / "config.json").read_text())
        text = json.dumps(config | {"dtype": "bfloat16"})
        (tmp_path / encoder / "config.json").write_text(text)
    pretrain_image_model.declare_float32(tmp_path)
    for encoder in ("text_encoder", "text_encoder_2"):
        shipped = (TINY / "sd3" / encoder / "config.json").read_text()
        assert (tmp_path / encoder / "config.json").read_text() == shipped
