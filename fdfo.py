"""FDFO: finite differences between paired samples say where every velocity of the sampler should go.

Paper: arXiv 2603.12893. Official code: licensed for non-commercial use, nothing copied. Derived from:
flow_grpo.py (read `diff flow_grpo.py fdfo.py`), without log-probabilities: the whole sampler is one action.

One iteration:
 1. draw P prompts, K / 2 pairs of images for each; a pair shares its first noise           draw_noise
 2. sample with a little private noise at each step, which keeps the marginals              churned_step
 3. score the images
 4. dx, dR: deviations from the pair's mean, of final latents and of rewards; dR dx / |dx|^2
    is the gradient of the reward as far as the pair shows it                               finite_difference
 5. shuffle all (image, step) tuples; in each, a pseudo-ratio rho grows as the velocity goes
    from v_old to v_old - h, h = dx / mean(dx^2), which moves x_0 along dx                  pseudo_log_ratio
 6. -dR rho + |dR| (rho - 1)^2 / (2 eps), least at rho = 1 +- eps, plus a KL to the base    spo_loss
 7. one optimiser step per rollout, or a few, each tuple used once; the first is on-policy (rho 1)

Differences from the official settings:
 1. The times are the pipeline's own. The learning rate is annealed, and a KL is on by default (docs/fdfo.md).
 2. Tuples without a difference in reward are left out, of the KL too: they are half of all.
 3. log rho is limited to +-5. A pair closer than 1e-8 in mean square counts as equal.

Run (with real weights: not run, not measured):
  python fdfo.py                                             # the tiny world: 0.9 GB, 9 minutes on two cores
  python fdfo.py --model stabilityai/stable-diffusion-3.5-medium --max-sequence-length 128 --lora-rank 32 \\
      --resolution 512 --rewards ocr --prompts ocr/train.txt --churn-weight 0.0025 --learning-rate 3e-5 \\
      --num-inference-steps 40 --eval-num-inference-steps 40 --num-updates-per-iteration 4 \\
      --kl-coef 0 --micro-batch-size 8
  torchrun --nproc_per_node=8 fdfo.py ... --num-prompts-per-iteration 448
Conventions: t in [0, 1], t = 1 is noise; x_t = (1 - t) x_0 + t eps; v = eps - x_0; sampling runs from 1 to 0.
Letters: P prompts, K images per prompt, B = P * K, T steps, (C, h, w) a latent.
"""

import contextlib
import copy
import dataclasses
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from einops import rearrange
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
    eval_every: int = 32  # iterations between evaluations
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
    num_prompts_per_iteration: int = 128  # P, over all processes
    num_images_per_prompt: int = 2  # K, the size of a group
    num_inference_steps: int = 8  # T, denoising steps of a training sample; fewer than at evaluation is fine
    eval_num_inference_steps: int = 10  # denoising steps of an evaluation sample
    guidance_scale: float = 1.0  # classifier-free, in sampling, loss and evaluation; 1: none, half the cost
    churn: Literal["raw", "logit-normal", "dirac"] = "raw"  # at all times, around one drawn, or at the start
    churn_weight: float = 0.03  # raw: gamma of each step; else the sum of log(1 + gamma) over the steps
    micro_batch_size: int = 64  # images per forward pass: memory and speed, not the result
    # algorithm
    clip_range: float = 0.03  # of the ratio; small, since log-probabilities are means over a latent
    kl_coef: float = 0.1  # beta, weight of the KL to the base model; a forward pass per trained step
    # optimisation
    num_iterations: int = 96  # rollouts
    num_updates_per_iteration: int = 1  # optimiser steps per rollout, each on its share of the prompts
    learning_rate: float = 8e-4  # AdamW's, annealed linearly to zero over the run
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


def churned_step(x_t, velocity, t, t_next, churn, noise):
    """Euler's step past t_next, to r, and noise back up to t_next: same marginal. churn: gamma, (B, 1, 1, 1).

    With sigma(t) = t / (1 - t): sigma(r) = sigma(t_next) / (1 + gamma), so
        r = t_next / (1 + gamma - gamma t_next),   x_r = x_t + (r - t) v
        x = (x_r + r sqrt((1 + gamma)^2 - 1) noise) / (1 + gamma r)
    gamma = 0 is Euler's step. At t = t_next = 1 it churns the prior: x_t / (1 + gamma) and fresh noise.
    """
    r = t_next / (1 + churn - churn * t_next)
    return (x_t + (r - t) * velocity + r * ((1 + churn) ** 2 - 1).sqrt() * noise) / (1 + churn * r)


