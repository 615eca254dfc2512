"""PromptLoop: a multimodal model sees the unfinished image and writes the prompt for the steps to come.

Paper: arXiv 2510.00430 (CVPR 2026), whose body was not read: docs/promptloop.md lists what is our choice.
Official code: none.

Read this file beside promptrl.py, function by function, not as a diff of flow_grpo.py. Functions of the same
name have the same code. Where promptrl.py has ask, rewrite, mean_per_reply, reply_objective and reply_losses,
this file has ask_about, refine, sum_per_reply, token_objective and token_losses.

The image model is a black box. Only the policy, a language model that also sees images, is trained.

One iteration; the numbers are those of the comments in `train`:
 1. Draw P prompts, K images for each, and the steps before which their prompts are refined.  draw_schedule
 2. Run the diffusers pipeline as it is. Before such a step its callback shows the clean image that the
    last step was heading for. That costs no call of the image model.         sample, clean_prediction
 3. The policy sees that image, the prompt in use and the original one, and writes the prompt for the steps
    to come.                                                                  refine
 4. Score the final image against the original prompt.                        rewards/
 5. Advantage = the z-score over the group. All refinements of an image share it.
                                                                              group_advantages
 6. GRPO on the tokens, all of which weigh the same, plus a KL penalty to the policy before training.
                                                                              token_losses, token_objective
 7. Take one optimiser step.

Differences from the paper, as far as it is known:
 1. The KL goes to the policy before training. The paper's goes to the policy that sampled, which has no
    gradient where each sample is used once. --lm-kl old is the paper's.
 2. The defaults, made for the tiny world, train all weights of the policy. The paper trains a LoRA.

Run (time and memory: docs/promptloop.md; the commands for real models were not run with real weights):
  python promptloop.py                                       # the tiny world: 1.2 GB, 9 minutes on one core
  python promptloop.py --evaluate runs/X --model OTHER       # no training: run X's policy writes for OTHER
  torchrun --nproc_per_node=4 promptloop.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
      --lm Qwen/Qwen2.5-VL-3B-Instruct --lm-lora-rank 32 --lm-learning-rate 1e-5 --lm-kl-coef 0.01 \\
      --preview-size 448 --max-new-tokens 77 --num-refinements 5 \\
      --rewards imagereward --prompts pickapic/train.txt --eval-prompts pickapic/test.txt \\
      --num-inference-steps 50 --eval-num-inference-steps 50 --guidance-scale 5 --num-iterations 1000 \\
      --num-prompts-per-iteration 16 --num-images-per-prompt 8 --micro-batch-size 4 \\
      --eval-every 100 --save-every 100

Known of the paper are its models, 5 refinements and 50 steps. The other settings of the last command are our
choice.

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
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no notes about optional packages
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("importing torch and diffusers ...", flush=True)  # some seconds

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, FluxKontextPipeline
from einops import rearrange
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
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
    evaluate: str = ""
    """Run folder whose trained policy is evaluated with the image model given here. Nothing is trained.
    --lm, --lm-lora-rank, --ask, --preview-size and --max-new-tokens are read from that run."""
    eval_every: PositiveInt = 12
    """Iterations between evaluations. The model is evaluated before and after the training, too."""
    eval_noises: PositiveInt = 1
    """Images drawn for each held-out prompt, from as many noises."""
    eval_wordings: bool = False
    """Also evaluate other wordings of the held-out prompts, paraphrased and hard, before and after."""
    eval_seed: Seed = 0
    """Seeds these noises: runs with the same number draw their held-out images from the same noises."""
    save_every: PositiveInt = 12
    """Iterations between checkpoints."""
    track: bool = False
    """Mirror the metrics to Weights & Biases."""
    wandb_project_name: str = "flow-rl"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user."""

    # Model and data
    model: str = "tiny/sd3"
    """Image model: a diffusers pipeline of Stable Diffusion 3 or XL, FLUX.1 or FLUX.1-Kontext, as a folder or
    a hub id."""
    flow_lora: str = ""
    """LoRA to load on top of the image model, in diffusers' format, such as runs/X/lora of another
    algorithm."""
    lm: str = "tiny/vlm"
    """The policy, a language model that refines prompts: a Qwen2.5-VL, as a transformers folder or a hub
    id."""
    ask: str = "Current prompt: {current}. Original prompt: {prompt}. Improve it inside <answer> </answer>."
    """What the policy is asked, after "Preview at 40%." or "No preview yet.". {current} stands for the prompt
    in use, {prompt} for the original one."""
    preview_size: Annotated[int, Range(0, 3584)] = 0
    """Side in pixels of the previews that the policy sees, a multiple of 28. 0: the side of the images."""
    resolution: NonNegativeInt = 0
    """Side of the square images, in pixels. 0: the model's own."""
    max_sequence_length: Annotated[int, Range(0, 512)] = 0
    """Length of a prompt in T5 tokens (SD3.5 uses up to 256). 0: leave T5 out of Stable Diffusion 3 (tiny/sd3
    has none); FLUX.1 then uses its tokenizer's own, 512."""
    lm_lora_rank: Annotated[int, Range(0, 1024)] = 0
    """Rank of the LoRA of the policy; its alpha is twice the rank. 0: train all weights that read and write
    text."""
    shard: bool = False
    """Split the weights of the policy among the processes while it is trained, where one GPU does not hold
    their gradients and moments too (FSDP2). A LoRA stays whole."""
    prompts: str = "tiny/prompts/fold_0/train.jsonl"
    """Training prompts: a .txt with one prompt per line, or a .jsonl with "prompt" and metadata per line."""
    eval_prompts: str = ""
    """Held-out prompts. Empty: the --prompts file with `eval` or `dev` for `train` in its name."""
    rewards: str = "geneval"
    """Rewards with optional weights: geneval:1,jpeg:0.2. A function of your own is module:function."""

    # Sampling
    num_prompts_per_iteration: PositiveInt = 16
    """P, prompts per iteration, over all processes."""
    num_images_per_prompt: Annotated[int, Range(2, 10_000)] = 8
    """K, images per prompt: the size of a group."""
    share_noise: bool = True
    """Start all images of a prompt from the same noise, so that they differ only in their refined prompts."""
    num_refinements: Annotated[int, Range(1, 1000)] = 5
    """How many times the prompt of an image is refined while it is sampled."""
    feedback: Literal["preview", "none", "shuffled"] = "preview"
    """What the policy sees of the image: a preview, nothing, or (as a control) another prompt's preview."""
    max_new_tokens: Annotated[int, Range(1, 4096)] = 32
    """N, the largest number of tokens of a reply of the policy."""
    num_inference_steps: Annotated[int, Range(2, 1000)] = 8
    """T, denoising steps of a training sample. It may be lower than in the evaluation."""
    eval_num_inference_steps: Annotated[int, Range(1, 1000)] = 10
    """Denoising steps of an evaluation sample."""
    guidance_scale: Annotated[float, Range(0, 100)] = 1.0
    """Classifier-free guidance in sampling and evaluation. Up to 1: none, at half the cost. FLUX.1 takes the
    scale as an input instead."""
    micro_batch_size: PositiveInt = 64
    """Images per forward pass. Sets memory and speed; does not change the result."""

    # Algorithm
    token_clip_range: Annotated[float, Range(0, 1, above_low=True)] = 0.2
    """eps, PPO's clip range for the ratio of a token."""
    lm_kl: Literal["base", "old"] = "base"
    """What the KL penalty compares the policy with: base, the policy before training, or old, the policy that
    sampled."""
    lm_kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL penalty."""

    # Optimisation
    num_iterations: NonNegativeInt = 24
    """Iterations, each with one rollout and one optimiser step."""
    lm_learning_rate: Annotated[float, Range(0, 1)] = 1e-3
    """Learning rate of AdamW, annealed linearly to zero over the run."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm."""


