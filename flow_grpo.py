"""Flow-GRPO: online reinforcement learning of a flow-matching image generator, GRPO on a stochastic sampler.

Paper: Liu et al. 2025, arXiv 2505.05470. Official code: yifan123/flow_grpo (read for facts, nothing copied).

One iteration:
 1. draw P prompts and K noises for each; a prompt's K images are a group    draw_prompts, draw_noise
 2. sample with an SDE that has the ODE's marginals: steps become actions    step_mean_std, rollout
 3. score the images with a black-box reward                                 rewards/
 4. advantage = (reward - mean of the group) / standard deviation            group_advantages
 5. recompute the log-probability of the stored steps                        log_prob
 6. PPO's clipped objective, plus a KL to the base model                     clipped_loss, gaussian_kl
 7. a few optimiser steps per rollout; the first is exactly on-policy (ratio 1), only later ones can clip

Differences from the paper and its code:
 1. The KL is the exact one, as in the paper; the code's lacks the step size (ours times dt).
 2. The last step is an ODE step, without noise. The learning rate is annealed; there is no EMA.
 3. --sde-type cps keeps the true Gaussian density; the code drops its normaliser and its 1 / (2 std^2).
 4. With guidance the gradient flows through both branches; the first official script detaches one.
 5. A group of equal rewards gets weight zero instead of being dropped; a group is a row, not a text.
 6. --ratio-norm is GRPO-Guard's ratio (2510.22319), without its weights per step.

Run (time and memory: docs/flow_grpo.md; with real weights: not run, not measured):
  python flow_grpo.py                                        # the tiny world, under 10 minutes on two cores
  python flow_grpo.py --model stabilityai/stable-diffusion-3.5-medium --max-sequence-length 128 \\
      --resolution 512 --rewards ocr --prompts ocr/train.txt --lora-rank 32 --learning-rate 3e-4 \\
      --num-inference-steps 10 --sde-window 0 --eval-num-inference-steps 40 --guidance-scale 4.5 \\
      --clip-range 1e-4 --num-prompts-per-iteration 8 --num-images-per-prompt 8 --micro-batch-size 8
  torchrun --nproc_per_node=8 flow_grpo.py ... --num-prompts-per-iteration 48 --num-images-per-prompt 24
Conventions: t in [0, 1], t = 1 is noise; x_t = (1 - t) x_0 + t eps; v = eps - x_0; sampling runs from 1 to 0.
Letters: P prompts, K images per prompt, B = P * K, T steps, W trained steps, (C, h, w) a latent.
"""

import contextlib
import copy
import dataclasses
import math
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm

import rewards
from rewards import BadInput, command_line, report
from rewards.prompts import load_prompt_files
from rewards.report.evaluation import evaluate, gather


@dataclasses.dataclass
class Args:
    seed: int = 1  # of the prompts' order and of every noise; on the CPU a run repeats bit for bit
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen weights and of the forward passes
    output_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # a run's folder to go on with, exactly; all other flags are then read from it
    eval_every: int = 16  # iterations between evaluations
    save_every: int = 16  # iterations between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project_name: str = "flow-rl"  # the W&B project
    wandb_entity: str | None = None  # the W&B team or user
    # model and data
    model: str = "tiny/sd3"  # a diffusers pipeline of a supported family: a folder or a hub id
    resolution: int = 0  # side of the images in pixels; 0: the model's own
    max_sequence_length: int = 0  # T5 tokens per prompt (SD3.5: 128); 0 leaves T5 out (tiny/sd3 has none)
    lora_rank: int = 0  # of the LoRA that is trained, alpha is twice that; 0 trains all weights
    gradient_checkpointing: bool = False  # recompute activations: far less memory, about a third more time
    prompts: str = "tiny/prompts/train.jsonl"  # .txt, a prompt a line, or .jsonl with metadata
    eval_prompts: str = ""  # held-out prompts; empty: the --prompts file with `train` replaced by `eval`
    rewards: str = "geneval"  # names with optional weights, such as geneval:1,jpeg:0.2
    # sampling
    num_prompts_per_iteration: int = 16  # P, over all processes
    num_images_per_prompt: int = 16  # K, the size of a group
    num_inference_steps: int = 8  # T, denoising steps of a training sample; fewer than at evaluation is fine
    eval_num_inference_steps: int = 10  # denoising steps of an evaluation sample
    guidance_scale: float = 1.0  # classifier-free, in sampling, loss and evaluation; 1: none, half the cost
    noise_level: float = 0.7  # a, strength of the SDE's noise
    sde_type: Literal["flow", "cps"] = "flow"  # the paper's SDE, or CPS (2509.05952)
    sde_window: int = 2  # W, steps with noise and training, in the noisy half; 0: all but the last
    micro_batch_size: int = 64  # images per forward pass: memory and speed, not the result
    # algorithm
    advantage_std: Literal["global", "group"] = "global"  # over all rewards, or the group's own
    clip_range: float = 1e-3  # of the ratio; small, since log-probabilities are means over a latent
    ratio_norm: bool = False  # GRPO-Guard's ratio: unbiased, on one scale at every step
    kl_coef: float = 0.0  # beta, weight of the KL to the base model; a forward pass per trained step
    # optimisation
    num_iterations: int = 96  # rollouts
    num_updates_per_iteration: int = 2  # optimiser steps per rollout, each on its share of the prompts
    learning_rate: float = 3e-4  # AdamW's, annealed linearly to zero over the run
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


