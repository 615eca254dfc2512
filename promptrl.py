"""PromptRL: a language model rewrites prompts, trained jointly with the flow model and from the same rewards.

Paper: Wang et al. 2026, arXiv 2602.01382v1. Official code: G-U-N/UniRL (read for facts, nothing copied).
Derived from: flow_grpo.py (read `diff flow_grpo.py promptrl.py`).

One iteration:
 1. draw P prompts; all but the last m of a group's K images get a rewrite     draw_prompts, rewrite
 2. sample with an SDE in the first W steps, its own noise for every image     draw_noise, rollout
 3. score against the original prompt; a well-formed rewrite earns more        rewards/, add_format_reward
 4. advantage = z-score over the group, originals and rewrites together        group_advantages
 5. language model: policy gradient on the rewrites' tokens, less a KL         reply_log_probs, lm_objective
 6. flow model: Flow-GRPO's clipped objective on all images                    clipped_loss, gaussian_kl
 7. one optimiser step for both, on-policy; no gradient crosses: a frozen encoder reads the rewrite

Differences from the paper and its code:
 1. Originals are kept (m = 2), as in the paper; the released text-to-image trainer has rewrites only.
 2. Tokens come from the full softmax, whose log-probabilities are trained; the code samples from the best 50.
 3. An empty answer is ill-formed. One --instruction serves all rewards; the code has one for each.
 4. Learning rates are annealed, each model's gradient is clipped by itself, SD3 stands in for FLUX.
Switches: --num-original-prompts K: flow-only; --trained lm or flow: the other model is frozen.

Run (with real weights: not run, not measured):
  python promptrl.py                                         # the tiny world: 1.1 GB, 7 minutes on one core
  torchrun --nproc_per_node=8 promptrl.py --model stabilityai/stable-diffusion-3.5-medium --lora-rank 32 \\
      --lm Qwen/Qwen2.5-VL-3B-Instruct --lm-lora-rank 32 ...              # more flags: docs/promptrl.md
Conventions: t in [0, 1], t = 1 is noise; x_t = (1 - t) x_0 + t eps; v = eps - x_0; sampling runs from 1 to 0.
"""

import contextlib
import copy
import dataclasses
import math
import re
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration

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
    eval_every: int = 5  # iterations between evaluations
    save_every: int = 16  # iterations between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project_name: str = "flow-rl"  # the W&B project
    wandb_entity: str | None = None  # the W&B team or user
    # models and data
    model: str = "tiny/sd3"  # a diffusers pipeline of a supported family: a folder or a hub id
    lm: str = "tiny/vlm"  # the language model, a Qwen2.5-VL: a transformers folder or a hub id
    instruction: str = "Improve this image prompt: {prompt}. Answer inside <answer> </answer>."
    """What the rewriter is asked, with {prompt} in it; the same in training and evaluation."""
    resolution: int = 0  # side of the images in pixels; 0: the model's own
    max_sequence_length: int = 0  # T5 tokens per prompt (SD3.5: 128); 0 leaves T5 out (tiny/sd3 has none)
    lora_rank: int = 0  # of the LoRA that is trained, alpha is twice that; 0 trains all weights
    lm_lora_rank: int = 0  # of the language model's LoRA; 0 trains all its text weights
    gradient_checkpointing: bool = False  # recompute activations: far less memory, about a third more time
    prompts: str = "tiny/prompts/train.jsonl"  # .txt, a prompt a line, or .jsonl with metadata
    eval_prompts: str = ""  # held-out prompts; empty: the --prompts file with `train` replaced by `eval`
    rewards: str = "geneval"  # names with optional weights, such as geneval:1,jpeg:0.2
    # sampling
    num_prompts_per_iteration: int = 32  # P, over all processes
    num_images_per_prompt: int = 8  # K, the size of a group
    num_original_prompts: int = 2  # m, images of a group made from the prompt itself; K: no rewrites at all
    max_new_tokens: int = 32  # N, longest reply of the language model
    num_inference_steps: int = 8  # T, denoising steps of a training sample; fewer than at evaluation is fine
    eval_num_inference_steps: int = 10  # denoising steps of an evaluation sample
    guidance_scale: float = 1.0  # classifier-free, in sampling, loss and evaluation; 1: none, half the cost
    noise_level: float = 0.7  # a, strength of the SDE's noise
    sde_type: Literal["flow", "cps"] = "flow"  # the paper's SDE, or CPS (2509.05952)
    sde_window: int = 4  # W, steps with noise and training, in the noisy half; 0: all but the last
    micro_batch_size: int = 64  # images per forward pass: memory and speed, not the result
    # algorithm
    trained: Literal["both", "flow", "lm"] = "both"  # the other is frozen; "flow" still samples rewrites
    format_coef: float = 1.0  # reward of a well-formed answer, beside the image's
    clip_range: float = 1e-3  # of the ratio; small, since log-probabilities are means over a latent
    kl_coef: float = 0.0  # beta, weight of the KL to the base model; a forward pass per trained step
    lm_kl_coef: float = 0.01  # weight of the language model's KL to itself before training
    # optimisation
    num_iterations: int = 20  # rollouts
    learning_rate: float = 6e-4  # AdamW's, annealed linearly to zero over the run
    lm_learning_rate: float = 1e-3  # the language model's
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm


