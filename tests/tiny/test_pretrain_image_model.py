"""tiny/pretrain_image_model.py: stages that resume exactly, and pipelines that load as they are."""

import hashlib
import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tiny import pretrain_image_model, world
from tiny.image_model import NO_T5
from tiny.pretraining import parse_options

TINY = world.PROMPTS.parent


def pretrain_vae(folder, steps):
    flags = ["--steps", "3", "--save-every", "1", "--threads", "1"]
    flags += ["--work", str(folder / "work"), "--folder", str(folder)]
    args = parse_options("", ["vae"], ["vae"] + flags)
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
    args = parse_options("", ["sd3"], ["sd3", "--folder", str(tmp_path), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="tiny.pretrain_image_model vae"):
        pretrain_image_model.pretrain_sd3(args)


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
