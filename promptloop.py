"""PromptLoop: a multimodal model sees the unfinished image and writes the prompt for the steps to come.

Paper: arXiv 2510.00430 (CVPR 2026), whose body was not read: docs/promptloop.md lists what is our choice.
Official code: none. Derived from: promptrl.py.

One iteration; the image model is a black box, only the policy is trained:
 1. draw P prompts, K images of each, and the steps where prompts are refined    draw_schedules
 2. run the diffusers pipeline as it is; before such a step its callback shows
    the clean image that the last step headed for, at no extra model call        sample, clean_prediction
 3. the policy sees it, the prompt in use and the original, and writes a prompt  refine
 4. score the final image against the original prompt                            rewards/
 5. advantage = z-score over the group, one for all refinements of an image      group_advantages
 6. GRPO on tokens, all tokens weigh the same, less a KL; one optimiser step     policy_loss, grpo_terms
Differences from the paper, as far as known: the KL goes to the policy before training (the paper's, to the
one that sampled, has no gradient as each sample is used once: --lm-kl old).

Run (with real weights: not run, not measured):
  python promptloop.py                                       # the tiny world: 1.3 GB, 9 minutes on two cores
  python promptloop.py --evaluate runs/X --model OTHER       # that run's policy with another image model
  python promptloop.py --model stabilityai/stable-diffusion-xl-base-1.0 --lm Qwen/Qwen2.5-VL-3B-Instruct ...
Conventions: t in [0, 1], t = 1 is noise; x_t = (1 - t) x_0 + t eps; v = eps - x_0; sampling runs from 1 to 0.
"""

import contextlib
import copy
import dataclasses
import re
from functools import partial, wraps
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers import DiffusionPipeline
from einops import rearrange
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from rewards import BadInput, command_line, report
from rewards.prompts import load_prompt_files
from rewards.report.evaluation import evaluate, gather
from rewards.weights import from_hub


@dataclasses.dataclass
class Args:
    seed: int = 1  # of the prompts' order and of every noise; on the CPU a run repeats bit for bit
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen weights and of the forward passes
    output_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # a run's folder to go on with, exactly; all other flags are then read from it
    evaluate: str = ""  # a run's folder: no training, its policy writes for the image model given here
    eval_every: int = 12  # iterations between evaluations
    save_every: int = 12  # iterations between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project_name: str = "flow-rl"  # the W&B project
    wandb_entity: str | None = None  # the W&B team or user
    # models and data
    model: str = "tiny/sd3"  # a diffusers pipeline of a supported family: a folder or a hub id
    flow_lora: str = ""  # a LoRA of that model to load on top, such as runs/X/lora of another algorithm
    lm: str = "tiny/vlm"  # the language model, a Qwen2.5-VL: a transformers folder or a hub id
    ask: str = "Current prompt: {current}. Original prompt: {prompt}. Improve it inside <answer> </answer>."
    """What the policy is asked, after "Preview at 40%." or "No preview yet."."""
    preview_size: int = 0  # side in pixels of what the policy sees, a multiple of 28 (448); 0: as it is
    resolution: int = 0  # side of the images in pixels; 0: the model's own
    max_sequence_length: int = 0  # T5 tokens per prompt (SD3.5: 128); 0 leaves T5 out (tiny/sd3 has none)
    lm_lora_rank: int = 0  # of the language model's LoRA; 0 trains all its text weights
    prompts: str = "tiny/prompts/train.jsonl"  # .txt, a prompt a line, or .jsonl with metadata
    eval_prompts: str = ""  # held-out prompts; empty: the --prompts file with `train` replaced by `eval`
    rewards: str = "geneval"  # names with optional weights, such as geneval:1,jpeg:0.2
    # sampling
    num_prompts_per_iteration: int = 16  # P, over all processes
    num_images_per_prompt: int = 8  # K, the size of a group
    share_noise: bool = True  # one first noise for a prompt's images: they differ by what is written, no more
    num_refinements: int = 5  # N_R, how often the prompt of an image is written anew
    feedback: Literal["preview", "none", "shuffled"] = "preview"  # shuffled: another prompt's, a control
    max_new_tokens: int = 32  # N, longest reply of the language model
    num_inference_steps: int = 8  # T, denoising steps of a training sample; fewer than at evaluation is fine
    eval_num_inference_steps: int = 10  # denoising steps of an evaluation sample
    guidance_scale: float = 1.0  # classifier-free, in sampling, loss and evaluation; 1: none, half the cost
    micro_batch_size: int = 64  # images per forward pass: memory and speed, not the result
    # algorithm
    token_clip_range: float = 0.2  # of a token's ratio
    lm_kl: Literal["base", "old"] = "base"  # the KL is to the policy before training, or to the sampling one
    lm_kl_coef: float = 0.01  # weight of the language model's KL to itself before training
    # optimisation
    num_iterations: int = 24  # rollouts
    lm_learning_rate: float = 1e-3  # the language model's
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm


# === model ===


def load_pipeline(args, device, dtype):
    """(pipeline, side of its images, shape of their latents) of the image model: frozen, the VAE float32."""
    sd3 = DiffusionPipeline.load_config(args.model)["_class_name"].startswith("StableDiffusion3")
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None} if sd3 and not args.max_sequence_length else {}
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype, **no_t5).to(device)
    if pipe.scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise BadInput(f"--model {args.model} predicts neither noise nor velocity of a flow")
    if args.flow_lora:
        from_hub(pipe.load_lora_weights, args.flow_lora)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.vae.float()
    pipe.set_progress_bar_config(disable=True)
    size = args.resolution or pipe.default_sample_size * pipe.vae_scale_factor
    channels = (getattr(pipe, "unet", None) or pipe.transformer).config.in_channels
    side, packed = size // pipe.vae_scale_factor, hasattr(pipe, "_pack_latents")  # FLUX: 2 x 2 to a token
    return pipe, size, (side * side // 4, channels) if packed else (channels, side, side)


def load_lm(args, device, dtype):
    """(tokenizer, lm, reference) of the rewriter; see load_model. Its vision tower is never trained."""
    if from_hub(PreTrainedConfig.get_config_dict, args.lm)[0].get("model_type") != "qwen2_5_vl":
        raise BadInput(f"--lm {args.lm} is no Qwen2.5-VL, the only family supported")
    tokenizer = from_hub(AutoTokenizer.from_pretrained, args.lm, padding_side="left")
    lm = from_hub(Qwen2_5_VLForConditionalGeneration.from_pretrained, args.lm, dtype=dtype).to(device)
    lm.requires_grad_(False).eval()
    end, pad, reference = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    # not the hub's top_k and repetition penalty: what is sampled is what is trained. A sampled image token
    # would have no image: special tokens, but the end of the turn, are left out of both
    banned = sorted({*tokenizer.all_special_ids, *range(len(tokenizer), lm.lm_head.out_features)} - {end})
    lm.generation_config = GenerationConfig(suppress_tokens=banned, eos_token_id=end, pad_token_id=pad)
    if args.lm_lora_rank > 0:
        config = {"r": args.lm_lora_rank, "lora_alpha": 2 * args.lm_lora_rank}
        lm.add_adapter(LoraConfig(target_modules=r"model\.language_model\..*_proj", **config))
    else:
        reference = copy.deepcopy(lm) if args.lm_kl_coef > 0 else None
        lm.requires_grad_(True).model.visual.requires_grad_(False)
    for p in lm.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    lm.forward = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(lm.forward)
    return tokenizer, lm, reference


@contextlib.contextmanager
def base_weights(transformer, reference):
    """The base model: the frozen copy, or the transformer with its LoRA switched off for a while."""
    if reference is None:
        transformer.disable_adapters()
    yield reference or transformer
    if reference is None:
        transformer.enable_adapters()


@torch.no_grad()
def embed(pipe, prompts, max_sequence_length, cache):
    """{name in the pipeline's call: (B, ...)}; each distinct prompt is encoded once, kept on the CPU."""
    if len(cache) > 4096:  # bounds the memory
        cache.clear()
    for prompt in set(prompts) - cache.keys():
        if hasattr(pipe, "unet"):  # SDXL
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        elif hasattr(pipe, "text_encoder_3"):  # SD3
            options = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, **options)
        else:  # FLUX
            embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=max_sequence_length or 512)
        cache[prompt] = {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}
    parts = {name: torch.cat([cache[prompt][name] for prompt in prompts]) for name in cache[prompts[0]]}
    return {name: part.to(pipe.device) for name, part in parts.items()}


