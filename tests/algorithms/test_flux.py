"""FLUX.1 and FLUX.1-Kontext on tiny random weights: the same classes, the same code, no download."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import fdfo
import flow_grpo
import promptloop
import promptrl
import rewards
import superflow
from flow_grpo import Args, Conditions, train
from rewards.prompts import PromptFile
from rewards.sources import load_source
from small_runs import Brightness, metrics

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 12  # T5 tokens of a prompt


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def make_flux(folder, kontext=False, guidance_embeds=True):
    """Saves a FLUX.1 with random weights: dev's architecture, or schnell's without the guidance embedding."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("tiny/sd3/tokenizer", model_max_length=24)
    clip = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 4, 4],
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
    )
    family = FluxKontextPipeline if kontext else FluxPipeline
    pipe = family(
        scheduler=scheduler,
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    for parameter in transformer.parameters():  # the norms' scales and the last layer are zero in a new model
        torch.nn.init.normal_(parameter, std=0.2)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder} of the architectures."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {
            "dev": make_flux(folder / "dev"),
            "schnell": make_flux(folder / "schnell", guidance_embeds=False),
            "kontext": make_flux(folder / "kontext", kontext=True),
        }


def sample_by_our_functions(pipe, prompts, noise, num_inference_steps, guidance_scale, source=None):
    """Images by flow_grpo's own ODE sampler; source (B, 3, H, W) in [0, 1].

    A fork with a family of its own checks it as below: against the images of the diffusers pipeline.
    """
    embeds, pooled = flow_grpo.encode_prompts(pipe, prompts, LENGTH, {})
    if source is not None:
        latents = pipe.vae.encode(2 * source - 1).latent_dist.mode()
        source = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    conditions = Conditions(embeds, pooled, source)
    num_tokens = noise.shape[2] * noise.shape[3] // 4
    sigmas = flow_grpo.get_sigmas(pipe.scheduler, num_inference_steps, num_tokens)

    def velocity_at(x_t, t):
        return flow_grpo.predict_flux_velocity(pipe.transformer, x_t, t, conditions, None, guidance_scale)

    x_0, _ = flow_grpo.rollout(velocity_at, noise.unsqueeze(1), sigmas, (), 0.0, "flow")
    return flow_grpo.decode(pipe, x_0)


@pytest.mark.parametrize("name", ["dev", "schnell", "kontext", "kontext with a source"])
@pytest.mark.parametrize("height, width", [(64, 64), (64, 96)])
@torch.no_grad()
def test_our_sampler_equals_the_pipeline(models, name, height, width):
    pipe = DiffusionPipeline.from_pretrained(models[name.split()[0]])
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, height // 8, width // 8, generator=torch.manual_seed(1))
    options = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": 2.5}
    source = None
    if name.startswith("kontext"):
        options |= {"max_area": height * width, "_auto_resize": False}  # else it picks another size
    if name.endswith("source"):
        source = torch.rand(2, 3, height, width, generator=torch.manual_seed(2))
        options["image"] = source
    prompts = ["a red circle", "two blue squares"]
    theirs = pipe(
        prompt=prompts,
        latents=flow_grpo.pack_latents(noise),
        max_sequence_length=LENGTH,
        output_type="pt",
        **options,
    ).images
    ours = sample_by_our_functions(pipe, prompts, noise, 4, 2.5, source)
    assert theirs.std() > 0.02  # the random network draws something
    assert (ours - (theirs * 255).round() / 255).abs().max() < 1e-5


def test_golden_times(models):
    scheduler = DiffusionPipeline.from_pretrained(models["dev"]).scheduler
    small = flow_grpo.get_sigmas(scheduler, 4, num_tokens=4 * 6)  # 64 x 96 pixels
    assert small == pytest.approx([1, 0.82626, 0.61319, 0.34573, 0], abs=1e-5)
    large = flow_grpo.get_sigmas(scheduler, 8, num_tokens=64 * 64)  # 1024 x 1024 pixels
    golden = [1, 0.95672, 0.90453, 0.84035, 0.75951, 0.65457, 0.51284, 0.3109, 0]
    assert large == pytest.approx(golden, abs=1e-5)


