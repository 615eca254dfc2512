"""PromptRL: a language model rewrites prompts, trained together with the flow model and on the same rewards.

Paper: Wang et al. 2026, arXiv 2602.01382v1. Official code: G-U-N/UniRL (read for facts, nothing copied).
Derived from: flow_grpo.py, whose functions it has unchanged. Read that file first.

One iteration; the numbers are those of the comments in `train`:
 1. Draw P prompts, K images for each. A language model rewrites the prompt of every image of a group but
    the last ones, which are drawn from the prompt itself. Where the prompt asks for an edit, the language
    model sees the image to edit.                                             draw_prompts, rewrite
 2. Sample with an SDE in the first W steps. Every image has its own noise.   draw_noise, rollout
 3. Score the images against the original prompt, never against the rewrite.  rewards/
 4. Reward = that score, plus one if the rewrite is well-formed: Eq. (1). Advantage = the z-score over the
    group, originals and rewrites together.             add_format_reward, group_advantages
 5. Language model: policy gradient on the tokens of the rewrites, plus a KL penalty to the model before
    training.                                           reply_losses, reply_objective
 6. Flow model: Flow-GRPO's clipped objective and its KL, on all images.      clipped_loss, gaussian_kl
 7. Take one optimiser step with both models, so that all is on-policy. No gradient crosses from one model to
    the other: a frozen text encoder reads the rewrite.

Differences from the paper and its code:
 1. Originals are kept, as in the paper. The released text-to-image trainer has rewrites only.
 2. Tokens are sampled from the full softmax, whose log-probabilities are trained. The code samples from the
    50 likeliest tokens.
 3. An empty answer is ill-formed; the code counts it as well-formed. One --instruction serves all rewards;
    the code has one for each.
 4. The gradient of each model is clipped to --max-grad-norm. The code does not clip.
 5. Weight decay is 1e-4 instead of 0. The defaults, made for the tiny world, have 256 images per iteration
    instead of 64, a = 0.7 instead of 0.8, and no KL of the flow model instead of beta = 4e-3.
 6. The last step is an ODE step.

Two biases are kept as published. A reply's loss is divided by its number of tokens, so that a token of a long
reply weighs less. The mean of a group includes the image itself, which shrinks the gradient by (K - 1) / K.

Run (time and memory: docs/promptrl.md; the commands for real models were not run with real weights):
  python promptrl.py                                         # the tiny world: 1.2 GB, 4 minutes on one core
  python promptrl.py --model stabilityai/stable-diffusion-3.5-medium --max-sequence-length 256 \\
      --lm Qwen/Qwen2.5-VL-3B-Instruct --max-new-tokens 512 --resolution 512 \\
      --rewards ocr --prompts ocr/train.txt --eval-prompts ocr/test.txt \\
      --lora-rank 32 --learning-rate 3e-4 --lm-lora-rank 32 --lm-learning-rate 1e-5 \\
      --kl-coef 4e-3 --lm-kl-coef 0.01 --clip-range 1e-4 --guidance-scale 4.5 --noise-level 0.8 \\
      --num-inference-steps 20 --sde-window 0 --eval-num-inference-steps 20 --num-iterations 781 \\
      --num-prompts-per-iteration 8 --num-images-per-prompt 8 --num-original-prompts 2 \\
      --micro-batch-size 8 --eval-every 50 --save-every 50 --gradient-checkpointing
  torchrun --nproc_per_node=8 promptrl.py ... --lora-rank 0 --learning-rate 3e-7 \\
      --lm-lora-rank 0 --lm-learning-rate 1e-6

The last command has the paper's settings for OCR: all weights are trained. By our estimate that takes 110 GB
per GPU. The rates of the LoRAs are our choice.

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
import re
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
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from rewards import BadInput, command_line, report
from rewards.command_line import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed
from rewards.prompts import join_prompt_files, load_prompt_files
from rewards.sources import load_source
from rewards.weights import from_hub, read_config, read_pipeline_configs


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
    eval_every: PositiveInt = 10
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
    lm: str = "tiny/vlm"
    """Language model that rewrites prompts: a Qwen2.5-VL, as a transformers folder or a hub id."""
    instruction: str = "Improve this image prompt: {prompt}. Answer inside <answer> </answer>."
    """What the language model is asked. {prompt} stands for the prompt."""
    edit_instruction: str = "Improve this edit instruction: {prompt}. Answer inside <answer> </answer>."
    """The same where the prompts have images to edit. The language model then sees the image, too."""
    source_size: NonNegativeInt = 0
    """Side of the images to edit as the language model sees them, in pixels. 0: that of --resolution."""
    resolution: NonNegativeInt = 0
    """Side of the square images, in pixels. 0: the model's own."""
    max_sequence_length: Annotated[int, Range(0, 512)] = 0
    """Length of a prompt in T5 tokens, padding included: at most 256 for SD3.5, 512 for FLUX.1, which draws
    another image at another length. 0: SD3 without its T5 (tiny/sd3 has none), FLUX.1 at its own length."""
    lora_rank: Annotated[int, Range(0, 1024)] = 0
    """Rank of the LoRA of the flow model; its alpha is twice the rank. 0: train all weights."""
    lm_lora_rank: Annotated[int, Range(0, 1024)] = 0
    """Rank of the LoRA of the language model; its alpha is twice the rank. 0: train all weights that read and
    write text."""
    gradient_checkpointing: bool = False
    """Recompute activations of the flow model in the backward pass: much less memory, about a third more
    time."""
    offload_text_encoders: bool = False
    """Keep the text encoders on the GPU only while they encode: frees up to 11 GB, costs up to a second per
    iteration with new prompts."""
    shard: bool = False
    """Split the weights of both models among the processes, where one GPU does not hold them (FSDP2). A LoRA
    stays whole."""
    compile: bool = False
    """Compile the blocks of the transformer: faster, after a minute or more. Needs a C compiler."""
    prompts: str = "tiny/prompts/fold_0/train.jsonl"
    """Training prompts: a .txt with one prompt per line, or a .jsonl with "prompt" and metadata per line."""
    eval_prompts: str = ""
    """Held-out prompts. Empty: the --prompts file with `eval` or `dev` for `train` in its name."""
    rewards: str = "geneval"
    """Rewards with optional weights: geneval:1,jpeg:0.2. A function of your own is module:function."""

    # Sampling
    num_prompts_per_iteration: PositiveInt = 32
    """P, prompts per iteration, over all processes."""
    num_images_per_prompt: Annotated[int, Range(2, 10_000)] = 8
    """K, images per prompt: the size of a group."""
    num_original_prompts: NonNegativeInt = 2
    """How many images of a group are drawn from the prompt itself; each of the others gets its own rewrite.
    If it equals --num-images-per-prompt, no language model is loaded."""
    max_new_tokens: Annotated[int, Range(1, 4096)] = 32
    """N, the largest number of tokens of a reply of the language model."""
    num_inference_steps: Annotated[int, Range(2, 1000)] = 8
    """T, denoising steps of a training sample. It may be lower than in the evaluation."""
    eval_num_inference_steps: Annotated[int, Range(1, 1000)] = 10
    """Denoising steps of an evaluation sample."""
    guidance_scale: Annotated[float, Range(0, 100)] = 1.0
    """Guidance in sampling, loss and evaluation. SD3: classifier-free; up to 1: none, at half the cost.
    FLUX.1: an input of the network, usually 3.5 (Kontext: 2.5)."""
    noise_level: Annotated[float, Range(0.001, 2)] = 0.7
    """a, the strength of the noise in stochastic steps."""
    sde_type: Literal["flow", "cps"] = "flow"
    """Stochastic sampler: flow is Flow-GRPO's SDE, cps is CPS (arXiv 2509.05952)."""
    sde_window: Annotated[int, Range(0, 999)] = 4
    """W, how many of the first steps are stochastic and trained. 0: all steps but the last."""
    micro_batch_size: PositiveInt = 64
    """Images per forward pass. Sets memory and speed; does not change the result."""

    # Algorithm
    trained: Literal["both", "flow", "lm"] = "both"
    """Which model is trained; the other one is frozen. A frozen language model still rewrites."""
    format_coef: NonNegativeFloat = 1.0
    """Reward of a well-formed reply, one with a text between <answer> tags, on top of that of the image."""
    clip_range: Annotated[float, Range(0, 1, above_low=True)] = 1e-3
    """eps, PPO's clip range for the flow model. Tiny because log-probabilities are averaged over the latent,
    not summed."""
    kl_coef: NonNegativeFloat = 0.0
    """beta, weight of the flow model's KL penalty to the base model. Above 0 it costs a forward pass per
    trained step."""
    lm_kl_coef: NonNegativeFloat = 0.01
    """Weight of the language model's KL penalty to itself before training."""

    # Optimisation
    num_iterations: NonNegativeInt = 20
    """Iterations, each with one rollout and one optimiser step."""
    learning_rate: Annotated[float, Range(0, 1)] = 6e-4
    """Learning rate of AdamW for the flow model, annealed linearly to zero over the run."""
    lm_learning_rate: Annotated[float, Range(0, 1)] = 2e-3
    """Learning rate of AdamW for the language model, annealed in the same way."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm, for each model by itself."""