def check_args(args):
    """Raises BadInput where flags contradict each other. Their ranges stand beside them, in Args."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_prompts_per_iteration % world_size:
        raise BadInput(
            f"--num-prompts-per-iteration {args.num_prompts_per_iteration} must be a multiple of "
            f"{world_size}, the number of processes"
        )
    if args.shard and world_size == 1:
        raise BadInput("--shard needs several processes")
    if args.num_prompts_per_iteration * args.num_images_per_prompt > 1_000_000:
        raise BadInput("--num-prompts-per-iteration times --num-images-per-prompt must be at most 1,000,000")
    most_refinements = args.eval_num_inference_steps
    if not args.evaluate:
        most_refinements = min(most_refinements, args.num_inference_steps)
    if args.num_refinements > most_refinements:
        raise BadInput(
            f"--num-refinements {args.num_refinements} must be at most {most_refinements}, "
            "one per denoising step"
        )
    if "{prompt}" not in args.ask and "{current}" not in args.ask:
        raise BadInput(
            "--ask must have {current} in it, for the prompt in use, or {prompt}, for the original"
        )
    if args.preview_size % 28:
        raise BadInput(
            f"--preview-size {args.preview_size} must be 0 or a multiple of 28: Qwen2.5-VL reads an image in "
            "squares of 28 pixels"
        )


def with_policy_flags(args):
    """args, for --evaluate: what concerns the policy is read from its run, and nothing is trained."""
    folder = Path(args.evaluate)
    names = "lm lm_lora_rank ask preview_size max_new_tokens".split()
    try:
        saved = json.loads((folder / "args.json").read_text())
        if saved["algorithm"] != Path(__file__).stem:
            raise ValueError("another algorithm made it")
        policy_flags = {name: saved[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot evaluate {folder}, it is no run of promptloop.py: {error}") from None
    args = dataclasses.replace(args, num_iterations=0, **policy_flags)
    command_line.check_ranges(args)
    return args


# === model ===


def check_pipeline(args, every_prompt):
    """Raises BadInput where the image model's configurations do not fit the flags or prompts. Loads no
    weights."""
    configs = read_pipeline_configs(args.model)
    family = configs["family"]
    families = "StableDiffusion3Pipeline StableDiffusionXLPipeline FluxPipeline FluxKontextPipeline".split()
    if family not in families:
        raise BadInput(f"--model {args.model} is a {family}; supported: {', '.join(families)}")
    scheduler = configs["scheduler"]
    if scheduler["_class_name"] not in ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"):
        raise BadInput(f"--model {args.model} has a {scheduler['_class_name']}; steps must be Euler's")
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise BadInput(f"--model {args.model} predicts neither noise nor the velocity of a flow")
    pixels_per_latent = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    if family == "StableDiffusion3Pipeline":
        if args.max_sequence_length > 0 and "text_encoder_3" not in configs:
            raise BadInput(f"--max-sequence-length must be 0: {args.model} has no T5 encoder")
        transformer = configs["transformer"]
        pixels_per_patch = transformer["patch_size"] * pixels_per_latent
        largest = pixels_per_patch * transformer["pos_embed_max_size"]
        if args.resolution % pixels_per_patch or args.resolution > largest:
            raise BadInput(
                f"--resolution {args.resolution} must be a multiple of {pixels_per_patch} and at most "
                f"{largest}"
            )
    else:
        multiple = pixels_per_latent
        if family in ("FluxPipeline", "FluxKontextPipeline"):
            multiple = 2 * pixels_per_latent  # 2 x 2 latents are a token
        if args.resolution % multiple:
            raise BadInput(f"--resolution {args.resolution} must be a multiple of {multiple}")
    edits = any("source" in row for row in every_prompt.metadata)
    if edits and family != "FluxKontextPipeline":
        raise BadInput(
            f"--model {args.model} cannot edit the source images of --prompts: use a FLUX.1-Kontext"
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


class ImageModel(NamedTuple):
    """The frozen pipeline, and how it is called."""

    pipe: DiffusionPipeline
    size: int  # side of the images in pixels
    latent_shape: tuple  # of an image: (C, h, w), or (L, C) where patches are packed into tokens (FLUX.1)
    dtype: torch.dtype
    max_sequence_length: int
    options: dict  # of every call
    cache: dict  # of the embeddings of prompts


def load_pipeline(args, device, dtype):
    """The ImageModel, frozen; its VAE is float32. Raises BadInput if --flow-lora does not fit."""
    left_out = {}
    family = read_pipeline_configs(args.model)["family"]
    if family == "StableDiffusion3Pipeline" and args.max_sequence_length == 0:
        left_out = {"text_encoder_3": None, "tokenizer_3": None}  # the T5 of SD3
    pipe = from_hub(DiffusionPipeline.from_pretrained, args.model, dtype=dtype, **left_out).to(device)
    if args.flow_lora:
        load_flow_lora(pipe, args.flow_lora)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.vae.float().to(memory_format=torch.channels_last)  # the faster layout of its convolutions
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    channels = denoiser.config.in_channels
    size = args.resolution or pipe.vae.config.sample_size
    side = size // pipe.vae_scale_factor
    latent_shape = (channels, side, side)
    if hasattr(pipe, "_pack_latents"):  # FLUX.1: 2 x 2 latents are a token
        latent_shape = (side * side // 4, channels)
    options = {"height": size, "width": size, "guidance_scale": args.guidance_scale}
    if hasattr(pipe, "text_encoder_3"):  # SD3 encodes the negative prompt itself, to the others' length
        options["max_sequence_length"] = args.max_sequence_length
    if isinstance(pipe, FluxKontextPipeline):  # else it draws another size, and scales the source to a third
        options |= {"max_area": size * size, "_auto_resize": False}
    return ImageModel(pipe, size, latent_shape, dtype, args.max_sequence_length, options, cache={})


def load_flow_lora(pipe, name):
    """Loads a LoRA on top of the image model. Raises BadInput unless all of its tensors find their layer.

    diffusers leaves out what it does not recognise, such as the whole of a LoRA in peft's own format, and
    goes on with the base model.
    """
    tensors, *_ = from_hub(pipe.lora_state_dict, name, return_lora_metadata=True)
    from_hub(pipe.load_lora_weights, name)
    loaded = []
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            loaded += [key for key, _ in component.named_parameters() if "lora_" in key]
    if not tensors or len(loaded) != len(tensors):
        raise BadInput(
            f"--flow-lora {name} has {len(tensors)} tensors, for which the image model has {len(loaded)} "
            "places: it is another model's, incomplete, or not in diffusers' format"
        )


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


def gather_weights(model):
    """Leaves each process all weights that `shard` has split, until `release_weights`. All have to call it.

    The forward passes between the two are each process's own. So the policy can write at other steps, and
    replies of other lengths, than in the other processes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module._is_fsdp_managed_module = False  # `generate` waits for no other process


