"""Draws pictures with what a run has trained, beside the model that it began with.

    python -m benchmark.draw runs/flow_grpo-... "a red circle" "two stars" [--out pictures.png]
    python -m benchmark.draw runs/promptrl-... --prompts my_prompts.txt

It takes the runs of all five files. Each line of the picture is a way to draw, from the same noises:
    source      the image to be edited, where there is one
    before      the image model as it was, with the prompt as it is
    after       the trained image model, if it was trained
    rewritten   the same with the prompt as the run's language model rewrites it (PromptRL)
    refined     the prompt refined by the run's language model during the sampling (PromptLoop)

A prompt file with images to edit works, too (docs/your_model.md):

    python -m benchmark.draw runs/promptrl-... --prompts tiny/prompts/fold_0/edit_reworded_test.jsonl
"""

import argparse
import json
from pathlib import Path

import torch

import promptloop
import promptrl
from rewards import BadInput
from rewards.prompts import PromptFile, load_prompts, resolve_sources
from rewards.report.pictures import Cell, draw_sheet, wrap

COLUMNS = 8  # of a sheet, and so the number of prompts
SHARED_FLAGS = (
    "model resolution max_sequence_length guidance_scale eval_num_inference_steps eval_seed".split()
)
LOOP_FLAGS = "num_refinements feedback preview_size max_new_tokens instruction edit_instruction".split()


def read_args(run):
    """(algorithm, its flags) of a run's folder. Raises BadInput where it is none."""
    path = run / "args.json"
    if not path.is_file():
        raise BadInput(f"{run} is not the folder of a run: it has no args.json")
    flags = json.loads(path.read_text())
    return flags["algorithm"], flags


def drawing_args(algorithm, flags):
    """promptloop's Args that draw as the run evaluates: its sampler is the pipeline's own, for any model."""
    names = SHARED_FLAGS + (LOOP_FLAGS if algorithm == "promptloop" else [])
    return promptloop.Args(**{name: flags[name] for name in names if name in flags})


def load_trained_weights(pipe, run):
    """Puts the run's LoRA or transformer into a pipeline. Returns whether the run has trained it."""
    if (run / "lora").is_dir():
        pipe.load_lora_weights(run / "lora")
    elif (run / "transformer").is_dir():
        trained = type(pipe.transformer).from_pretrained(run / "transformer")
        pipe.transformer.load_state_dict(trained.state_dict())
    else:
        return False
    return True


def load_policy(module, run, flags, device, dtype):
    """The run's language model, or None where it has none."""
    if not flags.get("lm") or not ((run / "lm").is_dir() or (run / "lm_lora").is_dir()):
        return None
    args = module.Args(lm=str(run / "lm") if (run / "lm").is_dir() else flags["lm"])
    lm, tokenizer, _ = module.load_lm(args, device, dtype, False)
    lm.to(device)
    if (run / "lm_lora").is_dir():
        lm.load_adapter(str(run / "lm_lora"))
    processor = promptloop.Qwen2VLImageProcessorPil.from_pretrained(flags["lm"])
    return module.Policy(lm, tokenizer, processor)


def rewritten(policy, flags, file, size):
    """The prompts as PromptRL's language model rewrites them, greedily."""
    pictures = None
    instruction = flags["instruction"]
    if "source" in file.metadata[0]:
        sources = promptrl.load_sources(file.metadata, size)
        pictures = promptrl.to_bytes(sources, flags["source_size"])
        instruction = flags["edit_instruction"]
    return promptrl.rewrite(policy, instruction, file.prompts, pictures, flags["max_new_tokens"]).prompts


@torch.no_grad()
def draw(run, file):
    """{way: (captions, images (B, 3, H, W) in [0, 1])} of the prompts of a PromptFile."""
    algorithm, flags = read_args(run)
    args = drawing_args(algorithm, flags)
    device, dtype, _, _ = promptloop.open_device("auto", "auto")
    model = promptloop.load_pipeline(args, device, dtype)
    numbers = range(len(file.prompts))
    ways = {}

    def add(way, prompts):
        images = promptloop.sample_plain(model, args, prompts, file.metadata, numbers).images
        ways[way] = (prompts, images)

    sources = promptrl.load_sources(file.metadata, model.size)
    if sources is not None:
        ways["source"] = (file.prompts, sources)
    add("before", file.prompts)
    if load_trained_weights(model.pipe, run):
        add("after", file.prompts)
    if algorithm == "promptrl":
        policy = load_policy(promptrl, run, flags, device, dtype)
        if policy:
            add("rewritten", rewritten(policy, flags, file, model.size))
    if algorithm == "promptloop":
        policy = load_policy(promptloop, run, flags, device, dtype)
        samples = promptloop.sample_refined(
            model, policy, args, args.feedback, file.prompts, file.metadata, numbers
        )
        last_prompts = [film[-1][1] for film in samples.films]
        ways["refined"] = (last_prompts, samples.images)
    return ways


def save(ways, path):
    """Writes a sheet with a line for each way to draw."""
    cells = []
    num_columns = 0
    for way, (captions, images) in ways.items():
        num_columns = len(captions)
        for caption, image in zip(captions, images.float().cpu()):
            cells.append(Cell([f"{way}:", *wrap(caption, lines_per_paragraph=4)], "", image.permute(1, 2, 0)))
    draw_sheet(cells, num_columns).save(path)


def prompts_of(args):
    """The PromptFile of the command line: at most COLUMNS prompts."""
    if args.prompts:
        file = resolve_sources(args.prompts, load_prompts(args.prompts))
    else:
        file = PromptFile(args.prompt, [{} for _ in args.prompt])
    if not file.prompts:
        raise BadInput("give prompts, or a file of prompts with --prompts")
    return PromptFile(file.prompts[:COLUMNS], file.metadata[:COLUMNS])


def parse(words=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("prompt", nargs="*", help="prompts to draw")
    parser.add_argument("--prompts", default="", help=f"file of prompts; the first {COLUMNS} are drawn")
    parser.add_argument("--out", type=Path, default=Path("pictures.png"), help="where to write the picture")
    return parser.parse_args(words)


if __name__ == "__main__":
    args = parse()
    try:
        save(draw(args.run, prompts_of(args)), args.out)
    except BadInput as error:
        raise SystemExit(f"error: {error}")
    print(f"wrote {args.out}")