def check_args(args):
    """Raises BadInput where flags contradict each other. Their ranges stand beside them, in Args."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_prompts_per_iteration % world_size:
        raise BadInput(
            f"--num-prompts-per-iteration {args.num_prompts_per_iteration} must be a multiple of "
            f"{world_size}, the number of processes"
        )
    if args.num_prompts_per_iteration * args.num_images_per_prompt > 1_000_000:
        raise BadInput("--num-prompts-per-iteration times --num-images-per-prompt must be at most 1,000,000")
    if args.shard and (world_size == 1 or args.compile):
        raise BadInput("--shard needs several processes, and goes without --compile")
    if args.sde_window >= args.num_inference_steps:
        raise BadInput(f"--sde-window {args.sde_window} must be below --num-inference-steps")
    if args.sde_type == "cps" and args.noise_level > 1:
        raise BadInput("--noise-level must be at most 1 with --sde-type cps: at 1 all noise is drawn anew")
    if args.num_original_prompts > args.num_images_per_prompt:
        raise BadInput(
            f"--num-original-prompts {args.num_original_prompts} must be at most --num-images-per-prompt, "
            f"{args.num_images_per_prompt}"
        )
    if args.trained == "lm" and args.num_original_prompts == args.num_images_per_prompt:
        raise BadInput("--num-original-prompts must be below --num-images-per-prompt with --trained lm")
    for name in ("instruction", "edit_instruction"):
        if "{prompt}" not in getattr(args, name):
            raise BadInput(f"{command_line.flag(name)} must have {{prompt}} in it, where the prompt goes")


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


def check_lm(args):
    """Raises BadInput where the language model's configuration does not fit the flags. Loads no weights."""
    config = read_config(args.lm, "config.json")
    if config["model_type"] != "qwen2_5_vl":
        raise BadInput(f"--lm {args.lm} is a {config['model_type']}; supported: qwen2_5_vl, a Qwen2.5-VL")
    text_config = config.get("text_config", config)  # older files have its entries at the top
    try:
        width = int(text_config["hidden_size"])
        positions = int(text_config["max_position_embeddings"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"--lm {args.lm}: its config.json lacks the model's sizes") from None
    if args.lm_lora_rank > width:
        raise BadInput(f"--lm-lora-rank {args.lm_lora_rank} must be at most {width}, the width of {args.lm}")
    if args.max_new_tokens >= positions:
        raise BadInput(
            f"--max-new-tokens {args.max_new_tokens} must be below {positions}, the positions of {args.lm}"
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


def load_lm(args, device, dtype, keep_reference):
    """(lm, tokenizer, reference). Trainable parameters (LoRA or all) are float32 and require grad.

    The models are on the CPU. reference is the language model before training, for the KL: a frozen copy, or
    None where the LoRA can be switched off instead, or where no reference is kept. The vision tower is never
    trained.
    """
    tokenizer = from_hub(AutoTokenizer.from_pretrained, args.lm, padding_side="left")
    if tokenizer.chat_template is None:
        raise BadInput(f"--lm {args.lm} has no chat template beside its tokenizer")
    lm = from_hub(Qwen2_5_VLForConditionalGeneration.from_pretrained, args.lm, dtype=dtype)
    lm.requires_grad_(False).eval()
    # Ignore the checkpoint's sampling defaults, so that we sample from the distribution that we train.
    # Special tokens other than the end of the turn are suppressed: an image token without an image would
    # crash the next forward pass. So are the rows of the output layer beyond the vocabulary.
    end_of_turn = tokenizer.eos_token_id
    suppressed = set(tokenizer.all_special_ids)
    suppressed.update(range(len(tokenizer), lm.lm_head.out_features))
    suppressed.discard(end_of_turn)
    lm.generation_config = GenerationConfig(
        suppress_tokens=sorted(suppressed),
        eos_token_id=end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
    )
    reference = None
    if args.lm_lora_rank > 0:
        lora = LoraConfig(
            r=args.lm_lora_rank,
            lora_alpha=2 * args.lm_lora_rank,
            target_modules=r"model\.language_model\..*_proj",
        )
        lm.add_adapter(lora)
    else:
        if keep_reference:
            reference = copy.deepcopy(lm)
        lm.requires_grad_(True)
        lm.model.visual.requires_grad_(False)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lm.forward = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(lm.forward)
    return lm, tokenizer, reference


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


# === language model ===


class Policy(NamedTuple):
    """The language model that writes prompts, and what turns questions into its input."""

    lm: torch.nn.Module
    tokenizer: object
    processor: object  # of pictures. None: it is shown none


class Dialogue(NamedTuple):
    """Questions and the replies that were sampled: all that the loss needs to evaluate them again."""

    questions: list  # of B texts
    replies: torch.Tensor  # (B, N) token ids
    mask: torch.Tensor  # (B, N) bool: the tokens of a reply up to its end of turn, that one included
    log_probs: torch.Tensor  # (B, N) of these tokens


class Rewrites(NamedTuple):
    """What the language model made of a batch of prompts."""

    prompts: list  # B new prompts
    well_formed: list  # of B bool: whether the reply has an answer between its tags
    dialogue: Dialogue


def fill(template, **texts):
    """The template with each {name} replaced by its text, in one pass: a text may have {prompt} in it."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def as_text(tokenizer, text):
    """The text, its special tokens broken by a space: a prompt that spells the mark of an image or the end of
    a turn is read as text."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, token[0] + " " + token[1:])
    return text


def ask(policy, questions):
    """Model inputs of a user's turn per question, with the reply about to begin: {name: (B, L)}.

    Questions are padded on the left, so that every reply begins in the same column.
    """
    turns = []
    for question in questions:
        turns.append([{"role": "user", "content": as_text(policy.tokenizer, question)}])
    inputs = policy.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    inputs = dict(inputs.to(policy.lm.device))
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # 0: all of it is text
    return inputs


def load_sources(metadata, size):
    """The images that the rows ask to edit, (B, 3, size, size) in [0, 1], or None where there are none."""
    if "source" not in metadata[0]:
        return None
    return torch.stack([load_source(row["source"], size) for row in metadata])


def to_bytes(images, size):
    """What the policy sees of images (B, 3, H, W): (B, size, size, 3) uint8. Size 0 does not scale them."""
    if size > 0:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    pixels = (images * 255).round().clamp(0, 255).byte().cpu()
    return rearrange(pixels, "b c h w -> b h w c")


def ask_about(policy, questions, pictures, sources=None):
    """Model inputs as from `ask`, with one of the pictures (B, H, W, 3) uint8 before each question.

    sources: further pictures of the same size, which come first. None: there are none.
    """
    columns = [column for column in (sources, pictures) if column is not None]
    if not columns:
        return ask(policy, questions)
    images = torch.stack(columns, dim=1).flatten(0, 1)  # question by question
    pixels = policy.processor(images=list(images.numpy()), return_tensors="pt")
    patches = int(pixels["image_grid_thw"][0].prod())  # of an image; all are of one size
    num_tokens = patches // policy.processor.merge_size**2
    chats = []
    for question in questions:
        content = [{"type": "image"}] * len(columns)
        content.append({"type": "text", "text": as_text(policy.tokenizer, question)})
        turn = {"role": "user", "content": content}
        chat = policy.tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        chats.append(chat.replace("<|image_pad|>", num_tokens * "<|image_pad|>"))
    inputs = dict(policy.tokenizer(chats, padding=True, return_tensors="pt"))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == policy.lm.config.image_token_id).int()
    inputs.update(pixels)
    return {name: value.to(policy.lm.device) for name, value in inputs.items()}


def draw_token_noise(image_numbers, turn, num_images, max_new_tokens, seed, iteration):
    """Standard normal noise (B, N) that picks the tokens of an image's prompt, at its turn 0, 1, ...

    For draw_noise the images have the numbers 0 to P K - 1, and num_images is P K. Each turn takes the next
    P K numbers, so that no token is drawn from the noise of an image.
    """
    numbers = [(1 + turn) * num_images + number for number in image_numbers]
    return draw_noise(numbers, 1, (max_new_tokens,), seed, iteration)[:, 0]


def choose_tokens(log_probs, noise):
    """A token for each row of log_probs (B, V): the likeliest if noise is None, else a sample: (B, 1).

    noise: standard normal (B,). Its cumulative probability u is uniform; the token is the one at which the
    cumulative distribution of the tokens passes u. So a row's token depends on no other row.
    """
    if noise is None:
        return log_probs.argmax(-1, keepdim=True)
    cumulative = log_probs.double().exp().cumsum(-1)
    u = torch.special.ndtr(noise.double()).unsqueeze(-1).to(log_probs.device)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


class TokenSampler:
    """A logits processor that leaves one token per row, and notes its log-probability.

    The sampler of transformers has one random state for all rows of a batch.
    """

    def __init__(self, noise):
        self.noise = noise  # (B, N), or None for the likeliest tokens
        self.log_probs = []  # of the tokens so far, (B, 1) each

    def __call__(self, _, scores):
        log_probs = scores.float().log_softmax(-1)  # of a suppressed token -inf
        noise = None if self.noise is None else self.noise[:, len(self.log_probs)]
        tokens = choose_tokens(log_probs, noise)
        self.log_probs.append(log_probs.gather(-1, tokens))
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0)


