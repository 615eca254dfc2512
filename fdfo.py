"""FDFO: finite differences between paired samples say where every velocity of the sampler should go.

Paper: Finite Difference Flow Optimization, arXiv 2603.12893. Official code: licensed for non-commercial use,
so nothing is copied; its settings and equations are facts. Derived from: flow_grpo.py, without
log-probabilities: the whole sampler is one action. Read `diff -u flow_grpo.py fdfo.py`.

One iteration; the numbers are those of the comments in `train`:
 1. Draw P prompts, and K / 2 pairs of images for each. The two images of     draw_prompts, draw_noise,
    a pair start from the same noise.                                         draw_churn
 2. Sample with a little private noise in each step, which keeps the ODE's    churned_step,
    marginals. So the two images of a pair end a little apart.                churned_rollout
 3. Score the images with a black-box reward.                                 rewards/
 4. For each image, dx and dR are the differences of its final latent and     finite_difference
    of its reward from the mean of the pair. dR dx / |dx|^2 is the gradient
    of the reward, as far as the pair shows it.
 5. Shuffle all (image, step) tuples. In each, a pseudo-ratio rho grows as    deal_tuples,
    the velocity goes from its old value towards old value - direction,       pseudo_log_ratio
    direction = dx / mean(dx^2): this moves x_0 along dx.
 6. The loss is -dR rho + |dR| (rho - 1)^2 / (2 eps), which is least at       spo_loss
    rho = 1 +- eps, plus a penalty for leaving the base model's velocity.
 7. Take one optimiser step per rollout, or a few; each tuple is used once. The first step is on-policy (its
    rho is 1).

As published, the direction is the same for all steps of an image, although the true gradient of a step has
the Jacobian of the rest of the sampler in it: a biased estimate, but well conditioned.

Differences from the official settings:
 1. By default there is one update per rollout, the penalty is on, and the learning rate is annealed. The
    reasons are in docs/fdfo.md.
 2. Tuples without a difference in reward, about half of all, are left out of the penalty too.
 3. log rho is limited to +-1. Otherwise, after a large first update, a few tuples whose rho has run off would
    have gradients that drown all others. A pair closer than 1e-8 in mean square counts as equal.
 4. The churn weight is the same for all pairs. One preset of the code draws it from a log-normal
    distribution.

Run (time and memory: docs/fdfo.md; the commands for real models were not run with real weights):
  python fdfo.py                                             # the tiny world, under 10 minutes on two cores
  python fdfo.py --model stabilityai/stable-diffusion-3.5-medium --max-sequence-length 128 \\
      --resolution 512 --rewards ocr --prompts ocr/train.txt --eval-prompts ocr/test.txt \\
      --lora-rank 32 --learning-rate 3e-5 --kl-coef 0 --churn-weight 0.0025 \\
      --num-inference-steps 40 --eval-num-inference-steps 40 --num-updates-per-iteration 4 \\
      --num-prompts-per-iteration 432 --num-iterations 300 --micro-batch-size 8 --gradient-checkpointing
  torchrun --nproc_per_node=8 fdfo.py ... --num-prompts-per-iteration 448

Conventions, the same in all five files:
  Time t runs from 1 (noise) to 0 (image), and x_t = (1 - t) x_0 + t noise.
  The velocity is v = noise - x_0, so an Euler step from t to t' < t is x_t + (t' - t) v.

Letters, the same in all five files:
  P prompts per iteration, K images per prompt (of the largest group), B images in a batch,
  T denoising steps, W trained steps, U updates per rollout, N new tokens of a reply,
  C channels, h and w height and width of a latent, H and W those of an image, L tokens, D embedding size,
  a = noise_level, beta = kl_coef, eps = clip_range, rho a probability ratio, A an advantage.
"""

import contextlib
import copy
import dataclasses
import math
import os
import shutil
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no notes about optional packages
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("importing torch and diffusers ...", flush=True)  # some seconds

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from einops import rearrange
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import rewards
from rewards import BadInput, command_line, report
from rewards.command_line import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed
from rewards.prompts import join_prompt_files, load_prompt_files
from rewards.sources import load_source
from rewards.weights import from_hub, read_pipeline_configs


