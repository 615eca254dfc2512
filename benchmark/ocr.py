"""What does reading text cost? Milliseconds per image of the ocr reward, with one and two processes, as a
ratio to the bare engine, called in this process with one thread.

    python -m benchmark.ocr [--num-images 32] [--rounds 5] [--output FILE.json]

Each round times all three on the same 512 x 512 images, one after the other, so that they see the same
machine; the medians of the rounds are kept. Writes benchmark/results/ocr.json and prints it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from benchmark.run import RESULTS, ROOT, processor
from rewards.ocr.engine import Reader, make_engine
from rewards.ocr.reward import OCR


def render(number):
    """The text "Number <number>", (512, 512, 3) uint8."""
    image = Image.new("RGB", (512, 512), (230, 230, 220))
    font = ImageFont.load_default(size=56)
    ImageDraw.Draw(image).text((256, 256), f"Number {number}", fill=(20, 40, 90), font=font, anchor="mm")
    return np.array(image)


def measure(num_images, rounds):
    """{way: [milliseconds per image, a number a round]}. A round before the first warms up."""
    pixels = np.stack([render(number) for number in range(num_images)])
    images = rearrange(torch.from_numpy(pixels), "b h w c -> b c h w") / 255
    prompts, metadata = [f'the text "Number {number}"' for number in range(num_images)], [{}] * num_images
    engine, one, two = make_engine(), OCR(Reader(1)), OCR(Reader(2))
    ways = {
        "bare engine": lambda: [engine(image) for image in pixels],
        "1 process": lambda: one(images, prompts, metadata),
        "2 processes": lambda: two(images, prompts, metadata),
    }
    milliseconds = {way: [] for way in ways}
    for round_number in range(rounds + 1):
        for way, read in ways.items():
            start = time.perf_counter()
            result = read()
            if round_number > 0:
                milliseconds[way].append(1000 * (time.perf_counter() - start) / num_images)
            elif way != "bare engine":
                assert result.mean() > 0.9, "the text was not read: what was timed is not the reward"
    return milliseconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "ocr.json")
    args = parser.parse_args()
    milliseconds = measure(args.num_images, args.rounds)
    bare = milliseconds["bare engine"]
    words = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "command": " ".join(["python -m benchmark.ocr", *sys.argv[1:]]),
        "commit": subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "images": f"{args.num_images} of 512 x 512, {args.rounds} rounds",
        "milliseconds_per_image": {way: statistics.median(values) for way, values in milliseconds.items()},
        "ratio_to_bare_engine": {
            way: statistics.median(value / floor for value, floor in zip(values, bare))
            for way, values in milliseconds.items()
        },
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