# === model ===


def load_model(args, device, dtype):
    """(pipeline, transformer, reference). What is trained, LoRA or all weights, requires grad and is float32.

    reference is the KL's base model: a frozen copy, or None where the LoRA can be switched off or beta is 0.
    """
    no_t5 = {} if args.max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=dtype, **no_t5).to(device)
    pipe.vae.float()
    transformer, reference = pipe.transformer.requires_grad_(False), None
    if args.lora_rank > 0:
        names = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
        config = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "init_lora_weights": "gaussian"}
        transformer.add_adapter(LoraConfig(target_modules=["attn." + name for name in names], **config))
    else:
        reference = copy.deepcopy(transformer) if args.kl_coef > 0 else None
        transformer.requires_grad_(True)
    for p in transformer.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return pipe, transformer.train(), reference  # train() matters to checkpointing alone: there is no dropout


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
def encode_prompts(pipe, prompts, max_sequence_length, cache):
    """Embeddings (B, L, D), pooled (B, D); each distinct prompt is encoded once, alone, kept on the CPU."""
    if len(cache) > 4096:  # bounds the memory: with T5 a prompt of SD3.5 takes 1.7 MB
        cache.clear()
    options = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    for prompt in prompts:
        if prompt not in cache:  # in a batch its rounding would depend on what a resumed run has cached
            embeds, _, pooled, _ = pipe.encode_prompt([prompt], None, None, **options)
            cache[prompt] = embeds[0].cpu(), pooled[0].cpu()
    embeds, pooled = zip(*(cache[prompt] for prompt in prompts))
    return torch.stack(embeds).to(pipe.device), torch.stack(pooled).to(pipe.device)


