"""The tiny world: scenes of coloured shapes, short texts and edits, each with prompts and GenEval metadata.

    python -m tiny.world                     writes tiny/prompts/*.jsonl again (same seed, same files)
    python -m tiny.world --show FILE.png     draws a sheet of examples

A scene starts as *content*: what a prompt asks for, as GenEval metadata (tag, include, exclude). What the
content leaves open, such as a colour, a size or a place, is drawn at random. The same content can be said in
three wordings: canonical, paraphrased and detailed. Evaluation contents never occur among the training
contents (see `split_contents`).

Every function that draws takes an `rng`, a random.Random. The order of its draws is part of the result: the
models in tiny/ were pretrained on it.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rewards.geneval.detection import RELATIONS, TAGS
from rewards.geneval.rule import relative_position
from rewards.tiny_world.glyphs import CHARACTERS, bitmap
from rewards.tiny_world.shapes import BACKGROUND, CLASSES, PALETTE, inside

SIZE = 64  # pixels
RADIUS = (7, 10)  # half an object's box
GAP = 3  # pixels between objects
MARGIN = 2  # pixels between an object and the border
GLYPH_SCALE = 3  # pixels per dot: a glyph is 15 x 21 pixels
GLYPH_GAP = 3  # pixels between glyphs
LINES_PER_TAG = 64  # of a prompt file
PROMPTS = Path(__file__).parent / "prompts"


class Thing(NamedTuple):
    """An object of a scene: the centre of its box, and half the side of its box, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    r: float