def sample_replies(lm, inputs, max_new_tokens, noise=None):
    """Replies (B, N) to `ask` and their log-probabilities (B, N): sampled by noise (B, N), or greedy."""
    sampler = TokenSampler(noise)
    ids = lm.generate(**inputs, logits_processor=[sampler], max_new_tokens=max_new_tokens)
    question_length = inputs["input_ids"].shape[1]
    return ids[:, question_length:], torch.cat(sampler.log_probs, dim=1)


def reply_log_probs(lm, inputs, replies):
    """Log-probabilities of the replies' tokens, and entropies, (B, N) each, by one pass over all tokens."""
    is_text = torch.zeros_like(replies)
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], replies], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_text + 1], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], is_text], dim=1)
    output = lm(**inputs, logits_to_keep=replies.shape[1] + 1)
    logits = output.logits[:, :-1].float()  # each position predicts the next token
    suppressed = torch.tensor(lm.generation_config.suppress_tokens, device=lm.device)
    log_probs = logits.index_fill(-1, suppressed, -torch.inf).log_softmax(-1)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(-1)
    return log_probs.gather(-1, replies.unsqueeze(-1)).squeeze(-1), entropy


def reference_log_probs(lm, reference, inputs, replies):
    """Log-probabilities (B, N) of the replies' tokens under the language model before training."""
    with torch.no_grad(), base_weights(lm, reference) as network:
        log_probs, _ = reply_log_probs(network, inputs, replies)
    return log_probs


