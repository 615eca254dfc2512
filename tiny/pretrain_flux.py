"""Pretrains the tiny world's editor, tiny/flux, from scratch, supervised only: no reward is ever seen here.

    python -m tiny.pretrain_flux flow       flow model and text encoders; the autoencoder is that of tiny/sd3
    python -m tiny.pretrain_flux prompts    goes on, mostly with prompts, which need longer than edits
    python -m tiny.pretrain_flux distill    makes the guidance scale an input of the model; comes last
    python -m tiny.pretrain_flux eval       scores the finished pipeline on the dev prompts and the dev edits

Each stage is deterministic from --seed on one machine and shows its progress. It writes a checkpoint to
--work every --save-every steps and resumes from it when started again. The result is a plain diffusers
folder. A step sees images with prompts and, in a second pass, images with their edited versions and
instructions. What is worded, and how, is in world.py and vlm_world.py.
"""

import copy
import functools
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxKontextPipeline
from tqdm import tqdm

from flow_grpo import Conditions, predict_flux_velocity
from rewards.sources import load_source
from tiny import vlm_world, world
from tiny.flux_model import build_flux
from tiny.image_model import MAX_TOKENS
from tiny.pretrain_image_model import Dataset, add_noise, images_to_tensor, save_pipeline
from tiny.pretraining import fit, parse_options
from tiny.scoring import print_scores

HERE = Path(__file__).parent
FLOW_STEPS = 20000
PROMPTS_STEPS = 8000
DISTILL_STEPS = 2000
LARGEST_GUIDANCE = 4.0  # of the scales that the model learns
EDIT_SHARE = 0.4  # of the images of a step
EDIT_SHARE_OF_PROMPTS_STAGE = 0.1


# ---- data ----
def to_latents(vae, images):
    """Images (B, 3, 64, 64) in [-1, 1] -> latents (B, C, 8, 8), the modes of their distributions."""
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