# ---- wording ----
# Three words for everything: the canonical one, a synonym, and one that is held out of all RL training.
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "cross": ("cross", "plus", "cruciform"),
}
COLOR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "azure", "navy"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "magenta"),
    "white": ("white", "ivory", "snowy"),
}
COUNT_WORDS = {
    2: ("two", "a pair of", "a couple of"),
    3: ("three", "a trio of", "a triple of"),
    4: ("four", "a quartet of", "a foursome of"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "west of"),
    "right of": ("right of", "to the right of", "east of"),
    "above": ("above", "over", "north of"),
    "below": ("below", "under", "south of"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SENTENCES = {  # {a} and {b} are the two objects, {r} is their relation
    "one": ("{a}", "there is {a}", "an image of {a}"),
    "two": ("{a} and {b}", "{b} with {a}", "both {b} and {a}"),
    "position": ("{a} {r} {b}", "there is {a} {r} {b}", "an image of {a} {r} {b}"),
    "text": ('the text "{t}"', 'the word "{t}"', 'a sign that says "{t}"'),
}
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


def plural(noun):
    """'circle' -> 'circles', 'box' -> 'boxes'."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def noun_phrase(clause, words):
    """'a red circle' or 'two circles'. words: a function that picks one of three wordings."""
    noun = words(SHAPE_WORDS[clause["class"]])
    if clause["count"] > 1:
        # The noun's word is drawn before the count's: an rng may stand behind `words`.
        return f"{words(COUNT_WORDS[clause['count']])} {plural(noun)}"
    if "color" in clause:
        noun = f"{words(COLOR_WORDS[clause['color']])} {noun}"
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article} {noun}"


def say(content, words, flip=False):
    """The sentence for a content. With flip, a position is said from the other object's side."""
    if content["tag"] == "text":
        return words(SENTENCES["text"]).format(t=content["text"])
    phrases = [noun_phrase(clause, words) for clause in content["include"]]
    if len(phrases) == 1:
        return words(SENTENCES["one"]).format(a=phrases[0])
    if content["tag"] == "position":
        # In the metadata, the second object stands in the relation to the first.
        target, subject = phrases
        relation = content["include"][1]["position"][0]
        if flip:
            subject, target = phrases
            relation = INVERSE[relation]
        sentence = words(SENTENCES["position"])
        return sentence.format(a=subject, b=target, r=words(RELATION_WORDS[relation]))
    return words(SENTENCES["two"]).format(a=phrases[0], b=phrases[1])


def canonical(content):
    """The content in canonical words."""
    return say(content, lambda options: options[0])


def paraphrase(content, rng, held_out=False):
    """A rewording, never the canonical one. With held_out, only in words kept out of RL training."""
    if held_out:
        return say(content, lambda options: options[2], flip=rng.random() < 0.5)
    while True:
        sentence = say(content, rng.choice, flip=rng.random() < 0.5)
        if sentence != canonical(content):
            return sentence


def place(x, y):
    """The name of the ninth of the image that a point lies in."""
    column = min(int(x * 3 / SIZE), 2)
    row = min(int(y * 3 / SIZE), 2)
    return PLACES[row][column]


def detailed(content, things):
    """Each object with its colour and place. A text is always said in the same way."""
    if content["tag"] == "text":
        return f'large white text "{content["text"]}" center'
    phrases = []
    for thing in sorted(things, key=lambda thing: (thing.y, thing.x)):
        phrases.append(f"{thing.color} {thing.shape} {place(thing.x, thing.y)}")
    return ", ".join(phrases)


# ---- contents ----
def content_of(tag, include):
    """GenEval metadata. `exclude` lists the classes that must not appear, so that extra objects cost."""
    asked = {clause["class"] for clause in include}
    exclude = [{"class": shape, "count": 1} for shape in CLASSES if shape not in asked]
    if tag == "counting":
        exclude.append({"class": include[0]["class"], "count": include[0]["count"] + 1})
    return {"tag": tag, "include": include, "exclude": exclude}


def all_contents(tag):
    """All contents of a GenEval tag, in a fixed order. Raises ValueError for an unknown tag."""
    if tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}, expected one of {TAGS}")
    return [content_of(tag, include) for include in all_includes(tag)]


def all_includes(tag):
    """The `include` lists of all contents of a GenEval tag."""
    plain = [{"class": shape, "count": 1} for shape in CLASSES]
    colored = [clause | {"color": color} for clause, color in itertools.product(plain, PALETTE)]
    if tag == "single_object":
        return [[clause] for clause in plain]
    if tag == "two_object":
        return [list(pair) for pair in itertools.combinations(plain, 2)]
    if tag == "counting":
        pairs = itertools.product(CLASSES, COUNT_WORDS)
        return [[{"class": shape, "count": count}] for shape, count in pairs]
    if tag == "colors":
        return [[clause] for clause in colored]
    includes = []
    if tag == "position":
        for a, b in itertools.permutations(plain, 2):
            for relation in RELATIONS:
                includes.append([a, b | {"position": [relation, 0]}])
    else:  # color_attr
        for a, b in itertools.combinations(colored, 2):
            if a["class"] != b["class"] and a["color"] != b["color"]:
                includes.append([a, b])
    return includes


def facts(content):
    """What a content says, whatever the wording and whichever side it is said from: a sorted tuple."""
    if content["tag"] == "text":
        return ("text", content["text"])
    said = []
    for clause in content["include"]:
        said.append((clause["class"], clause.get("color"), clause["count"]))
        if "position" in clause:
            relation, index = clause["position"]
            subject = clause["class"]
            target = content["include"][index]["class"]
            if relation in ("left of", "above"):
                said.append((subject, relation, target))
            else:
                said.append((target, INVERSE[relation], subject))
    return tuple(sorted(said, key=str))


def split_contents(tag, seed=0):
    """(train, evaluation): two thirds and one third of the tag's contents. No facts are in both."""
    groups = {}
    for content in all_contents(tag):
        groups.setdefault(facts(content), []).append(content)
    keys = sorted(groups, key=str)
    random.Random(f"{seed}-{tag}").shuffle(keys)
    num_train = len(keys) - len(keys) // 3
    train = []
    for key in keys[:num_train]:
        train.extend(groups[key])
    evaluation = []
    for key in keys[num_train:]:
        evaluation.extend(groups[key])
    return [train, evaluation]


def text_content(text):
    """The content of a text to draw."""
    return {"tag": "text", "text": text}


def in_evaluation(key):
    """True for a third of all strings, always the same ones: the evaluation side of a split."""
    return random.Random(key).random() < 1 / 3


def random_text(rng, evaluation=None):
    """Two or three characters. evaluation: True or False keeps to that side of the split."""
    while True:
        text = "".join(rng.choices(CHARACTERS, k=rng.choice((2, 3))))
        if evaluation is None or evaluation == in_evaluation(text):
            return text


# ---- scenes ----
def fits(thing, others):
    """True where a thing keeps its distance from all others."""
    for other in others:
        distance = max(abs(thing.x - other.x), abs(thing.y - other.y))
        if distance < thing.r + other.r + GAP:
            return False
    return True


def random_thing(rng, shape, color):
    """A thing of random size at a random place."""
    r = rng.uniform(*RADIUS)
    low = r + MARGIN
    high = SIZE - r - MARGIN
    x = rng.uniform(low, high)
    y = rng.uniform(low, high)
    return Thing(shape, color, x, y, r)


def random_free_thing(rng, shape, color, others):
    """A random thing that fits beside the others, or None after twenty tries."""
    for _ in range(20):
        thing = random_thing(rng, shape, color)
        if fits(thing, others):
            return thing
    return None


def box_of(thing):
    """(x0, y0, x1, y1) of a thing, in pixels."""
    return (thing.x - thing.r, thing.y - thing.r, thing.x + thing.r, thing.y + thing.r)


def realise(content, rng):
    """A random list of Things that shows exactly the content."""
    while True:
        things = try_to_realise(content, rng)
        if things is not None:
            return things


def try_to_realise(content, rng):
    """As `realise`, but None where a thing found no place, or one in the wrong relation."""
    things = []
    for clause in content["include"]:
        for _ in range(clause["count"]):
            color = clause.get("color") or rng.choice(list(PALETTE))
            thing = random_free_thing(rng, clause["class"], color, things)
            if thing is None:
                return None
            if "position" in clause:
                relation, index = clause["position"]
                if relation not in relative_position(box_of(thing), box_of(things[index])):
                    return None
            things.append(thing)
    return things


def draw(things):
    """(SIZE, SIZE, 3) uint8 image, anti-aliased over one pixel."""
    canvas = torch.tensor(BACKGROUND, dtype=torch.float32).expand(SIZE, SIZE, 3).clone()
    for thing in things:
        x0 = max(int(thing.x - thing.r) - 1, 0)
        y0 = max(int(thing.y - thing.r) - 1, 0)
        x1 = min(int(thing.x + thing.r) + 3, SIZE)
        y1 = min(int(thing.y + thing.r) + 3, SIZE)
        u = (torch.arange(x0, x1) + 0.5 - thing.x) / thing.r  # -1 to 1 within the box
        v = (torch.arange(y0, y1) + 0.5 - thing.y) / thing.r
        depth = inside(thing.shape, u[None, :], v[:, None]) * thing.r  # pixels from the edge
        coverage = (depth + 0.5).clamp(0, 1)[..., None]
        color = torch.tensor(PALETTE[thing.color], dtype=torch.float32)
        region = canvas[y0:y1, x0:x1]
        region += coverage * (color - region)
    return canvas.round().to(torch.uint8).numpy()


def draw_text(text, rng):
    """(SIZE, SIZE, 3) uint8 image of white glyphs near the centre."""
    canvas = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    advance = 5 * GLYPH_SCALE + GLYPH_GAP
    width = len(text) * advance - GLYPH_GAP
    height = 7 * GLYPH_SCALE
    x = (SIZE - width) // 2 + rng.randint(-2, 2)
    y = (SIZE - height) // 2 + rng.randint(-2, 2)
    dot = np.ones((GLYPH_SCALE, GLYPH_SCALE), dtype=bool)
    for character in text:
        glyph = np.kron(bitmap(character).numpy(), dot)
        region = canvas[y : y + glyph.shape[0], x : x + glyph.shape[1]]
        region[glyph] = PALETTE["white"]
        x += advance
    return canvas


def sample(rng, text_share=0.25):
    """One training example: (content, things, image). For a text, things is empty."""
    if rng.random() < text_share:
        content = text_content(random_text(rng))
        return content, [], draw_text(content["text"], rng)
    content = rng.choice(CONTENTS[rng.choice(TAGS)])
    things = realise(content, rng)
    return content, things, draw(things)


def wording(content, things, rng):
    """A prompt for an example: 60% canonical, 15% paraphrased, 25% detailed."""
    kind = rng.random()
    if kind < 0.60:
        return canonical(content)
    if kind < 0.75:
        return paraphrase(content, rng, held_out=rng.random() < 0.5)
    return detailed(content, things)


# ---- edits ----
def sample_edit(rng):
    """One edit: (source things, instruction, target things, target content)."""
    while True:
        shapes = rng.sample(CLASSES, rng.choice((1, 2)))
        include = [{"class": shape, "count": 1} for shape in shapes]
        source = realise(content_of("edit", include), rng)
        kind = rng.choice(("recolour", "add", "remove", "move", "replace"))
        edit = edit_scene(kind, source, rng)
        if edit is None:
            continue
        instruction, target = edit
        fitting = [fits(thing, target[:i]) for i, thing in enumerate(target)]
        if all(fitting):
            include = [{"class": thing.shape, "count": 1, "color": thing.color} for thing in target]
            return source, instruction, target, content_of(kind, include)


def edit_scene(kind, source, rng):
    """(instruction, target things) of an edit of this kind, or None where the scene does not allow it."""
    thing = source[0]
    rest = source[1:]
    shapes = [thing.shape for thing in source]
    other_shapes = [shape for shape in CLASSES if shape not in shapes]
    if kind == "recolour":
        color = rng.choice([color for color in PALETTE if color != thing.color])
        return f"make the {thing.shape} {color}", [thing._replace(color=color)] + rest
    if kind == "add":
        new = random_thing(rng, rng.choice(other_shapes), rng.choice(list(PALETTE)))
        return f"add a {new.color} {new.shape}", source + [new]
    if kind == "remove":
        if not rest:
            return None
        return f"remove the {thing.shape}", rest
    if kind == "move":
        x = rng.choice((0.17, 0.5, 0.83)) * SIZE
        y = rng.choice((0.17, 0.5, 0.83)) * SIZE
        if place(x, y) == place(thing.x, thing.y):
            return None
        return f"move the {thing.shape} to the {place(x, y)}", [thing._replace(x=x, y=y)] + rest
    shape = rng.choice(other_shapes)
    return f"replace the {thing.shape} with a {shape}", [thing._replace(shape=shape)] + rest


CONTENTS = {tag: all_contents(tag) for tag in TAGS}


# ---- prompt files ----
def repeated(contents, count):
    """The first `count` of the contents over and over again."""
    return [contents[i % len(contents)] for i in range(count)]


def write_prompts(seed=0):
    """Writes tiny/prompts/*.jsonl: one row of GenEval metadata per line."""
    rng = random.Random(seed)
    trained = []
    held_out = []
    for tag in TAGS:  # as many lines for each tag, so that each weighs the same, as in GenEval
        train, evaluation = split_contents(tag)
        trained += repeated(train, LINES_PER_TAG)
        held_out += repeated(evaluation, LINES_PER_TAG)
    write_rows("train", [row | {"prompt": canonical(row)} for row in trained])
    write_rows("eval", [row | {"prompt": canonical(row)} for row in held_out])
    paraphrased = [row | {"prompt": paraphrase(row, rng, held_out=True)} for row in held_out]
    write_rows("eval_paraphrased", paraphrased)
    write_rows("text_train", text_rows(1024, False, rng))
    write_rows("text_eval", text_rows(256, True, rng))
    write_rows("edit_train", edit_rows(1024, False, rng))
    write_rows("edit_eval", edit_rows(256, True, rng))


def text_rows(count, evaluation, rng):
    """Rows that ask for a text, all from one side of the split."""
    rows = []
    for _ in range(count):
        content = text_content(random_text(rng, evaluation))
        rows.append(content | {"prompt": canonical(content)})
    return rows


def edit_rows(count, evaluation, rng):
    """Rows that ask for an edit, all from one side of the split, with the scene to edit under `source`."""
    rows = []
    while len(rows) < count:
        source, instruction, _, content = sample_edit(rng)
        if in_evaluation(instruction + str(facts(content))) == evaluation:
            scene = [thing._asdict() for thing in source]
            rows.append(content | {"prompt": instruction, "source": scene})
    return rows


def write_rows(name, rows):
    """Writes one prompt file."""
    PROMPTS.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (PROMPTS / f"{name}.jsonl").write_text("".join(lines))


def show(path):
    """Draws a sheet of 8 x 12 examples."""
    images = [sample(random.Random(i))[2] for i in range(96)]
    rows = [np.concatenate(images[i : i + 12], axis=1) for i in range(0, 96, 12)]
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", metavar="FILE.png", help="draw a sheet of examples to this file instead")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show)
    else:
        write_prompts()
