"""SuperFlow: Flow-GRPO that samples more where it is unsure, and credits each step by the noise it had.

Paper: arXiv 2512.17951. It was reported withdrawn in July 2026, because it had been submitted without the
consent of all its authors; no number of it is relied on here. Official code: none.
Derived from: flow_grpo.py. `diff -u flow_grpo.py superflow.py` shows the method and nothing else.

A tracker counts the successes and failures of each row of the training file. The value of a prompt is
successes / (successes + failures), the reward that is expected of it. Before the first iteration, the tracker
starts from a few images of the base model.

One iteration; the numbers are those of the comments in `train`. SuperFlow changes 1, 4 and 6:
 1. Draw P prompts, those of uncertain value more often, and up to K images   uncertainty, choose_prompts,
    for each: the more uncertain the value, the more images.                  choose_group_sizes, draw_noise
 2. Sample with an SDE that has the ODE's marginals: each step is an action.  step_mean_std, rollout
 3. Score the images with a black-box reward, which must lie in [0, 1].       rewards/
 4. Advantage = (reward - value of the prompt), standardised over the batch.  tracker_advantages
    Only then does the tracker learn the rewards.                             update_tracker
 5. Recompute the log-probability of the sampled steps under the policy.      log_prob
 6. PPO's clipped objective, where the noise of a step is the weight of its   step_weights, clipped_loss,
    advantage, plus a KL penalty to the base model.                           gaussian_kl
 7. Take a few optimiser steps per rollout. The first is on-policy (its ratio is exactly 1), so only later
    ones can clip.

Of the paper, the abstract, the introduction and figure 1 were read, and a reading note that reproduces its
formulas. They leave these points open; the answers are our choice:
 1. Bins have equal width in value (1 - value), the only simple rule that gives the note's example. The floor
    of the uncertainty is 0.05. Prompts are chosen from a pool of candidates, as in the code of SPO
    (single-stream policy optimisation).
 2. The tracker forgets at a constant rate, once per visit. It starts from images of the base model, as in
    SPO. It belongs to a row of the prompt file: two rows with the same text have a tracker each.
 3. The noise of a step includes sqrt(dt), as in figure 1. The weights have mean 1, which makes them those of
    TempFlow-GRPO (arXiv 2508.04324). The KL penalty is not weighted.
 4. There are P prompts per iteration, so the number of images varies. The loss is the mean over all images
    and steps. Advantages are limited to 5 standard deviations before they are weighted.

The rest is flow_grpo.py's; the differences that its header lists hold here too. To switch a part off:
--pool 1 (prompt choice), --num-bins 1 (group sizes), --baseline group (tracker), --no-step-credit (weights).

Run (time and memory: docs/superflow.md; the commands for real models were not run with real weights):
  python superflow.py                                        # the tiny world, under 10 minutes on two cores
  python superflow.py --model stabilityai/stable-diffusion-3.5-medium --max-sequence-length 128 \\
      --resolution 512 --rewards ocr --prompts ocr/train.txt --eval-prompts ocr/test.txt \\
      --lora-rank 32 --learning-rate 3e-4 --kl-coef 0.004 --clip-range 1e-4 --guidance-scale 4.5 \\
      --num-inference-steps 10 --sde-window 0 --eval-num-inference-steps 40 --start-images 0 \\
      --num-iterations 1000 --num-prompts-per-iteration 8 --num-images-per-prompt 8 --noise-level 0.7 \\
      --micro-batch-size 8 --gradient-checkpointing
  torchrun --nproc_per_node=8 superflow.py ... --num-prompts-per-iteration 48 --num-images-per-prompt 24

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
import functools
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
    num_prompts_per_iteration: PositiveInt = 16
    """P, prompts per iteration, over all processes."""
    num_images_per_prompt: Annotated[int, Range(2, 10_000)] = 16
    """K, images per prompt in the largest groups, those of the most uncertain prompts."""
    num_inference_steps: Annotated[int, Range(2, 1000)] = 8
    """T, denoising steps of a training sample. It may be lower than in the evaluation."""
    eval_num_inference_steps: Annotated[int, Range(1, 1000)] = 10
    """Denoising steps of an evaluation sample."""
    guidance_scale: Annotated[float, Range(0, 100)] = 1.0
    """Guidance in sampling, loss and evaluation. SD3: classifier-free; up to 1: none, at half the cost.
    FLUX.1: an input of the network, usually 3.5 (Kontext: 2.5)."""
    noise_level: Annotated[float, Range(0.001, 2)] = 1.0
    """a, the strength of the noise in stochastic steps."""
    sde_type: Literal["flow", "cps"] = "flow"
    """Stochastic sampler: flow is Flow-GRPO's SDE, cps is CPS (arXiv 2509.05952)."""
    sde_window: Annotated[int, Range(0, 999)] = 2
    """W, how many consecutive steps are stochastic and trained, placed at random in the noisier half. 0: all
    steps but the last."""
    micro_batch_size: PositiveInt = 64
    """Images per forward pass. Sets memory and speed; does not change the result."""

    # Algorithm
    advantage_std: Literal["global", "group"] = "global"
    """Standard deviation that advantages are divided by: over all images, or over those of the prompt."""
    clip_range: Annotated[float, Range(0, 1, above_low=True)] = 1e-3
    """eps, PPO's clip range. Tiny because log-probabilities are averaged over the latent, not summed."""
    ratio_norm: bool = False
    """Use GRPO-Guard's ratio: unbiased, and of the same scale at every step."""
    kl_coef: NonNegativeFloat = 0.0
    """beta, weight of the KL penalty to the base model. Above 0 it costs a forward pass per trained step."""

    # Optimisation
    num_iterations: NonNegativeInt = 96
    """Iterations, each with one rollout."""
    num_updates_per_iteration: PositiveInt = 2
    """U, optimiser steps per rollout. Each uses a different 1/U of the prompts."""
    learning_rate: Annotated[float, Range(0, 1)] = 2e-4
    """Learning rate of AdamW, annealed linearly to zero over the run."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm."""

    # SuperFlow
    pool: Annotated[int, Range(1, 1000)] = 4
    """Candidates per drawn prompt, of which uncertain ones are chosen more often. 1: none is preferred."""
    num_bins: Annotated[int, Range(1, 10_000)] = 4
    """Bins of uncertainty. A group has K images in the most uncertain bin, K - 1 in the next, and so on. 1:
    every group has K images."""
    baseline: Literal["tracker", "group"] = "tracker"
    """What a reward is compared with: the tracked value of the prompt, or the mean of the group."""
    step_credit: bool = True
    """Weight the advantage at each step by the noise of that step."""
    forgetting: Annotated[float, Range(0, 1, below_high=True)] = 0.9
    """Decay of a prompt's counts per visit: the part that remains when its new rewards are counted."""
    start_images: Annotated[int, Range(0, 1000)] = 2
    """Images of the base model per training prompt, from which the tracker starts. They are sampled before
    the training, which takes long if there are many prompts. 0: all values start at 1/2."""


