"""The pictures of a run: samples with their rewards, films of how they came about, and the reward's curve."""

import functools
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rewards.sources import load_source

SIDE = 192  # pixels of a picture in a sheet
GAP = 8
LINE = 15  # height of a line of text


class Cell(NamedTuple):
    """A place in a sheet."""

    lines: list  # of text, above the picture
    score: str = ""  # below these, in bold
    picture: object = None  # (H, W, 3) in [0, 1], where there is one


@functools.cache
def load_font(size, bold=False):
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek and Cyrillic letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), size)


def wrap(text, width=28, lines_per_paragraph=None):
    """The text as lines, of which each paragraph gets at most that many."""
    lines = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width)[:lines_per_paragraph]
    return lines


def format_score(score):
    return "not scored" if math.isnan(score) else f"reward {score:.2f}"


def draw_sheet(cells, columns):
    """Cells in rows of so many columns, as an image."""
    rows = math.ceil(len(cells) / columns)
    text_height = LINE * max(len(cell.lines) for cell in cells) + LINE + 4
    width = SIDE + GAP
    height = text_height + SIDE + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(draw_cell(cell, text_height), (GAP + column * width, GAP + row * height))
    return sheet


def draw_cell(cell, text_height):
    """One cell as an image. The text ends right above the picture."""
    image = Image.new("RGB", (SIDE, text_height + SIDE), "white")
    draw = ImageDraw.Draw(image)
    top = text_height - LINE * (len(cell.lines) + 1) - 4
    for line in cell.lines:
        draw.text((0, top), line, "black", load_font(12))
        top += LINE
    draw.text((0, top), cell.score, "black", load_font(13, bold=True))
    if cell.picture is not None:
        image.paste(to_image(cell.picture), (0, text_height))
    return image


def to_image(picture):
    """A picture (H, W, 3), in [0, 1] or in 8 bits, as an image whose longer side is SIDE."""
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    smaller = max(image.size) <= SIDE  # the tiny world's pixels stay sharp squares
    return ImageOps.contain(image, (SIDE, SIDE), Image.NEAREST if smaller else Image.LANCZOS)


def save_samples(path, evaluation):
    """The shown images of an evaluation, with captions and rewards. An edit stands beside its source."""
    cells = []
    for row in sorted(evaluation.pictures):
        source = evaluation.metadata[row].get("source")
        if source:
            size = evaluation.pictures[row].shape[-1]
            cells.append(Cell(["image to edit"], picture=load_source(source, size).permute(1, 2, 0)))
        lines = wrap(evaluation.captions[row], lines_per_paragraph=3)
        score = format_score(evaluation.scores["reward"][row])
        cells.append(Cell(lines, score, evaluation.pictures[row].permute(1, 2, 0)))
    draw_sheet(cells, columns=8).save(path, format="png")


def save_films(path, evaluation):
    """Six shown images, a line each: the pictures and captions of how an image came about, and the image."""
    rows = sorted(evaluation.films)
    rows = rows[:: max(len(rows) // 6, 1)][:6]
    columns = 1 + max(len(evaluation.films[row]) for row in rows)
    cells = []
    for row in rows:
        line = [Cell(wrap(caption), picture=picture) for picture, caption in evaluation.films[row]]
        score = format_score(evaluation.scores["reward"][row])
        line.append(Cell(wrap(evaluation.captions[row]), score, evaluation.pictures[row].permute(1, 2, 0)))
        cells += line + [Cell([])] * (columns - len(line))
    draw_sheet(cells, columns).save(path, format="png")


def save_curve(path, rows):
    """The reward's evaluations so far against images sampled; metrics.jsonl has all other scores."""
    curve = matplotlib.figure.Figure(figsize=(7, 4))
    axes = curve.subplots()
    names = set()
    for row in rows:
        names.update(name for name in row if re.fullmatch(r"eval/reward[^/]*", name))
    for name in sorted(names):
        points = [row for row in rows if row.get(name) is not None and "charts/num_images" in row]
        images = [row["charts/num_images"] for row in points]
        axes.plot(images, [row[name] for row in points], ".-", label=name)
    axes.set(xlabel="images sampled", ylabel="held-out reward")
    if names:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves
    curve.savefig(path, dpi=120, bbox_inches="tight", format="png")


def save_before_after(path, sheets):
    """Sheets of samples, {title: image}, one above the other under their titles."""
    strip = 40  # height of a title
    width = max(image.width for image in sheets.values())
    height = sum(strip + image.height for image in sheets.values())
    both = Image.new("RGB", (width, height), "white")
    top = 0
    for title, image in sheets.items():
        ImageDraw.Draw(both).text((GAP, top + GAP), title, "black", load_font(22, bold=True))
        both.paste(image, (0, top + strip))
        top += strip + image.height
    both.save(path, format="png")


def open_picture(path):
    """A picture in a file, None if it is missing or torn."""
    try:
        return Image.open(path).convert("RGB")
    except Exception:  # Pillow raises anything on a damaged file
        return None