def reply_mask(replies, end_of_turn):
    """(B, N) bool: the tokens up to the first end of turn, that one included; all where there is none."""
    is_end = (replies == end_of_turn).int()
    ends_before = is_end.cumsum(1) - is_end
    return ends_before == 0


def parse_answer(reply):
    """(prompt, well-formed): the last <answer> that is not empty, else the reply without stray tags."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)
    answers = [answer for answer in answers if answer.strip()]
    text = answers[-1] if answers else re.sub(r"</?answer>", " ", reply)
    return " ".join(text.split()), len(answers) > 0


def converse(policy, questions, inputs, max_new_tokens, noise):
    """Rewrites of a batch: samples replies to questions with these model inputs, and parses them."""
    replies, log_probs = sample_replies(policy.lm, inputs, max_new_tokens, noise)
    prompts = []
    well_formed = []
    for reply in policy.tokenizer.batch_decode(replies, skip_special_tokens=True):
        prompt, has_answer = parse_answer(reply)
        prompts.append(prompt)
        well_formed.append(has_answer)
    mask = reply_mask(replies, policy.tokenizer.eos_token_id)
    return Rewrites(prompts, well_formed, Dialogue(questions, replies, mask, log_probs))


def rewrite(policy, instruction, prompts, pictures, max_new_tokens, noise=None):
    """Rewrites of B prompts, sampled by noise (B, N) or greedy. A reply without an answer is taken whole.

    pictures: the images to edit, as for `ask_about`, or None.
    """
    questions = [fill(instruction, prompt=prompt) for prompt in prompts]
    inputs = ask_about(policy, questions, pictures)
    return converse(policy, questions, inputs, max_new_tokens, noise)


def is_truncated(tokenizer, prompt):
    """Whether a prompt is longer than a text encoder reads. Words beyond that get credit without effect."""
    return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length


def sample_rewritten(rewrite_rows, sample, prompts, metadata, numbers):
    """Samples with greedy rewrites in place of the prompts. sample: as for `report.evaluate`.

    rewrite_rows: a function (prompts, metadata) -> Rewrites.
    """
    rewrites = rewrite_rows(prompts, metadata).prompts
    captions = [f"{prompt}\n-> {text}" for prompt, text in zip(prompts, rewrites)]
    return sample(rewrites, metadata, numbers)._replace(captions=captions)


# === algorithm ===


def add_format_reward(rewards, formatted, coef):
    """R = R_image + coef * [well-formed], Eq. (1) of arXiv 2602.01382, for rewards (P, K): (P, K).

    formatted: (P, number of rewrites), 1 or 0; the images with rewrites come first in a group. An original
    has no format: it gets the mean of its group's rewrites, so that format neither helps nor harms it.
    """
    num_rewrites = formatted.shape[1]
    mean_format = formatted.sum(1, keepdim=True) / max(num_rewrites, 1)
    of_originals = mean_format.expand(-1, rewards.shape[1] - num_rewrites)
    return rewards + coef * torch.cat([formatted, of_originals], dim=1)


def group_advantages(rewards, advantage_std, limit=5.0):
    """Advantages (P, K) of rewards (P, K): (reward - mean of the group) / standard deviation.

    GRPO's advantage (arXiv 2402.03300): an image is compared with the other images of its prompt, so that no
    value function has to be learned. The deviation is the group's own ("group", used here) or that of all
    rewards ("global", used by Flow-GRPO). NaN rewards are ignored; they, and groups whose rewards are all
    equal, get advantage 0. Advantages are limited to [-limit, limit].
    """
    rewards = rewards.double()
    valid = ~rewards.isnan()
    centred = (rewards - rewards.nanmean(1, keepdim=True)).masked_fill(~valid, 0)
    if advantage_std == "group":
        count = valid.sum(1, keepdim=True).clamp(min=1)
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    else:
        std = rewards[valid].std(correction=0)
    return (centred / (std + 1e-4)).clamp(-limit, limit).float()


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


def token_kl(log_probs, ref_log_probs):
    """k3, an estimate of the KL from sampled tokens: exp(d) - d - 1 with d = ref_log_prob - log_prob: (B, N).

    It is never negative. As a loss on samples of the policy its gradient is that of KL(ref || policy), on
    average, and at ref = policy it is zero.
    """
    difference = ref_log_probs - log_probs
    return difference.exp() - difference - 1


def mean_per_reply(values, mask):
    """Means (B,) of values (B, N) over the tokens of each reply."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def reply_objective(log_probs, ref_log_probs, mask, advantages):
    """Policy loss and KL of each reply, (B,) each, means over its tokens. Log-probabilities, mask: (B, N).

    GRPO with one update per rollout, as in the official code: the loss of a token is -rho A, where the ratio
    rho = exp(log_prob - log_prob of now) is 1, is never clipped, and carries the gradient.
    """
    log_probs = log_probs.where(mask, 0)  # what follows the end of a reply may have -inf
    ref_log_probs = ref_log_probs.where(mask, 0)
    ratio = (log_probs - log_probs.detach()).exp()
    policy_loss = mean_per_reply(-ratio * advantages.unsqueeze(1), mask)
    return policy_loss, mean_per_reply(token_kl(log_probs, ref_log_probs), mask)