@torch.no_grad()
def to_images(pipe, latents, size):
    """Latents of a pipeline -> images (B, 3, H, W) float32 in [0, 1], rounded to 8 bits as when saved."""
    if hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    config = pipe.vae.config
    z = latents.float() / config.scaling_factor + (config.get("shift_factor") or 0)
    return ((pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255).round() / 255


# === flow ===


def clean_prediction(x_t, velocity, t):
    """x_0 = x_t - t v, what an Euler step heads for. In SDXL's scale t is the noise's sigma, v the noise."""
    return x_t - t * velocity


# === rollout ===


def draw_prompts(num_prompts, count, seed, iteration):
    """Row numbers of iteration 1, 2, ...: passes over the file, each in its own order, cut into pieces."""
    rows = []
    for n in range((iteration - 1) * count, iteration * count):
        order = np.random.default_rng((seed, 1, n // num_prompts)).permutation(num_prompts)
        rows.append(int(order[n % num_prompts]))
    return rows


def draw_noise(indices, draws, shape, seed, iteration):
    """Standard normal (B, draws, C, h, w), float32 on the CPU; one generator an image: no split changes it.

    indices number the iteration's images. Draw 0 is the starting noise, the others are the SDE's.
    """
    generators = [np.random.default_rng((seed, 3, iteration, index)) for index in indices]
    noise = [generator.standard_normal((draws, *shape), np.float32) for generator in generators]
    return torch.from_numpy(np.stack(noise))


def draw_schedules(groups, count, num_steps, seed, iteration, random):
    """Steps 0 ... num_steps - 1 before which a prompt is refined, a set for each of the groups (prompts).

    random: every subset of that count is as likely; else equally spaced, floor(i num_steps / count).
    """
    if not random:
        return [{i * num_steps // count for i in range(count)} for _ in groups]
    generators = [np.random.default_rng((seed, 2, iteration, group)) for group in groups]
    return [{*generator.choice(num_steps, count, replace=False).tolist()} for generator in generators]


@torch.no_grad()
def sample(pipe, prompts, noise, schedules, write, options, max_sequence_length, cache):
    """Images (B, 3, H, W) by the pipeline's own call, image j's prompt rewritten before steps schedules[j].

    noise: the first latents, of the model's dtype. write(rows, step, current, look) returns new prompts for
    rows, whose prompts are current so far; look() shows their clean predictions, and is None before step 0.
    options: of the call. max_sequence_length, cache: as for `embed`.
    """
    prompts, clean, scheduler, scheduler_step = list(prompts), None, pipe.scheduler, pipe.scheduler.step

    @wraps(scheduler_step)  # the pipeline looks at its signature
    def step_and_note(velocity, t, x_t, *rest, **keywords):
        nonlocal clean  # from the velocity itself, guidance included: latents of bfloat16 are too coarse
        after = scheduler_step(velocity, t, x_t, *rest, **keywords)
        clean = clean_prediction(x_t.float(), velocity.float(), scheduler.sigmas[scheduler.step_index - 1])
        return after

    def refine_rows(pipe, i, _, tensors):  # the callback after step i, also called before the first
        if rows := [j for j in range(len(prompts)) if i + 1 in schedules[j]]:
            look = (lambda: to_images(pipe, clean[rows], options["height"])) if i >= 0 else None
            for j, text in zip(rows, write(rows, i + 1, [prompts[j] for j in rows], look)):
                prompts[j] = text
            new = embed(pipe, prompts, max_sequence_length, cache)
            new["add_text_embeds"] = new["pooled_prompt_embeds"]  # SDXL's name for it
            for name in tensors.keys() & new.keys():  # with guidance the negative ones come first, and stay
                tensors[name] = torch.cat([tensors[name][: -len(prompts)], new[name]])
        return tensors

    refine_rows(pipe, -1, None, {})
    # FLUX lets a callback replace prompt_embeds alone: its pooled embedding stays the first prompt's
    names = {"prompt_embeds", "pooled_prompt_embeds", "add_text_embeds"}
    callback = {"callback_on_step_end_tensor_inputs": [*names.intersection(pipe._callback_tensor_inputs)]}
    callback |= {"callback_on_step_end": refine_rows, "output_type": "latent", "latents": noise}
    scheduler.step = step_and_note
    latents = pipe(**embed(pipe, prompts, max_sequence_length, cache), **callback, **options).images
    del scheduler.step  # the class's own again
    return to_images(pipe, latents, options["height"])


def to_bytes(images, size):
    """What the policy sees of images (B, 3, H, W): (B, size, size, 3) uint8, unscaled for size 0."""
    if size:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return rearrange((images * 255).round().clamp(0, 255).byte().cpu(), "b c h w -> b h w c")


def ask_about(policy, questions, previews):
    """Model inputs (B, L), padded on the left: a user's turn for each question, the reply about to start.

    previews: (B, H, W, 3) uint8, one before each question, or None: text alone.
    """
    lm, tokenizer, processor = policy
    picture = [] if previews is None else [{"type": "image"}]
    turns = [[{"role": "user", "content": [*picture, {"type": "text", "text": q}]}] for q in questions]
    chat, pixels = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), {}
    if previews is not None:
        pixels = processor(images=list(previews.numpy()), return_tensors="pt")
        tokens = int(pixels["image_grid_thw"][0].prod()) // processor.merge_size**2  # of an image
        chat = [text.replace("<|image_pad|>", tokens * "<|image_pad|>") for text in chat]
    inputs = tokenizer(chat, padding=True, return_tensors="pt")
    inputs = {**inputs, **pixels, "mm_token_type_ids": (inputs.input_ids == lm.config.image_token_id).int()}
    return {name: value.to(lm.device) for name, value in inputs.items()}


def sample_replies(lm, question, max_new_tokens, noise=None):
    """Replies (B, N) to `ask`, log-probabilities (B, N): greedy, or by normal noise (B, max_new_tokens)."""
    chosen = []

    def choose(_, scores):  # leaves one token; transformers' own sampler has one random state for all rows
        log_probs = scores.float().log_softmax(-1)  # of a banned token -inf
        token = log_probs.argmax(-1, keepdim=True)
        if noise is not None:
            cumulative = log_probs.double().exp().cumsum(-1)
            u = torch.special.ndtr(noise[:, len(chosen), None].double()).to(lm.device)
            token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        chosen.append(log_probs.gather(-1, token))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0)

    ids = lm.generate(**question, logits_processor=[choose], max_new_tokens=max_new_tokens)
    return ids[:, question["input_ids"].shape[1] :], torch.cat(chosen, dim=1)


def reply_log_probs(lm, question, replies):
    """Log-probabilities of the replies' tokens, and entropies, (B, N) each, by one pass over all tokens."""
    after = torch.zeros_like(replies)
    parts = {"input_ids": replies, "attention_mask": after + 1, "mm_token_type_ids": after}
    inputs = question | {name: torch.cat([question[name], part], dim=1) for name, part in parts.items()}
    logits = lm(**inputs, logits_to_keep=replies.shape[1] + 1).logits[:, :-1].float()
    banned = torch.tensor(lm.generation_config.suppress_tokens, device=lm.device)
    log_probs = logits.index_fill(-1, banned, -torch.inf).log_softmax(-1)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(-1)
    return log_probs.gather(-1, replies.unsqueeze(-1)).squeeze(-1), entropy


def parse_answer(reply):
    """(prompt, well-formed): the last <answer> that is not empty, else the reply without stray tags."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)
    answers = [answer for answer in found if answer.strip()] or [re.sub(r"</?answer>", " ", reply)]
    return " ".join(answers[-1].split()), any(answer.strip() for answer in found)


def refine(policy, args, originals, current, done, previews, noise=None):
    """(prompts, are they well-formed, what the loss needs) for (B,) images, of which a share `done` is done.

    previews: as for `ask_about`, noise: as for `sample_replies`. Without an answer a prompt stays as it is.
    """
    lm, tokenizer, _ = policy
    start = "No preview yet." if previews is None else f"Preview at {round(10 * done) * 10}%."
    template = f"{start} {args.ask}"
    asked = [template.replace("{current}", c).replace("{prompt}", p) for p, c in zip(originals, current)]
    replies, log_probs = sample_replies(lm, ask_about(policy, asked, previews), args.max_new_tokens, noise)
    answers = [parse_answer(reply) for reply in tokenizer.batch_decode(replies, skip_special_tokens=True)]
    prompts = [answer if formed else c for (answer, formed), c in zip(answers, current)]
    end = (replies == tokenizer.eos_token_id).int()
    dialogue = asked, previews, replies, end.cumsum(1) == end, log_probs
    return prompts, [formed for _, formed in answers], dialogue


# === algorithm ===


def group_advantages(values, advantage_std, limit=5.0):
    """Advantages (P, K) of rewards (P, K): less the group's mean, over a population standard deviation.

    "global" takes the deviation of all rewards (the official default), "group" the group's own. A NaN reward
    counts nowhere and gets 0, as does every image of a group of equal rewards. Limited to +-limit.
    """
    values = values.double()
    valid = ~values.isnan()
    centred = (values - values.nanmean(1, keepdim=True)).masked_fill(~valid, 0)
    std = values[valid].std(correction=0)
    if advantage_std == "group":
        std = (centred.square().sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).sqrt()
    return (centred / (std + 1e-4)).clamp(-limit, limit).float()


def clipped_loss(log_ratio, advantages, clip_range):
    """PPO's pessimistic objective as a loss: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)): (B,)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def grpo_terms(log_probs, old_log_probs, ref_log_probs, mask, advantages, clip_range):
    """Policy loss and KL of each reply, (2, B): sums over its tokens. Log-probabilities and mask (B, N).

    The ratio is a token's, the advantage (B,) its image's. KL: k3, exp(d) - d - 1 with d = ref - log_prob. As
    a loss on the policy's own samples k3 has the gradient of KL(ref || policy), and at ref = policy none.
    """
    log_probs, old, ref = (part.where(mask, 0) for part in (log_probs, old_log_probs, ref_log_probs))
    policy_loss = clipped_loss(log_probs - old, advantages.unsqueeze(1), clip_range)
    difference = ref - log_probs
    return (torch.stack([policy_loss, difference.exp() - difference - 1]) * mask).sum(2)


def policy_loss(policy, reference, dialogue, advantages, args):
    """Policy loss, KL, |ratio - 1| and entropy (4,) of a dialogue (see `refine`), sums over its tokens."""
    asked, previews, replies, mask, old_log_probs = dialogue
    question = ask_about(policy, asked, previews)  # from the bytes that were seen
    log_probs, entropy = reply_log_probs(policy[0], question, replies)
    ref_log_probs = old_log_probs
    if args.lm_kl == "base" and args.lm_kl_coef > 0:
        with torch.no_grad(), base_weights(policy[0], reference) as network:
            ref_log_probs = reply_log_probs(network, question, replies)[0]
    log_probs_of = log_probs, old_log_probs, ref_log_probs
    losses = grpo_terms(*log_probs_of, mask, advantages, args.token_clip_range)
    change = (log_probs.detach() - old_log_probs).where(mask, 0).expm1().abs()
    return torch.cat([losses.sum(1), (torch.stack([change, entropy]) * mask).sum((1, 2))])


# === checkpoint ===


@report.uninterrupted()
def save_policy(run_dir, policy, optimizer, progress):
    """checkpoint/ to go on with; the policy in lm_lora/ (peft) or lm/ (transformers, a --lm for others)."""
    weights = {name: p.detach() for name, p in policy[0].named_parameters() if p.requires_grad}
    state = {"progress": progress, "weights": weights, "optimizer": optimizer.state_dict()}
    report.write_state(run_dir / "checkpoint" / "state.pt", state)
    for part in policy:
        part.save_pretrained(run_dir / ("lm_lora" if hasattr(policy[0], "peft_config") else "lm"))


def load_checkpoint(run_dir, transformer, optimizer):
    """Restores a checkpoint, returns its progress. No random state: draws depend on the iteration alone."""
    path = run_dir / "checkpoint" / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        transformer.load_state_dict(transformer.state_dict() | state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]
    except Exception as error:  # a damaged file raises anything
        raise BadInput(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from None


# === train ===


def train(args):
    """Runs, resumes or evaluates an experiment; returns the run's folder."""
    args, run_dir = report.open_run(Args, args, __file__)
    if args.evaluate:  # all that concerns the policy is its run's
        saved, _ = report.open_run(Args, Args(resume=args.evaluate), __file__)
        names = "lm lm_lora_rank ask preview_size max_new_tokens".split()
        args = dataclasses.replace(args, num_iterations=0, **{name: getattr(saved, name) for name in names})
    report.check_args(args, ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "FluxPipeline"])
    files = load_prompt_files(args.prompts, args.eval_prompts)
    device, dtype, rank, world_size = report.open_device(args)
    reward = rewards.build(args.rewards, *(sum(parts, []) for parts in zip(*files.values())), device)
    prompts, metadata = files.pop("train")

    torch.manual_seed(args.seed)  # the LoRA's first weights
    tokenizer, lm, reference = load_lm(args, device, dtype)
    policy = lm, tokenizer, from_hub(Qwen2VLImageProcessorPil.from_pretrained, args.lm)
    pipe, size, shape = load_pipeline(args, device, dtype)
    weights = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=1e-4)
    options = {"height": size, "width": size, "guidance_scale": args.guidance_scale}
    if hasattr(pipe, "text_encoder_3"):  # SD3 encodes the negative prompt itself: as long as the others
        options["max_sequence_length"] = args.max_sequence_length
    cache, limit = {}, pipe.tokenizer.model_max_length
    P, K, T = args.num_prompts_per_iteration, args.num_images_per_prompt, args.num_inference_steps
    B, M, N = P * K // world_size, args.micro_batch_size, args.max_new_tokens

    def draw(texts, noise, steps, schedules, first=None, blind=args.feedback == "none"):
        """Images, and a record of each refinement; greedy, or by the noise of images numbered from first."""
        record = []

        def write(rows, step, current, look):
            previews = to_bytes(look(), args.preview_size) if look and not blind else None
            if args.feedback == "shuffled" and previews is not None:  # images of a prompt are neighbours
                previews = previews.roll(len(rows) // 2, dims=0)
            numbers = [(1 + step) * P * K + (first or 0) + j for j in rows]  # beyond those of images
            z = None if first is None else draw_noise(numbers, 1, (N,), args.seed, iteration)[:, 0]
            made = refine(policy, args, [texts[j] for j in rows], current, step / steps, previews, z)
            record.append((rows, step, *made))
            return made[0]

        asked = noise.to(device, dtype), schedules, write, options | {"num_inference_steps": steps}
        return sample(pipe, texts, *asked, args.max_sequence_length, cache), record

    def sample_eval(mode, films, texts, rows):
        noise = draw_noise(rows, 1, shape, seed=0, iteration=0)[:, 0]  # the same in every run
        steps, count = args.eval_num_inference_steps, args.num_refinements * (mode != "")
        schedules = draw_schedules(rows, count, steps, 0, 0, random=False)
        blind = {"blind": True} if mode == "_apriori" else {}  # all of it could be written before sampling
        pictures, record = draw(texts, noise, steps, schedules, **blind)
        films.append((rows, steps, record))
        return pictures

    progress = load_checkpoint(run_dir, lm, optimizer) if args.resume else {"iteration": -1}
    if args.evaluate:
        load_checkpoint(Path(args.evaluate), lm, optimizer)
    log = report.Report(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    images = range(rank * B, (rank + 1) * B)  # of this process, whole groups
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0: before training
        row, clock = {"iteration": iteration, "charts/num_images": iteration * P * K}, report.Clock(device)
        if iteration > 0:
            # 1. prompts, and when they are refined
            drawn = draw_prompts(len(prompts), P, args.seed, iteration)
            originals, data = ([rows[drawn[j // K]] for j in images] for rows in (prompts, metadata))
            # at random, so that one policy serves any number of them; a single one comes first
            settings = args.num_refinements, T, args.seed, iteration, args.num_refinements > 1
            schedules = [steps for steps in draw_schedules(range(P), *settings) for _ in range(K)]
            numbers = [j // K if args.share_noise else j for j in images]
            noise = draw_noise(numbers, 1, shape, args.seed, iteration)[:, 0]

            # 2. to 4. sample and refine, score against the original prompts
            dialogues, scores, stats = [], [], []
            for i in tqdm(range(0, B, M), desc="sample", leave=False, disable=None):
                batch = slice(i, min(i + M, B))
                when = [schedules[j] for j in images[batch]]
                pictures, record = draw(originals[batch], noise[batch], T, when, images[i])
                clock.stop("sample")
                scores.append(reward.details(pictures, originals[batch], data[batch]))
                clock.stop("reward")
                for rows, _, texts, formed, dialogue in record:
                    dialogues.append(([i + j for j in rows], dialogue))
                    cut = [len(ids) > limit for ids in pipe.tokenizer(texts).input_ids]
                    stats += zip(formed, dialogue[3].sum(1).tolist(), cut)

            # 5. advantages, from the rewards of all processes
            scores = {name: gather(torch.cat([s[name] for s in scores])) for name in scores[0]}
            stats = gather(torch.tensor(stats, dtype=torch.float32))
            names = "format_rate reply_tokens truncated_fraction".split()
            row |= {f"charts/{name}": value for name, value in zip(names, stats.mean(0).tolist())}
            row |= report.reward_metrics(scores, K)
            advantages = group_advantages(scores["reward"].view(P, K), "group")
            advantages = advantages.flatten().split(B)[rank].to(device)

            # 6. loss, a mean over all tokens of the iteration
            sums, tokens = torch.zeros(5, device=device), stats[:, 1].sum().item()
            for rows, dialogue in tqdm(dialogues, desc="train", leave=False, disable=None):
                parts = policy_loss(policy, reference, dialogue, advantages[rows], args) / tokens
                (parts[0] + args.lm_kl_coef * parts[1]).backward()
                sums[:4] += parts.detach()

            # 7. one optimiser step
            for tensor in [sums, *(p.grad for p in weights)] if world_size > 1 else []:
                torch.distributed.all_reduce(tensor)  # losses are over global counts
            lr = args.lm_learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = row["losses/lm_learning_rate"] = lr
            sums[4] = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            if not sums.isfinite().all():
                raise FloatingPointError("the loss or its gradient is not finite")
            optimizer.step()
            optimizer.zero_grad()
            clock.stop("train")
            names = "lm_policy_loss lm_kl lm_ratio_first lm_entropy lm_grad_norm".split()
            row |= {f"losses/{name}": value for name, value in zip(names, sums.tolist())}

        results, last = {}, iteration == args.num_iterations
        if iteration % args.eval_every == 0 or last:
            for name, rows in files.items():
                for mode in ("", "_loop", "_apriori")[iteration > 0 :]:  # "": the prompts as they are, once
                    key, films = name + mode, []
                    show = partial(sample_eval, mode, films)
                    results[key] = (*rows, *evaluate(show, *rows, reward, M))
                    if rank == 0 and key == "eval_loop":
                        report.save_films(run_dir, iteration, films, *results[key])
            clock.stop("evaluate")
        if rank == 0:
            log.write(row | clock.metrics(P * K), results)
            if (iteration % args.save_every == 0 or last) and not args.evaluate:
                save_policy(run_dir, policy, optimizer, {"iteration": iteration})
    if rank == 0:
        log.close()
    return run_dir


if __name__ == "__main__":
    command_line.main(train, tyro.cli(Args))
