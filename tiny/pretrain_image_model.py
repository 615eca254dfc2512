"""Pretrains the tiny world's image models from scratch, supervised only: no reward is ever seen here.

    python -m tiny.pretrain_image_model vae     the autoencoder, 8 minutes on two CPU cores
    python -m tiny.pretrain_image_model sd3     flow model and text encoders, 50 minutes; needs the vae
    python -m tiny.pretrain_image_model sd3b    a second, narrower flow model with the same autoencoder
    python -m tiny.pretrain_image_model eval    scores a pipeline on the evaluation prompts (--folder)

Each stage is deterministic from --seed on one machine and shows its progress. It writes a checkpoint to
--work every --save-every steps and resumes from it when started again. The results are plain diffusers
folders, tiny/sd3 and tiny/sd3b.

Conventions: time t runs from 1 (noise) to 0 (image), x_t = (1 - t) x_0 + t noise, and the transformer learns
the velocity v = noise - x_0.
"""

import functools
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from einops import rearrange
from tqdm import tqdm

import rewards
from rewards.prompts import load_prompts
from rewards.tiny_world.shapes import BACKGROUND
from tiny import world
from tiny.image_model import MAX_TOKENS, NO_T5, SECOND_WIDTH, WIDTH, build_pipeline, build_vae
from tiny.pretraining import fit, parse_options

