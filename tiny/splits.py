"""Divides the tiny world into training, development and test, in four folds, and writes the prompt files.

    python -m tiny.splits     writes tiny/prompts/ again (same files each time)

All contents of a tag are dealt into four quarters. In fold f, quarter f is the test split, the next quarter
is the development split, and the other two are for training. So each content is a test content in one fold,
and the average over the four folds is an average over all contents.

Everything that is chosen, such as a learning rate, is chosen on the development split. The test split is for
numbers that are reported. Texts and edits are divided in the same way, by hash.

Per fold:
    train, dev, test                    64, 32 and 64 lines per tag, spread evenly over the contents
    dev_paraphrased, test_paraphrased   the same lines, in words that are held out of all training by rewards
    dev_hard, test_hard                 the same lines, in longer sentences with their parts in another order
    text_train, text_dev, text_test     texts to write
    edit_train, edit_dev, edit_test     instructions, each for an image of prompts/sources/
    edit_reworded_train, _dev, _test    the same edits, in synonyms that the editor has not learned to edit by
"""

import functools
import hashlib
import json
import random
from pathlib import Path

from PIL import Image

from rewards.geneval.detection import TAGS
from tiny import world

FOLDS = 4
LINES_PER_TAG = {"train": 64, "dev": 32, "test": 64}
TEXT_LINES = {"train": 512, "dev": 64, "test": 256}
EDITS_PER_QUARTER = 120
PROMPTS = Path(__file__).parent / "prompts"


# ---- quarters ----
def split_name(quarter, fold):
    """The split that a quarter belongs to in a fold: "test", "dev" or "train"."""
    if quarter == fold:
        return "test"
    if quarter == (fold + 1) % FOLDS:
        return "dev"
    return "train"


def kind_of_content(content):
    """What the quarters have equally much of: counts, places and relations. A string."""
    first, *others = content["include"]
    relations = [clause["position"][0] for clause in others if "position" in clause]
    return str((first["count"], first.get("place"), relations))


def quarters(tag):
    """The contents of a GenEval tag in four lists. No facts are in two of them (see `world.facts`)."""
    rng = random.Random(f"quarters of {tag}")
    groups = {}
    for content in world.CONTENTS[tag]:
        groups.setdefault(world.facts(content), []).append(content)
    groups = list(groups.values())
    rng.shuffle(groups)
    groups.sort(key=lambda group: kind_of_content(group[0]))  # stable: each kind stays shuffled
    dealt = []
    for quarter in range(FOLDS):
        contents = sum(groups[quarter::FOLDS], [])
        rng.shuffle(contents)
        dealt.append(contents)
    return dealt


def quarter_of(text):
    """The quarter of a string: a number from 0 to 3 that only depends on the string."""
    return hashlib.sha256(text.encode()).digest()[0] % FOLDS


def split_contents(tag, fold):
    """{"train": contents, "dev": contents, "test": contents} of a tag in a fold."""
    split = {"train": [], "dev": [], "test": []}
    for quarter, contents in enumerate(quarters(tag)):
        split[split_name(quarter, fold)].append(contents)
    # Contents of several quarters take turns, so that the first lines of a file are of all of them.
    return {name: take_turns(lists) for name, lists in split.items()}


def take_turns(lists):
    """One list with the first elements of all lists, then the second ones, and so on."""
    longest = max(len(own) for own in lists)
    mixed = []
    for i in range(longest):
        mixed += [own[i] for own in lists if i < len(own)]
    return mixed


# ---- rows of prompt files ----
def scene_rows(name, fold):
    """The rows of a split: as many for each tag, so that each weighs the same, as in GenEval."""
    rows = []
    for tag in TAGS:
        contents = split_contents(tag, fold)[name]
        for i in range(LINES_PER_TAG[name]):
            content = contents[i % len(contents)]
            rows.append(content | {"prompt": world.canonical(content)})
    return rows