def release_weights(model):
    """Leaves each process its share of the weights again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module._is_fsdp_managed_module = True
            module.reshard()


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


@torch.no_grad()
def embed(pipe, prompts, max_sequence_length, cache):
    """{name in the pipeline's call: (B, ...)}. A distinct prompt is encoded once, then cached."""
    if len(cache) > 1024:  # bounds the CPU memory: a prompt takes 4.2 MB for FLUX.1
        cache.clear()
    new_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
    for start in range(0, len(new_prompts), 16):
        # Always 16 prompts, the last ones filled up: rounding depends on the size of a batch. A resumed run,
        # whose cache starts empty, encodes fewer prompts at once, and must get the same embeddings.
        batch = new_prompts[start : start + 16]
        filled = batch + batch[:1] * (16 - len(batch))
        if hasattr(pipe, "unet"):  # SDXL
            embeds, _, pooled, _ = pipe.encode_prompt(filled, do_classifier_free_guidance=False)
        elif hasattr(pipe, "text_encoder_3"):  # SD3
            embeds, _, pooled, _ = pipe.encode_prompt(
                filled,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
        else:  # FLUX.1
            length = max_sequence_length or pipe.tokenizer_2.model_max_length
            embeds, pooled, _ = pipe.encode_prompt(filled, max_sequence_length=length)
        rows = zip(embeds.cpu().unbind(), pooled.cpu().unbind())
        for prompt, (embed, pool) in zip(batch, rows):
            cache[prompt] = embed.clone(), pool.clone()
    embeds = torch.stack([cache[prompt][0] for prompt in prompts])
    pooled = torch.stack([cache[prompt][1] for prompt in prompts])
    return {"prompt_embeds": embeds.to(pipe.device), "pooled_prompt_embeds": pooled.to(pipe.device)}


@torch.no_grad()
def to_images(pipe, latents, size):
    """Latents of a pipeline -> images (B, 3, H, W) float32 in [0, 1], rounded to 8 bits as when saved.

    16 at a time: more would take more memory, and more time on a CPU, whose cache they leave.
    """
    if hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    config = pipe.vae.config
    latents = latents.float() / config.scaling_factor + (config.get("shift_factor") or 0)
    decoded = torch.cat([pipe.vae.decode(part).sample for part in latents.split(16)])
    images = (decoded / 2 + 0.5).clamp(0, 1)
    return (images * 255).round() / 255


# === flow ===


def clean_prediction(x_t, velocity, t):
    """x_0 = x_t - t v, the image that an Euler step is heading for.

    In the scale of Stable Diffusion XL the same holds, with t the noise's sigma and v the predicted noise.
    """
    return x_t - t * velocity


# === rollout ===


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


def draw_noise(image_numbers, draws, shape, seed, iteration):
    """Standard normal noise (B, draws, C, h, w), float32 on the CPU. Here draws is 1.

    Each image has its own generator, so its noise does not depend on how images are split into batches or
    among processes.
    """
    noise = []
    for number in image_numbers:
        generator = np.random.default_rng((seed, 3, iteration, number))
        noise.append(generator.standard_normal((draws, *shape), np.float32))
    return torch.from_numpy(np.stack(noise))


def even_schedule(num_refinements, num_steps):
    """The steps before which an evaluation refines: equally spaced, floor(i num_steps / num_refinements)."""
    return {i * num_steps // num_refinements for i in range(num_refinements)}


def draw_schedule(group, num_refinements, num_steps, seed, iteration):
    """The steps before which the images of a group (0 to P - 1) are refined in training.

    Any set of that many steps is equally likely, so that one policy serves any number of refinements. A
    single one comes before the first step, as in the evaluation.
    """
    if num_refinements == 1:
        return even_schedule(1, num_steps)
    generator = np.random.default_rng((seed, 2, iteration, group))
    return set(generator.choice(num_steps, num_refinements, replace=False).tolist())


@contextlib.contextmanager
def watched_steps(scheduler, note):
    """Inside the block, each step of the scheduler calls note(x_0) with its clean prediction.

    That comes from the velocity itself, guidance included. From two consecutive latents it could not be
    computed: in bfloat16 they differ by little more than their rounding.
    """
    original_step = scheduler.step

    @functools.wraps(original_step)  # the pipeline looks at its signature
    def step_and_note(velocity, t, x_t, *rest, **keywords):
        result = original_step(velocity, t, x_t, *rest, **keywords)
        sigma = scheduler.sigmas[scheduler.step_index - 1]
        note(clean_prediction(x_t.float(), velocity.float(), sigma))
        return result

    scheduler.step = step_and_note
    try:
        yield
    finally:
        del scheduler.step  # it is the class's own again


class PromptsInUse:
    """The prompts of a batch while the pipeline runs, and the callback that exchanges them."""

    def __init__(self, model, prompts, schedules, write):
        self.model = model
        self.prompts = list(prompts)
        self.schedules = schedules
        self.write = write
        self.clean = None  # latents: where the last step was heading

    def note(self, clean):
        self.clean = clean

    def look(self, positions):
        """Images of the clean predictions at these positions of the batch."""
        return to_images(self.model.pipe, self.clean[positions], self.model.size)

    def refine(self, step):
        """Asks for new prompts where the schedule has this step. Returns whether there are any."""
        positions = [k for k, schedule in enumerate(self.schedules) if step in schedule]
        if not positions:
            return False
        look = functools.partial(self.look, positions) if step > 0 else None
        current = [self.prompts[position] for position in positions]
        for position, prompt in zip(positions, self.write(positions, step, current, look)):
            self.prompts[position] = prompt
        return True

    def embed(self):
        return embed(self.model.pipe, self.prompts, self.model.max_sequence_length, self.model.cache)

    def after_step(self, pipe, i, timestep, tensors):
        """The pipeline's callback after step i: returns the tensors that it goes on with."""
        if self.refine(i + 1):
            new = self.embed()
            new["add_text_embeds"] = new["pooled_prompt_embeds"]  # SDXL's name for it
            for name in tensors.keys() & new.keys():
                # With guidance the negative embeddings come first, and stay.
                negative = tensors[name][: -len(self.prompts)]
                tensors[name] = torch.cat([negative, new[name]])
        return tensors


@torch.no_grad()
def sample(model, prompts, noise, schedules, write, num_steps, sources=None):
    """Images (B, 3, H, W) by the pipeline's own call; prompts are refined before the steps of schedules.

    model: an ImageModel. noise: (B, *latent_shape). schedules: a set of steps for each image.
    write: a function (positions, step, current, look) -> new prompts for the images at these positions of
    the batch, whose prompts are current so far. look() shows their clean predictions; it is None before
    step 0. sources: the images to edit, (B, 3, H, W) in [0, 1].
    """
    options = model.options if sources is None else model.options | {"image": sources}
    in_use = PromptsInUse(model, prompts, schedules, write)
    in_use.refine(0)
    # FLUX.1 lets a callback exchange prompt_embeds alone: its pooled embedding stays the first prompt's.
    names = ["prompt_embeds", "pooled_prompt_embeds", "add_text_embeds"]
    names = [name for name in names if name in model.pipe._callback_tensor_inputs]
    with watched_steps(model.pipe.scheduler, in_use.note):
        latents = model.pipe(
            **in_use.embed(),
            **options,
            latents=noise.to(model.pipe.device, model.dtype),
            num_inference_steps=num_steps,
            output_type="latent",
            callback_on_step_end=in_use.after_step,
            callback_on_step_end_tensor_inputs=names,
        ).images
    return to_images(model.pipe, latents, model.size)


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


def refine(policy, template, originals, current, done, previews, max_new_tokens, noise=None, sources=None):
    """Rewrites of B prompts in use, after a share `done` of the steps. Without an answer a prompt stays.

    template: what is asked, as in --ask. previews: as the pictures of `ask_about`. noise: (B, N), by which
    the replies are sampled; without it they are greedy. sources: the images to edit, as the previews.
    """
    start = "No preview yet." if previews is None else f"Preview at {round(10 * done) * 10}%."
    if sources is not None:
        start = "The first image is to be edited. " + start
    questions = []
    for original, prompt in zip(originals, current):
        questions.append(fill(f"{start} {template}", prompt=original, current=prompt))
    inputs = ask_about(policy, questions, previews, sources)
    rewrites = converse(policy, questions, inputs, max_new_tokens, noise)
    prompts = list(current)
    for k, has_answer in enumerate(rewrites.well_formed):
        if has_answer:
            prompts[k] = rewrites.prompts[k]
    return rewrites._replace(prompts=prompts)


def is_truncated(tokenizer, prompt):
    """Whether a prompt is longer than a text encoder reads. Words beyond that get credit without effect."""
    return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length


class Refinement(NamedTuple):
    """What the policy saw and wrote before one step of a batch of images."""

    positions: list  # of the images that it was for, in the batch
    step: int
    previews: torch.Tensor | None  # (B, H, W, 3) uint8, exactly the pixels that it saw
    rewrites: Rewrites
    sources: torch.Tensor | None = None  # (B, H, W, 3) uint8, likewise: the images to edit


class Refiner:
    """The policy as `sample` calls it to write prompts for a batch; it keeps all Refinements.

    feedback: as the flag. image_numbers: numbers of the batch's images in the iteration, from which the noise
    of the replies is drawn. None: replies are greedy. sources: the images to edit, (B, 3, H, W) in [0, 1].
    """

    def __init__(
        self, policy, args, originals, num_steps, feedback, image_numbers=None, iteration=0, sources=None
    ):
        self.policy = policy
        self.args = args
        self.originals = originals
        self.num_steps = num_steps
        self.feedback = feedback
        self.image_numbers = image_numbers
        self.iteration = iteration
        self.sources = None if sources is None else to_bytes(sources, args.preview_size)
        self.refinements = []

    def __call__(self, positions, step, current, look):
        originals = [self.originals[position] for position in positions]
        previews = self.see(look)
        sources = None if self.sources is None else self.sources[positions]
        noise = self.draw_noise(positions, step)
        args = self.args
        done = step / self.num_steps
        rewrites = refine(
            self.policy, args.ask, originals, current, done, previews, args.max_new_tokens, noise, sources
        )
        self.refinements.append(Refinement(positions, step, previews, rewrites, sources))
        return rewrites.prompts

    def see(self, look):
        """The previews (B, H, W, 3) that the policy gets to see, or None."""
        if look is None or self.feedback == "none":
            return None
        previews = to_bytes(look(), self.args.preview_size)
        if self.feedback == "shuffled":
            # Images of one prompt are neighbours, so half a batch away is another prompt.
            previews = previews.roll(len(previews) // 2, dims=0)
        return previews

    def draw_noise(self, positions, step):
        """Noise (B, N) of the replies before a step, or None."""
        if self.image_numbers is None:
            return None
        args = self.args
        numbers = [self.image_numbers[position] for position in positions]
        num_images = args.num_prompts_per_iteration * args.num_images_per_prompt
        return draw_token_noise(numbers, step, num_images, args.max_new_tokens, args.seed, self.iteration)

    def films(self):
        """For each image of the batch, what was seen and written: [(preview or None, "40%: prompt")]."""
        films = [[] for _ in self.originals]
        for refinement in self.refinements:
            for k, position in enumerate(refinement.positions):
                preview = None if refinement.previews is None else refinement.previews[k].numpy()
                caption = f"{refinement.step / self.num_steps:.0%}: {refinement.rewrites.prompts[k]}"
                films[position].append((preview, caption))
        return films


def sample_plain(model, args, prompts, metadata, numbers):
    """Samples of some rows of a file, by the image model alone. Their noise does not change in a run."""
    noise = draw_noise(numbers, 1, model.latent_shape, args.eval_seed, iteration=0)[:, 0]
    schedules = [set()] * len(numbers)
    sources = load_sources(metadata, model.size)
    images = sample(model, prompts, noise, schedules, None, args.eval_num_inference_steps, sources)
    return report.Samples(images, captions=prompts)


def sample_refined(model, policy, args, feedback, prompts, metadata, numbers):
    """Samples of some rows of a file, their prompts refined greedily. Noise as in `sample_plain`."""
    num_steps = args.eval_num_inference_steps
    noise = draw_noise(numbers, 1, model.latent_shape, args.eval_seed, iteration=0)[:, 0]
    schedules = [even_schedule(args.num_refinements, num_steps)] * len(numbers)
    sources = load_sources(metadata, model.size)
    refiner = Refiner(policy, args, prompts, num_steps, feedback, sources=sources)
    images = sample(model, prompts, noise, schedules, refiner, num_steps, sources)
    return report.Samples(images, captions=prompts, films=refiner.films())


# === algorithm ===


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
    """PPO's pessimistic objective as a loss, Eq. (7) of arXiv 1707.06347, in the shape of its input.

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)): once the ratio rho has moved by eps in the direction that the
    advantage A asks for, there is no gradient to move further.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio)


def token_kl(log_probs, ref_log_probs):
    """k3, an estimate of the KL from sampled tokens: exp(d) - d - 1 with d = ref_log_prob - log_prob: (B, N).

    It is never negative. As a loss on samples of the policy its gradient is that of KL(ref || policy), on
    average, and at ref = policy it is zero.
    """
    difference = ref_log_probs - log_probs
    return difference.exp() - difference - 1


def sum_per_reply(values, mask):
    """Sums (B,) of values (B, N) over the tokens of each reply."""
    return (values * mask).sum(1)


def token_objective(log_probs, old_log_probs, ref_log_probs, mask, advantages, clip_range):
    """Policy loss and KL of each reply, (B,) each, sums over its tokens. Log-probabilities, mask: (B, N).

    GRPO on tokens: each has its own ratio exp(log_prob - old_log_prob), and the advantage (B,) of its image.
    """
    log_probs = log_probs.where(mask, 0)  # what follows the end of a reply may have -inf
    old_log_probs = old_log_probs.where(mask, 0)
    ref_log_probs = ref_log_probs.where(mask, 0)
    policy_loss = clipped_loss(log_probs - old_log_probs, advantages.unsqueeze(1), clip_range)
    kl = token_kl(log_probs, ref_log_probs)
    return sum_per_reply(policy_loss, mask), sum_per_reply(kl, mask)


def token_losses(policy, reference, refinement, advantages, clip_range, has_kl):
    """Named losses and diagnostics of a refinement's replies: numbers, sums over all of their tokens.

    reference: the policy before training, as for `base_weights`; without has_kl it is not asked, and the KL
    goes to the policy that sampled. advantages: (B,).
    """
    dialogue = refinement.rewrites.dialogue
    inputs = ask_about(policy, dialogue.questions, refinement.previews, refinement.sources)
    log_probs, entropy = reply_log_probs(policy.lm, inputs, dialogue.replies)
    ref_log_probs = dialogue.log_probs
    if has_kl:
        ref_log_probs = reference_log_probs(policy.lm, reference, inputs, dialogue.replies)
    policy_loss, kl = token_objective(
        log_probs, dialogue.log_probs, ref_log_probs, dialogue.mask, advantages, clip_range
    )
    log_ratio = log_probs.detach() - dialogue.log_probs
    change = log_ratio.where(dialogue.mask, 0).expm1().abs()
    return {
        "lm_policy_loss": policy_loss.sum(),
        "lm_kl": kl.sum(),
        "lm_ratio_first": (change * dialogue.mask).sum(),
        "lm_entropy": (entropy * dialogue.mask).sum(),
    }


def gather_numbers(values):
    """A list of numbers or booleans as a float32 tensor, joined with the lists of all other processes."""
    return report.gather(torch.tensor(values, dtype=torch.float32))


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


def with_idle_passes(trained):
    """The refinements that this process trains on, made as many as in the process with the most.

    With --shard all processes have to run the same number of passes. One with fewer refinements repeats its
    first one without any token in the mask, so that its losses are 0. trained: [(images, Refinement)].
    """
    images, refinement = trained[0]
    dialogue = refinement.rewrites.dialogue
    dialogue = dialogue._replace(mask=torch.zeros_like(dialogue.mask))
    idle = refinement._replace(rewrites=refinement.rewrites._replace(dialogue=dialogue))
    most = int(gather_numbers([len(trained)]).max())
    return trained + [(images, idle)] * (most - len(trained))


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


def load_evaluated(folder, lm):
    """Restores the language model of the run that --evaluate names. Raises BadInput if it does not fit."""
    try:
        state = report.read_checkpoint(Path(folder))
        report.restore_parameters(trained_parameters(lm), state.get("lm", {}))
    except BadInput as error:
        raise BadInput(str(error).replace("cannot resume", "cannot evaluate")) from None


# === train ===


def train(args):
    """Runs, resumes or evaluates an experiment; returns the run's folder."""
    args, run_dir = report.open_run(args, __file__)
    if args.evaluate:
        args = with_policy_flags(args)
    check_args(args)
    check_lm(args)
    prompt_files = load_prompt_files(args.prompts, args.eval_prompts)
    every_prompt = join_prompt_files(prompt_files.values())
    check_pipeline(args, every_prompt)
    device, dtype, rank, world_size = open_device(args.device, args.dtype)
    report.print_folder(run_dir)
    with report.announce(f"loading the rewards {args.rewards}"):
        reward = rewards.build(args.rewards, every_prompt.prompts, every_prompt.metadata, device)
    train_file = prompt_files.pop("train")

    torch.manual_seed(args.seed)  # for the initial weights of the LoRA
    has_kl = args.lm_kl_coef > 0 and args.lm_kl == "base"
    with report.announce(f"loading {args.lm}"):
        lm, tokenizer, reference = load_lm(args, device, dtype, has_kl and not args.evaluate)
        language_models = [lm] if reference is None else [lm, reference]
        for language_model in language_models:
            if args.shard:
                shard(language_model, device)
            else:
                language_model.to(device)
        processor = from_hub(Qwen2VLImageProcessorPil.from_pretrained, args.lm)
    policy = Policy(lm, tokenizer, processor)
    with report.announce(f"loading {args.model}"):
        model = load_pipeline(args, device, dtype)
    parameters = list(trained_parameters(lm).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4)

    P = args.num_prompts_per_iteration
    K = args.num_images_per_prompt
    T = args.num_inference_steps
    images_per_process = P * K // world_size  # whole groups
    image_numbers = range(rank * images_per_process, (rank + 1) * images_per_process)
    # How the evaluation samples.
    plain = functools.partial(sample_plain, model, args)
    loop = functools.partial(sample_refined, model, policy, args, args.feedback)
    a_priori = functools.partial(sample_refined, model, policy, args, "none")

    progress = {"iteration": -1}
    if args.resume:
        progress = load_models(run_dir, {"lm": lm}, optimizer)
    if args.evaluate:
        load_evaluated(args.evaluate, lm)
    log = report.Log(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    if args.resume:
        export_lm(run_dir, policy)  # a kill may have left an older export
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0 evaluates the base models
        metrics = {"iteration": iteration, "charts/num_images": iteration * P * K}
        clock = report.Clock(device)
        if iteration > 0:
            # 1. Draw prompts, noise for each image, and the steps before which prompts are refined.
            drawn = draw_prompts(len(train_file.prompts), P, args.seed, iteration)
            originals = [train_file.prompts[drawn[number // K]] for number in image_numbers]
            metadata = [train_file.metadata[drawn[number // K]] for number in image_numbers]
            schedules = []
            noise_numbers = []
            for number in image_numbers:
                group = number // K
                schedules.append(draw_schedule(group, args.num_refinements, T, args.seed, iteration))
                noise_numbers.append(group if args.share_noise else number)
            noise = draw_noise(noise_numbers, 1, model.latent_shape, args.seed, iteration)[:, 0]

            # 2. Sample and 3. refine on the way, and 4. score against the original prompts.
            gather_weights(lm)
            trained = []  # each refinement, with the images that it was for
            pending_scores = []  # functions that wait for the scores of a micro-batch
            reply_tokens = []
            well_formed = []
            truncated = []
            starts = range(0, images_per_process, args.micro_batch_size)
            for start in tqdm(starts, desc="sample", leave=False, disable=None):
                images = slice(start, min(start + args.micro_batch_size, images_per_process))
                sources = load_sources(metadata[images], model.size)
                refiner = Refiner(
                    policy,
                    args,
                    originals[images],
                    T,
                    args.feedback,
                    image_numbers[images],
                    iteration,
                    sources,
                )
                pictures = sample(
                    model, originals[images], noise[images], schedules[images], refiner, T, sources
                )
                clock.stop("sample")
                pending_scores.append(reward.start_scoring(pictures, originals[images], metadata[images]))
                clock.stop("reward")
                for refinement in refiner.refinements:
                    refined_images = [start + position for position in refinement.positions]
                    trained.append((refined_images, refinement))
                    rewrites = refinement.rewrites
                    reply_tokens += rewrites.dialogue.mask.sum(1).tolist()
                    well_formed += rewrites.well_formed
                    truncated += [is_truncated(model.pipe.tokenizer, text) for text in rewrites.prompts]

            release_weights(lm)

            # 5. Advantages, from the rewards of all processes.
            scores = report.gather_scores([wait() for wait in pending_scores])
            clock.stop("reward")
            metrics |= report.reward_metrics(scores, [K] * P)
            reply_tokens = gather_numbers(reply_tokens)
            metrics["charts/format_rate"] = gather_numbers(well_formed).mean().item()
            metrics["charts/reply_tokens"] = reply_tokens.mean().item()
            metrics["charts/truncated_fraction"] = gather_numbers(truncated).mean().item()
            advantages = group_advantages(scores["reward"].view(P, K), "group")
            advantages = advantages.flatten().split(images_per_process)[rank].to(device)

            # 6. The loss: a mean over all tokens of the iteration.
            num_tokens = reply_tokens.sum().item()  # over all processes
            names = "lm_policy_loss lm_kl lm_ratio_first lm_entropy".split()
            totals = {name: torch.zeros((), device=device) for name in names}
            if args.shard:
                trained = with_idle_passes(trained)
            for language_model in language_models:
                gather_weights(language_model.model.visual)  # not every question has a picture
            for images, refinement in tqdm(trained, desc="train", leave=False, disable=None):
                losses = token_losses(
                    policy, reference, refinement, advantages[images], args.token_clip_range, has_kl
                )
                losses = {name: value / num_tokens for name, value in losses.items()}
                loss = losses["lm_policy_loss"] + args.lm_kl_coef * losses["lm_kl"]
                loss.backward()
                for name, value in losses.items():
                    totals[name] += value.detach()
            for language_model in language_models:
                release_weights(language_model.model.visual)

            # 7. One optimiser step. Losses are divided by global counts, so processes add up.
            # Gradients that --shard has shared out (DTensor) are sums already.
            gradients = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]
            sum_over_processes(list(totals.values()) + gradients)
            totals["lm_grad_norm"] = clip_gradients(parameters, args.max_grad_norm)
            report.check_finite(totals)
            learning_rate = args.lm_learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            clock.stop("train")
            for name, total in totals.items():
                metrics["losses/" + name] = total.item()
            metrics["losses/lm_learning_rate"] = learning_rate

        is_last = iteration == args.num_iterations
        evaluations = []
        gather_weights(lm)
        for name, file in report.files_to_evaluate(prompt_files, iteration, args).items():
            if iteration == 0:  # the image model is not trained: once is enough
                evaluation = report.evaluate(
                    name, plain, file, reward, args.micro_batch_size, args.eval_noises
                )
                evaluations.append(evaluation)
            in_loop = report.evaluate(
                name + "_loop", loop, file, reward, args.micro_batch_size, args.eval_noises
            )
            evaluations.append(in_loop)
            if iteration > 0 and not is_last:  # on the way, the loop alone, which costs less
                continue
            name = name + "_apriori"
            if args.feedback == "none" or args.num_refinements == 1:  # no preview was seen in the loop either
                evaluation = in_loop._replace(name=name)
            else:
                evaluation = report.evaluate(
                    name, a_priori, file, reward, args.micro_batch_size, args.eval_noises
                )
            evaluations.append(evaluation._replace(films={}))  # without previews it is no film
        release_weights(lm)
        if evaluations:
            clock.stop("evaluate")
        if rank == 0:
            log.write(metrics | clock.metrics(P * K), evaluations)
        if (iteration % args.save_every == 0 or is_last) and not args.evaluate:
            save_models(run_dir, {"lm": lm}, optimizer, {"iteration": iteration})
            export_lm(run_dir, policy)
    if rank == 0:
        log.close()
    if world_size > 1:
        dist.destroy_process_group()
    return run_dir


if __name__ == "__main__":
    command_line.run(train, Args, __doc__)