def churn_schedule(sigmas, kind, weight, centre, width=0.25):
    """gamma_0 ... gamma_T of a pair, (T + 1,) float64: gamma_i on arrival at sigmas[i], gamma_0 the prior's.

    raw: gamma_i = weight. dirac: gamma_0 = exp(weight) - 1, no other. logit-normal: gamma_i = exp(weight p_i)
    - 1, p the density of sigmoid(N(centre, width)) over its sum: prod (1 + gamma_i) = exp(weight).
    """
    times = np.array(sigmas[:-1])
    if kind == "raw":
        return np.append(np.full(len(times), weight), 0.0)
    density = (times == 1).astype(float)
    if kind == "logit-normal":
        t = np.where(times < 1, times, 0.5)  # the density is 0 at t = 1
        density = np.exp(-(((np.log(t / (1 - t)) - centre) / width) ** 2) / 2) / (t * (1 - t)) * (times < 1)
        density = density if density.sum() > 1e-6 else np.ones(len(times))  # no step near the centre
    return np.append(np.expm1(weight * density / density.sum()), 0.0)


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


def draw_churn(pairs, sigmas, kind, weight, seed, iteration):
    """A schedule for each pair, (2 * pairs, T + 1) float32; logit-normal centres are drawn from N(1, 1.5)."""
    centres = [np.random.default_rng((seed, 2, iteration, pair)).normal(1.0, 1.5) for pair in pairs]
    schedules = [churn_schedule(sigmas, kind, weight, centre) for centre in centres]
    return torch.from_numpy(np.repeat(schedules, 2, axis=0)).float()


@torch.no_grad()
def churned_rollout(velocity_at, noise, sigmas, churn):
    """Samples a batch. noise (B, 1 + T, C, h, w), draw 0 the start's, churn (B, T + 1).

    velocity_at(x_t, t) -> (B, C, h, w). Returns x_0 (B, C, h, w), and all x_t, velocities (B, T, C, h, w).
    """
    churn = rearrange(churn, "b t -> t b 1 1 1")
    x_t, states, velocities = churned_step(noise[:, 0], 0.0, 1.0, 1.0, churn[0], noise[:, 1]), [], []
    for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:])):
        states.append(x_t)
        velocities.append(velocity_at(x_t, t))
        fresh = noise[:, 2 + i] if i + 2 < len(sigmas) else 0.0  # the last step, to t = 0, has no noise
        x_t = churned_step(x_t, velocities[-1], t, t_next, churn[i + 1], fresh)
    return x_t, torch.stack(states, dim=1), torch.stack(velocities, dim=1)


# === algorithm ===


def finite_difference(x_0, values):
    """Direction h (B, C, h, w) and reward difference dR (B,) of pairs x_0 (B, C, h, w), values (B,).

    dx, dR: half the differences, opposite signs in a pair. h = dx / mean(dx^2), not over its root: so dR h is
    their quotient times C h w. dR, and the loss, is 0 for equal latents (h, too), equal rewards, or a NaN.
    """
    pairs, values = rearrange(x_0, "(n k) ... -> n k ...", k=2), values.view(-1, 2)
    dx, dR = (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1), values - values.mean(1, keepdim=True)
    m = dx.square().flatten(1).mean(1)
    dR = dR.nan_to_num(0, 0, 0).flatten() * (m > 1e-8)
    return dx / (m + 1e-6).view(-1, 1, 1, 1) * (m > 1e-8).view(-1, 1, 1, 1), dR


def pseudo_log_ratio(velocity, old_velocity, direction, limit=5.0):
    """log rho = mean(h^2) - mean((v - v_target)^2), v_target = v_old - h, means over (C, h, w): (B,)."""
    # minus h: a smaller velocity gives a larger x_0. Written out, so that rho is exactly 1 where v = v_old
    change = velocity - old_velocity
    return -(change**2 + 2 * change * direction).flatten(1).mean(1).clamp(-limit, limit)