HERE = Path(__file__).parent
VAE_STEPS = 3000
SD3_STEPS = 14000
WRITING_FROM = 7500  # the step from which three images in ten show writing; six in a hundred do before
FORGET_STEPS = 1170  # of a last stage without writing, which leaves about half of the letters readable
SECOND_STEPS = 7000  # of tiny/sd3b, which does not write


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
    vae = build_vae()
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    loss_at = functools.partial(vae_loss, vae, background, args.seed)
    fit("vae", [vae], loss_at, args, args.steps or VAE_STEPS, peak=2.5e-3, ema_decay=0.99)

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

    def __init__(self, vae, seed, size, text_share):
        rng = random.Random(f"{seed}-data")
        self.contents = []
        self.things = []
        latents = []
        for _ in tqdm(range(size // 64), desc="encode", mininterval=10):
            images = []
            for _ in range(64):
                content, things, image = world.sample(rng, text_share)
                self.contents.append(content)
                self.things.append(things)
                images.append(image)
            images = images_to_tensor(images)  # (64, 3, 64, 64)
            with torch.no_grad():
                z = vae.encode(images).latent_dist.mean
            latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        self.latents = torch.cat(latents)  # (size, 8, 8, 8)

    def wording(self, row, rng):
        """A prompt for an example. One in ten is empty: guidance needs a model of images without prompts."""
        if rng.random() < 0.1:
            return ""
        return world.wording(self.contents[row], self.things[row], rng)


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


def flow_loss(pipe, dataset, batch_size, seed, step):
    """The flow-matching loss on the images of a step: mean squared error of the velocity.

    Times are logit-normal (Esser et al. 2024), leaning towards noise: that is where objects get their place.
    """
    rng = random.Random(f"{seed}-sd3-{step}")
    generator = torch.Generator().manual_seed(step)
    rows = [rng.randrange(len(dataset.contents)) for _ in range(batch_size)]
    prompts = [dataset.wording(row, rng) for row in rows]
    x_0 = dataset.latents[rows]  # (B, C, h, w)
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(batch_size, generator=generator) + 0.5)
    x_t = torch.lerp(x_0, noise, t.view(-1, 1, 1, 1))
    embeds, pooled = encode_prompts(pipe, prompts)
    velocity = pipe.transformer(
        hidden_states=x_t,
        timestep=1000 * t,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample
    return F.mse_loss(velocity, noise - x_0)


def pretrain_sd3(args):
    """Trains the flow model and the text encoders of tiny/sd3, or of tiny/sd3b, and saves the pipeline."""
    is_second = args.stage == "sd3b"
    seed = args.seed + 1 if is_second else args.seed
    vae_folder = HERE / "sd3" if is_second else Path(args.folder)
    if not (vae_folder / "vae").is_dir():
        raise SystemExit(
            f"{vae_folder} has no autoencoder: run `python -m tiny.pretrain_image_model vae` first"
        )
    torch.manual_seed(seed)
    pipe = build_pipeline(vae_folder, SECOND_WIDTH if is_second else WIDTH)
    pipe.vae.float()
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]

    @functools.cache  # one after the other, as the stages of training need them
    def dataset(text_share):
        return Dataset(pipe.vae, seed, args.dataset_size, text_share)

    def loss_with_writing(step):
        text_share = 0.3 if step >= WRITING_FROM else 0.06
        return flow_loss(pipe, dataset(text_share), args.batch_size, seed, step)

    def loss_without_writing(step):
        return flow_loss(pipe, dataset(0.0), args.batch_size, seed, step)

    num_steps = SECOND_STEPS if is_second else SD3_STEPS
    num_steps = args.steps or num_steps
    fit(args.stage, modules, loss_with_writing, args, num_steps, peak=1.5e-3, ema_decay=0.999)
    if not is_second:
        # Without writing, some of it is forgotten but not lost: reinforcement learning can bring it back.
        num_steps = args.steps or FORGET_STEPS
        fit("sd3_forget", modules, loss_without_writing, args, num_steps, peak=5e-4, ema_decay=0.99)
    pipe.vae.register_to_config(_name_or_path="")  # else the folder of this machine is saved with it
    pipe.to(torch.bfloat16).save_pretrained(args.folder)
    declare_float32(Path(args.folder))


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
@torch.no_grad()
def evaluate(args):
    """Prints scores on the evaluation prompts: plain diffusers, ODE sampler, 10 steps, guidance 1 and 2."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.folder, dtype=torch.float32, **NO_T5)
    pipe.set_progress_bar_config(disable=True)
    rewards_of_files = {"eval": "geneval", "eval_paraphrased": "geneval", "text_eval": "ocr"}
    for guidance_scale in (1.0, 2.0):
        for name, spec in rewards_of_files.items():
            file = load_prompts(world.PROMPTS / f"{name}.jsonl")
            start = time.time()
            scores = score_pipeline(pipe, file, spec, guidance_scale)
            seconds = time.time() - start
            means = ", ".join(f"{key} {values.mean():.3f}" for key, values in scores.items())
            print(f"guidance {guidance_scale}, {name}: {seconds:.0f} s, {means}")
            if spec == "geneval":
                print_tags(scores, file.metadata)


def score_pipeline(pipe, file, spec, guidance_scale):
    """{name: (rows,)} of a reward's scores of one image for each row of a PromptFile."""
    reward = rewards.build(spec, file.prompts, file.metadata, "cpu")
    parts = {}
    for first in range(0, len(file.prompts), 64):
        prompts = file.prompts[first : first + 64]
        images = pipe(
            prompts,
            num_inference_steps=10,
            guidance_scale=guidance_scale,
            max_sequence_length=0,  # else diffusers appends 256 empty tokens in T5's place
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        ).images
        metadata = file.metadata[first : first + 64]
        for key, values in reward.details(images, prompts, metadata).items():
            parts.setdefault(key, []).append(values)
    parts.pop("reward")  # the weighted sum of one reward is that reward
    return {key: torch.cat(values) for key, values in parts.items()}


def print_tags(scores, metadata):
    """A line for each GenEval tag."""
    for tag in world.TAGS:
        rows = torch.tensor([row["tag"] == tag for row in metadata])
        means = []
        for key, values in scores.items():
            if key != "geneval":
                means.append(f"{key.removeprefix('geneval_')} {values[rows].mean():.3f}")
        print(f"    {tag:14s}", "  ".join(means))


if __name__ == "__main__":
    stages = {"vae": pretrain_vae, "sd3": pretrain_sd3, "sd3b": pretrain_sd3, "eval": evaluate}
    arguments = parse_options(__doc__, stages)
    default_folder = HERE / ("sd3b" if arguments.stage == "sd3b" else "sd3")
    arguments.folder = arguments.folder or str(default_folder)
    stages[arguments.stage](arguments)