@dataclasses.dataclass
class Args:
    seed: Seed = 1
    """Seeds the prompt order and all noise of training. CPU runs are bit-for-bit reproducible."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on CUDA if there is a CUDA device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of frozen weights and forward passes. auto: bfloat16 on CUDA, float32 on the CPU."""
    output_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str = ""
    """Run folder to resume from; all other flags are then read from that run."""
    resume_anyway: bool = False
    """Resume even if the script, the prompt files or the model have changed since the run began."""
    eval_every: PositiveInt = 16
    """Iterations between evaluations. The model is evaluated before and after the training, too."""
    eval_noises: PositiveInt = 1
    """Images drawn for each held-out prompt, from as many noises."""
    eval_wordings: bool = False
    """Also evaluate other wordings of the held-out prompts, paraphrased and hard, before and after."""
    eval_seed: Seed = 0
    """Seeds these noises: runs with the same number draw their held-out images from the same noises."""
    save_every: PositiveInt = 16
    """Iterations between checkpoints."""
    track: bool = False
    """Mirror the metrics to Weights & Biases."""
    wandb_project_name: str = "flow-rl"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user."""

    # Model and data
    model: str = "tiny/sd3"
    """Image model: a diffusers pipeline of SD3, FLUX.1 or FLUX.1-Kontext, as a folder or a hub id."""
    resolution: NonNegativeInt = 0
    """Side of the square images, in pixels. 0: the model's own."""
    max_sequence_length: Annotated[int, Range(0, 512)] = 0
    """Length of a prompt in T5 tokens, padding included: at most 256 for SD3.5, 512 for FLUX.1, which draws
    another image at another length. 0: SD3 without its T5 (tiny/sd3 has none), FLUX.1 at its own length."""
    lora_rank: Annotated[int, Range(0, 1024)] = 0
    """Rank of the trained LoRA; its alpha is twice the rank. 0: train all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    offload_text_encoders: bool = False
    """Keep the text encoders on the GPU only while they encode: frees up to 11 GB, costs up to a second per
    iteration with new prompts."""
    shard: bool = False
    """Split the weights of the transformer among the processes, where one GPU does not hold them (FSDP2). A
    LoRA stays whole."""
    compile: bool = False
    """Compile the blocks of the transformer: faster, after a minute or more. Needs a C compiler."""
    prompts: str = "tiny/prompts/fold_0/train.jsonl"
    """Training prompts: a .txt with one prompt per line, or a .jsonl with "prompt" and metadata per line."""
    eval_prompts: str = ""
    """Held-out prompts. Empty: the --prompts file with `eval` or `dev` for `train` in its name."""
    rewards: str = "geneval"
    """Rewards with optional weights: geneval:1,jpeg:0.2. A function of your own is module:function."""

    # Sampling
    num_prompts_per_iteration: PositiveInt = 128
    """P, prompts per iteration, over all processes."""
    num_images_per_prompt: Annotated[int, Range(2, 10_000)] = 2
    """K, images per prompt, an even number: each two of them are a pair."""
    num_inference_steps: Annotated[int, Range(2, 1000)] = 8
    """T, denoising steps of a training sample. It may be lower than in the evaluation."""
    eval_num_inference_steps: Annotated[int, Range(1, 1000)] = 10
    """Denoising steps of an evaluation sample."""
    guidance_scale: Annotated[float, Range(0, 100)] = 1.0
    """Guidance in sampling, loss and evaluation. SD3: classifier-free; up to 1: none, at half the cost.
    FLUX.1: an input of the network, usually 3.5 (Kontext: 2.5)."""
    churn: Literal["raw", "logit-normal", "dirac"] = "raw"
    """When the two images of a pair get private noise. raw: in all steps; logit-normal: around a time drawn
    for the pair; dirac: at the start only."""
    churn_weight: Annotated[float, Range(1e-6, 10)] = 0.3
    """Strength of the private noise. raw: gamma of each step, which lowers the noise level by the factor
    1 + gamma and restores it with fresh noise. Others: the sum of log(1 + gamma) over all steps."""
    micro_batch_size: PositiveInt = 64
    """Images or (image, step) tuples per forward pass. Sets memory and speed; does not change the result."""

    # Algorithm
    clip_range: Annotated[float, Range(0, 1, above_low=True)] = 0.03
    """eps, how far the loss lets the pseudo-ratio go from 1. Tiny because the logarithm of the ratio is a
    mean over the latent, not a sum."""
    kl_coef: NonNegativeFloat = 0.1
    """beta, weight of the penalty for leaving the base model's velocity. Above 0 it costs a forward pass per
    trained step."""

    # Optimisation
    num_iterations: NonNegativeInt = 96
    """Iterations, each with one rollout."""
    num_updates_per_iteration: PositiveInt = 1
    """U, optimiser steps per rollout. Each uses a different 1/U of all (image, step) tuples."""
    learning_rate: Annotated[float, Range(0, 1)] = 8e-4
    """Learning rate of AdamW, annealed linearly to zero over the run."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm."""


def check_args(args):
    """Raises BadInput where flags contradict each other. Their ranges stand beside them, in Args."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    share = args.num_updates_per_iteration * world_size
    if args.num_prompts_per_iteration % share:
        raise BadInput(
            f"--num-prompts-per-iteration {args.num_prompts_per_iteration} must be a multiple of {share}: "
            "updates times processes"
        )
    if args.shard and (world_size == 1 or args.compile):
        raise BadInput("--shard needs several processes, and goes without --compile")
    if args.num_prompts_per_iteration * args.num_images_per_prompt > 1_000_000:
        raise BadInput("--num-prompts-per-iteration times --num-images-per-prompt must be at most 1,000,000")
    if args.num_images_per_prompt % 2:
        raise BadInput(f"--num-images-per-prompt {args.num_images_per_prompt} must be even, for pairs")


# === model ===


def check_model(args, every_prompt):
    """Raises BadInput where the model's configurations do not fit the flags or prompts. Loads no weights."""
    configs = read_pipeline_configs(args.model)
    families = ["StableDiffusion3Pipeline", "FluxPipeline", "FluxKontextPipeline"]
    if configs["family"] not in families:
        raise BadInput(f"--model {args.model} is a {configs['family']}; supported: {', '.join(families)}")
    flux = configs["family"] != "StableDiffusion3Pipeline"
    scheduler, transformer = configs["scheduler"], configs["transformer"]
    if scheduler["_class_name"] != "FlowMatchEulerDiscreteScheduler":
        raise BadInput(f"--model {args.model} has a {scheduler['_class_name']}; steps must be Euler's")
    if scheduler.get("use_dynamic_shifting") and not flux:
        raise BadInput(
            f"--model {args.model} shifts its times dynamically, which is supported for FLUX.1 only"
        )
    if args.max_sequence_length > 0 and not flux and "text_encoder_3" not in configs:
        raise BadInput(f"--max-sequence-length must be 0: {args.model} has no T5 encoder")
    patch_size = 2 if flux else transformer["patch_size"]  # in latents
    pixels_per_patch = patch_size * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    largest = 4096 if flux else pixels_per_patch * transformer["pos_embed_max_size"]
    if args.resolution % pixels_per_patch or args.resolution > largest:
        raise BadInput(
            f"--resolution {args.resolution} must be a multiple of {pixels_per_patch} and at most {largest}"
        )
    edits = any("source" in row for row in every_prompt.metadata)
    if edits and configs["family"] != "FluxKontextPipeline":
        raise BadInput(
            f"--model {args.model} cannot edit the source images of --prompts: use a FLUX.1-Kontext"
        )
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if args.lora_rank > width:
        raise BadInput(f"--lora-rank {args.lora_rank} must be at most {width}, the width of the transformer")
    if args.compile and not any(shutil.which(name) for name in ("g++", "clang++", "gcc", "clang")):
        raise BadInput("--compile needs a C++ compiler: install one, such as g++")
    if flux and not transformer["guidance_embeds"]:
        command_line.say(
            f"warning: {args.model} is distilled for a few steps, as FLUX.1-schnell is. With the noise of "
            "training its images turn blurry: train the model that it was distilled from"
        )


