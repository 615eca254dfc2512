"""Makes a moving picture of a run: the same held-out prompts at each evaluation, with the score above them.

    python -m benchmark.make_moving_picture runs/flow_grpo-... docs/learning.png

It reads samples/*.png and metrics.jsonl of the run's folder. --suffix _enhanced or _loop takes the pictures
of PromptRL's rewrites or of PromptLoop's loop.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

from rewards.report.pictures import load_font

TITLE_HEIGHT = 44
MILLISECONDS = 900  # that a picture is shown
MILLISECONDS_OF_LAST = 3000


def title(row, last_row, suffix):
    """What stands above the pictures of an evaluation, a row of metrics.jsonl."""
    score = row[f"eval/geneval_strict{suffix}"]
    iterations = f"iteration {row['iteration']} of {last_row['iteration']}"
    images = f"{row['charts/num_images']:,} images sampled"
    return f"{iterations}, {images}, strict GenEval on held-out prompts: {score:.3f}"


def make_frames(run, suffix):
    """A picture for each evaluation of the run whose samples are there."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    frames = []
    for row in rows:
        path = run / "samples" / f"{row['iteration']:06d}{suffix}.png"
        if not path.exists():
            continue
        sheet = Image.open(path)
        frame = Image.new("RGB", (sheet.width, sheet.height + TITLE_HEIGHT), "white")
        frame.paste(sheet, (0, TITLE_HEIGHT))
        draw = ImageDraw.Draw(frame)
        draw.text((8, 10), title(row, rows[-1], suffix), "black", load_font(22, bold=True))
        width = frame.width * row["iteration"] // rows[-1]["iteration"]
        draw.rectangle((0, TITLE_HEIGHT - 5, width, TITLE_HEIGHT - 1), "black")  # how far the run is
        frames.append(frame)
    return frames


def save(frames, path):
    """Writes the frames as an animated PNG, which starts again at its end."""
    durations = [MILLISECONDS] * (len(frames) - 1) + [MILLISECONDS_OF_LAST]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def parse(words=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="where to write the picture, such as docs/learning.png")
    parser.add_argument("--suffix", default="", help="of the pictures: nothing, _enhanced or _loop")
    return parser.parse_args(words)


if __name__ == "__main__":
    args = parse()
    frames = make_frames(args.run, args.suffix)
    if len(frames) < 2:
        raise SystemExit(f"{args.run} has pictures of {len(frames)} evaluations: two are needed")
    save(frames, args.out)
    print(f"wrote {args.out}: {len(frames)} pictures, {args.out.stat().st_size / 1e6:.1f} MB")