@torch.no_grad()
def decode(pipe, x_0):
    """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1], rounded to 8 bits as when saved."""
    z = x_0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return ((pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255).round() / 255


# === flow ===


def predict_velocity(transformer, x_t, t, embeds, negative, guidance_scale):
    """v(x_t, t, prompt), float32 (B, C, h, w); t is a number or float64 (B,), embeds ((B, L, D), (B, D))."""
    # guidance_scale != 1: classifier-free guidance against negative, ((1, L, D), (1, D)), in one batch
    prompt_embeds, pooled = embeds
    timestep = torch.as_tensor(1000 * t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
    if guidance_scale != 1:
        x_t, timestep = torch.cat([x_t, x_t]), torch.cat([timestep, timestep])  # unconditional, conditional
        prompt_embeds = torch.cat([negative[0].expand_as(prompt_embeds), prompt_embeds])
        pooled = torch.cat([negative[1].expand_as(pooled), pooled])
    with torch.autocast(x_t.device.type, prompt_embeds.dtype, enabled=prompt_embeds.dtype != torch.float32):
        velocity = transformer(
            hidden_states=x_t.to(prompt_embeds.dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
        ).sample.float()
    if guidance_scale != 1:
        unconditional, conditional = velocity.chunk(2)
        velocity = unconditional + guidance_scale * (conditional - unconditional)
    return velocity


def step_mean_std(x_t, velocity, sigmas, i, noise_level, sde_type):
    """Mean (B, C, h, w) and standard deviation (a number) of step i, t = sigmas[i] to t' = sigmas[i + 1].

    flow (the paper), Euler-Maruyama with dt = t - t' > 0, for an SDE with the ODE's marginals:
        sigma_t = a sqrt(t / (1 - t)),   std = sigma_t sqrt(dt)
        mean = x_t (1 - sigma_t^2 dt / (2 t)) - v (1 + sigma_t^2 (1 - t) / (2 t)) dt
    cps, from the clean and the noise prediction x_0 = x_t - t v, x_1 = x_t + (1 - t) v:
        std = t' sin(a pi / 2),   mean = (1 - t') x_0 + t' cos(a pi / 2) x_1
    a = 0 makes both the ODE's Euler step. The step is named by its index: times, as floats, compare badly.
    """
    t, t_next = sigmas[i], sigmas[i + 1]
    dt = t - t_next
    if sde_type == "cps":
        x_0, x_1, angle = x_t - t * velocity, x_t + (1 - t) * velocity, noise_level * math.pi / 2
        return (1 - t_next) * x_0 + t_next * math.cos(angle) * x_1, t_next * math.sin(angle)
    # sigma_t diverges at t = 1: the first step's denominator takes the next time, which makes std = a there
    variance = noise_level**2 * t / (1 - (t_next if i == 0 else t))
    mean = x_t * (1 - variance * dt / (2 * t)) - velocity * (1 + variance * (1 - t) / (2 * t)) * dt
    return mean, math.sqrt(variance * dt)


def log_prob(x, mean, std):
    """Gaussian log-density of x, the MEAN over (C, h, w): (B,)."""
    # as in DDPO and the official code: a sum's ratio leaves any clip range at once with 65,536 elements
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean, reference_mean, std):
    """KL of two Gaussians of equal std, |mean - reference_mean|^2 / (2 std^2), mean over (C, h, w): (B,)."""
    # std includes sqrt(dt), as in the paper; the official code divides by sigma_t^2: its KL is ours times dt
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std**2)


def get_sigmas(scheduler, num_inference_steps):
    """The pipeline's own times, from 1 down to 0, T + 1 numbers: what is trained is what gets deployed."""
    scheduler.set_timesteps(num_inference_steps)
    return scheduler.sigmas.tolist()


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


@torch.no_grad()
def rollout(velocity_at, noise, sigmas, window, noise_level, sde_type):
    """Samples a batch, SDE steps inside the window and ODE steps outside. noise (B, 1 + W, C, h, w).

    velocity_at(x_t, t) -> (B, C, h, w). Returns x_0 (B, C, h, w) and for each step of the window x_t, what
    followed it, its mean (B, C, h, w) and log-prob (B,): float32, exactly what the sampler went on with.
    """
    x_t, steps = noise[:, 0], []
    for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:])):
        velocity = velocity_at(x_t, t)
        if i in window:
            mean, std = step_mean_std(x_t, velocity, sigmas, i, noise_level, sde_type)
            x_next = mean + std * noise[:, 1 + len(steps)]
            steps.append((x_t, x_next, mean, log_prob(x_next, mean, std)))
            x_t = x_next
        else:
            x_t = x_t + (t_next - t) * velocity
    return x_t, steps


def ask(tokenizer, prompts, instruction, device):
    """Model inputs (B, L), padded on the left: a user's turn for each prompt, the reply about to start."""
    turns = [[{"role": "user", "content": instruction.replace("{prompt}", prompt)}] for prompt in prompts]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, padding=True, return_tensors="pt")
    return {**chat.to(device), "mm_token_type_ids": torch.zeros_like(chat.input_ids)}  # 0: all of it is text


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


def reply_mask(replies, end):
    """(B, N) bool: the tokens up to the first end of turn, that one included; all where there is none."""
    return (replies == end).cumsum(1) - (replies == end).int() == 0