def reply_losses(policy, reference, dialogue, pictures, advantages, has_kl):
    """Named losses and diagnostics of a dialogue's replies, (B,) each, means over the tokens of a reply.

    reference: the language model before training, as for `base_weights`; without has_kl it is not asked, and
    the KL is 0. pictures: what the policy saw, as for `ask_about`. advantages: (B,).
    """
    inputs = ask_about(policy, dialogue.questions, pictures)
    log_probs, entropy = reply_log_probs(policy.lm, inputs, dialogue.replies)
    ref_log_probs = log_probs.detach()
    if has_kl:
        ref_log_probs = reference_log_probs(policy.lm, reference, inputs, dialogue.replies)
    policy_loss, kl = reply_objective(log_probs, ref_log_probs, dialogue.mask, advantages)
    log_ratio = log_probs.detach() - dialogue.log_probs
    change = log_ratio.where(dialogue.mask, 0).expm1().abs()
    return {
        "lm_policy_loss": policy_loss,
        "lm_kl": kl,
        "lm_ratio_first": mean_per_reply(change, dialogue.mask),
        "lm_entropy": mean_per_reply(entropy, dialogue.mask),
    }


def gather_numbers(values):
    """A list of numbers or booleans as a float32 tensor, joined with the lists of all other processes."""
    return report.gather(torch.tensor(values, dtype=torch.float32))


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