def reworded(rows, reword, seed):
    """The rows with other prompts. reword: a function of a row and an rng."""
    rng = random.Random(seed)
    return [row | {"prompt": reword(row, rng)} for row in rows]


def held_out_paraphrase(row, rng):
    """The row's content in words that are held out of all RL training."""
    return world.paraphrase(row, rng, held_out=True)


def text_rows(name, fold):
    """Rows that ask for a text, without repetition."""
    rng = random.Random(f"texts of {name} in fold {fold}")
    rows = []
    seen = set()
    while len(rows) < TEXT_LINES[name]:
        text = world.random_text(rng)
        if split_name(quarter_of(text), fold) == name and text not in seen:
            seen.add(text)
            content = world.text_content(text)
            rows.append(content | {"prompt": world.canonical(content)})
    return rows


def is_edit_of(quarter, edit):
    """True where both the instruction and the result of an edit are in a quarter: no two splits share one."""
    keys = (edit.instruction, str(world.facts(edit.content)))
    return all(quarter_of(key) == quarter for key in keys)


@functools.cache
def edits_of(quarter):
    """The edits of a quarter: (source things, Edit) pairs. The kinds of edit take turns."""
    rng = random.Random(f"edits of quarter {quarter}")
    edits = []
    while len(edits) < EDITS_PER_QUARTER:
        kind = world.EDITS[len(edits) % len(world.EDITS)]
        source = world.sample_source(rng)
        edit = world.edit_scene(kind, source, rng)
        if edit is not None and is_edit_of(quarter, edit):
            edits.append((source, edit))
    return edits


def source_name(quarter, number):
    """The file name of the image that an edit starts from."""
    return f"{quarter}_{number:03}.png"


def edit_rows(name, fold, reworded=False):
    """Rows that ask for an edit of an image, in canonical words or in synonyms."""
    rows = []
    for quarter in range(FOLDS):
        if split_name(quarter, fold) != name:
            continue
        for number, (_, edit) in enumerate(edits_of(quarter)):
            source = f"../sources/{source_name(quarter, number)}"
            keep = [described(thing) for thing in edit.kept]
            prompt = edit.reworded if reworded else edit.instruction
            rows.append(edit.content | {"prompt": prompt, "source": source, "keep": keep})
    return rows


def described(thing):
    """A thing as the reward `edit` wants it: its centre is in shares of the image's side."""
    center = [round(thing.x / world.SIZE, 4), round(thing.y / world.SIZE, 4)]
    return {"class": thing.shape, "color": thing.color, "center": center}


# ---- writing ----
def write_rows(folder, name, rows):
    """Writes one prompt file: one row of GenEval metadata per line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines))


def write_fold(folder, fold):
    """Writes the prompt files of a fold into a folder."""
    for name in ("train", "dev", "test"):
        rows = scene_rows(name, fold)
        write_rows(folder, name, rows)
        if name != "train":
            write_rows(folder, f"{name}_paraphrased", reworded(rows, held_out_paraphrase, fold))
            write_rows(folder, f"{name}_hard", reworded(rows, world.hard_paraphrase, fold))
        write_rows(folder, f"text_{name}", text_rows(name, fold))
        write_rows(folder, f"edit_{name}", edit_rows(name, fold))
        write_rows(folder, f"edit_reworded_{name}", edit_rows(name, fold, reworded=True))


def write_sources(folder):
    """Writes the images to edit."""
    folder.mkdir(parents=True, exist_ok=True)
    for quarter in range(FOLDS):
        for number, (source, _) in enumerate(edits_of(quarter)):
            Image.fromarray(world.draw(source)).save(folder / source_name(quarter, number))


def write_all(folder=PROMPTS):
    """Writes all prompt files, and the images to edit."""
    for fold in range(FOLDS):
        write_fold(folder / f"fold_{fold}", fold)
    write_sources(folder / "sources")


if __name__ == "__main__":
    write_all()