def spo_loss(log_ratio, advantages, clip_range):
    """SPO's parabola -A rho + |A| (rho - 1)^2 / (2 eps), least at rho = 1 + sign(A) eps, any |A|: (B,)."""
    ratio = log_ratio.exp()
    return -advantages * ratio + advantages.abs() * (ratio - 1) ** 2 / (2 * clip_range)


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
    if args.num_images_per_prompt % 2 or args.churn_weight < 0:
        raise BadInput("--num-images-per-prompt must be even, for pairs, and --churn-weight not negative")
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

    def sample_ode(texts, rows):
        noise = draw_noise(rows, 1, shape, seed=0, iteration=0).to(device)  # the same in every run
        noise = noise.expand(-1, len(eval_sigmas), -1, -1, -1)  # without churn only draw 0 counts
        churn = torch.zeros(len(rows), len(eval_sigmas))
        return decode(pipe, churned_rollout(velocity_for(texts), noise, eval_sigmas, churn.to(device))[0])

    progress = load_checkpoint(run_dir, transformer, optimizer) if args.resume else {"iteration": -1}
    log = report.Report(run_dir, __file__, args, progress["iteration"]) if rank == 0 else None
    U, P, K = args.num_updates_per_iteration, args.num_prompts_per_iteration, args.num_images_per_prompt
    B, T, M = P * K // world_size, args.num_inference_steps, args.micro_batch_size  # B: of this process
    images = range(rank * B, (rank + 1) * B)
    batches = [slice(j, min(j + M, B)) for j in range(0, B, M)]
    times = torch.tensor(sigmas, dtype=torch.float64, device=device)
    for p in parameters:
        p.grad = torch.zeros_like(p)  # a process may have no tuple of an update
    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):  # 0: the base model
        row, clock = {"iteration": iteration, "charts/num_images": iteration * P * K}, report.Clock(device)
        if iteration > 0:
            # 1. prompts and noises
            drawn = draw_prompts(len(prompts), P, args.seed, iteration)
            texts, data = ([rows[drawn[j // K]] for j in images] for rows in (prompts, metadata))
            noise = draw_noise(images, 1 + T, shape, args.seed, iteration)
            noise[1::2, 0] = noise[::2, 0]  # pairs are neighbours and start at the same noise
            churn = draw_churn(images[::2], sigmas, args.churn, args.churn_weight, args.seed, iteration)

            # 2. and 3. sample and score
            samples, scores = [], []
            for batch in tqdm(batches, desc="sample", leave=False, disable=None):
                velocity_at, z = velocity_for(texts[batch]), noise[batch].to(device)
                samples.append(churned_rollout(velocity_at, z, sigmas, churn[batch].to(device)))
                pictures = decode(pipe, samples[-1][0])
                clock.stop("sample")
                scores.append(reward.details(pictures, texts[batch], data[batch]))
                clock.stop("reward")

            # 4. differences of pairs
            x_0, states, velocities = (torch.cat(parts) for parts in zip(*samples))
            scores = {name: gather(torch.cat([s[name] for s in scores])) for name in scores[0]}
            row |= report.reward_metrics(scores, K)
            direction, dR = finite_difference(x_0, scores["reward"].split(B)[rank].to(device))

            # 5. to 7. loss and optimiser steps
            lr = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)
            optimizer.param_groups[0]["lr"] = lr
            order = torch.from_numpy(np.random.default_rng((args.seed, 4, iteration)).permutation(P * K * T))
            sums, terms = torch.zeros(U, 6, device=device), P * K * T // U
            for update, tuples in enumerate(tqdm(order.split(terms), "train", leave=False, disable=None)):
                tuples = tuples[tuples // (B * T) == rank].to(device) - rank * B * T  # this process's images
                tuples = tuples[dR[tuples // T] != 0]  # a tie has no policy loss
                for batch in tuples.split(M) if len(tuples) else []:
                    b, i = batch // T, batch % T
                    A, x_t, old_velocity, mine = dR[b], states[b, i], velocities[b, i], [texts[j] for j in b]
                    velocity = velocity_for(mine)(x_t, times[i])
                    log_ratio = pseudo_log_ratio(velocity, old_velocity, direction[b])
                    policy_loss, kl = spo_loss(log_ratio, A, args.clip_range), torch.zeros_like(A)
                    if args.kl_coef > 0:
                        with torch.no_grad(), base_weights(transformer, reference) as network:
                            ref_velocity = velocity_for(mine, network)(x_t, times[i])
                        kl = (velocity - ref_velocity).square().flatten(1).mean(1)
                    ((policy_loss + args.kl_coef * kl).sum() / terms).backward()
                    sums[update, :5] += diagnostics(policy_loss, kl, log_ratio, A, args.clip_range)
                for tensor in [sums[update], *(p.grad for p in parameters)] if world_size > 1 else []:
                    torch.distributed.all_reduce(tensor)  # losses are over global counts
                sums[update, 5] = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                if not sums[update].isfinite().all():
                    raise FloatingPointError("the loss or its gradient is not finite")
                if sums[update, 5] > 0:  # else all pairs are equal: neither momentum nor decay may step
                    optimizer.step()
                optimizer.zero_grad(set_to_none=False)
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