def open_device(device_name, dtype_name):
    """(device, dtype of frozen weights, rank, number of processes); joins torchrun's process group."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = torch.cuda.is_available() if device_name == "auto" else device_name == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is no CUDA device here, use --device cpu")
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    num_gpus = torch.cuda.device_count()
    if use_cuda and num_processes > num_gpus:
        raise BadInput(f"{num_processes} processes on a machine with {num_gpus} GPUs: start one per GPU")
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # collectives of objects use the current device, not the tensors'
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    if dtype_name == "auto":
        dtype_name = "bfloat16" if use_cuda else "float32"
    return device, getattr(torch, dtype_name), rank, world_size


def load_model(args, device, dtype):
    """(pipeline, transformer, reference). Trainable parameters (LoRA or all) are float32 and require grad.

    reference is the base model for the KL: a frozen copy, or None where the LoRA can be switched off instead,
    or where beta is 0.
    """
    left_out = {}
    family = read_pipeline_configs(args.model)["family"]
    if family == "StableDiffusion3Pipeline" and args.max_sequence_length == 0:
        left_out = {"text_encoder_3": None, "tokenizer_3": None}  # the T5 of SD3
    pipe = from_hub(DiffusionPipeline.from_pretrained, args.model, dtype=dtype, **left_out)
    if not args.shard:
        pipe.to(device)
    pipe.vae.float().to(memory_format=torch.channels_last)  # the faster layout of its convolutions
    transformer = pipe.transformer.requires_grad_(False)
    reference = None
    if args.lora_rank > 0:
        names = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=2 * args.lora_rank,
            init_lora_weights="gaussian",
            target_modules=["attn." + name for name in names],
        )
        transformer.add_adapter(lora)
    else:
        if args.kl_coef > 0:
            reference = copy.deepcopy(transformer)
        transformer.requires_grad_(True)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        for module in transformer.modules():
            if is_block(transformer, module):  # one by one, since they share their compiled code
                module.compile()
    if args.shard:
        shard(transformer, device)
        if reference is not None:
            shard(reference, device)
        pipe.to(device)
    if args.offload_text_encoders:
        move_text_encoders(pipe, "cpu")
    return pipe, transformer.train(), reference  # train() is for checkpointing alone: there is no dropout


def shard(model, device):
    """Leaves each process its share of the weights and moves it to the device (FSDP2). A LoRA stays whole.

    A block is put together before it computes and taken apart afterwards. So is the model around the blocks:
    the first process saves a LoRA alone, and must find it in the state in which the others have it. All
    processes have to run the same number of forward passes. A backward pass leaves each process its share of
    the gradients, which are summed over the processes.
    """
    lora = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if is_block(model, module)]
    for module in [*blocks, model]:
        name = type(module).__name__
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=lora)
        type(module).__name__ = name  # FSDP has made it a subclass, whose name would be saved with the model
        module.set_gradient_divide_factor(1.0)  # losses are divided by global counts: their gradients add up
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too
    model.to(device)  # what is not shared out: the LoRA and the buffers


def is_block(model, module):
    """Whether a module is one of the blocks of which the model consists."""
    return type(module).__name__ in model._no_split_modules


@contextlib.contextmanager
def base_weights(model, reference):
    """The base model: the frozen copy, or the model itself with its LoRA switched off inside the block."""
    if reference is not None:
        yield reference
        return
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def is_flux(pipe):
    """Whether this is FLUX.1 or FLUX.1-Kontext, and not SD3."""
    return "Flux" in type(pipe).__name__


def move_text_encoders(pipe, device):
    """Moves the text encoders of a pipeline to a device."""
    for name, component in pipe.components.items():
        if name.startswith("text_encoder") and component is not None:
            component.to(device)


@torch.no_grad()
def encode_prompts(pipe, prompts, max_sequence_length, cache, offload=False):
    """Embeddings (B, L, D) and pooled embeddings (B, D). A distinct prompt is encoded once, then cached.

    offload: whether the text encoders are on the CPU, and come to the device only for new prompts.
    """
    device = pipe.transformer.device
    if len(cache) > 1024:  # bounds the CPU memory: a prompt takes 1.7 MB for SD3.5 with T5, 4.2 MB for FLUX.1
        cache.clear()
    new_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
    if new_prompts and offload:
        move_text_encoders(pipe, device)
    for start in range(0, len(new_prompts), 16):
        # Always 16 prompts, the last ones filled up: rounding depends on the size of a batch. A resumed run,
        # whose cache starts empty, encodes fewer prompts at once, and must get the same embeddings.
        batch = new_prompts[start : start + 16]
        filled = batch + batch[:1] * (16 - len(batch))
        if is_flux(pipe):
            length = max_sequence_length or pipe.tokenizer_2.model_max_length
            embeds, pooled, _ = pipe.encode_prompt(filled, max_sequence_length=length)
        else:
            embeds, _, pooled, _ = pipe.encode_prompt(
                filled,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
        rows = zip(embeds.cpu().unbind(), pooled.cpu().unbind())
        for prompt, (embed, pool) in zip(batch, rows):
            cache[prompt] = embed.clone(), pool.clone()
    if new_prompts and offload:
        move_text_encoders(pipe, "cpu")
    embeds = torch.stack([cache[prompt][0] for prompt in prompts])
    pooled = torch.stack([cache[prompt][1] for prompt in prompts])
    return embeds.to(device), pooled.to(device)


@torch.no_grad()
def encode_sources(pipe, metadata, resolution, cache):
    """Latents (B, C, h, w) of the images that the rows ask to edit, or None where there are none.

    The image of a row is cropped at its centre to a square of resolution x resolution pixels. Its latents are
    the mode of the autoencoder's distribution, as in Kontext's own pipeline. An image is encoded once, then
    cached.
    """
    if "source" not in metadata[0]:
        return None
    if len(cache) > 1024:  # bounds the CPU memory: a source of 1024 x 1024 pixels takes 1 MB
        cache.clear()
    for row in metadata:
        if row["source"] not in cache:
            image = load_source(row["source"], resolution).to(pipe.transformer.device)  # (3, H, W) in [0, 1]
            latents = pipe.vae.encode(2 * image.unsqueeze(0) - 1).latent_dist.mode()
            latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            cache[row["source"]] = latents[0].cpu()
    return torch.stack([cache[row["source"]] for row in metadata]).to(pipe.transformer.device)


@torch.no_grad()
def decode(pipe, x_0):
    """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1], rounded to 8 bits as when saved.

    16 at a time: more would take more memory, and more time on a CPU, whose cache they leave.
    """
    latents = x_0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = torch.cat([pipe.vae.decode(part).sample for part in latents.split(16)])
    images = (decoded / 2 + 0.5).clamp(0, 1)
    return (images * 255).round() / 255


# === flow ===


class Conditions(NamedTuple):
    """What the velocity of a batch depends on, besides x_t and t."""

    embeds: torch.Tensor  # (B, L, D), of the tokens of the prompts
    pooled: torch.Tensor  # (B, D), of the whole prompts
    source: torch.Tensor | None = None  # (B, C, h, w), latents of the images to edit, for FLUX.1-Kontext


def get_sigmas(scheduler, num_inference_steps, num_tokens=None):
    """The pipeline's own T + 1 times, from 1 down to 0, so that what is trained is what is deployed.

    num_tokens: for FLUX.1, the number of 2 x 2 patches of a latent. Larger images spend more steps near the
    noise: a time s becomes e^mu / (e^mu + 1 / s - 1), where mu grows linearly with num_tokens.
    """
    if num_tokens is None:
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.sigmas.tolist()
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (num_tokens - config.base_image_seq_len)
    times = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(sigmas=times, mu=mu)
    return scheduler.sigmas.tolist()


def predict_sd3_velocity(transformer, x_t, t, conditions, negative, guidance_scale):
    """SD3's velocity v(x_t, t, prompt), float32 (B, C, h, w).

    t: a number, or float64 (B,). negative: the Conditions of one negative prompt. Above a scale of 1,
    classifier-free guidance v_negative + scale (v - v_negative) takes both in one forward pass.
    """
    embeds, pooled, _ = conditions
    timestep = torch.as_tensor(1000 * t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
    if guidance_scale > 1:
        x_t = torch.cat([x_t, x_t])
        timestep = torch.cat([timestep, timestep])
        embeds = torch.cat([negative.embeds.expand_as(embeds), embeds])
        pooled = torch.cat([negative.pooled.expand_as(pooled), pooled])
    with torch.autocast(x_t.device.type, embeds.dtype, enabled=embeds.dtype != torch.float32):
        velocity = transformer(
            hidden_states=x_t.to(embeds.dtype),
            timestep=timestep,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample.float()
    if guidance_scale > 1:
        negative_velocity, positive_velocity = velocity.chunk(2)
        velocity = negative_velocity + guidance_scale * (positive_velocity - negative_velocity)
    return velocity


def predict_flux_velocity(transformer, x_t, t, conditions, negative, guidance_scale):
    """FLUX.1's velocity v(x_t, t, prompt, source), float32 (B, C, h, w). Arguments: `predict_sd3_velocity`.

    Guidance was distilled into the network: its scale is an input, and there is no negative prompt. A token
    is a 2 x 2 patch of a latent. Kontext reads the source as further tokens, whose outputs are not used.
    """
    embeds, pooled, source = conditions
    rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
    tokens = pack_latents(x_t)
    positions = token_positions(0, rows, columns)
    if source is not None:
        tokens = torch.cat([tokens, pack_latents(source)], dim=1)
        positions = torch.cat([positions, token_positions(1, rows, columns)])
    timestep = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
    guidance = None
    if transformer.config.guidance_embeds:
        guidance = torch.full((len(x_t),), guidance_scale, device=x_t.device)
    with torch.autocast(x_t.device.type, embeds.dtype, enabled=embeds.dtype != torch.float32):
        velocity = transformer(
            hidden_states=tokens.to(embeds.dtype),
            timestep=timestep,  # in [0, 1]; SD3 wants it times 1000
            guidance=guidance,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            img_ids=positions.to(x_t.device),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
        ).sample.float()
    velocity = velocity[:, : rows * columns]  # of the image alone, without the source
    return rearrange(velocity, "b (r s) (c p q) -> b c (r p) (s q)", r=rows, s=columns, p=2, q=2)


def pack_latents(latents):
    """Latents (B, C, h, w) -> FLUX.1's tokens (B, h/2 * w/2, 4 C), one for each 2 x 2 patch."""
    return rearrange(latents, "b c (r p) (s q) -> b (r s) (c p q)", p=2, q=2)


