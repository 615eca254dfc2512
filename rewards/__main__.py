"""Scores a folder of images: the rewards as an evaluation tool.

    python -m rewards geneval ocr --images DIR --prompts FILE

Prints the mean of each reward over all images and over those of each tag, and a last line of JSON. Whose
prompt an image is, is read off its name. These work, each with one or more images per prompt:
  00012.png, 12_3.png, image_12.png         by the prompt's number, counted from 0, or from 1 as ComfyUI does
  00012/samples/0000.png                    GenEval's own folders
  a red dog_000001.png                      by the prompt's words

Where the names can be read in several ways, one line says so. An image that cannot be read is left unscored.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from einops import rearrange
from tqdm import tqdm

import rewards
from rewards import command_line, report
from rewards.command_line import PositiveInt, Range
from rewards.errors import BadInput
from rewards.image_file import read_image
from rewards.image_folder import describe_pairing, find_images, pair_images
from rewards.prompts import load_prompts


@dataclasses.dataclass
class Args:
    rewards: Annotated[tuple, tyro.conf.Positional, tyro.conf.arg(metavar="REWARD [REWARD ...]")]
    """What to score with, such as geneval ocr clipscore@hub/id-or-folder:0.5. Of several, "reward" is the
    weighted sum."""
    images: str
    """The folder of images, of any sizes."""
    prompts: str
    """The prompts that the images were made for: a .txt with one prompt per line, or a .jsonl with "prompt"
    and metadata per line."""
    output: str = ""
    """A .jsonl to write, a line per image with its scores; null where it could not be scored."""
    batch_size: PositiveInt = 16
    """Images of one size that are scored together."""
    number: Annotated[int, Range(-9, 9)] = 0
    """Which number in an image's name is its prompt's: 1 the first, 2 the second, -1 the last. 0: find
    out."""
    count_from: Literal["auto", "0", "1"] = "auto"
    """The number of the first prompt. auto: find out."""
    in_order: bool = False
    """Pair images and prompts in the order of the names and of the file, one image per prompt."""


def read_batches(paths, batch_size, broken):
    """Yields the images that can be read, in order, as batches of one size.

    A batch is (indices of its paths, images (B, 3, H, W) float in [0, 1]), of up to batch_size images. The
    others get the reason in broken, {index: reason}.
    """
    indices = []
    batch = []
    for index, path in enumerate(tqdm(paths, leave=False, disable=None)):
        try:
            pixels = torch.from_numpy(read_image(path))
        except ValueError as error:
            broken[index] = str(error)
            continue
        image = rearrange(pixels, "h w c -> c h w") / 255
        is_full = len(batch) == batch_size
        if batch and (is_full or image.shape != batch[0].shape):
            yield indices, torch.stack(batch)
            indices = []
            batch = []
        indices.append(index)
        batch.append(image)
    if batch:
        yield indices, torch.stack(batch)


def score(reward, paths, prompts, metadata, batch_size, device):
    """The scores, {reward: {index of the image: value}}, and {index: why it could not be read}.

    NaN marks what could not be scored.
    """
    scores = {}
    broken = {}
    for indices, images in read_batches(paths, batch_size, broken):
        some_prompts = [prompts[index] for index in indices]
        some_metadata = [metadata[index] for index in indices]
        details = reward.details(images.to(device), some_prompts, some_metadata)
        for name, values in details.items():
            scores.setdefault(name, {}).update(zip(indices, values.tolist()))
    for values in scores.values():
        values.update(dict.fromkeys(broken, math.nan))
    return scores, broken


def tabulate(scores, metadata, names):
    """{reward: {"all": mean, tag: mean, "mean of tags": mean}}; the last is GenEval's overall score."""
    means = report.summarise(scores, metadata, "")
    table = {}
    for name in names:
        start = f"eval/{name}/"
        tags = {key.removeprefix(start): mean for key, mean in means.items() if key.startswith(start)}
        table[name] = {"all": means.get(f"eval/{name}", math.nan)} | tags
        if tags:
            table[name]["mean of tags"] = report.mean(tags.values())
    return table


def print_table(table):
    """Prints a column per reward and a line per tag."""
    labels = {}  # as an ordered set
    for column in table.values():
        labels |= column
    left = max(16, max(map(len, labels)) + 2)
    width = max(18, max(map(len, table)) + 2)
    print(" " * left + "".join(f"{name:>{width}}" for name in table))
    for label in labels:
        cells = [f"{column.get(label, math.nan):{width}.4f}" for column in table.values()]
        print(f"{label:{left}}" + "".join(cells))


def to_json(record):
    """A line of JSON, in which NaN is null."""
    return json.dumps(json.loads(json.dumps(record), parse_constant=lambda name: None))


def write_scores(path, paths, prompts, scores, broken):
    """Writes a line per image."""
    lines = []
    for index, (image, prompt) in enumerate(zip(paths, prompts)):
        record = {"image": str(image), "prompt": prompt}
        for name, values in scores.items():
            record[name] = values[index]
        if index in broken:
            record["broken"] = broken[index]
        lines.append(to_json(record) + "\n")
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--output {path} cannot be written: {error.strerror}") from None


def say(line):
    """Prints beside the results, which go to stdout."""
    print(line, file=sys.stderr)


def main(args):
    """Scores the images, prints the means as a table and as a last line of JSON."""
    if not args.rewards:
        raise BadInput(f"name one or more rewards: {', '.join(rewards.REGISTRY)}")
    if args.output and os.path.isdir(args.output):
        raise BadInput(f"--output {args.output} is a folder: name a .jsonl")
    if args.output and not os.path.isdir(Path(args.output).parent):
        raise BadInput(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    file = load_prompts(args.prompts)
    paths = find_images(args.images)
    rows = pair_images(args.images, paths, file.prompts, args.number, args.count_from, args.in_order)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reward = rewards.build(",".join(args.rewards), file.prompts, file.metadata, device)
    prompts = [file.prompts[row] for row in rows]
    metadata = [file.metadata[row] for row in rows]
    scores, broken = score(reward, paths, prompts, metadata, args.batch_size, device)
    if not scores:
        raise BadInput(f"--images {args.images}: no image can be read, such as {paths[0]} ({broken[0]})")
    say(describe_pairing(rows, len(file.prompts)))
    for index, reason in broken.items():
        say(f"unscored: {paths[index]} cannot be read ({reason})")
    names = list(scores)
    if len(reward.parts) == 1:
        names.remove("reward")  # the sum of one
    table = tabulate(scores, metadata, names)
    print_table(table)
    if args.output:
        write_scores(args.output, paths, prompts, scores, broken)
    unscored = sum(math.isnan(value) for value in scores["reward"].values())
    record = {
        "images": len(paths),
        "unscored": unscored,
        "prompts_without_image": len(file.prompts) - len(set(rows)),
        "scores": table,
    }
    print(to_json(record))


if __name__ == "__main__":
    command_line.run(main, Args, __doc__, prog="python -m rewards")