def parse_answer(reply):
    """(prompt, well-formed): the last <answer> that is not empty, else the reply without stray tags."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)
    answers = [answer for answer in found if answer.strip()] or [re.sub(r"</?answer>", " ", reply)]
    return " ".join(answers[-1].split()), any(answer.strip() for answer in found)


def rewrite(lm, tokenizer, prompts, args, noise=None):
    """(rewrites, are they well-formed, what the loss needs): of (B,) prompts; noise as in sample_replies."""
    question = ask(tokenizer, prompts, args.instruction, lm.device)
    replies, log_probs = sample_replies(lm, question, args.max_new_tokens, noise)
    answers = map(parse_answer, tokenizer.batch_decode(replies, skip_special_tokens=True))
    return *zip(*answers), (question, replies, reply_mask(replies, tokenizer.eos_token_id), log_probs)


# === algorithm ===


def add_format_reward(values, formatted, coef):
    """R = R_image + coef * [well-formed], (P, K). formatted (P, K - m): of the rewrites, first in a group."""
    count = formatted.shape[1]
    # originals have no format; their rewrites' mean neither helps nor harms them
    neutral = (formatted.sum(1, keepdim=True) / max(count, 1)).expand(-1, values.shape[1] - count)
    return values + coef * torch.cat([formatted, neutral], dim=1)


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


@torch.no_grad()
def diagnostics(policy_loss, kl, log_ratio, advantages, clip_range):
    """Sums over a batch: loss, KL, |ratio - 1|, and how many clipped with positive, negative advantage."""
    change = log_ratio.exp() - 1
    clipped = (change.abs() > clip_range) & (change * advantages > 0)
    parts = (policy_loss, kl, change.abs(), clipped & (advantages > 0), clipped & (advantages < 0))
    return torch.stack([part.sum() for part in parts])


def lm_objective(log_probs, ref_log_probs, mask, advantages):
    """Policy loss and KL of each reply, (2, B), means over its tokens: log-probabilities and mask (B, N)."""
    # on-policy GRPO: the ratio is 1, never clipped; k3 for the KL: exp(d) - d - 1, d = ref_log_prob - l
    log_probs, ref_log_probs = log_probs.where(mask, 0), ref_log_probs.where(mask, 0)  # pads have -inf
    ratio, difference = (log_probs - log_probs.detach()).exp(), ref_log_probs - log_probs
    terms = torch.stack([-ratio * advantages.unsqueeze(1), difference.exp() - difference - 1])  # (2, B, N)
    return (terms * mask).sum(2) / mask.sum(1).clamp(min=1)


def lm_loss(lm, reference, dialogue, advantages, kl_coef):
    """Loss (B,) of a dialogue (see `rewrite`), and (4, B): policy loss, KL, |ratio - 1|, entropy."""
    question, replies, mask, old_log_probs = dialogue
    log_probs, entropy = reply_log_probs(lm, question, replies)
    ref_log_probs = log_probs.detach()
    if kl_coef > 0:
        with torch.no_grad(), base_weights(lm, reference) as network:
            ref_log_probs = reply_log_probs(network, question, replies)[0]
    policy_loss, kl = losses = lm_objective(log_probs, ref_log_probs, mask, advantages)
    change = (log_probs.detach() - old_log_probs).where(mask, 0).expm1().abs()
    means = (torch.stack([change, entropy]) * mask).sum(2) / mask.sum(1)
    return policy_loss + kl_coef * kl, torch.cat([losses.detach(), means])


# === checkpoint ===


@report.uninterrupted()
def save_models(run_dir, transformer, lm, tokenizer, optimizer, progress):
    """checkpoint/ to go on with; lora/, transformer/ (diffusers), lm_lora/ (peft), lm/ (transformers)."""
    state = {"progress": progress, "optimizer": optimizer.state_dict()}
    for name, model in (("transformer", transformer), ("lm", lm)):
        state[name] = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad} if model else {}
    report.write_state(run_dir / "checkpoint" / "state.pt", state)
    if state["transformer"] and hasattr(transformer, "peft_config"):
        # without this metadata diffusers loads the LoRA with alpha = rank: other images, and no error
        metadata = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
        layers = get_peft_model_state_dict(transformer)
        StableDiffusion3Pipeline.save_lora_weights(f"{run_dir}/lora", layers, **metadata)
    elif state["transformer"]:
        transformer.save_pretrained(run_dir / "transformer")
    for part in (lm, tokenizer) if state["lm"] else ():
        part.save_pretrained(run_dir / ("lm_lora" if hasattr(lm, "peft_config") else "lm"))


def load_models(run_dir, transformer, lm, optimizer):
    """Restores a checkpoint, returns its progress. No random state: draws depend on the iteration alone."""
    path = run_dir / "checkpoint" / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for model, weights in ((transformer, state["transformer"]), (lm, state["lm"])):
            if weights:
                model.load_state_dict(model.state_dict() | weights)
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]
    except Exception as error:  # a damaged file raises anything
        raise BadInput(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from None


# === train ===


def train(args):
    """Runs or resumes an experiment; returns the run's folder."""
    args, run_dir = report.open_run(Args, args, __file__)
    # the place of a second family, FLUX: load_model, encode_prompts, decode and predict_velocity differ
    report.check_args(args, families=["StableDiffusion3Pipeline"])
    P, K, m = args.num_prompts_per_iteration, args.num_images_per_prompt, args.num_original_prompts
    if not 0 <= m <= K - (args.trained == "lm"):
        raise BadInput(f"--num-original-prompts {m} must be 0 to {K}, and with --trained lm less than {K}")
    if "{prompt}" not in args.instruction or args.max_new_tokens < 1:
        raise BadInput("--instruction must have {prompt} in it, and --max-new-tokens be at least 1")
    files = load_prompt_files(args.prompts, args.eval_prompts)
    device, dtype, rank, world_size = report.open_device(args)
    reward = rewards.build(args.rewards, *(sum(parts, []) for parts in zip(*files.values())), device)
    prompts, metadata = files.pop("train")

    torch.manual_seed(args.seed)  # the LoRAs' first weights
    tokenizer, lm, lm_reference = load_lm(args, device, dtype) if m < K else (None, None, None)
    pipe, transformer, reference = load_model(args, device, dtype)
    if frozen := {"flow": lm, "lm": transformer}.get(args.trained):
        frozen.requires_grad_(False)
    weights = [[p for p in net.parameters() if p.requires_grad] if net else [] for net in (transformer, lm)]
    optimizer = torch.optim.AdamW([{"params": group} for group in weights], lr=0.0, weight_decay=1e-4)
    sigmas = get_sigmas(pipe.scheduler, args.num_inference_steps)
    eval_sigmas = get_sigmas(pipe.scheduler, args.eval_num_inference_steps)
    side = args.resolution // pipe.vae_scale_factor or transformer.config.sample_size
    shape, cache = (transformer.config.in_channels, side, side), {}  # (C, h, w)
    negative = encode_prompts(pipe, [""], args.max_sequence_length, cache)

    def velocity_for(texts, network=transformer):
        embeds = encode_prompts(pipe, texts, args.max_sequence_length, cache)
        return lambda x_t, t: predict_velocity(network, x_t, t, embeds, negative, args.guidance_scale)

    def step(x_t, velocity, i):
        return step_mean_std(x_t, velocity, sigmas, i, args.noise_level, args.sde_type)

    def sample_ode(texts, rows):
        noise = draw_noise(rows, 1, shape, seed=0, iteration=0).to(device)  # the same in every run
        return decode(pipe, rollout(velocity_for(texts), noise, eval_sigmas, (), 0.0, "flow")[0])

    def sample_enhanced(texts, rows):
        answers = rewrite(lm, tokenizer, texts, args)[0]
        titles.update((row, f"{text}\n-> {answer}") for row, text, answer in zip(rows, texts, answers))
        return sample_ode(answers, rows)

    progress = load_models(run_dir, transformer, lm, optimizer) if args.resume else {"iteration": -1}
    log = report.Report(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    B, M, N = P * K // world_size, args.micro_batch_size, args.max_new_tokens
    images = range(rank * B, (rank + 1) * B)  # whole groups
    # the same micro-batches in rollout and loss: kernels differ with the batch size, so would the first ratio
    batches = [slice(j, min(j + M, B)) for j in range(0, B, M)]
    asked = [j for j in range(B) if j % K < K - m]  # rewrites come first in a group
    lm_batches = [asked[j : j + M] for j in range(0, len(asked), M)]
    # the noisy steps come first; when the flow model is frozen it samples as it will be used
    window = range(args.sde_window or args.num_inference_steps - 1) if weights[0] else ()
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0: the base models
        row, clock = {"iteration": iteration, "charts/num_images": iteration * P * K}, report.Clock(device)
        if iteration > 0:
            # 1. prompts and rewrites
            drawn = draw_prompts(len(prompts), P, args.seed, iteration)
            originals, data = ([rows[drawn[j // K]] for j in images] for rows in (prompts, metadata))
            texts, stats, dialogues = list(originals), [], []
            for batch in tqdm(lm_batches, desc="rewrite", leave=False, disable=None):
                noise = draw_noise([P * K + images[j] for j in batch], 1, (N,), args.seed, iteration)[:, 0]
                *answers, dialogue = rewrite(lm, tokenizer, [originals[j] for j in batch], args, noise)
                dialogues.append(dialogue)
                for j, answer, *stat in zip(batch, *answers, dialogue[2].sum(1).tolist()):
                    cut = len(pipe.tokenizer(answer).input_ids) > pipe.tokenizer.model_max_length
                    stats.append([*stat, cut, answer not in texts[j - j % K : j]])  # new in its group
                    texts[j] = answer
            clock.stop("rewrite")

            # 2. and 3. sample and score, against the original prompts
            paths, scores = [], []
            noise = draw_noise(images, 1 + len(window), shape, args.seed, iteration)
            for batch in tqdm(batches, desc="sample", leave=False, disable=None):
                velocity_at, z = velocity_for(texts[batch]), noise[batch].to(device)
                x_0, path = rollout(velocity_at, z, sigmas, window, args.noise_level, args.sde_type)
                paths.append(path)
                pictures = decode(pipe, x_0)
                clock.stop("sample")
                scores.append(reward.details(pictures, originals[batch], data[batch]))
                clock.stop("reward")

            # 4. advantages, from the rewards of all processes
            scores = {name: gather(torch.cat([s[name] for s in scores])) for name in scores[0]}
            stats = gather(torch.tensor(stats, dtype=torch.float32)).view(P, K - m, 4)
            values = scores["reward"].view(P, K)
            names = "format_rate reply_tokens truncated_fraction distinct_fraction".split()
            row |= {f"charts/{name}": value for name, value in zip(names, stats.mean((0, 1)).tolist()) if lm}
            parts = {"rewrites": values[:, : K - m], "originals": values[:, K - m :]}
            row |= {f"charts/reward_{k}": v.nanmean().item() for k, v in parts.items() if v.numel()}
            row |= report.reward_metrics(scores, K)
            total = add_format_reward(values, stats[:, :, 0], args.format_coef)
            advantages = group_advantages(total, "group").flatten().split(B)[rank].to(device)

            # 5. the language model's loss
            sums, terms = torch.zeros(11, device=device), (P * K * len(window), P * (K - m))
            for batch, dialogue in zip(lm_batches, dialogues if weights[1] else ()):
                loss, parts = lm_loss(lm, lm_reference, dialogue, advantages[batch], args.lm_kl_coef)
                (loss.sum() / terms[1]).backward()
                sums[5:9] += parts.sum(1) / terms[1]

            # 6. the flow model's loss
            for batch, path in zip(batches, paths):
                A, velocity_at = advantages[batch], velocity_for(texts[batch])
                for i, (x_t, x_next, _, old_log_prob) in zip(window, path):
                    mean, std = step(x_t, velocity_at(x_t, sigmas[i]), i)
                    log_ratio = log_prob(x_next, mean, std) - old_log_prob
                    policy_loss, kl = clipped_loss(log_ratio, A, args.clip_range), torch.zeros_like(A)
                    if args.kl_coef > 0:
                        with torch.no_grad(), base_weights(transformer, reference) as network:
                            ref_velocity = velocity_for(texts[batch], network)(x_t, sigmas[i])
                        kl = gaussian_kl(mean, step(x_t, ref_velocity, i)[0], std)
                    ((policy_loss + args.kl_coef * kl).sum() / terms[0]).backward()
                    sums[:5] += diagnostics(policy_loss, kl, log_ratio, A, args.clip_range) / terms[0]

            # 7. one step for both
            for tensor in [sums, *(p.grad for p in sum(weights, []))] if world_size > 1 else []:
                torch.distributed.all_reduce(tensor)  # losses are over global counts
            anneal = 1 - (iteration - 1) / args.num_iterations
            for k, lr in enumerate((args.learning_rate, args.lm_learning_rate)):
                group = optimizer.param_groups[k]
                group["lr"] = row[f"losses/{'lm_' * k}learning_rate"] = lr * anneal
                sums[9 + k] = torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            if not sums.isfinite().all():
                raise FloatingPointError("the loss or its gradient is not finite")
            optimizer.step()
            optimizer.zero_grad()
            clock.stop("train")
            names = "policy_loss kl ratio_first clipfrac_positive clipfrac_negative".split()
            names += "lm_policy_loss lm_kl lm_ratio_first lm_entropy grad_norm lm_grad_norm".split()
            row |= {f"losses/{name}": value for name, value in zip(names, sums.tolist())}

        results, last = {}, iteration == args.num_iterations
        if iteration % args.eval_every == 0 or last:
            for name, rows in files.items():
                results[name] = (*rows, *evaluate(sample_ode, *rows, reward, M))
                if lm:
                    titles = dict(enumerate(rows[0]))  # of the picture; a process fills in its own rewrites
                    evaluated = evaluate(sample_enhanced, *rows, reward, M)
                    results[name + "_enhanced"] = (titles, rows[1], *evaluated)
            clock.stop("evaluate")
        if rank == 0:
            log.write(row | clock.metrics(P * K), results)
            if iteration % args.save_every == 0 or last:
                save_models(run_dir, transformer, lm, tokenizer, optimizer, {"iteration": iteration})
    if rank == 0:
        log.close()
    return run_dir


if __name__ == "__main__":
    command_line.main(train, tyro.cli(Args))