def check_args(args):
    """Raises BadInput where flags contradict each other. Their ranges stand beside them, in Args."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    share = args.num_updates_per_iteration * world_size
    if args.num_prompts_per_iteration % share:
        raise BadInput(
            f"--num-prompts-per-iteration {args.num_prompts_per_iteration} must be a multiple of {share}: "
            "updates times processes"
        )
    if args.num_prompts_per_iteration * args.num_images_per_prompt > 1_000_000:
        raise BadInput("--num-prompts-per-iteration times --num-images-per-prompt must be at most 1,000,000")
    if args.shard and (world_size == 1 or args.compile):
        raise BadInput("--shard needs several processes, and goes without --compile")
    smallest_group = args.num_images_per_prompt - args.num_bins + 1
    if args.shard and math.ceil(args.num_images_per_prompt / args.micro_batch_size) > smallest_group:
        raise BadInput("--shard needs as many micro-batches in all processes: raise --micro-batch-size")
    if args.sde_window >= args.num_inference_steps:
        raise BadInput(f"--sde-window {args.sde_window} must be below --num-inference-steps")
    if args.sde_type == "cps" and args.noise_level > 1:
        raise BadInput("--noise-level must be at most 1 with --sde-type cps: at 1 all noise is drawn anew")
    if args.num_bins > args.num_images_per_prompt:
        raise BadInput(f"--num-bins {args.num_bins} must be at most --num-images-per-prompt")
    if args.pool * args.num_prompts_per_iteration > 1_000_000:
        raise BadInput("--pool times --num-prompts-per-iteration must be at most 1,000,000")


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


def step_mean_std(x_t, velocity, sigmas, i, noise_level, sde_type):
    """Mean (B, C, h, w) and standard deviation (a number) of step i, from t = sigmas[i] to t' = sigmas[i+1].

    flow, the SDE of Flow-GRPO (arXiv 2505.05470): an Euler-Maruyama step with dt = t - t' > 0. Its marginals
    are those of the ODE: the noise explores, and the terms with sigma_t^2 pull back what it adds.
        sigma_t = a sqrt(t / (1 - t)),   std = sigma_t sqrt(dt)
        mean = x_t (1 - sigma_t^2 dt / (2 t)) - v (1 + sigma_t^2 (1 - t) / (2 t)) dt
    cps, arXiv 2509.05952: a mix of the predicted image x_0 = x_t - t v and the predicted noise
    x_1 = x_t + (1 - t) v, where fresh noise replaces a part of x_1. No excess noise is left in the image.
        std = t' sin(a pi / 2),   mean = (1 - t') x_0 + t' cos(a pi / 2) x_1
    With a = 0 both reduce to an Euler step of the ODE. Steps are identified by index because comparing float
    times is fragile.
    """
    t = sigmas[i]
    t_next = sigmas[i + 1]
    dt = t - t_next
    if sde_type == "cps":
        angle = noise_level * math.pi / 2
        x_0 = x_t - t * velocity
        x_1 = x_t + (1 - t) * velocity
        mean = (1 - t_next) * x_0 + t_next * math.cos(angle) * x_1
        return mean, t_next * math.sin(angle)
    # sigma_t diverges at t = 1. In the first step the denominator uses t' instead, as in Flow-GRPO's code,
    # which makes its std equal to a.
    denominator = 1 - t_next if i == 0 else 1 - t
    variance = noise_level**2 * t / denominator
    mean = x_t * (1 - variance * dt / (2 * t)) - velocity * (1 + variance * (1 - t) / (2 * t)) * dt
    return mean, math.sqrt(variance * dt)


def log_prob(x_next, mean, std):
    """Gaussian log-density of a step, the MEAN over the elements (C, h, w) of a latent: (B,).

    For each element, log N(x; mean, std^2) = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2. As in DDPO
    and Flow-GRPO's code it is not summed: a sum over 65,536 elements would leave any clip range at once.
    """
    density = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean, reference_mean, std):
    """KL divergence of two steps with equal std, the mean over the elements of a latent: (B,).

    KL = (mean - reference_mean)^2 / (2 std^2), Flow-GRPO's closed form: how far the policy has moved from
    the base model, in units of the step's noise.
    """
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std**2)


# === rollout ===


class TrainedStep(NamedTuple):
    """A stochastic step of a sampled batch: all that the loss needs to evaluate it again."""

    index: int  # i: the step went from sigmas[i] to sigmas[i + 1]
    x_t: torch.Tensor  # (B, C, h, w)
    x_next: torch.Tensor  # (B, C, h, w), what was sampled
    mean: torch.Tensor  # (B, C, h, w)
    log_prob: torch.Tensor  # (B,)


class MicroBatch(NamedTuple):
    """Images of one process that share a forward pass, in the rollout and again in the loss."""

    images: slice  # of this process's images
    trained_steps: list  # of TrainedStep, as from `rollout`


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


def draw_window(num_inference_steps, sde_window, seed, iteration):
    """The steps that are stochastic and trained: consecutive ones in the noisier half (Flow-GRPO-Fast)."""
    if sde_window == 0:  # all but the last: its std is so small that densities overflow
        return range(num_inference_steps - 1)
    last_start = max(num_inference_steps // 2 - sde_window, 0)
    start = int(np.random.default_rng((seed, 2, iteration)).integers(last_start + 1))
    return range(start, start + sde_window)


@torch.no_grad()
def rollout(velocity_at, noise, sigmas, window, noise_level, sde_type):
    """Samples a batch: stochastic steps inside the window, ODE steps outside.

    velocity_at: a function (x_t, t) -> velocity (B, C, h, w). noise: (B, 1 + W, C, h, w).
    Returns x_0 (B, C, h, w) and a TrainedStep per step of the window. All of it is float32, exactly what the
    sampler continued from: with anything rounded, the first ratio would not be 1.
    """
    x_t = noise[:, 0]
    trained_steps = []
    for i in range(len(sigmas) - 1):
        velocity = velocity_at(x_t, sigmas[i])
        if i in window:
            mean, std = step_mean_std(x_t, velocity, sigmas, i, noise_level, sde_type)
            x_next = mean + std * noise[:, 1 + len(trained_steps)]
            trained_steps.append(TrainedStep(i, x_t, x_next, mean, log_prob(x_next, mean, std)))
        else:
            x_next = x_t + (sigmas[i + 1] - sigmas[i]) * velocity
        x_t = x_next
    return x_t, trained_steps


# === algorithm ===


def tracker_advantages(rewards, baselines, advantage_std, limit=5.0):
    """Advantages (P, K) of rewards (P, K): reward - baseline of the prompt, standardised over the batch.

    baselines: (P, 1). A value that was known before the images gives a signal to groups of equal rewards too,
    relative to other prompts. The mean of all differences is subtracted. The standard deviation is that of
    all differences ("global") or the group's own ("group"). NaN rewards, which also fill up smaller groups,
    are ignored; they, and differences that are all equal, get advantage 0. Advantages are limited to
    [-limit, limit].
    """
    rewards = rewards.double()
    valid = ~rewards.isnan()
    differences = rewards - baselines
    if advantage_std == "group":
        centred = (rewards - rewards.nanmean(1, keepdim=True)).masked_fill(~valid, 0)
        count = valid.sum(1, keepdim=True).clamp(min=1)
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    else:
        std = differences[valid].std(correction=0)
    advantages = (differences - differences[valid].mean()) / (std + 1e-8)
    without_signal = ~valid | (std < 1e-6)
    return advantages.masked_fill(without_signal, 0).clamp(-limit, limit).float()


def update_tracker(counts, rows, rewards, forgetting):
    """New counts (num_prompts, 2) of successes and failures, from rewards (B,) of the prompts rows (B,).

        successes <- forgetting * successes + sum of r,   failures <- forgetting * failures + sum of 1 - r
    A prompt forgets once per visit (our choice), however many images it has: they are all of one policy. NaN
    rewards are ignored. Raises BadInput for rewards outside of [0, 1], which are no share of a success.
    """
    if ((rewards < 0) | (rewards > 1)).any():
        raise BadInput("the tracker needs rewards in [0, 1]: choose such, with weights that add up to 1")
    valid = ~rewards.isnan()
    outcomes = torch.stack([rewards, 1 - rewards], dim=1)  # (B, 2)
    counts = counts.clone()
    counts[rows.unique()] *= forgetting
    return counts.index_add(0, rows[valid], outcomes[valid].double())


def uncertainty(value, floor=0.05):
    """sqrt(value (1 - value) + floor), for values (B,): a prompt is chosen with a probability like this.

    sqrt(value (1 - value)) is the standard deviation of a reward that is 0 or 1. The floor keeps solved and
    hopeless prompts in the draw; 0.05 is our choice.
    """
    return (value * (1 - value) + floor).sqrt()


def choose_prompts(candidates, weights, count, seed, iteration):
    """Draws count of the candidates (a tensor) without replacement, with probabilities like the weights.

    They keep the candidates' order, so nothing changes where all candidates are taken.
    """
    probabilities = (weights / weights.sum()).numpy()
    generator = np.random.default_rng((seed, 4, iteration))
    chosen = generator.choice(len(candidates), count, replace=False, p=probabilities)
    chosen.sort()
    return candidates[chosen]


def choose_group_sizes(value, largest_group, num_bins):
    """Images per prompt, integers (P,), for the values (P,): largest_group - bin + 1.

    bin = min(num_bins, 1 + floor(num_bins (1 - 2 value)^2)). Bin 1 is the most uncertain. All bins have the
    same width in value (1 - value), our choice, since (1 - 2 value)^2 = 1 - 4 value (1 - value).
    """
    certainty = (1 - 2 * value) ** 2
    bins = (1 + num_bins * certainty).long()
    return largest_group - bins.clamp(max=num_bins) + 1


def step_weights(stds):
    """Weights eta * std of the advantage at each step; eta = 1 / mean std, our choice, gives them the mean 1.

    The gradient of a step's log-density is proportional to 1 / std. The weight undoes this; without it, the
    steps with the least noise would dominate.
    """
    return [std * len(stds) / sum(stds) for std in stds]


def normalised_log_ratio(log_ratio, mean, old_mean, std):
    """GRPO-Guard's log-ratio (arXiv 2510.22319): std (log_ratio + |mean - old_mean|^2 / (2 std^2)): (B,).

    A Gaussian's log-ratio is biased downwards by that square and scales with 1 / std. What is left here is
    the mean of z (mean - old_mean), where z is the noise: zero on average and of one size at all steps, so
    that one clip range fits them all.
    """
    return std * (log_ratio + gaussian_kl(mean, old_mean, std))


def clipped_loss(log_ratio, advantages, clip_range):
    """PPO's pessimistic objective as a loss, Eq. (7) of arXiv 1707.06347: (B,).

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)): once the ratio rho has moved by eps in the direction that the
    advantage A asks for, there is no gradient to move further.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio)


