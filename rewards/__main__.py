"""Scores a folder of images: the rewards as an evaluation tool.

    python -m rewards geneval ocr --images DIR --prompts FILE

Where all names start with a number it is their prompt's, counted from 0 as GenEval does: 00012.png, 12_3.png,
12/any.png, GenEval's own 00012/samples/0000.png. Otherwise there must be an image per prompt, in name order.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import rearrange
from PIL import Image
from tqdm import tqdm

import rewards
from rewards import BadInput, command_line, report
from rewards.prompts import load_prompts


@dataclasses.dataclass
class Args:
    rewards: tyro.conf.Positional[tuple[str, ...]]  # such as: geneval ocr clipscore@hub/id-or-folder:0.5
    images: Path  # the folder of png, jpg or webp files of any sizes
    prompts: Path  # .txt, a prompt a line, or .jsonl with metadata
    output: Path | None = None  # a .jsonl to write, a line per image; null where it could not be scored
    batch_size: int = 16  # images of one size that are scored together


def find_images(folder, num_prompts):
    """Paths in the order of their names, and the row of each one's prompt. BadInput where that is unclear."""
    paths = sorted(path for path in folder.rglob("*") if re.search(r"(?i)\.(png|jpe?g|webp)$", path.name))
    # GenEval's scripts leave a grid of the samples next to their folder
    paths = [path for path in paths if path.stem != "grid" or not (path.parent / "samples").is_dir()]
    numbers = [re.match(r"\d+(?![^\W_])", path.relative_to(folder).parts[0]) for path in paths]
    if not paths or (not all(numbers) and len(paths) != num_prompts):
        raise BadInput(f"--images {folder}: {len(paths)} images, {num_prompts} prompts: number the names")
    rows = [int(number[0]) if all(numbers) else i for i, number in enumerate(numbers)]
    if max(rows) >= num_prompts:
        raise BadInput(f"--images {folder}: one is of prompt {max(rows)}, counted from 0, of {num_prompts}")
    return paths, rows


def batches(paths, batch_size):
    """Yields (B, 3, H, W) float in [0, 1], in order: up to batch_size images of one size."""
    batch = []
    for path in tqdm(paths, leave=False, disable=None):
        try:
            pixels = np.array(Image.open(path).convert("RGB"))
        except OSError:
            raise BadInput(f"{path} is no image that can be read") from None
        image = rearrange(torch.from_numpy(pixels), "h w c -> c h w") / 255
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    yield torch.stack(batch)


def to_json(record):
    return json.dumps(json.loads(json.dumps(record), parse_constant=lambda name: None))  # NaN becomes null


def main(args):
    """Scores the images, prints the means as a table and as a last line of JSON."""
    if args.output and not args.output.parent.is_dir():
        raise BadInput(f"--output {args.output}: there is no folder {args.output.parent}")
    prompts, metadata = load_prompts(args.prompts)
    paths, rows = find_images(args.images, len(prompts))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reward = rewards.build(",".join(args.rewards), prompts, metadata, device)
    prompts, metadata, scores, start = [prompts[i] for i in rows], [metadata[i] for i in rows], {}, 0
    for images in batches(paths, args.batch_size):
        batch = slice(start, start := start + len(images))
        for name, values in reward.details(images.to(device), prompts[batch], metadata[batch]).items():
            scores.setdefault(name, {}).update(zip(range(batch.start, start), values.tolist()))
    means = report.summarise(scores, metadata, "")
    names = list(scores)[len(reward.parts) == 1 :]  # the first, "reward", is the sum
    table = {name: {"all": means.get(f"eval/{name}", math.nan)} for name in names}
    for name, row in table.items():
        tags = {key.split("/")[2]: value for key, value in means.items() if key.startswith(f"eval/{name}/")}
        row |= tags | (
            {"mean of tags": report.mean(tags.values())} if tags else {}
        )  # GenEval's overall score
    print(" " * 16 + "".join(f"{name:>18}" for name in table))
    for label in dict.fromkeys(label for row in table.values() for label in row):
        print(f"{label:16}" + "".join(f"{row.get(label, math.nan):18.4f}" for row in table.values()))
    if args.output:
        lines = [{"image": str(path), "prompt": prompt} for path, prompt in zip(paths, prompts)]
        lines = [line | {name: values[i] for name, values in scores.items()} for i, line in enumerate(lines)]
        args.output.write_text("\n".join(map(to_json, lines)) + "\n")
    unscored = sum(map(math.isnan, scores["reward"].values()))
    print(to_json({"images": len(paths), "unscored": unscored, "scores": table}))


if __name__ == "__main__":
    command_line.run(main, Args, __doc__, prog="python -m rewards")
