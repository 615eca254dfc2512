"""Checks a family of models that a file has learned to train: does it draw what its diffusers pipeline draws?

    python -m benchmark.check_family flow_grpo.py --model tiny/sd3
    python -m benchmark.check_family my_algorithm.py --model FOLDER --velocity predict_my_velocity \\
        --height 512 --width 768 --guidance-scale 3.5 --max-sequence-length 512

It loads the model in float32, and draws two prompts from the same noise, once by the diffusers pipeline, and
once by the functions of the file that depend on the family (docs/your_model.md): encode_prompts,
encode_sources, get_sigmas, the velocity, and decode. Any mistake in one of them gives other images. Run it
on a small model with random weights first: that takes a second.

It prints the largest difference of the times, and of the pixels in steps of 1/255. It exits with 1 where the
times differ by more than 1e-5, or a pixel by more than one step: a pixel that lies between two steps may be
rounded up on one side and down on the other.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

PROMPTS = ["a red circle", "two blue squares"]
SEED = 1


def pipeline_images(pipe, args, source):
    """What plain diffusers draws, (B, 3, H, W) in [0, 1], and the times at which it stepped, from 1 down."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    options = {
        "prompt": PROMPTS,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "pt",
    }
    if "max_area" in accepted:  # Kontext would draw another size
        options |= {"max_area": args.height * args.width, "_auto_resize": False}
    if source is not None:
        options["image"] = source
    options["max_sequence_length"] = args.max_sequence_length
    if args.max_sequence_length == 0 and "tokenizer_3" not in pipe.components:
        options["max_sequence_length"] = pipe.tokenizer_2.model_max_length
    images = pipe(**options).images
    return images, pipe.scheduler.sigmas.tolist()


def file_images(module, pipe, args, source_path):
    """What the file's own functions draw from the same noise, and its times."""
    side_per_latent = pipe.vae_scale_factor
    height = args.height // side_per_latent
    width = args.width // side_per_latent
    shape = (len(PROMPTS), pipe.vae.config.latent_channels, height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    embeds, pooled = module.encode_prompts(pipe, PROMPTS, args.max_sequence_length, {})
    negative_embeds, negative_pooled = module.encode_prompts(pipe, [""], args.max_sequence_length, {})
    metadata = [{"source": source_path}] * len(PROMPTS) if source_path else [{}] * len(PROMPTS)
    sources = module.encode_sources(pipe, metadata, args.height, {})
    conditions = module.Conditions(embeds, pooled, sources)
    negative = module.Conditions(negative_embeds, negative_pooled, None)
    num_tokens = height * width // 4 if module.is_flux(pipe) else None
    sigmas = module.get_sigmas(pipe.scheduler, args.num_inference_steps, num_tokens)
    name = args.velocity
    if not name:
        name = "predict_flux_velocity" if module.is_flux(pipe) else "predict_sd3_velocity"
    predict_velocity = getattr(module, name)
    x_t = noise
    for t, t_next in zip(sigmas[:-1], sigmas[1:]):  # Euler's steps of the ODE
        velocity = predict_velocity(pipe.transformer, x_t, t, conditions, negative, args.guidance_scale)
        x_t = x_t + (t_next - t) * velocity
    return module.decode(pipe, x_t), sigmas


@torch.no_grad()
def check(args):
    """(largest difference of the times, largest difference of a pixel in steps of 1/255)."""
    sys.path.insert(0, str(Path(args.file).resolve().parent))
    module = importlib.import_module(Path(args.file).stem)
    left_out = {}
    if args.max_sequence_length == 0 and not args.velocity:
        family = DiffusionPipeline.load_config(args.model)["_class_name"]
        if family == "StableDiffusion3Pipeline":
            left_out = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, **left_out)
    pipe.set_progress_bar_config(disable=True)
    source = None
    if args.source:
        if args.height != args.width:
            raise SystemExit("--source needs --height equal to --width: sources are cropped to a square")
        source = module.load_source(args.source, args.height).expand(len(PROMPTS), -1, -1, -1)
    ours, own_times = file_images(module, pipe, args, args.source)
    theirs, their_times = pipeline_images(pipe, args, source)
    if len(own_times) != len(their_times):
        raise SystemExit(f"{len(own_times)} times, where the pipeline has {len(their_times)}")
    times = max(abs(own - their) for own, their in zip(own_times, their_times))
    pixels = ((255 * ours).round() - (255 * theirs).round()).abs().max().item()
    return times, pixels


def parse(words=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="algorithm file, such as flow_grpo.py or a fork of it")
    parser.add_argument("--model", required=True, help="diffusers pipeline: a folder or a hub id")
    parser.add_argument("--velocity", default="", help="name of the file's function for this family")
    parser.add_argument("--source", default="", help="image to edit, for a model that edits")
    parser.add_argument("--height", type=int, default=64, help="in pixels")
    parser.add_argument("--width", type=int, default=64, help="in pixels")
    parser.add_argument("--num-inference-steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--max-sequence-length", type=int, default=0, help="as in the algorithm files")
    return parser.parse_args(words)


if __name__ == "__main__":
    times, pixels = check(parse())
    print(f"largest difference of the times: {times:.1e}")
    print(f"largest difference of a pixel: {pixels:.0f} of 255")
    if times > 1e-5 or pixels > 1:
        raise SystemExit("the file does not draw what the pipeline draws")
    print("the file draws what the pipeline draws")