def test_guidance_is_an_input_where_the_network_has_it(models):
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    for name, differs in (("dev", True), ("schnell", False)):
        pipe = DiffusionPipeline.from_pretrained(models[name])
        one, four = (sample_by_our_functions(pipe, ["a cross"], noise, 2, scale) for scale in (1.0, 4.0))
        assert (one != four).any() == differs


def test_tokens_and_positions():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    tokens = flow_grpo.pack_latents(latents)
    assert tokens.shape == (2, 6, 12)
    # token 4 is the patch in row 1, column 1; channel by channel, its two rows of two
    assert tokens[1, 4].tolist() == latents[1, :, 2:4, 2:4].flatten().tolist()
    assert flow_grpo.token_positions(1, 2, 3)[4].tolist() == [1, 1, 1]
    assert flow_grpo.token_positions(0, 2, 3)[5].tolist() == [0, 1, 2]


@pytest.fixture
def flags(tmp_path):
    """Flags of a run that takes a second or two."""
    for name in ("train", "dev"):
        lines = (ROOT / f"tiny/prompts/fold_0/{name}.jsonl").read_text().splitlines(keepends=True)[::48]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "prompts": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "runs"),
        "rewards": "jpeg",
        "max_sequence_length": LENGTH,
        "guidance_scale": 3.5,
        "num_prompts_per_iteration": 2,
        "num_images_per_prompt": 3,
        "num_inference_steps": 4,
        "eval_num_inference_steps": 2,
        "num_iterations": 2,
        "device": "cpu",
    }