def draw_window(num_inference_steps, sde_window, seed, iteration):
    """The steps with noise and training: sde_window ones somewhere in the noisy half (Flow-GRPO-Fast)."""
    if sde_window == 0:  # all but the last, whose std is so small that densities overflow
        return range(num_inference_steps - 1)
    starts = max(num_inference_steps // 2 - sde_window, 0) + 1
    start = int(np.random.default_rng((seed, 2, iteration)).integers(starts))
    return range(start, start + sde_window)


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


def normalised_log_ratio(log_ratio, mean, old_mean, std):
    """GRPO-Guard: removes the log-ratio's bias -|mean - old_mean|^2 / (2 std^2) and scale 1 / std: (B,)."""
    # what is left is the mean of z (mean - old_mean), z the noise: zero on average, one size at all steps
    return std * (log_ratio + gaussian_kl(mean, old_mean, std))


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


# === checkpoint ===


@report.uninterrupted()
def save_checkpoint(run_dir, transformer, optimizer, progress):
    """Weights, optimiser and progress in checkpoint/, to go on with; the weights alone in diffusers' format,
    in lora/ (for load_lora_weights) or transformer/ (for from_pretrained).
    """
    weights = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    state = {"progress": progress, "weights": weights, "optimizer": optimizer.state_dict()}
    report.write_state(run_dir / "checkpoint" / "state.pt", state)
    if hasattr(transformer, "peft_config"):
        # without this metadata diffusers loads the LoRA with alpha = rank: other images, and no error
        metadata = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
        layers = get_peft_model_state_dict(transformer)
        StableDiffusion3Pipeline.save_lora_weights(f"{run_dir}/lora", layers, **metadata)
    else:
        transformer.save_pretrained(run_dir / "transformer")


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
    """Runs or resumes an experiment; returns the run's folder."""
    args, run_dir = report.open_run(Args, args, __file__)
    # the place of a second family, FLUX: load_model, encode_prompts, decode and predict_velocity differ
    report.check_args(args, families=["StableDiffusion3Pipeline"])
    files = load_prompt_files(args.prompts, args.eval_prompts)
    device, dtype, rank, world_size = report.open_device(args)
    reward = rewards.build(args.rewards, *(sum(parts, []) for parts in zip(*files.values())), device)
    prompts, metadata = files.pop("train")

    torch.manual_seed(args.seed)  # the LoRA's first weights
    pipe, transformer, reference = load_model(args, device, dtype)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
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

    progress = load_checkpoint(run_dir, transformer, optimizer) if args.resume else {"iteration": -1}
    log = report.Report(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    U, P, K = args.num_updates_per_iteration, args.num_prompts_per_iteration, args.num_images_per_prompt
    # the prompts of an update are the same for any number of processes; a process has whole groups of each
    own = np.arange(P).reshape(U, world_size, -1)[:, rank].flatten().tolist()
    images = [i * K + k for i in own for k in range(K)]
    B, share = len(images), len(images) // U  # this process's images per rollout and per update
    # the same micro-batches in rollout and loss: kernels differ with the batch size, so would the first ratio
    M, starts = args.micro_batch_size, range(0, B, share)
    updates = [[slice(j, min(j + M, i + share)) for j in range(i, i + share, M)] for i in starts]
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0: the base model
        row, clock = {"iteration": iteration, "charts/num_images": iteration * P * K}, report.Clock(device)
        if iteration > 0:
            # 1. prompts and noises
            drawn = draw_prompts(len(prompts), P, args.seed, iteration)
            texts, data = ([rows[drawn[j // K]] for j in images] for rows in (prompts, metadata))
            window = draw_window(args.num_inference_steps, args.sde_window, args.seed, iteration)
            noise = draw_noise(images, 1 + len(window), shape, args.seed, iteration)

            # 2. and 3. sample and score
            paths, scores = [], []
            for batch in tqdm(sum(updates, []), desc="sample", leave=False, disable=None):
                velocity_at, z = velocity_for(texts[batch]), noise[batch].to(device)
                x_0, path = rollout(velocity_at, z, sigmas, window, args.noise_level, args.sde_type)
                paths.append(path)
                pictures = decode(pipe, x_0)
                clock.stop("sample")
                scores.append(reward.details(pictures, texts[batch], data[batch]))
                clock.stop("reward")

            # 4. advantages, from the rewards of all processes
            scores = {name: gather(torch.cat([s[name] for s in scores])) for name in scores[0]}
            row |= report.reward_metrics(scores, K)
            advantages = group_advantages(scores["reward"].view(P, K), args.advantage_std)
            advantages = advantages.flatten().split(B)[rank].to(device)

            # 5. to 7. loss and optimiser steps
            lr = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = lr
            sums, paths = torch.zeros(len(updates), 6, device=device), iter(paths)
            terms = P * K // U * len(window)  # summands of an update's loss, over all processes
            for update, batches in enumerate(tqdm(updates, desc="train", leave=False, disable=None)):
                for batch in batches:
                    A, velocity_at = advantages[batch], velocity_for(texts[batch])
                    for i, (x_t, x_next, old_mean, old_log_prob) in zip(window, next(paths)):
                        mean, std = step(x_t, velocity_at(x_t, sigmas[i]), i)
                        log_ratio = log_prob(x_next, mean, std) - old_log_prob
                        if args.ratio_norm:
                            log_ratio = normalised_log_ratio(log_ratio, mean, old_mean, std)
                        policy_loss, kl = clipped_loss(log_ratio, A, args.clip_range), torch.zeros_like(A)
                        if args.kl_coef > 0:
                            with torch.no_grad(), base_weights(transformer, reference) as network:
                                ref_velocity = velocity_for(texts[batch], network)(x_t, sigmas[i])
                            kl = gaussian_kl(mean, step(x_t, ref_velocity, i)[0], std)
                        ((policy_loss + args.kl_coef * kl).sum() / terms).backward()
                        sums[update, :5] += diagnostics(policy_loss, kl, log_ratio, A, args.clip_range)
                for tensor in [sums[update], *(p.grad for p in parameters)] if world_size > 1 else []:
                    torch.distributed.all_reduce(tensor)  # losses are over global counts
                sums[update, 5] = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                if not sums[update].isfinite().all():
                    raise FloatingPointError("the loss or its gradient is not finite")
                optimizer.step()
                optimizer.zero_grad()
            clock.stop("train")
            sums[:, :5] /= terms
            names = "policy_loss kl ratio_mean clipfrac_positive clipfrac_negative grad_norm".split()
            row |= {f"losses/{name}": value.item() for name, value in zip(names, sums.mean(0))}
            row |= {"losses/ratio_first": sums[0, 2].item(), "losses/learning_rate": lr}

        results, last = {}, iteration == args.num_iterations
        if iteration % args.eval_every == 0 or last:
            for name, rows in files.items():
                results[name] = (*rows, *evaluate(sample_ode, *rows, reward, args.micro_batch_size))
            clock.stop("evaluate")
        if rank == 0:
            log.write(row | clock.metrics(P * K), results)
            if iteration % args.save_every == 0 or last:
                save_checkpoint(run_dir, transformer, optimizer, {"iteration": iteration})
    if rank == 0:
        log.close()
    return run_dir


if __name__ == "__main__":
    command_line.main(train, tyro.cli(Args))