def token_positions(image, rows, columns):
    """Where the tokens of an image are: (rows * columns, 3) of image number, row and column."""
    positions = torch.zeros(rows, columns, 3)
    positions[:, :, 0] = image  # 0 is the image that is sampled, 1 the source
    positions[:, :, 1] = torch.arange(rows).unsqueeze(1)
    positions[:, :, 2] = torch.arange(columns)
    return positions.view(rows * columns, 3)


def churned_step(x_t, velocity, t, t_next, churn, noise):
    """One step from t to t_next that draws fresh noise and keeps the ODE's marginals: (B, C, h, w).

    churn: gamma >= 0, (B, 1, 1, 1). An Euler step goes too far, to a time t_over; noise leads back to t_next.
    With sigma(t) = t / (1 - t), t_over is where sigma(t_over) = sigma(t_next) / (1 + gamma):
        t_over = t_next / (1 + gamma - gamma t_next),   x_over = x_t + (t_over - t) v
        x_next = (x_over + t_over sqrt((1 + gamma)^2 - 1) noise) / (1 + gamma t_over)
    gamma is EDM's (arXiv 2206.00364), which adds the noise before the step. gamma = 0 is Euler's step. With
    t = t_next = 1 it replaces a part of the initial noise: x_t / (1 + gamma) and fresh noise.
    """
    t_over = t_next / (1 + churn - churn * t_next)
    x_over = x_t + (t_over - t) * velocity
    added_noise = t_over * ((1 + churn) ** 2 - 1).sqrt() * noise
    return (x_over + added_noise) / (1 + churn * t_over)


