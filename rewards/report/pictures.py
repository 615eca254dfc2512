"""The pictures of a run: samples with their rewards, films of how they came about, and the reward's curve."""

import re
import textwrap

import matplotlib.figure
from einops import rearrange
from PIL import Image


def wrap(text, width, lines_per_paragraph=None):
    """The text as lines, of which each paragraph gets at most that many."""
    lines = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width)[:lines_per_paragraph]
    return lines


def save_samples(path, evaluation):
    """The shown images of an evaluation, each with its caption and reward."""
    rows = sorted(evaluation.pictures)
    titles = []
    for row in rows:
        title = wrap(evaluation.captions[row], 28, lines_per_paragraph=3)
        titles.append([*title, f"{evaluation.scores['reward'][row]:.2f}"])
    sheet = matplotlib.figure.Figure(figsize=(16, 4.2 + 0.35 * max(map(len, titles))))
    for axes, row, title in zip(sheet.subplots(2, 8).flat, rows, titles):
        axes.imshow(rearrange(evaluation.pictures[row], "c h w -> h w c"), interpolation="nearest")
        axes.set_title("\n".join(title), fontsize=9, parse_math=False)
    for axes in sheet.axes:
        axes.axis("off")
    sheet.tight_layout()
    sheet.savefig(path, dpi=80)


def save_films(path, evaluation):
    """Six shown images, a line each: the pictures and captions of how an image came about, and the image."""
    rows = sorted(evaluation.films)
    rows = rows[:: max(len(rows) // 6, 1)][:6]
    columns = 1 + max(len(evaluation.films[row]) for row in rows)
    sheet = matplotlib.figure.Figure(figsize=(2.2 * columns, 2.7 * len(rows)))
    for row, line in zip(rows, sheet.subplots(len(rows), columns, squeeze=False)):
        final = rearrange(evaluation.pictures[row], "c h w -> h w c")
        title = f"{evaluation.captions[row]}\n{evaluation.scores['reward'][row]:.2f}"
        for axes, (picture, caption) in zip(line, [*evaluation.films[row], (final, title)]):
            if picture is not None:
                axes.imshow(picture, interpolation="nearest")
            axes.set_title("\n".join(wrap(caption, 30)), fontsize=7, parse_math=False)
        for axes in line:
            axes.axis("off")
    sheet.tight_layout()
    sheet.savefig(path, dpi=80)


def save_curve(path, metrics):
    """The reward's evaluations so far against images sampled; metrics.jsonl has all other scores."""
    curve = matplotlib.figure.Figure(figsize=(7, 4))
    axes = curve.subplots()
    names = sorted({name for row in metrics for name in row if re.fullmatch(r"eval/reward[^/]*", name)})
    for name in names:
        rows = [row for row in metrics if row.get(name) is not None]
        images = [row["charts/num_images"] for row in rows]
        axes.plot(images, [row[name] for row in rows], ".-", label=name)
    axes.set(xlabel="images sampled", ylabel="held-out reward")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves
    curve.savefig(path, dpi=120, bbox_inches="tight")


def save_before_after(path, before, after):
    """Two sample sheets, one above the other; rewritten prompts make the second one higher."""
    sheets = [Image.open(before), Image.open(after)]
    both = Image.new("RGB", (sheets[0].width, sheets[0].height + sheets[1].height))
    both.paste(sheets[0], (0, 0))
    both.paste(sheets[1], (0, sheets[0].height))
    both.save(path)