def save_models(run_dir, models, optimizer, progress):
    """Writes checkpoint/, to resume from. models: {name: model}. All processes have to call it."""
    state = {"progress": progress, "optimizer": optimizer.state_dict()}
    for model_name, model in models.items():
        parameters = trained_parameters(model)
        state[model_name] = {name: parameter.detach() for name, parameter in parameters.items()}
    report.write_checkpoint(run_dir, state)


def load_models(run_dir, models, optimizer):
    """Restores a checkpoint and returns its progress. Raises BadInput if it is damaged or does not fit.

    There is no random state to restore: all draws depend on the seed and the iteration alone.
    """
    state = report.read_checkpoint(run_dir)
    for model_name, model in models.items():
        report.restore_parameters(trained_parameters(model), state[model_name])
    report.restore_optimizer(optimizer, state["optimizer"])
    return state["progress"]


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


def export_lm(run_dir, policy):
    """Writes the trained language model: lm_lora/ is for peft, lm/ for transformers and for --lm.

    All processes have to call it.
    """
    is_lora = hasattr(policy.lm, "peft_config")
    weights = None  # save_pretrained then takes what the model holds: a LoRA is whole
    if not is_lora:
        weights = report.put_together(policy.lm.state_dict())
    if not report.is_first_process():
        return
    with report.replace_folder(run_dir / ("lm_lora" if is_lora else "lm")) as folder:
        policy.lm.save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        if policy.processor is not None:
            policy.processor.save_pretrained(folder)


def export_models(run_dir, pipe, policy, trained):
    """Writes the weights of what is trained. All processes have to call it."""
    if trained != "lm":
        export_transformer(run_dir, pipe)
    if trained != "flow" and policy:
        export_lm(run_dir, policy)


# === train ===