def churn_schedule(sigmas, kind, weight, centre, width=0.25):
    """gamma_0 ... gamma_T of a pair, (T + 1,) float64: gamma_0 of the initial noise, gamma_i of the step to
    sigmas[i]. The last, of the step to 0, is 0.

    raw: each is the weight. dirac: gamma_0 = exp(weight) - 1, the others 0. logit-normal: gamma_i =
    exp(weight p_i) - 1, where p is the density of sigmoid(N(centre, width)) at the times, divided by its sum.
    In both, the product of all 1 + gamma_i is exp(weight).
    """
    times = np.array(sigmas[:-1])
    churn = np.zeros(len(sigmas))
    if kind == "raw":
        churn[:-1] = weight
    elif kind == "dirac":
        churn[0] = np.expm1(weight)
    else:
        inner = times < 1  # the density is 0 at t = 1
        t = times[inner]
        logit = np.log(t / (1 - t))
        normal = np.exp(-(((logit - centre) / width) ** 2) / 2)
        density = np.zeros(len(times))
        density[inner] = normal / (t * (1 - t))
        if density.sum() <= 1e-6:  # no time near the centre
            density[:] = 1
        shares = weight * density / density.sum()
        churn[:-1] = np.expm1(shares)
    return churn


# === rollout ===


class Rollout(NamedTuple):
    """A sampled batch, and all that the loss needs to evaluate its steps again."""

    x_0: torch.Tensor  # (B, C, h, w)
    states: torch.Tensor  # (B, T, C, h, w), the x_t
    velocities: torch.Tensor  # (B, T, C, h, w)


class Tuples(NamedTuple):
    """The (image, step) tuples of one update that this process evaluates, in their shuffled order."""

    images: torch.Tensor  # (n,), positions among this process's images
    steps: torch.Tensor  # (n,)


def draw_prompts(num_prompts, count, seed, iteration):
    """Prompt indices for iteration 1, 2, ...: a slice of an endless stream of reshuffled epochs."""
    first = (iteration - 1) * count
    indices = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, num_prompts)
        if position == first or offset == 0:
            order = np.random.default_rng((seed, 1, epoch)).permutation(num_prompts)
        indices.append(int(order[offset]))
    return indices


def split_images(group_sizes, largest_group, num_updates, micro_batch_size, rank, world_size):
    """Which images this process samples, and in which micro-batches.

    group_sizes: images of each of the P prompts. Image k of prompt p has the number p * largest_group + k. An
    update sees the same prompts for any number of processes, and a process gets whole groups of it.
    Returns this process's image numbers and, for each update, its micro-batches as slices of those.
    """
    prompts_per_share = len(group_sizes) // num_updates // world_size
    image_numbers = []
    updates = []
    for update in range(num_updates):
        share_sizes = []  # images of each process in this update
        for process in range(world_size):
            first_prompt = (update * world_size + process) * prompts_per_share
            share_sizes.append(sum(group_sizes[first_prompt : first_prompt + prompts_per_share]))
        bounds = micro_batch_bounds(share_sizes[rank], max(share_sizes), micro_batch_size)
        first_image = len(image_numbers)
        micro_batches = []
        for start, end in zip(bounds, bounds[1:]):
            micro_batches.append(slice(first_image + start, first_image + end))
        updates.append(micro_batches)
        first_prompt = (update * world_size + rank) * prompts_per_share
        for prompt in range(first_prompt, first_prompt + prompts_per_share):
            first_number = prompt * largest_group
            image_numbers += range(first_number, first_number + group_sizes[prompt])
    return image_numbers, updates


