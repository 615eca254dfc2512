"""tiny/pretrain_flux.py and tiny/flux_model.py: data, losses, resuming, and the pipeline that is saved."""

import hashlib
import random

import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline

import flow_grpo
from tiny import pretrain_flux, splits, vlm_world, world
from tiny.flux_model import build_flux
from tiny.image_model import MAX_TOKENS
from tiny.pretraining import parse_options

VAE = splits.PROMPTS.parent / "sd3" / "vae"


@pytest.fixture(scope="module")
def pipe():
    """An untrained pipeline, whose last layer is not zero."""
    torch.manual_seed(0)
    pipe = build_flux(AutoencoderKL.from_pretrained(VAE))
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def datasets(pipe):
    return pretrain_flux.Dataset(pipe.vae, 0, 64), pretrain_flux.EditDataset(pipe.vae, 0, 64)


def test_an_edit_has_its_own_source_target_and_wordings(pipe, datasets):
    _, edits = datasets
    rng = random.Random("0-edits")
    expected = [world.sample_edit(rng) for _ in range(64)]
    for row in (0, 7, 63):
        source, edit = expected[row]
        assert edits.wordings[row] == vlm_world.edit_answers(source, edit)
        for latents, scene in ((edits.sources[row], source), (edits.targets[row], edit.target)):
            image = pretrain_flux.images_to_tensor([world.draw(scene)])
            found = flow_grpo.decode(pipe, latents.unsqueeze(0))
            assert (found - (image / 2 + 0.5)).abs().mean() < 0.02
    prompts, sources, targets = edits.batch(random.Random(1), 200)
    assert sources.shape == targets.shape == (200, 8, 8, 8)
    assert 5 < prompts.count("") < 40
    kinds = [0, 0, 0]
    rows = random.Random(1)
    rows = [rows.randrange(64) for _ in range(200)]
    for row, prompt, source in zip(rows, prompts, sources):
        assert (source == edits.sources[row]).all()
        if prompt:
            kinds[edits.wordings[row].index(prompt)] += 1
    assert kinds[0] > kinds[1] > 10 and kinds[2] > 10


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipe):
    prompts = ["a red circle", "", 'the text "K7"']
    with torch.no_grad():
        embeds, pooled = pretrain_flux.encode_prompts(pipe, prompts)
        expected_embeds, expected_pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=MAX_TOKENS)
    torch.testing.assert_close(embeds, expected_embeds)
    torch.testing.assert_close(pooled, expected_pooled)


@pytest.mark.parametrize("largest, is_zero", [(1.0, True), (4.0, False)])
def test_a_student_that_is_its_teacher_is_right_at_guidance_1_only(
    monkeypatch, pipe, datasets, largest, is_zero
):
    monkeypatch.setattr(pretrain_flux, "LARGEST_GUIDANCE", largest)
    with torch.no_grad():
        loss = pretrain_flux.distill_loss(pipe, pipe.transformer, *datasets, 10, 0, 0)
    assert (loss.item() < 1e-9) == is_zero


@pytest.mark.parametrize("edit_share, num_edits", [(0.4, 4), (0.1, 1)])
def test_the_flow_loss_is_that_of_drawings_and_edits_by_their_numbers(
    monkeypatch, pipe, datasets, edit_share, num_edits
):
    """With a model that predicts zero, it is the mean square of noise - x_0 over all images of a step."""
    monkeypatch.setattr(pretrain_flux, "velocity", lambda _, x_t, *rest: torch.zeros_like(x_t))
    targets = []

    def add_noise(x_0, generator):
        noise = torch.full_like(x_0, 0.5)
        targets.append(noise - x_0)
        return torch.rand(len(x_0), generator=generator), noise, x_0

    monkeypatch.setattr(pretrain_flux, "add_noise", add_noise)
    loss = pretrain_flux.flow_loss(pipe, *datasets, 10, 0, edit_share, 0)
    assert [len(target) for target in targets] == [10 - num_edits, num_edits]
    assert loss.item() == pytest.approx(torch.cat(targets).square().mean().item(), rel=1e-5)


def pretrain(folder, steps, stage="flow"):
    """Trains for so many of 3 steps; the hash of the transformer's weights if these were all."""
    flags = [stage, "--steps", "3", "--save-every", "1", "--threads", "1", "--dataset-size", "128"]
    flags += ["--batch-size", "10", "--work", str(folder / "work"), "--folder", str(folder / "flux")]
    args = parse_options("", list(pretrain_flux.STAGES), ["flux"], flags)
    fit = pretrain_flux.fit

    def cut_off(name, modules, loss_at, args, num_steps, **options):
        def loss_until(step):
            if step == steps:
                raise KeyboardInterrupt
            return loss_at(step)

        return fit(name, modules, loss_until, args, num_steps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_flux, "fit", cut_off)
        if steps < 3:
            with pytest.raises(KeyboardInterrupt):
                pretrain_flux.STAGES[stage](args)
            return None
        pretrain_flux.STAGES[stage](args)
    weights = folder / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_stage_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    whole = pretrain(tmp_path / "whole", steps=3)
    pretrain(tmp_path / "parts", steps=2)
    assert pretrain(tmp_path / "parts", steps=3) == whole

    longer = pretrain(tmp_path / "whole", steps=3, stage="prompts")
    assert longer != whole
    pretrain(tmp_path / "parts", steps=2, stage="prompts")
    assert pretrain(tmp_path / "parts", steps=3, stage="prompts") == longer

    saved = FluxKontextPipeline.from_pretrained(tmp_path / "whole" / "flux")
    networks = [saved.transformer, saved.vae, saved.text_encoder, saved.text_encoder_2]
    assert {network.dtype for network in networks} == {torch.float32}
    assert str(tmp_path) not in (tmp_path / "whole" / "flux" / "model_index.json").read_text()


def test_the_pipeline_draws_and_edits(pipe):
    options = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False}
    options |= {"num_inference_steps": 2, "max_sequence_length": MAX_TOKENS, "output_type": "pt"}
    options["generator"] = torch.Generator().manual_seed(0)
    (drawn,) = pipe(prompt="a red circle", **options).images
    options["generator"] = torch.Generator().manual_seed(0)
    (edited,) = pipe(prompt="a red circle", image=torch.ones(1, 3, 64, 64), **options).images
    assert drawn.shape == edited.shape == (3, 64, 64)
    assert drawn.isfinite().all() and (drawn != edited).any()