def train(args):
    """Runs or resumes an experiment; returns the run's folder."""
    args, run_dir = report.open_run(args, __file__)
    check_args(args)
    P = args.num_prompts_per_iteration
    K = args.num_images_per_prompt
    num_rewrites = K - args.num_original_prompts  # of a group
    has_lm_kl = args.lm_kl_coef > 0 and args.trained != "flow"
    if num_rewrites > 0:
        check_lm(args)
    prompt_files = load_prompt_files(args.prompts, args.eval_prompts)
    every_prompt = join_prompt_files(prompt_files.values())
    check_model(args, every_prompt)
    device, dtype, rank, world_size = open_device(args.device, args.dtype)
    report.print_folder(run_dir)
    with report.announce(f"loading the rewards {args.rewards}"):
        reward = rewards.build(args.rewards, every_prompt.prompts, every_prompt.metadata, device)
    train_file = prompt_files.pop("train")
    has_sources = "source" in every_prompt.metadata[0]
    instruction = args.edit_instruction if has_sources else args.instruction

    torch.manual_seed(args.seed)  # for the initial weights of the LoRAs
    policy = None
    lm_reference = None
    lm_parameters = []
    if num_rewrites > 0:
        with report.announce(f"loading {args.lm}"):
            lm, tokenizer, lm_reference = load_lm(args, device, dtype, has_lm_kl)
            processor = None
            if has_sources:
                processor = from_hub(Qwen2VLImageProcessorPil.from_pretrained, args.lm)
            for model in (lm, lm_reference):
                if model is not None and args.shard:
                    shard(model, device)
                    model._is_fsdp_managed_module = True  # `generate` then waits for the slowest process
                elif model is not None:
                    model.to(device)
        policy = Policy(lm, tokenizer, processor)
    with report.announce(f"loading {args.model}"):
        pipe, transformer, reference = load_model(args, device, dtype)
    models = {"transformer": transformer}
    if args.trained == "lm":
        transformer.requires_grad_(False)
        reference = None
    if policy:
        models["lm"] = policy.lm
        if args.trained == "flow":
            policy.lm.requires_grad_(False)
        lm_parameters = list(trained_parameters(policy.lm).values())
    flow_parameters = list(trained_parameters(transformer).values())
    groups = [{"params": flow_parameters}, {"params": lm_parameters}]  # each has its own learning rate
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=1e-4)
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
        """Samples by the ODE, for rows with these numbers. A row's initial noise does not change in a run."""
        noise = draw_noise(numbers, 1, latent_shape, args.eval_seed, iteration=0).to(device)
        x_0, _ = rollout(velocity_for(prompts, metadata), noise, eval_sigmas, (), 0.0, "flow")
        return report.Samples(decode(pipe, x_0), captions=prompts)

    def show_sources(metadata):
        """What the language model sees of the rows' images to edit: (B, H, W, 3) uint8, or None."""
        sources = load_sources(metadata, resolution)
        return None if sources is None else to_bytes(sources, args.source_size)

    def rewrite_rows(prompts, metadata, noise=None):
        """Rewrites for a batch of these rows."""
        return rewrite(policy, instruction, prompts, show_sources(metadata), args.max_new_tokens, noise)

    sample_enhanced = functools.partial(sample_rewritten, rewrite_rows, sample_for_evaluation)

    # The loss uses the micro-batches of the rollout. Kernels round differently at another batch size, and the
    # first ratio would not be exactly 1.
    image_numbers, updates = split_images([K] * P, K, 1, args.micro_batch_size, rank, world_size)
    (slices,) = updates  # there is one optimiser step per rollout
    # The first images of each group have rewrites; these are the micro-batches of the language model.
    images_with_rewrites = [image for image in range(len(image_numbers)) if image % K < num_rewrites]
    lm_batches = []
    for start in range(0, len(images_with_rewrites), args.micro_batch_size):
        lm_batches.append(images_with_rewrites[start : start + args.micro_batch_size])
    # The stochastic steps come first. A frozen flow model samples as it will be used, by the ODE.
    window = range(args.sde_window or args.num_inference_steps - 1)
    if args.trained == "lm":
        window = range(0)

    progress = {"iteration": -1}
    if args.resume:
        progress = load_models(run_dir, models, optimizer)
    log = report.Log(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    if args.resume:
        export_models(run_dir, pipe, policy, args.trained)  # a kill may have left an older export
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0 evaluates the base models
        metrics = {"iteration": iteration, "charts/num_images": iteration * P * K}
        clock = report.Clock(device)
        if iteration > 0:
            # 1. Draw prompts, and sample a rewrite for most images.
            drawn = draw_prompts(len(train_file.prompts), P, args.seed, iteration)
            originals = [train_file.prompts[drawn[number // K]] for number in image_numbers]
            metadata = [train_file.metadata[drawn[number // K]] for number in image_numbers]
            prompts = list(originals)  # what each image is drawn from
            rewrites = []  # a Rewrites for each of lm_batches
            reply_tokens = []
            well_formed = []
            truncated = []
            distinct = []
            for images in tqdm(lm_batches, desc="rewrite", leave=False, disable=None):
                numbers = [image_numbers[image] for image in images]
                noise = draw_token_noise(numbers, 0, P * K, args.max_new_tokens, args.seed, iteration)
                asked_about = [originals[image] for image in images]
                batch = rewrite_rows(asked_about, [metadata[image] for image in images], noise)
                rewrites.append(batch)
                reply_tokens += batch.dialogue.mask.sum(1).tolist()
                well_formed += batch.well_formed
                for image, text in zip(images, batch.prompts):
                    first_of_group = image - image % K
                    truncated.append(is_truncated(pipe.tokenizer, text))
                    distinct.append(text not in prompts[first_of_group:image])
                    prompts[image] = text
            clock.stop("rewrite")

            # 2. Sample, and 3. score against the original prompts.
            noise = draw_noise(image_numbers, 1 + len(window), latent_shape, args.seed, iteration)
            micro_batches = []
            pending_scores = []  # functions that wait for the scores of a micro-batch
            for images in tqdm(slices, desc="sample", leave=False, disable=None):
                velocity_at = velocity_for(prompts[images], metadata[images])
                x_0, trained_steps = rollout(
                    velocity_at, noise[images].to(device), sigmas, window, args.noise_level, args.sde_type
                )
                micro_batches.append(MicroBatch(images, trained_steps))
                pictures = decode(pipe, x_0)
                clock.stop("sample")
                pending_scores.append(reward.start_scoring(pictures, originals[images], metadata[images]))
                clock.stop("reward")

            # 4. Advantages, from the rewards of all processes.
            scores = report.gather_scores([wait() for wait in pending_scores])
            clock.stop("reward")
            metrics |= report.reward_metrics(scores, [K] * P)
            image_rewards = scores["reward"].view(P, K)
            formatted = gather_numbers(well_formed).view(P, num_rewrites)
            if policy:
                metrics["charts/format_rate"] = formatted.mean().item()
                metrics["charts/reply_tokens"] = gather_numbers(reply_tokens).mean().item()
                metrics["charts/truncated_fraction"] = gather_numbers(truncated).mean().item()
                metrics["charts/distinct_fraction"] = gather_numbers(distinct).mean().item()
                metrics["charts/reward_rewrites"] = image_rewards[:, :num_rewrites].nanmean().item()
            if args.num_original_prompts > 0:
                metrics["charts/reward_originals"] = image_rewards[:, num_rewrites:].nanmean().item()
            total_rewards = add_format_reward(image_rewards, formatted, args.format_coef)
            advantages = group_advantages(total_rewards, "group")
            advantages = advantages.flatten().split(len(image_numbers))[rank].to(device)

            # 5. The language model's loss: a mean over all rewrites of the iteration.
            names = "policy_loss kl ratio_mean clipfrac_positive clipfrac_negative".split()
            names += "lm_policy_loss lm_kl lm_ratio_first lm_entropy".split()
            totals = {name: torch.zeros((), device=device) for name in names}  # of a frozen model: 0
            num_replies = P * num_rewrites
            if args.trained != "flow":
                for images, batch in zip(lm_batches, rewrites):
                    A = advantages[images]
                    pictures = show_sources([metadata[image] for image in images])
                    losses = reply_losses(policy, lm_reference, batch.dialogue, pictures, A, has_lm_kl)
                    loss = losses["lm_policy_loss"] + args.lm_kl_coef * losses["lm_kl"]
                    (loss.sum() / num_replies).backward()
                    for name, values in losses.items():
                        totals[name] += values.detach().sum() / num_replies

            # 6. The flow model's loss: a mean over all images and trained steps of the iteration.
            num_terms = P * K * len(window)
            for images, trained_steps in tqdm(micro_batches, desc="train", leave=False, disable=None):
                A = advantages[images]
                velocity_at = velocity_for(prompts[images], metadata[images])
                for old in trained_steps:
                    t = sigmas[old.index]
                    velocity = velocity_at(old.x_t, t)
                    mean, std = step_mean_std(
                        old.x_t, velocity, sigmas, old.index, args.noise_level, args.sde_type
                    )
                    log_ratio = log_prob(old.x_next, mean, std) - old.log_prob
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
                    sums = diagnostics(policy_loss, kl, log_ratio, A, args.clip_range)
                    for name, value in sums.items():
                        totals[name] += value / num_terms

            # 7. One optimiser step for both. Losses are divided by global counts, so processes add up.
            # Gradients that --shard has shared out (DTensor) are sums already.
            parameters = flow_parameters + lm_parameters
            gradients = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]
            sum_over_processes(list(totals.values()) + gradients)
            totals["ratio_first"] = totals.pop("ratio_mean")  # the only update of an iteration is the first
            totals["grad_norm"] = clip_gradients(flow_parameters, args.max_grad_norm)
            totals["lm_grad_norm"] = clip_gradients(lm_parameters, args.max_grad_norm)
            report.check_finite(totals)
            anneal = 1 - (iteration - 1) / args.num_iterations
            flow_group, lm_group = optimizer.param_groups
            flow_group["lr"] = args.learning_rate * anneal
            lm_group["lr"] = args.lm_learning_rate * anneal
            optimizer.step()
            optimizer.zero_grad()
            clock.stop("train")
            for name, total in totals.items():
                metrics["losses/" + name] = total.item()
            metrics["losses/learning_rate"] = flow_group["lr"]
            metrics["losses/lm_learning_rate"] = lm_group["lr"]

        is_last = iteration == args.num_iterations
        evaluations = []
        for name, file in report.files_to_evaluate(prompt_files, iteration, args).items():
            if policy is None or iteration == 0 or is_last:  # on the way, the rewrites alone: half the cost
                evaluation = report.evaluate(
                    name, sample_for_evaluation, file, reward, args.micro_batch_size, args.eval_noises
                )
                evaluations.append(evaluation)
            if policy:
                name = name + "_enhanced"
                evaluation = report.evaluate(
                    name, sample_enhanced, file, reward, args.micro_batch_size, args.eval_noises
                )
                evaluations.append(evaluation)
        if evaluations:
            clock.stop("evaluate")
        if rank == 0:
            log.write(metrics | clock.metrics(P * K), evaluations)
        if iteration % args.save_every == 0 or is_last:
            save_models(run_dir, models, optimizer, {"iteration": iteration})
            export_models(run_dir, pipe, policy, args.trained)
    if rank == 0:
        log.close()
    if world_size > 1:
        dist.destroy_process_group()
    return run_dir


if __name__ == "__main__":
    command_line.run(train, Args, __doc__)
