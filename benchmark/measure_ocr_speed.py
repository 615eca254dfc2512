"""What does reading text cost? Milliseconds per image of the ocr reward, and its ratio to the bare engine.

    python -m benchmark.measure_ocr_speed [--num-images 32] [--rounds 5] [--output FILE.json]

Three ways are timed on the same 512 x 512 images: the bare engine, called in this process with one thread,
and the reward with one and with two processes. Each round times all three, one after the other, so that they
see the same machine. The medians of the rounds are printed and written to a file, by default under runs/.
With --output benchmark/results/speed/ocr.json they are those of docs/rewards.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from benchmark.records import RUNS, commit, processor, shown
from rewards.ocr.engine import Reader, make_engine
from rewards.ocr.reward import OCR

BARE = "bare engine"


def render(number):
    """The text "Number <number>", (512, 512, 3) uint8."""
    image = Image.new("RGB", (512, 512), (230, 230, 220))
    font = ImageFont.load_default(size=56)
    ImageDraw.Draw(image).text((256, 256), f"Number {number}", fill=(20, 40, 90), font=font, anchor="mm")
    return np.array(image)


def measure(num_images, rounds):
    """{way: [milliseconds per image, for each round]}. A round before the first warms up."""
    pixels = np.stack([render(number) for number in range(num_images)])
    images = rearrange(torch.from_numpy(pixels), "b h w c -> b c h w") / 255
    prompts = [f'the text "Number {number}"' for number in range(num_images)]
    metadata = [{}] * num_images
    engine = make_engine()
    readers = {"1 process": OCR(Reader(1)), "2 processes": OCR(Reader(2))}
    milliseconds = {way: [] for way in (BARE, "1 process", "2 processes")}
    for round_number in range(rounds + 1):
        start = time.perf_counter()
        for image in pixels:
            engine(image)
        seconds = {BARE: time.perf_counter() - start}
        for way, reward in readers.items():
            start = time.perf_counter()
            scores = reward(images, prompts, metadata)
            seconds[way] = time.perf_counter() - start
            assert scores.mean() > 0.9, "the text was not read: what was timed is not the reward"
        if round_number > 0:
            for way in milliseconds:
                milliseconds[way].append(1000 * seconds[way] / num_images)
    return milliseconds


def summarise(milliseconds):
    """Medians over rounds, and of each round's ratio to the bare engine."""
    record = {"milliseconds_per_image": {}, "ratio_to_bare_engine": {}}
    for way, values in milliseconds.items():
        ratios = [value / floor for value, floor in zip(values, milliseconds[BARE])]
        record["milliseconds_per_image"][way] = statistics.median(values)
        record["ratio_to_bare_engine"][way] = statistics.median(ratios)
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RUNS / "ocr_speed.json")
    args = parser.parse_args()
    record = {
        "command": " ".join(["python -m benchmark.measure_ocr_speed"] + sys.argv[1:]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "images": f"{args.num_images} of 512 x 512, {args.rounds} rounds",
    } | summarise(measure(args.num_images, args.rounds))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    print(f"wrote {shown(args.output)}")
