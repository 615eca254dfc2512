"""Pretrains the tiny world's image models from scratch, supervised only: no reward is ever seen here.

    python -m tiny.pretrain_image_model vae --model sd3       the autoencoder
    python -m tiny.pretrain_image_model flow --model sd3      flow model and text encoders; needs the vae
    python -m tiny.pretrain_image_model distill --model sd3   makes guidance part of the model; needs the flow
    python -m tiny.pretrain_image_model eval --model sd3      scores the finished pipeline on the dev prompts

On one CPU core the first three take about 13, 60 and 12 minutes. --model sd3b makes the second model.
Each stage is deterministic from --seed on one machine and shows its progress. It writes a checkpoint to
--work every --save-every steps and resumes from it when started again. The results are plain diffusers
folders, tiny/sd3 and tiny/sd3b.

Conventions: time t runs from 1 (noise) to 0 (image), x_t = (1 - t) x_0 + t noise, and the transformer learns
the velocity v = noise - x_0.
"""

import copy
import functools
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from einops import rearrange
from tqdm import tqdm

from rewards.tiny_world.shapes import BACKGROUND
from tiny import world
from tiny.image_model import MAX_TOKENS, NO_T5, SIZES, build_pipeline, build_vae
from tiny.pretraining import fit, parse_options
from tiny.scoring import print_scores

HERE = Path(__file__).parent
VAE_STEPS = 3000
FLOW_STEPS = {"sd3": 10000, "sd3b": 14000}
DISTILL_STEPS = 2000
DISTILLED_GUIDANCE = 5.0  # with it, no guidance draws better than none afterwards, on the dev prompts


# ---- the autoencoder ----
def images_to_tensor(images):
    """List of (H, W, 3) uint8 arrays -> (B, 3, H, W) float in [-1, 1]."""
    batch = torch.stack([torch.from_numpy(image) for image in images])
    return rearrange(batch, "b h w c -> b c h w").float() / 127.5 - 1


def sample_images(rng, count):
    """Images of the world, (count, 3, 64, 64) in [-1, 1]."""
    return images_to_tensor([world.sample(rng)[2] for _ in range(count)])


def vae_loss(vae, background, seed, step):
    """The autoencoder's loss on the 16 images of a step.

    Objects cover a twentieth of the pixels. They weigh more than the background, or their colours would be
    the last thing learnt. The L1 term keeps edges sharp. A faint KL term keeps the latents bounded.
    """
    images = sample_images(random.Random(f"{seed}-vae-{step}"), 16)  # (B, 3, 64, 64)
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample
    weight = 1 + 5 * (images - background).abs().amax(dim=1, keepdim=True)
    error = decoded - images
    reconstruction = (weight * (error**2 + 0.5 * error.abs())).mean()
    return reconstruction + 1e-5 * posterior.kl().mean() / images[0].numel()


def pretrain_vae(args):
    """Trains the autoencoder and saves it."""
    torch.manual_seed(args.seed)
    vae = build_vae(SIZES[args.model])
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    loss_at = functools.partial(vae_loss, vae, background, args.seed)
    fit(f"{args.model}_vae", [vae], loss_at, args, args.steps or VAE_STEPS, peak=2.5e-3, ema_decay=0.99)

    # Latents are brought to mean 0 and variance 1 in diffusers' way: (z - shift_factor) * scaling_factor.
    vae.eval()
    with torch.no_grad():
        images = sample_images(random.Random(args.seed), 512)
        z = vae.encode(images).latent_dist.mean
        error = (vae.decode(z).sample - images).abs().mean()
    mean, std = z.mean(), z.std()
    vae.register_to_config(scaling_factor=float(1 / std), shift_factor=float(mean))
    vae.to(torch.bfloat16).save_pretrained(Path(args.folder) / "vae")
    print(f"vae: mean absolute error {error:.4f} of a range of 2, latents {mean:.3f} +- {std:.3f}")


# ---- the flow model ----
class Dataset:
    """Examples of the world, drawn once. They get a new wording at every use."""

    def __init__(self, vae, seed, size):
        rng = random.Random(f"{seed}-data")
        self.contents = []
        self.things = []
        latents = []
        for _ in tqdm(range(size // 64), desc="encode", mininterval=10):
            images = []
            for _ in range(64):
                content, things, image = world.sample(rng)
                self.contents.append(content)
                self.things.append(things)
                images.append(image)
            images = images_to_tensor(images)  # (64, 3, 64, 64)
            with torch.no_grad():
                z = vae.encode(images).latent_dist.mean
            latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        self.latents = torch.cat(latents)  # (size, C, h, w)

    def batch(self, rng, batch_size):
        """(prompts, latents) of random examples. One prompt in ten is empty: guidance needs a model of images
        without prompts."""
        rows = [rng.randrange(len(self.contents)) for _ in range(batch_size)]
        prompts = []
        for row in rows:
            if rng.random() < 0.1:
                prompts.append("")
            else:
                prompts.append(world.wording(self.contents[row], self.things[row], rng))
        return prompts, self.latents[rows]


def add_noise(x_0, generator):
    """(times (B,), noise, noisy latents).

    Times are logit-normal (Esser et al. 2024), leaning towards noise: that is where objects get their place.
    """
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x_0), generator=generator) + 0.5)
    x_t = torch.lerp(x_0, noise, t.view(-1, 1, 1, 1))
    return t, noise, x_t


def encode_prompts(pipe, prompts):
    """Embeddings (B, L, D) and pooled embeddings (B, D), with gradients.

    The same as StableDiffusion3Pipeline.encode_prompt without T5.
    """
    tokens = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    embeds = []
    pooled = []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        output = encoder(tokens.input_ids, output_hidden_states=True)
        embeds.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    return torch.cat(embeds, dim=-1), torch.cat(pooled, dim=-1)