@torch.no_grad()
def diagnostics(policy_loss, kl, log_ratio, advantages, clip_range):
    """Named sums over a batch, for the log; each input is (B,)."""
    change = log_ratio.exp() - 1
    clipped = (change.abs() > clip_range) & (change * advantages > 0)  # these have no gradient
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

    def sample_for_evaluation(prompts, metadata, numbers, seed=args.eval_seed):
        """Samples by the ODE, for rows with these numbers. A row's initial noise does not change in a run."""
        noise = draw_noise(numbers, 1, latent_shape, seed, iteration=0).to(device)
        x_0, _ = rollout(velocity_for(prompts, metadata), noise, eval_sigmas, (), 0.0, "flow")
        return report.Samples(decode(pipe, x_0), captions=prompts)

    P = args.num_prompts_per_iteration
    K = args.num_images_per_prompt
    U = args.num_updates_per_iteration
    num_rows = len(train_file.prompts)
    stds = []  # of all steps but the last, which is never trained
    for i in range(args.num_inference_steps - 1):
        _, std = step_mean_std(0.0, 0.0, sigmas, i, args.noise_level, args.sde_type)
        stds.append(std)
    weights = [1.0] * len(stds)
    if args.step_credit:
        weights = step_weights(stds)

    progress = {"iteration": -1, "num_images": 0}
    if args.resume:
        progress = load_checkpoint(run_dir, transformer, optimizer)
    log = report.Log(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    if args.resume:
        export_transformer(run_dir, pipe)  # a kill may have left an older export
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0 evaluates the base model
        metrics = {"iteration": iteration}
        clock = report.Clock(device)
        if iteration == 0:
            # The tracker starts as in SPO: half a success and half a failure, plus the rewards of the base
            # model's images, scaled to the sum at which the counts settle with one image per visit.
            num_images = num_rows * args.start_images
            if num_images > args.num_iterations * P * K > 0:
                command_line.say(
                    f"warning: the tracker starts from {num_images:,} images of the base model, which are "
                    "more than the training samples: a lower --start-images takes less time, 0 none"
                )
            start_file = join_prompt_files([train_file] * args.start_images)
            sample_start = functools.partial(sample_for_evaluation, seed=args.seed)
            start = report.evaluate(
                "start", sample_start, start_file, reward, args.micro_batch_size, num_shown=0
            )
            start_rewards = [start.scores["reward"][image] for image in range(num_images)]
            start_rewards = torch.tensor(start_rewards)
            rows = torch.arange(num_rows).repeat(args.start_images)
            counts = torch.full((num_rows, 2), 0.5, dtype=torch.float64)
            counts = update_tracker(counts, rows, start_rewards, forgetting=1.0)
            counts /= (1 - args.forgetting) * counts.sum(1, keepdim=True)
            clock.stop("start")
        if iteration > 0:
            # 1. Draw prompts and their numbers of images by uncertainty, and noise for each image.
            counts = progress["counts"]
            value = counts[:, 0] / counts.sum(1)  # of every training prompt
            candidates = draw_prompts(num_rows, args.pool * P, args.seed, iteration)
            candidates = torch.tensor(candidates)
            preference = uncertainty(value[candidates])
            drawn = choose_prompts(candidates, preference, P, args.seed, iteration)
            group_sizes = choose_group_sizes(value[drawn], K, args.num_bins)
            num_images = int(group_sizes.sum())
            # The loss uses the micro-batches of the rollout. Kernels round differently at another batch size,
            # and the first ratio would not be exactly 1.
            image_numbers, updates = split_images(
                group_sizes.tolist(), K, U, args.micro_batch_size, rank, world_size
            )
            prompts = [train_file.prompts[drawn[number // K]] for number in image_numbers]
            metadata = [train_file.metadata[drawn[number // K]] for number in image_numbers]
            window = draw_window(args.num_inference_steps, args.sde_window, args.seed, iteration)
            noise = draw_noise(image_numbers, 1 + len(window), latent_shape, args.seed, iteration)

            # 2. Sample, and 3. score.
            rollouts = []  # for each update, its MicroBatches
            pending_scores = []  # functions that wait for the scores of a micro-batch
            for slices in tqdm(updates, desc="sample", leave=False, disable=None):
                micro_batches = []
                for images in slices:
                    velocity_at = velocity_for(prompts[images], metadata[images])
                    x_0, trained_steps = rollout(
                        velocity_at, noise[images].to(device), sigmas, window, args.noise_level, args.sde_type
                    )
                    micro_batches.append(MicroBatch(images, trained_steps))
                    pictures = decode(pipe, x_0)
                    clock.stop("sample")
                    pending_scores.append(reward.start_scoring(pictures, prompts[images], metadata[images]))
                    clock.stop("reward")
                rollouts.append(micro_batches)

            # 4. Advantages, from the rewards of all processes.
            scores = report.gather_scores([wait() for wait in pending_scores])
            clock.stop("reward")
            numbers = report.gather(torch.tensor(image_numbers))  # of all images, in the order of the scores
            order = torch.unique_consecutive(numbers // K)  # of the prompts, likewise
            metrics |= report.reward_metrics(scores, group_sizes[order].tolist())
            group_rewards = torch.full((P, K), math.nan)  # NaN where a group is smaller than K
            group_rewards[numbers // K, numbers % K] = scores["reward"]
            groups = [group_rewards[p, : group_sizes[p]] for p in range(P)]
            group_means = torch.stack([group.nanmean() for group in groups])
            metrics["charts/group_size"] = num_images / P
            value_errors = (value[drawn] - group_means).abs()
            metrics["charts/value_error"] = value_errors.nanmean().item()
            baselines = value[drawn] if args.baseline == "tracker" else group_means
            baselines = baselines.view(P, 1)
            advantages = tracker_advantages(group_rewards, baselines, args.advantage_std)
            advantages = advantages.flatten()[image_numbers].to(device)
            # The tracker learns the rewards only now: a baseline must not depend on what it is compared with.
            rows = drawn.repeat_interleave(K)
            counts = update_tracker(counts, rows, group_rewards.flatten(), args.forgetting)

            learning_rate = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = learning_rate
            images_per_update = group_sizes.view(U, -1).sum(1)  # over all processes
            update_logs = []
            for update, micro_batches in enumerate(tqdm(rollouts, desc="train", leave=False, disable=None)):
                num_terms = int(images_per_update[update]) * len(window)  # of this update's loss
                totals = {}
                for images, trained_steps in micro_batches:
                    velocity_at = velocity_for(prompts[images], metadata[images])
                    for old in trained_steps:
                        A = weights[old.index] * advantages[images]

                        # 5. The log-probability of the sampled step, under the policy as it is now.
                        t = sigmas[old.index]
                        velocity = velocity_at(old.x_t, t)
                        mean, std = step_mean_std(
                            old.x_t, velocity, sigmas, old.index, args.noise_level, args.sde_type
                        )
                        log_ratio = log_prob(old.x_next, mean, std) - old.log_prob
                        if args.ratio_norm:
                            log_ratio = normalised_log_ratio(log_ratio, mean, old.mean, std)

                        # 6. The clipped objective, and the KL penalty.
                        policy_loss = clipped_loss(log_ratio, A, args.clip_range)
                        kl = torch.zeros_like(A)
                        if args.kl_coef > 0:
                            with torch.no_grad(), base_weights(transformer, reference) as network:
                                ref_velocity = velocity_for(prompts[images], metadata[images], network)(
                                    old.x_t, t
                                )
                            ref_mean, _ = step_mean_std(
                                old.x_t, ref_velocity, sigmas, old.index, args.noise_level, args.sde_type
                            )
                            kl = gaussian_kl(mean, ref_mean, std)
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
                optimizer.step()
                optimizer.zero_grad()
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
        num_images_so_far = progress["num_images"] + num_images
        progress = {"iteration": iteration, "counts": counts, "num_images": num_images_so_far}
        metrics["charts/num_images"] = num_images_so_far
        if rank == 0:
            log.write(metrics | clock.metrics(num_images), evaluations)
        if iteration % args.save_every == 0 or is_last:
            save_checkpoint(run_dir, pipe, optimizer, progress)
    if rank == 0:
        log.close()
    if world_size > 1:
        dist.destroy_process_group()
    return run_dir


if __name__ == "__main__":
    command_line.run(train, Args, __doc__)