def edit_files(folder, size=(80, 64)):
    """A user's own edits: two images and instructions for each. Returns the path of the training file."""
    generator = np.random.default_rng(0)
    for name in ("my_edits_train", "my_edits_eval"):
        rows = []
        for k in range(2):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{k}.png")
            rows.append({"prompt": f"make it {['red', 'blue'][k]}", "source": f"{name}_{k}.png"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "my_edits_train.jsonl")


VARIANTS = {
    "LoRA": {"lora_rank": 2},
    "all weights and KL": {"kl_coef": 0.01},
    "bfloat16, LoRA, checkpointing": {"lora_rank": 2, "dtype": "bfloat16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["dev", "schnell", "kontext", "kontext with a source"])
def test_training_starts_on_policy(models, flags, tmp_path, name, variant):
    flags["model"] = models[name.split()[0]]
    if name.endswith("source"):
        flags["prompts"] = edit_files(tmp_path)
    run_dir = train(Args(**flags | VARIANTS[variant]))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["losses/ratio_first"] for row in rows[1:]] == [0, 0]
    assert all(row["losses/grad_norm"] > 0 for row in rows[1:])


@pytest.mark.parametrize("name", ["dev", "kontext with a source"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(models, flags, tmp_path, interrupted_run, name):
    flags |= {"model": models[name.split()[0]], "lora_rank": 2, "save_every": 1, "num_iterations": 3}
    if name.endswith("source"):
        flags["prompts"] = edit_files(tmp_path)
    expected = train(Args(**flags | {"output_dir": str(tmp_path / "whole")}))
    run_dir = interrupted_run(train, Args(**flags))
    train(Args(resume=str(run_dir)))
    assert metrics(run_dir) == metrics(expected)
    weights = [load_file(folder / "lora/pytorch_lora_weights.safetensors") for folder in (run_dir, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def pay_for_brightness():
    """For the processes that a test starts."""
    rewards.build = lambda *_: Brightness()


@pytest.mark.parametrize("name", ["dev", "kontext with a source"])
def test_two_processes_equal_one(models, flags, tmp_path, start_processes, monkeypatch, name):
    flags |= {"model": models[name.split()[0]], "lora_rank": 2, "num_iterations": 1}
    flags["num_prompts_per_iteration"] = 4
    if name.endswith("source"):
        flags["prompts"] = edit_files(tmp_path)
    wait = start_processes(flow_grpo, flags, prepare=pay_for_brightness)
    monkeypatch.setattr(rewards, "build", lambda *_: Brightness())
    _, one = metrics(train(Args(**flags | {"output_dir": str(tmp_path / "alone")})))
    _, two = metrics(wait())
    assert one["losses/grad_norm"] > 0
    for key in ("losses/policy_loss", "losses/grad_norm", "charts/reward_mean", "losses/ratio_first"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key


@pytest.mark.parametrize("module", [superflow, fdfo, promptrl], ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ["dev", "kontext with a source"])
def test_the_other_files_train_it_too(models, flags, tmp_path, module, name):
    flags |= {"model": models[name.split()[0]], "lora_rank": 2, "rewards": "jpeg_incompressibility:0.001"}
    flags["num_images_per_prompt"] = 4
    if name.endswith("source"):
        flags["prompts"] = edit_files(tmp_path)
    if module is superflow:
        flags["pool"] = 1
    if module is promptrl:
        flags["sde_window"] = 2
    run_dir = module.train(module.Args(**flags))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["losses/ratio_first"] for row in rows[1:]] == [0, 0]
    assert all(row["losses/grad_norm"] > 0 for row in rows[1:])


@pytest.mark.parametrize("module", [flow_grpo, superflow, fdfo, promptrl], ids=lambda module: module.__name__)
def test_the_length_of_a_prompt_is_the_tokenizers_own_unless_it_is_given(models, module):
    pipe = DiffusionPipeline.from_pretrained(models["dev"])
    embeds, _ = module.encode_prompts(pipe, ["a red circle"], 0, {})
    assert embeds.shape[1] == pipe.tokenizer_2.model_max_length == 24
    embeds, _ = module.encode_prompts(pipe, ["a red circle"], LENGTH, {})
    assert embeds.shape[1] == LENGTH


def test_the_rewriter_sees_the_image_that_it_is_asked_about(models, flags, tmp_path, spy):
    """The same pixels in the rollout, in the loss and in the evaluation, each beside its own instruction."""
    asked = spy(promptrl, "ask_about")
    flags |= {"model": models["kontext"], "lora_rank": 2, "prompts": edit_files(tmp_path), "sde_window": 2}
    flags |= {"source_size": 32, "lm_kl_coef": 0.0, "num_iterations": 1}
    run_dir = promptrl.train(promptrl.Args(**flags))
    (row,) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    assert 0 <= row["losses/lm_ratio_first"] < 1e-5
    pictures = {}
    for split in ("train", "eval"):
        for k, color in enumerate(("red", "blue")):
            source = load_source(tmp_path / f"my_edits_{split}_{k}.png", 64)
            question = promptrl.fill(promptrl.Args().edit_instruction, prompt=f"make it {color}")
            pictures[split, question] = promptrl.to_bytes(source.unsqueeze(0), 32)[0]
    splits = []
    for (_, questions, shown), _ in asked:
        assert shown.shape == (len(questions), 32, 32, 3)
        for split in ("train", "eval"):
            if all((image == pictures[split, own]).all() for image, own in zip(shown, questions)):
                splits.append(split)
    # Evaluated, sampled, trained, evaluated.
    assert splits == ["eval", "train", "train", "eval"]


def test_promptloop_edits_and_sees_source_and_preview(models, flags, tmp_path, spy):
    """The source comes first, beside the preview or alone, and the same pixels are in the loss."""
    asked = spy(promptloop, "ask_about")
    sampled = spy(promptloop, "sample")
    flags |= {"model": models["kontext"], "prompts": edit_files(tmp_path), "num_iterations": 1}
    flags |= {"num_inference_steps": 3, "num_refinements": 2, "preview_size": 28, "micro_batch_size": 8}
    run_dir = promptloop.train(promptloop.Args(**flags))
    (row,) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    assert 0 <= row["losses/lm_ratio_first"] < 1e-5 and row["losses/lm_grad_norm"] > 0
    sources = {}
    for split in ("train", "eval"):
        for k, color in enumerate(("red", "blue")):
            source = load_source(tmp_path / f"my_edits_{split}_{k}.png", 64)
            sources[split, color] = source, promptloop.to_bytes(source.unsqueeze(0), 28)[0]
    with_preview = 0
    for (_, questions, previews, shown), inputs in asked:
        images_per_question = 1 if previews is None else 2
        assert len(inputs["image_grid_thw"]) == images_per_question * len(questions)
        with_preview += previews is not None
        for question, image in zip(questions, shown):
            color = "red" if "red" in question else "blue"
            assert question.startswith("The first image is to be edited. ")
            assert any((image == sources[split, color][1]).all() for split in ("train", "eval"))
    assert 0 < with_preview < len(asked)
    for (_, prompts, *_, images), _ in sampled:  # the image model edits the same sources
        for prompt, image in zip(prompts, images):
            color = "red" if "red" in prompt else "blue"
            assert any((image == sources[split, color][0]).all() for split in ("train", "eval"))


def test_two_pictures_of_a_question_come_in_their_order():
    """The policy's own order: all sources of a batch would come before all previews in a flat list."""
    args = promptloop.Args()
    lm, tokenizer, _ = promptloop.load_lm(args, torch.device("cpu"), torch.float32, False)
    processor = promptloop.Qwen2VLImageProcessorPil.from_pretrained(args.lm)
    policy = promptloop.Policy(lm, tokenizer, processor)
    pictures = torch.randint(0, 256, (4, 64, 64, 3), generator=torch.manual_seed(0), dtype=torch.uint8)
    inputs = promptloop.ask_about(policy, ["a", "b"], pictures[:2], pictures[2:])
    expected = processor(images=[pictures[k].numpy() for k in (2, 0, 3, 1)], return_tensors="pt")
    assert (inputs["pixel_values"] == expected["pixel_values"]).all()
    image_tokens = (inputs["input_ids"] == lm.config.image_token_id).sum(dim=1)
    assert image_tokens.tolist() == [32, 32]


@pytest.mark.parametrize("model", ["tiny/sd3", "dev"])
def test_promptloop_edits_with_kontext_only(models, flags, tmp_path, model):
    flags |= {"model": models.get(model, model), "prompts": edit_files(tmp_path)}
    flags |= {"max_sequence_length": 0, "num_refinements": 2}
    with pytest.raises(flow_grpo.BadInput, match="cannot edit"):
        promptloop.train(promptloop.Args(**flags))


def test_the_rewriter_reads_the_picture():
    """Another picture gives other probabilities, and a text beside a picture others than alone."""
    args = promptrl.Args()
    lm, tokenizer, _ = promptrl.load_lm(args, torch.device("cpu"), torch.float32, False)
    processor = promptrl.Qwen2VLImageProcessorPil.from_pretrained(args.lm)
    policy = promptrl.Policy(lm, tokenizer, processor)
    questions = [promptrl.fill(promptrl.Args().edit_instruction, prompt="make the red circle blue")] * 2
    pictures = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    pictures[1, 20:40, 20:40] = 255
    replies = torch.tensor([tokenizer("make the circle blue").input_ids] * 2)
    log_probs, _ = promptrl.reply_log_probs(lm, promptrl.ask_about(policy, questions, pictures), replies)
    alone, _ = promptrl.reply_log_probs(lm, promptrl.ask_about(policy, questions, None), replies)
    assert (log_probs[0] != log_probs[1]).any()
    assert (log_probs != alone).any(dim=1).all() and (alone[0] == alone[1]).all()


def test_the_saved_lora_gives_the_trained_images_in_plain_diffusers(models, flags):
    flags |= {"model": models["dev"], "lora_rank": 2, "learning_rate": 0.1}
    run_dir = train(Args(**flags))
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    pipe = FluxPipeline.from_pretrained(models["dev"])
    before = sample_by_our_functions(pipe, ["a cross"], noise, 2, 3.5)
    pipe.load_lora_weights(run_dir / "lora")
    after = sample_by_our_functions(pipe, ["a cross"], noise, 2, 3.5)
    state = torch.load(run_dir / "checkpoint/state.pt", weights_only=True)
    assert (before != after).any() and pipe.transformer.peft_config["default_0"].lora_alpha == 4
    loaded = dict(pipe.transformer.named_parameters())
    for parameter, value in state["weights"].items():
        assert (loaded[parameter.replace(".default.", ".default_0.")] == value).all()


def test_the_saved_transformer_gives_the_trained_weights_in_plain_diffusers(models, flags):
    run_dir = train(Args(**flags | {"model": models["schnell"]}))
    state = torch.load(run_dir / "checkpoint/state.pt", weights_only=True)
    loaded = FluxTransformer2DModel.from_pretrained(run_dir / "transformer").state_dict()
    assert loaded.keys() == state["weights"].keys()
    assert all((loaded[name] == value).all() for name, value in state["weights"].items())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("dev", {"resolution": 56}, "--resolution 56 must be a multiple of 16"),
        ("dev", {"resolution": 8192}, "at most 4096"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(models, flags, name, changes, message):
    with pytest.raises(flow_grpo.BadInput, match=message):
        train(Args(**flags | {"model": models[name]} | changes))
    assert not Path(flags["output_dir"]).exists()


def test_a_distilled_model_is_warned_of(models, flags, capsys):
    flow_grpo.check_model(Args(**flags | {"model": models["schnell"]}), PromptFile([""], [{}]))
    assert "distilled" in capsys.readouterr().err
    flow_grpo.check_model(Args(**flags | {"model": models["dev"]}), PromptFile([""], [{}]))
    assert capsys.readouterr().err == ""


def test_a_source_is_upright_and_cropped_at_its_centre(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, 5:15] = 255  # the square at the centre
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side: a viewer turns it by 90 degrees
    image.save(tmp_path / "lying.png", exif=exif)
    image.convert("P").save(tmp_path / "palette.png")
    for name in ("lying", "palette"):
        source = flow_grpo.load_source(tmp_path / f"{name}.png", 10)
        assert source.shape == (3, 10, 10) and (source == 1).all()


def test_a_bad_source_is_named_with_its_row(models, flags, tmp_path):
    prompts = Path(edit_files(tmp_path))
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    (tmp_path / "text.png").write_text("no image")
    for source, message in (
        ("missing.png", "line 2: its source .*missing.png does not exist"),
        ("text.png", "line 2: its source .*text.png is not an image"),
        ([1, 2], "line 2: its source must be the path of an image"),
        (None, "1 of its 2 rows have a source"),
    ):
        second = {"prompt": "make it blue"} if source is None else rows[1] | {"source": source}
        prompts.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], second)))
        with pytest.raises(flow_grpo.BadInput, match=message):
            train(Args(**flags | {"model": models["kontext"], "prompts": str(prompts)}))
        assert not Path(flags["output_dir"]).exists()


@pytest.mark.parametrize("model", ["tiny/sd3", "dev"])
def test_only_kontext_edits(models, flags, tmp_path, model):
    flags |= {"model": models.get(model, model), "prompts": edit_files(tmp_path)}
    if model == "tiny/sd3":
        flags["max_sequence_length"] = 0
    with pytest.raises(flow_grpo.BadInput, match="cannot edit"):
        train(Args(**flags))


def test_the_source_matters(models):
    pipe = DiffusionPipeline.from_pretrained(models["kontext"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    white, black = (
        sample_by_our_functions(pipe, ["a cross"], noise, 2, 2.5, torch.full((1, 3, 64, 64), value))
        for value in (1.0, 0.0)
    )
    assert (white != black).any()