def micro_batch_bounds(num_images, most_images, micro_batch_size):
    """Where a process cuts its images into micro-batches: [0, ..., num_images].

    It has as many micro-batches as the process with the most images: with --shard, all processes have to run
    the same number of forward passes. Where they would not be enough, it makes them smaller, but not empty.
    """
    count = min(math.ceil(most_images / micro_batch_size), num_images)
    bounds = [min(number * micro_batch_size, num_images) for number in range(count + 1)]
    if bounds[-2] == num_images:  # the last micro-batch would be empty
        bounds = [number * num_images // count for number in range(count + 1)]
    return bounds


def draw_noise(image_numbers, draws, shape, seed, iteration):
    """Standard normal noise (B, draws, C, h, w), float32 on the CPU. Draw 0 is the initial noise of an image.

    Each image has its own generator, so its noise does not depend on how images are split into batches or
    among processes.
    """
    noise = []
    for number in image_numbers:
        generator = np.random.default_rng((seed, 3, iteration, number))
        noise.append(generator.standard_normal((draws, *shape), np.float32))
    return torch.from_numpy(np.stack(noise))


def deal_tuples(image_numbers, dR, num_images, num_steps, num_updates, seed, iteration):
    """Shuffles the (image, step) tuples of all num_images images, and deals each to one update.

    The order is the same for any number of processes. Returns for each update the Tuples of this process,
    which has the images with these consecutive numbers. Images with dR (B,) of 0 are left out: in a tie,
    nothing is to be learned.
    """
    generator = np.random.default_rng((seed, 4, iteration))
    num_tuples = num_images * num_steps
    order = torch.from_numpy(generator.permutation(num_tuples))
    updates = []
    for tuples in order.split(num_tuples // num_updates):
        images = tuples // num_steps - image_numbers[0]
        steps = tuples % num_steps
        is_here = (images >= 0) & (images < len(image_numbers))
        images = images[is_here].to(dR.device)
        steps = steps[is_here].to(dR.device)
        differs = dR[images] != 0
        updates.append(Tuples(images[differs], steps[differs]))
    return updates


def draw_churn(pairs, sigmas, kind, weight, seed, iteration):
    """A schedule per pair, each twice: (2 * pairs, T + 1) float32. pairs: numbers that identify the pairs.

    The centres of logit-normal schedules are drawn from N(1, 1.5).
    """
    schedules = []
    for pair in pairs:
        generator = np.random.default_rng((seed, 2, iteration, pair))
        centre = generator.normal(1.0, 1.5)
        schedules.append(churn_schedule(sigmas, kind, weight, centre))
    return torch.from_numpy(np.repeat(schedules, 2, axis=0)).float()


@torch.no_grad()
def churned_rollout(velocity_at, noise, sigmas, churn):
    """Samples a batch as a Rollout, with fresh noise in each step.

    velocity_at: a function (x_t, t) -> velocity (B, C, h, w). churn: (B, T + 1), as from `draw_churn`.
    noise: (B, 1 + T, C, h, w). Draw 0 is the initial noise, draw 1 churns it, draw 2 + i churns step i. The
    last step, to 0, has no noise.
    """
    churn = rearrange(churn, "b t -> t b 1 1 1")
    x_t = churned_step(noise[:, 0], 0.0, 1.0, 1.0, churn[0], noise[:, 1])
    states = []
    velocities = []
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        t = sigmas[i]
        t_next = sigmas[i + 1]
        velocity = velocity_at(x_t, t)
        states.append(x_t)
        velocities.append(velocity)
        is_last = i == num_steps - 1
        fresh_noise = 0.0 if is_last else noise[:, 2 + i]
        x_t = churned_step(x_t, velocity, t, t_next, churn[i + 1], fresh_noise)
    return Rollout(x_t, torch.stack(states, dim=1), torch.stack(velocities, dim=1))


# === algorithm ===


def finite_difference(x_0, rewards):
    """Directions (B, C, h, w) and reward differences dR (B,) of x_0 (B, C, h, w), rewards (B,) of pairs.

    The two images of a pair are neighbours; dx and dR are half their differences, with opposite signs.
    direction = dx / mean(dx^2), divided by the mean square and not its root: then dR * direction is the
    finite-difference gradient dR dx / |dx|^2, times the number of elements of a latent. Where latents or
    rewards are equal or a reward is NaN, dR is 0, and so is the loss. Where latents are equal, the direction
    is 0 too.
    """
    x_0 = rearrange(x_0, "(n k) c h w -> n k c h w", k=2)
    rewards = rewards.view(-1, 2)
    dx = (x_0 - x_0.mean(1, keepdim=True)).flatten(0, 1)
    dR = (rewards - rewards.mean(1, keepdim=True)).flatten()
    mean_square = dx.square().flatten(1).mean(1)
    is_equal = mean_square <= 1e-8  # rounding is all that such a pair differs by
    direction = dx / (mean_square + 1e-6).view(-1, 1, 1, 1)
    direction = direction.masked_fill(is_equal.view(-1, 1, 1, 1), 0)
    return direction, dR.nan_to_num(0, 0, 0).masked_fill(is_equal, 0)


def pseudo_log_ratio(velocity, old_velocity, direction, limit=1.0):
    """log rho = mean(direction^2) - mean((v - v_target)^2) for the target v_target = v_old - direction: (B,).

    Means are over the elements (C, h, w) of a latent. rho plays the part of a probability ratio: it is 1 at
    the old velocity and grows towards the target. The direction is subtracted because a smaller velocity
    gives a larger x_0. Written out as -mean((v - v_old)^2 + 2 (v - v_old) direction), it is exactly 0 where
    v = v_old.

    Limited to [-limit, limit], beyond which there is no gradient. Without a limit it grows to
    mean(direction^2), which is large for close pairs, and the gradient of the loss grows with exp(2 log rho).
    """
    change = velocity - old_velocity
    log_ratio = -(change**2 + 2 * change * direction).flatten(1).mean(1)
    return log_ratio.clamp(-limit, limit)


def spo_loss(log_ratio, advantages, clip_range):
    """The objective of SPO (simple policy optimisation) as a loss: -A rho + |A| (rho - 1)^2 / (2 eps): (B,).

    A parabola that is least at rho = 1 + eps for A > 0 and 1 - eps for A < 0, whatever |A|. It pulls back a
    ratio that has gone further, where PPO's clip only stops pushing.
    """
    ratio = log_ratio.exp()
    return -advantages * ratio + advantages.abs() * (ratio - 1) ** 2 / (2 * clip_range)


@torch.no_grad()
def diagnostics(policy_loss, kl, log_ratio, advantages, clip_range):
    """Named sums over a batch, for the log; each input is (B,)."""
    change = log_ratio.exp() - 1
    clipped = (change.abs() > clip_range) & (change * advantages > 0)  # these are pulled back
    return {
        "policy_loss": policy_loss.sum(),
        "kl": kl.sum(),
        "ratio_mean": change.abs().sum(),
        "clipfrac_positive": (clipped & (advantages > 0)).float().sum(),
        "clipfrac_negative": (clipped & (advantages < 0)).float().sum(),
    }


def add_to(totals, values):
    """Adds the values of a dict to those of the same names in totals."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0) + value


def sum_over_processes(tensors):
    """Replaces each tensor by its sum over all processes of the run.

    64 tensors share a collective call: one call for each of a LoRA's many small gradients would take longer.
    """
    if not dist.is_initialized():
        return
    for start in range(0, len(tensors), 64):
        bucket = tensors[start : start + 64]
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(total.view_as(tensor))


def clip_gradients(parameters, max_norm):
    """Scales all gradients by the same factor so that their common norm is at most max_norm.

    Returns the norm before, a scalar tensor.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# === checkpoint ===


def trained_parameters(model):
    """{name: parameter} of what is trained, the LoRA or all weights."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(run_dir, pipe, optimizer, progress):
    """Writes checkpoint/, to resume from, and exports the trained weights. All processes have to call it."""
    weights = {name: parameter.detach() for name, parameter in trained_parameters(pipe.transformer).items()}
    state = {"progress": progress, "weights": weights, "optimizer": optimizer.state_dict()}
    report.write_checkpoint(run_dir, state)
    export_transformer(run_dir, pipe)


def export_transformer(run_dir, pipe):
    """Writes the trained weights for plain diffusers: lora/ is for load_lora_weights, transformer/ for
    from_pretrained. All processes have to call it."""
    transformer = pipe.transformer
    is_lora = hasattr(transformer, "peft_config")
    if not is_lora:
        weights = report.put_together(transformer.state_dict())
    if not report.is_first_process():
        return
    if is_lora:
        with report.replace_folder(run_dir / "lora") as folder:
            # Without this metadata diffusers loads the LoRA with alpha = rank: other images, and no error.
            config = transformer.peft_config["default"].to_dict()
            pipe.save_lora_weights(
                folder,
                get_peft_model_state_dict(transformer),
                transformer_lora_adapter_metadata=config,
            )
    else:
        with report.replace_folder(run_dir / "transformer") as folder:
            # save_pretrained would write the share of this process, so the whole weights are written here.
            transformer.save_config(folder)
            save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def load_checkpoint(run_dir, transformer, optimizer):
    """Restores a checkpoint and returns its progress. Raises BadInput if it is damaged or does not fit.

    There is no random state to restore: all draws depend on the seed and the iteration alone.
    """
    state = report.read_checkpoint(run_dir)
    report.restore_parameters(trained_parameters(transformer), state["weights"])
    report.restore_optimizer(optimizer, state["optimizer"])
    return state["progress"]


# === train ===


def train(args):
    """Runs or resumes an experiment; returns the run's folder."""
    args, run_dir = report.open_run(args, __file__)
    check_args(args)
    prompt_files = load_prompt_files(args.prompts, args.eval_prompts)
    every_prompt = join_prompt_files(prompt_files.values())
    check_model(args, every_prompt)
    device, dtype, rank, world_size = open_device(args.device, args.dtype)
    report.print_folder(run_dir)
    with report.announce(f"loading the rewards {args.rewards}"):
        reward = rewards.build(args.rewards, every_prompt.prompts, every_prompt.metadata, device)
    train_file = prompt_files.pop("train")

    torch.manual_seed(args.seed)  # for the initial weights of the LoRA
    with report.announce(f"loading {args.model}"):
        pipe, transformer, reference = load_model(args, device, dtype)
    parameters = list(trained_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
    resolution = args.resolution or pipe.vae.config.sample_size
    side = resolution // pipe.vae_scale_factor
    latent_shape = (pipe.vae.config.latent_channels, side, side)  # (C, h, w)
    num_tokens = side * side // 4 if is_flux(pipe) else None
    sigmas = get_sigmas(pipe.scheduler, args.num_inference_steps, num_tokens)
    eval_sigmas = get_sigmas(pipe.scheduler, args.eval_num_inference_steps, num_tokens)
    predict_velocity = predict_flux_velocity if is_flux(pipe) else predict_sd3_velocity
    prompt_cache, source_cache = {}, {}

    def conditions_for(prompts, metadata):
        """The Conditions of a batch of these rows."""
        embeds, pooled = encode_prompts(
            pipe, prompts, args.max_sequence_length, prompt_cache, args.offload_text_encoders
        )
        return Conditions(embeds, pooled, encode_sources(pipe, metadata, resolution, source_cache))

    negative = conditions_for([""], [{}])

    def velocity_for(prompts, metadata, network=transformer):
        """A function (x_t, t) -> velocity, for a batch of these rows."""
        conditions = conditions_for(prompts, metadata)

        def velocity_at(x_t, t):
            # Code compiled for inference may round differently from code compiled for training, and the first
            # ratio would not be exactly 1. So compiled blocks run as in training, also in a rollout.
            with torch.set_grad_enabled(torch.is_grad_enabled() or args.compile):
                velocity = predict_velocity(network, x_t, t, conditions, negative, args.guidance_scale)
            return velocity if torch.is_grad_enabled() else velocity.detach()

        return velocity_at

    def sample_for_evaluation(prompts, metadata, numbers):
        """Samples without churn, for rows with these numbers. A row always has the same initial noise."""
        noise = draw_noise(numbers, 1, latent_shape, args.eval_seed, iteration=0).to(device)
        noise = noise.expand(-1, len(eval_sigmas), -1, -1, -1)  # only draw 0 matters
        churn = torch.zeros(len(numbers), len(eval_sigmas), device=device)
        x_0 = churned_rollout(velocity_for(prompts, metadata), noise, eval_sigmas, churn).x_0
        return report.Samples(decode(pipe, x_0), captions=prompts)

    P = args.num_prompts_per_iteration
    K = args.num_images_per_prompt
    U = args.num_updates_per_iteration
    T = args.num_inference_steps
    # Images are split as for a single update, since the tuples of all of them are shuffled.
    image_numbers, only_update = split_images([K] * P, K, 1, args.micro_batch_size, rank, world_size)
    micro_batches = only_update[0]
    times = torch.tensor(sigmas, dtype=torch.float64, device=device)
    nothing = torch.zeros(0, device=device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # a process may have no tuple of an update

    progress = {"iteration": -1}
    if args.resume:
        progress = load_checkpoint(run_dir, transformer, optimizer)
    log = report.Log(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    if args.resume:
        export_transformer(run_dir, pipe)  # a kill may have left an older export
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0 evaluates the base model
        metrics = {"iteration": iteration, "charts/num_images": iteration * P * K}
        clock = report.Clock(device)
        if iteration > 0:
            # 1. Draw prompts, and noise for each image. Pairs are neighbours and share their initial noise.
            drawn = draw_prompts(len(train_file.prompts), P, args.seed, iteration)
            prompts = [train_file.prompts[drawn[number // K]] for number in image_numbers]
            metadata = [train_file.metadata[drawn[number // K]] for number in image_numbers]
            noise = draw_noise(image_numbers, 1 + T, latent_shape, args.seed, iteration)
            noise[1::2, 0] = noise[::2, 0]
            pairs = image_numbers[::2]
            churn = draw_churn(pairs, sigmas, args.churn, args.churn_weight, args.seed, iteration)

            # 2. Sample, and 3. score.
            rollouts = []
            pending_scores = []  # functions that wait for the scores of a micro-batch
            for images in tqdm(micro_batches, desc="sample", leave=False, disable=None):
                velocity_at = velocity_for(prompts[images], metadata[images])
                rollout = churned_rollout(
                    velocity_at, noise[images].to(device), sigmas, churn[images].to(device)
                )
                rollouts.append(rollout)
                pictures = decode(pipe, rollout.x_0)
                clock.stop("sample")
                pending_scores.append(reward.start_scoring(pictures, prompts[images], metadata[images]))
                clock.stop("reward")

            # 4. Differences within pairs, of latents and of rewards.
            scores = report.gather_scores([wait() for wait in pending_scores])
            clock.stop("reward")
            metrics |= report.reward_metrics(scores, [K] * P)
            own_rewards = scores["reward"].split(len(image_numbers))[rank]
            x_0 = torch.cat([rollout.x_0 for rollout in rollouts])
            states = torch.cat([rollout.states for rollout in rollouts])
            velocities = torch.cat([rollout.velocities for rollout in rollouts])
            direction, dR = finite_difference(x_0, own_rewards.to(device))

            learning_rate = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = learning_rate
            # 5. Shuffle all (image, step) tuples, and compare the velocity in each with that of the rollout.
            updates = deal_tuples(image_numbers, dR, P * K, T, U, args.seed, iteration)
            num_terms = P * K * T // U  # of an update's loss, over all processes
            update_logs = []
            for tuples in tqdm(updates, desc="train", leave=False, disable=None):
                totals = diagnostics(nothing, nothing, nothing, nothing, args.clip_range)  # zeros
                for start in range(0, len(tuples.images), args.micro_batch_size):
                    images = tuples.images[start : start + args.micro_batch_size]  # (n,)
                    steps = tuples.steps[start : start + args.micro_batch_size]  # (n,)
                    A = dR[images]
                    x_t = states[images, steps]  # (n, C, h, w)
                    t = times[steps]
                    batch_prompts = [prompts[image] for image in images]
                    batch_metadata = [metadata[image] for image in images]
                    velocity = velocity_for(batch_prompts, batch_metadata)(x_t, t)
                    log_ratio = pseudo_log_ratio(velocity, velocities[images, steps], direction[images])

                    # 6. SPO's objective, and the penalty for leaving the base model.
                    policy_loss = spo_loss(log_ratio, A, args.clip_range)
                    kl = torch.zeros_like(A)
                    if args.kl_coef > 0:
                        with torch.no_grad(), base_weights(transformer, reference) as network:
                            ref_velocity = velocity_for(batch_prompts, batch_metadata, network)(x_t, t)
                        kl = (velocity - ref_velocity).square().flatten(1).mean(1)
                    loss = (policy_loss + args.kl_coef * kl).sum() / num_terms
                    loss.backward()
                    add_to(totals, diagnostics(policy_loss, kl, log_ratio, A, args.clip_range))

                # 7. An optimiser step. Losses are divided by global counts, so processes add up.
                # Gradients that --shard has shared out (DTensor) are sums already.
                gradients = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]
                sum_over_processes(list(totals.values()) + gradients)
                update_log = {name: total / num_terms for name, total in totals.items()}
                update_log["grad_norm"] = clip_gradients(parameters, args.max_grad_norm)
                report.check_finite(update_log)
                if update_log["grad_norm"] > 0:  # else all pairs tie: neither momentum nor decay may step
                    optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                update_logs.append(update_log)
            clock.stop("train")
            for name in update_logs[0]:
                values = torch.stack([update_log[name] for update_log in update_logs])
                metrics["losses/" + name] = values.mean().item()
            metrics["losses/ratio_first"] = update_logs[0]["ratio_mean"].item()
            metrics["losses/learning_rate"] = learning_rate

        is_last = iteration == args.num_iterations
        evaluations = []
        for name, file in report.files_to_evaluate(prompt_files, iteration, args).items():
            evaluation = report.evaluate(
                name, sample_for_evaluation, file, reward, args.micro_batch_size, args.eval_noises
            )
            evaluations.append(evaluation)
        if evaluations:
            clock.stop("evaluate")
        if rank == 0:
            log.write(metrics | clock.metrics(P * K), evaluations)
        if iteration % args.save_every == 0 or is_last:
            save_checkpoint(run_dir, pipe, optimizer, {"iteration": iteration})
    if rank == 0:
        log.close()
    if world_size > 1:
        dist.destroy_process_group()
    return run_dir


if __name__ == "__main__":
    command_line.run(train, Args, __doc__)