class EditDataset:
    """Edits of the world, drawn once: source and target as latents, three wordings of the instruction."""

    def __init__(self, vae, seed, size):
        rng = random.Random(f"{seed}-edits")
        self.wordings = []
        sources = []
        targets = []
        for _ in tqdm(range(size // 64), desc="encode edits", mininterval=10):
            edits = [world.sample_edit(rng) for _ in range(64)]
            for source, edit in edits:
                self.wordings.append(vlm_world.edit_answers(source, edit))
            sources.append(to_latents(vae, images_to_tensor([world.draw(source) for source, _ in edits])))
            targets.append(to_latents(vae, images_to_tensor([world.draw(edit.target) for _, edit in edits])))
        self.sources = torch.cat(sources)  # (size, C, h, w)
        self.targets = torch.cat(targets)

    def batch(self, rng, batch_size):
        """(prompts, sources, targets) of random edits.

        Three instructions in five are as they are, one in five says where the object is, and one in five
        describes the result. One in ten is then left empty, for guidance.
        """
        rows = [rng.randrange(len(self.wordings)) for _ in range(batch_size)]
        prompts = []
        for row in rows:
            instruction, exact_instruction, target = self.wordings[row]
            wordings = [instruction] * 3 + [exact_instruction, target]
            prompts.append("" if rng.random() < 0.1 else rng.choice(wordings))
        return prompts, self.sources[rows], self.targets[rows]


class Batch(NamedTuple):
    """What a pass of a step learns from."""

    prompts: list  # of B strings
    sources: torch.Tensor | None  # latents (B, C, h, w) of the images to be edited
    x_0: torch.Tensor  # latents (B, C, h, w) to be drawn


def draw_batches(dataset, edits, rng, batch_size, edit_share=EDIT_SHARE):
    """The two passes of a step: drawings and edits."""
    num_edits = round(edit_share * batch_size)
    prompts, x_0 = dataset.batch(rng, batch_size - num_edits)
    edit_prompts, sources, targets = edits.batch(rng, num_edits)
    return [Batch(prompts, None, x_0), Batch(edit_prompts, sources, targets)]


# ---- losses ----
def encode_prompts(pipe, prompts):
    """Embeddings (B, L, D) and pooled embeddings (B, D), with gradients: FluxPipeline.encode_prompt."""
    tokens = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    pooled = pipe.text_encoder(tokens.input_ids).pooler_output
    embeds = pipe.text_encoder_2(tokens.input_ids).last_hidden_state
    return embeds, pooled


def velocity(transformer, x_t, t, embeds, pooled, sources, guidance_scale):
    """The transformer's velocity at noisy latents x_t (B, C, h, w) and times t (B,)."""
    conditions = Conditions(embeds, pooled, sources)
    return predict_flux_velocity(transformer, x_t, t, conditions, None, guidance_scale)


def flow_loss(pipe, dataset, edits, batch_size, seed, edit_share, step):
    """The flow-matching loss on the images of a step: mean squared error of the velocity."""
    rng = random.Random(f"{seed}-flow-{step}")
    generator = torch.Generator().manual_seed(step)
    loss = 0.0
    for batch in draw_batches(dataset, edits, rng, batch_size, edit_share):
        t, noise, x_t = add_noise(batch.x_0, generator)
        embeds, pooled = encode_prompts(pipe, batch.prompts)
        predicted = velocity(pipe.transformer, x_t, t, embeds, pooled, batch.sources, 1.0)
        loss = loss + len(t) / batch_size * F.mse_loss(predicted, noise - batch.x_0)
    return loss


def distill_loss(pipe, teacher, dataset, edits, batch_size, seed, step):
    """How far the model's velocity at a guidance scale is from its teacher's guided velocity.

    The scale is drawn anew for each step, from 1 to LARGEST_GUIDANCE. The teacher guides in two passes, with
    and without the prompt (Ho & Salimans 2022); both see the source. The model learns to do it in one, with
    the scale as an input (Meng et al. 2023), as FLUX.1-dev did.
    """
    rng = random.Random(f"{seed}-distill-{step}")
    generator = torch.Generator().manual_seed(step)
    scale = rng.uniform(1, LARGEST_GUIDANCE)
    loss = 0.0
    for batch in draw_batches(dataset, edits, rng, batch_size):
        t, _, x_t = add_noise(batch.x_0, generator)
        with torch.no_grad():
            embeds, pooled = encode_prompts(pipe, batch.prompts)
            empty_embeds, empty_pooled = encode_prompts(pipe, [""] * len(t))
            with_prompt = velocity(teacher, x_t, t, embeds, pooled, batch.sources, 1.0)
            without = velocity(teacher, x_t, t, empty_embeds, empty_pooled, batch.sources, 1.0)
            guided = without + scale * (with_prompt - without)
        predicted = velocity(pipe.transformer, x_t, t, embeds, pooled, batch.sources, scale)
        loss = loss + len(t) / batch_size * F.mse_loss(predicted, guided)
    return loss


# ---- stages ----
def make_datasets(vae, args):
    """(Dataset, EditDataset), with half as many edits as images."""
    dataset = Dataset(vae, f"{args.seed}-flux", args.dataset_size)
    return dataset, EditDataset(vae, args.seed, args.dataset_size // 2)


def pretrain_flow(args):
    """Trains the flow model and the text encoders, and saves the pipeline."""
    torch.manual_seed(args.seed)
    pipe = build_flux(AutoencoderKL.from_pretrained(HERE / "sd3" / "vae"))
    num_steps = args.steps or FLOW_STEPS
    fit_flow("flux_flow", pipe, args, args.seed, EDIT_SHARE, num_steps, peak=1.5e-3)


def pretrain_prompts(args):
    """Goes on training what the stage `flow` saved, mostly with prompts, and saves the pipeline.

    To put the right colour on the right one of two objects takes the model longer than to edit an image.
    """
    pipe = FluxKontextPipeline.from_pretrained(args.folder, dtype=torch.float32)
    num_steps = args.steps or PROMPTS_STEPS
    seed = f"{args.seed}-prompts"  # else the first batches of the stage `flow` come again
    fit_flow("flux_prompts", pipe, args, seed, EDIT_SHARE_OF_PROMPTS_STAGE, num_steps, peak=1e-3)


def fit_flow(name, pipe, args, seed, edit_share, num_steps, peak):
    """Trains the flow model and the text encoders, and saves the pipeline. name: of the checkpoint."""
    datasets = make_datasets(pipe.vae, args)
    loss_at = functools.partial(flow_loss, pipe, *datasets, args.batch_size, seed, edit_share)
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    fit(name, modules, loss_at, args, num_steps, peak=peak, ema_decay=0.999)
    save_pipeline(pipe, args.folder)


def distill(args):
    """Teaches the flow model its own guided velocities, and saves the pipeline.

    The text encoders stay as they are. The teacher is what the stage before saved. It is kept in --work,
    because the student takes its place.
    """
    teacher_folder = Path(args.work) / "flux_teacher"
    if not teacher_folder.is_dir():
        FluxKontextPipeline.from_pretrained(args.folder, dtype=torch.float32).save_pretrained(teacher_folder)
    pipe = FluxKontextPipeline.from_pretrained(teacher_folder, dtype=torch.float32)
    teacher = copy.deepcopy(pipe.transformer).requires_grad_(False)
    datasets = make_datasets(pipe.vae, args)
    loss_at = functools.partial(distill_loss, pipe, teacher, *datasets, args.batch_size, args.seed)
    num_steps = args.steps or DISTILL_STEPS
    fit("flux_distill", [pipe.transformer], loss_at, args, num_steps, peak=5e-4, ema_decay=0.995)
    save_pipeline(pipe, args.folder)


# ---- evaluation ----
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
REWARDS_OF_FILES = {
    "dev": "geneval",
    "dev_paraphrased": "geneval",
    "dev_hard": "geneval",
    "text_dev": "ocr",
    "edit_dev": "edit",
}


def draw(pipe, prompts, metadata, guidance_scale, generator=None, latents=None):
    """One image for each prompt: plain diffusers, ODE sampler, 10 steps. Rows with a source are edits.

    latents: the initial noise, as the pipeline packs it. Without it, it is drawn by the generator.
    """
    sources = None
    if "source" in metadata[0]:
        sources = torch.stack([load_source(row["source"], world.SIZE) for row in metadata])
    return pipe(
        image=sources,
        prompt=prompts,
        height=world.SIZE,
        width=world.SIZE,
        max_area=world.SIZE**2,  # else diffusers draws an image of a megapixel
        _auto_resize=False,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        max_sequence_length=MAX_TOKENS,
        generator=generator,
        latents=latents,
        output_type="pt",
    ).images


def evaluate(args):
    """Prints the scores on the dev prompts and the dev edits."""
    pipe = FluxKontextPipeline.from_pretrained(args.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print_scores(functools.partial(draw, pipe), REWARDS_OF_FILES, GUIDANCE_SCALES)


STAGES = {"flow": pretrain_flow, "prompts": pretrain_prompts, "distill": distill, "eval": evaluate}

if __name__ == "__main__":
    arguments = parse_options(__doc__, list(STAGES), ["flux"])
    STAGES[arguments.stage](arguments)