def velocity(transformer, x_t, t, embeds, pooled):
    """The transformer's velocity at noisy latents x_t (B, C, h, w) and times t (B,)."""
    return transformer(
        hidden_states=x_t,
        timestep=1000 * t,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample


def flow_loss(pipe, dataset, batch_size, seed, step):
    """The flow-matching loss on the images of a step: mean squared error of the velocity."""
    rng = random.Random(f"{seed}-flow-{step}")
    prompts, x_0 = dataset.batch(rng, batch_size)
    t, noise, x_t = add_noise(x_0, torch.Generator().manual_seed(step))
    embeds, pooled = encode_prompts(pipe, prompts)
    return F.mse_loss(velocity(pipe.transformer, x_t, t, embeds, pooled), noise - x_0)


def model_seed(args):
    """The second model has other weights and other data, too."""
    return args.seed + list(SIZES).index(args.model)


def pretrain_flow(args):
    """Trains the flow model and the text encoders, and saves the pipeline."""
    vae_folder = Path(args.folder) / "vae"
    if not vae_folder.is_dir():
        raise SystemExit(f"{args.folder} has no autoencoder: run the stage `vae` first")
    seed = model_seed(args)
    torch.manual_seed(seed)
    pipe = build_pipeline(SIZES[args.model], AutoencoderKL.from_pretrained(vae_folder))
    dataset = Dataset(pipe.vae, seed, args.dataset_size)
    loss_at = functools.partial(flow_loss, pipe, dataset, args.batch_size, seed)
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    num_steps = args.steps or FLOW_STEPS[args.model]
    fit(f"{args.model}_flow", modules, loss_at, args, num_steps, peak=1.5e-3, ema_decay=0.999)
    save_pipeline(pipe, args.folder)


# ---- guidance ----
def distill_loss(pipe, teacher, dataset, batch_size, seed, step):
    """How far the model's one velocity is from its teacher's guided velocity: mean squared error.

    Guidance adds w - 1 times what the prompt changes (Ho & Salimans 2022). The student learns the sum (Meng
    et al. 2023), so that it needs one pass where its teacher needs two, and no scale is left to find.
    """
    rng = random.Random(f"{seed}-distill-{step}")
    prompts, x_0 = dataset.batch(rng, batch_size)
    t, _, x_t = add_noise(x_0, torch.Generator().manual_seed(step))
    with torch.no_grad():
        embeds, pooled = encode_prompts(pipe, prompts)
        empty_embeds, empty_pooled = encode_prompts(pipe, [""] * batch_size)
        with_prompt = velocity(teacher, x_t, t, embeds, pooled)
        without = velocity(teacher, x_t, t, empty_embeds, empty_pooled)
        guided = without + DISTILLED_GUIDANCE * (with_prompt - without)
    return F.mse_loss(velocity(pipe.transformer, x_t, t, embeds, pooled), guided)


def distill(args):
    """Teaches the flow model its own guided velocity, and saves the pipeline. The text encoders stay fixed.

    The teacher is what the stage `flow` saved. It is kept in --work, because the student takes its place.
    """
    teacher_folder = Path(args.work) / f"{args.model}_teacher"
    if not teacher_folder.is_dir():
        pipe = StableDiffusion3Pipeline.from_pretrained(args.folder, dtype=torch.float32, **NO_T5)
        pipe.save_pretrained(teacher_folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(teacher_folder, dtype=torch.float32, **NO_T5)
    teacher = copy.deepcopy(pipe.transformer).requires_grad_(False)
    seed = model_seed(args)
    dataset = Dataset(pipe.vae, seed, args.dataset_size)
    loss_at = functools.partial(distill_loss, pipe, teacher, dataset, args.batch_size, seed)
    num_steps = args.steps or DISTILL_STEPS
    fit(f"{args.model}_distill", [pipe.transformer], loss_at, args, num_steps, peak=5e-4, ema_decay=0.995)
    save_pipeline(pipe, args.folder)


# ---- saving ----
def save_pipeline(pipe, folder):
    """Saves a pipeline with its weights in bfloat16."""
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.to(torch.bfloat16)
    for part in (pipe, pipe.vae, pipe.transformer):
        part.register_to_config(_name_or_path="")  # else the folder of this machine is saved with it
    pipe.save_pretrained(folder)
    declare_float32(Path(folder))


def declare_float32(folder):
    """Makes the text encoders of a saved pipeline load in float32, as everything else does by default.

    The weights are stored in bfloat16 to be small. Without being told a type, diffusers loads its own models
    in float32, and transformers loads each model in the type that its configuration names. A pipeline of
    both types stops at its first multiplication.
    """
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---- evaluation ----
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
REWARDS_OF_FILES = {"dev": "geneval", "dev_paraphrased": "geneval", "dev_hard": "geneval", "text_dev": "ocr"}


def draw(pipe, prompts, metadata, guidance_scale, generator):
    """One image for each prompt: plain diffusers, ODE sampler, 10 steps."""
    return pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        max_sequence_length=0,  # else diffusers appends 256 empty tokens in T5's place
        generator=generator,
        output_type="pt",
    ).images


def evaluate(args):
    """Prints the scores on the dev prompts."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.folder, dtype=torch.float32, **NO_T5)
    pipe.set_progress_bar_config(disable=True)
    print_scores(functools.partial(draw, pipe), REWARDS_OF_FILES, GUIDANCE_SCALES)


STAGES = {"vae": pretrain_vae, "flow": pretrain_flow, "distill": distill, "eval": evaluate}

if __name__ == "__main__":
    arguments = parse_options(__doc__, list(STAGES), list(SIZES))
    STAGES[arguments.stage](arguments)
