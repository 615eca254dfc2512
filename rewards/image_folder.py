"""A folder of images: which prompt each one was made for.

That is read off the names, by rules that refuse to guess; see `pair_images`.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rewards.errors import BadInput

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
UNREADABLE_ENDINGS = (".heic", ".heif", ".jxl")  # images as well, but Pillow does not read them


# === which images ===


def find_images(folder):
    """The images in a folder and its subfolders, in natural order: 2.png before 10.png.

    Left out are hidden files (macOS's ._0.png among them), __MACOSX, and grids of samples: GenEval's grid.png
    next to samples/, and grid-0000.png as Stable Diffusion's scripts leave it. Raises BadInput for a folder
    that is missing, cannot be read or has no images.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        kind = "a file" if os.path.exists(folder) else "missing"
        raise BadInput(f"--images {folder} is {kind}: give a folder")
    paths = []
    try:
        for root, _, names in os.walk(folder, onerror=raise_it):
            for name in names:
                path = Path(root, name)
                if is_image(path.relative_to(folder)):
                    paths.append(path)
    except OSError as error:
        raise BadInput(f"--images {folder}: {error.filename} cannot be read ({error.strerror})") from None
    paths = [path for path in paths if not is_geneval_grid(path)]
    samples = [path for path in paths if not re.fullmatch(r"grid[-_]\d+", path.stem)]
    paths = samples or paths
    if not paths:
        raise BadInput(f"--images {folder}: 0 images ({', '.join(ENDINGS)})")
    return sorted(paths, key=natural_order)


def is_geneval_grid(path):
    """Whether a path is the overview that GenEval's scripts leave next to the samples."""
    return path.stem == "grid" and (path.parent / "samples").is_dir()


def raise_it(error):
    raise error


def is_image(path):
    """Whether a path relative to the folder is an image that a person put there."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in ENDINGS + UNREADABLE_ENDINGS and not hidden


def natural_order(path):
    """A key that sorts numbers in names by their value."""
    key = []
    for k, piece in enumerate(re.split(r"(\d+)", path.with_suffix("").as_posix())):
        key.append(int(piece) if k % 2 else piece)  # every second piece is a number
    return key, path.suffix


# === whose prompt ===


class Reading(NamedTuple):
    """A way to read off the names whose prompt each image is."""

    place: int  # which number it is: 1 is the first in the names, -1 the last
    first: int  # the number of the first prompt, 0 or 1
    rows: list  # the prompt number, from 0, of each image


def pair_images(folder, paths, prompts, number=0, count_from="auto", in_order=False):
    """The prompt number, from 0, of each image. The first of these rules that fits decides:

      in_order      one image per prompt, in the order of the names; only where the user says so
      one prompt    all images are of that prompt
      GenEval's     00012/samples/0000.png is of prompt 12; metadata.jsonl beside samples/ must agree
      spelled       every name is its prompt's words, as in `a red dog_000001.png`, or its folder's name is
      numbered      a number in every name is the prompt's, see `choose_reading`

    number, count_from: which number in the names is the prompt's, 1 the first and -1 the last, and whether
    prompts are counted from "0" or "1". 0 and "auto": find out. Raises BadInput where no rule fits, and where
    the names can be read in several ways.
    """
    folder = Path(folder)
    names = [path.relative_to(folder) for path in paths]
    if in_order:
        if len(paths) != len(prompts):
            raise BadInput(
                f"--in-order needs one image per prompt: {len(paths)} images, {len(prompts)} prompts"
            )
        return list(range(len(paths)))
    firsts = [0, 1] if count_from == "auto" else [int(count_from)]
    if number != 0 or count_from != "auto":
        readings = find_readings(names, len(prompts), number, firsts)
        return choose_reading(names, len(prompts), readings, number).rows
    if len(prompts) == 1:
        return [0] * len(paths)
    rows = pair_like_geneval(folder, names, prompts)
    if rows:
        return rows
    spelled = find_spelled(names, prompts)
    if all(len(rows) == 1 for rows in spelled):
        return [rows[0] for rows in spelled]
    readings = find_readings(names, len(prompts), number, firsts)
    rows = choose_reading(names, len(prompts), readings, number).rows
    check_spelled(names, rows, spelled)
    return rows


def pair_like_geneval(folder, names, prompts):
    """The prompt numbers of images as GenEval's scripts leave them, [] for other names."""
    rows = []
    for name in names:
        match = re.fullmatch(r"(\d+)/samples/[^/]+", name.as_posix())
        if match is None:
            return []
        rows.append(int(match[1]))
    for name, row in zip(names, rows):
        if row >= len(prompts):
            raise out_of_range(name, row, 0, len(prompts))
        made_for = read_geneval_prompt(folder / name.parts[0] / "metadata.jsonl")
        if made_for not in (None, prompts[row]):
            raise BadInput(
                f"--images {folder}: {name} was made for {made_for!r}, but prompt {row} is {prompts[row]!r}: "
                "--prompts is another file, or in another order"
            )
    return rows


def read_geneval_prompt(path):
    """The prompt in the metadata.jsonl of a folder, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def words_of(text):
    """The words of a text, without case, punctuation and underscores: what a file's name can hold of it."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def find_spelled(names, prompts):
    """Per image, the numbers of the prompts that its name spells, [] where it spells none."""
    rows_of = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(words_of(prompt), []).append(row)
    spelled = []
    for name in names:
        found = [rows_of[words] for words in spellings(name) if words in rows_of]
        spelled.append(found[0] if found else [])
    return spelled


def spellings(name):
    """What an image's name may spell: all of it, it without numbers at its ends, the name of its folder."""
    words = words_of(name.stem).split()
    leading = 0
    while leading < len(words) and words[leading].isdecimal():
        leading += 1
    trailing = 0
    while trailing < len(words) - leading and words[-1 - trailing].isdecimal():
        trailing += 1
    found = []
    for start in range(leading + 1):
        for end in range(trailing + 1):
            found.append(" ".join(words[start : len(words) - end]))
    found.sort(key=len, reverse=True)  # "route 66" before "route"
    found.append(words_of(name.parent.name))
    return [text for text in found if re.search(r"[^\W\d_]", text)]  # numbers alone spell nothing


def check_spelled(names, rows, spelled):
    """Raises BadInput where a name spells another prompt than the one that its number stands for."""
    for name, row, prompts in zip(names, rows, spelled):
        if prompts and row not in prompts:
            raise BadInput(
                f"--images: {name} spells prompt {prompts[0]}, but by a number in its name it is of prompt "
                f"{row}: say which number is the prompt's with --number (1: the first in the names, -1: the "
                "last)"
            )


def numbers_in(name):
    """The numbers in an image's name and folders: those that stand alone or end a word, as in img0012."""
    text = name.with_suffix("").as_posix()
    if re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-|\b(?=\d*[a-f])[0-9a-f]{24,}", text.lower()):
        return []  # a random name
    numbers = []
    for word in re.findall(r"[^\W_]+", text):
        match = re.fullmatch(r"[^\W\d_]*(\d+)", word)
        if match:
            numbers.append(int(match[1]))
    return numbers


def find_readings(names, num_prompts, number, firsts):
    """The different readings of the names by which every image is of one of the prompts, at least one.

    number: which one to read, 0 for all. firsts: the numbers that the first prompt may have.
    """
    numbers = [numbers_in(name) for name in names]
    for name, found in zip(names, numbers):
        if len(found) < max(abs(number), 1):
            raise BadInput(
                f"--images: {name} has no number that says whose prompt it is: number the images from 0, or "
                "pair them with the prompts in the order of their names, with --in-order"
            )
    places = [number]
    if number == 0:
        fewest = min(len(found) for found in numbers)
        places = list(range(1, fewest + 1)) + [-1]
    readings = []
    for place in places:
        index = place - 1 if place > 0 else place
        values = [found[index] for found in numbers]
        for first in firsts:
            rows = [value - first for value in values]
            is_new = all(rows != reading.rows for reading in readings)
            if is_new and min(rows) >= 0 and max(rows) < num_prompts:
                readings.append(Reading(place, first, rows))
    if not readings:
        largest = max(values)
        raise out_of_range(names[values.index(largest)], largest, firsts[0], num_prompts)
    return readings


def choose_reading(names, num_prompts, readings, number):
    """The reading that cannot be wrong. Raises BadInput where there is none.

    A reading is complete if every prompt has an image by it. If one is, it is taken. If none is, some prompts
    have no image; then a reading is taken if it is the only one, and reads the first number in the names or
    the one that the user asked for. By another number than the first, images made for other prompts than
    these would look like images of these.
    """
    complete = [reading for reading in readings if len(set(reading.rows)) == num_prompts]
    if len(complete) == 1:
        return complete[0]
    candidates = complete or readings
    if len(candidates) > 1 or (number == 0 and candidates[0].place != 1):
        raise ambiguous(names, candidates)
    if number == 0:
        check_restarts(names, candidates[0])
    return candidates[0]


def check_restarts(names, reading):
    """Raises BadInput if the numbers start again after another word, as in anime/0.png and photo/0.png."""
    starts = {}  # {prompt number: what stands before the first number}
    for name, row in zip(names, reading.rows):
        start = re.split(r"\d", name.as_posix())[0]
        if starts.setdefault(row, start) != start:
            raise BadInput(
                f"--images: the numbers start again at {name}, so the same number may stand for several "
                "prompts: score one folder at a time, or add --number 1"
            )


def out_of_range(name, value, first, num_prompts):
    return BadInput(
        f"--images: {name} would be of prompt {value}, counted from {first}, of {num_prompts} prompts: is "
        "--prompts the file that the images were made with?"
    )


def ambiguous(names, readings):
    """The BadInput that says how the first image's name can be read."""
    ways = []
    for reading in readings[:3]:
        which = "last" if reading.place == -1 else f"{reading.place}."
        ways.append(f"prompt {reading.rows[0]} by its {which} number, counted from {reading.first}")
    return BadInput(
        f"--images: whose prompt is {names[0]}? It may be {' or '.join(ways)}. Say which number it is with "
        "--number (1: the first in the names, -1: the last) and --count-from 0 or 1"
    )


def describe_pairing(rows, num_prompts):
    """What a user should know of the pairing, in one line."""
    counts = Counter(rows)
    fewest = min(counts.values())
    most = max(counts.values())
    per_prompt = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    line = f"{len(rows)} images, {per_prompt} per prompt"
    missing = [row for row in range(num_prompts) if row not in counts]
    if missing:
        listed = ", ".join(str(row) for row in missing[:10])
        more = ", ..." if len(missing) > 10 else ""
        line += f"; {len(missing)} of {num_prompts} prompts have no image: {listed}{more} (counted from 0)"
    return line
