"""The tiny world: scenes of coloured shapes, short texts and edits, each with prompts and GenEval metadata.

    python -m tiny.world                     draws a sheet of examples (--out FILE.png)

A scene starts as *content*: what a prompt asks for, as GenEval metadata (tag, include, exclude). What the
content leaves open, such as a colour, a size or a place, is drawn at random. The same content can be said in
four wordings: canonical, paraphrased, hard and detailed. `tiny/splits.py` divides the contents into training,
development and test, and writes the prompt files.

Every function that draws takes an `rng`, a random.Random. The order of its draws is part of the result: the
models in tiny/ were pretrained on it.
"""

import argparse
import itertools
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rewards.geneval.detection import PLACES, RELATIONS, TAGS, place_of
from rewards.geneval.rule import relative_position
from rewards.tiny_world.glyphs import CHARACTERS, bitmap
from rewards.tiny_world.shapes import BACKGROUND, CLASSES, PALETTE, inside

SIZE = 64  # pixels
RADIUS = (7, 10)  # half an object's box
GAP = 3  # pixels between objects
MARGIN = 2  # pixels between an object and the border
PLACE_MARGIN = 2  # pixels between the border of a ninth and the centre of an object that is asked for there
TEXT_SHARE = 0.12  # of all images of the world that show writing
GLYPH_SCALE = 3  # pixels per dot: a glyph is 15 x 21 pixels
GLYPH_GAP = 3  # pixels between glyphs


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
    "star": ("star", "asterisk", "pentagram"),
    "heart": ("heart", "valentine", "cardioid"),
    "moon": ("moon", "crescent", "lune"),
    "hourglass": ("hourglass", "sandglass", "eggtimer"),
}
COLOR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "azure", "navy"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "magenta"),
    "white": ("white", "ivory", "snowy"),
    "orange": ("orange", "tangerine", "apricot"),
    "cyan": ("cyan", "turquoise", "aqua"),
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
PLACE_WORDS = {
    "top left": ("top left", "upper left", "northwest"),
    "top": ("top", "upper middle", "north"),
    "top right": ("top right", "upper right", "northeast"),
    "left": ("left", "middle left", "west"),
    "center": ("center", "middle", "midpoint"),
    "right": ("right", "middle right", "east"),
    "bottom left": ("bottom left", "lower left", "southwest"),
    "bottom": ("bottom", "lower middle", "south"),
    "bottom right": ("bottom right", "lower right", "southeast"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# {a} and {b} are the two objects, {r} is their relation, {p} a place, {t} a text to write
SENTENCES = {
    "one": ("{a}", "there is {a}", "an image of {a}"),
    "placed": ("{a} at the {p}", "at the {p} there is {a}", "an image of {a} in the {p}"),
    "two": ("{a} and {b}", "{b} with {a}", "both {b} and {a}"),
    "position": ("{a} {r} {b}", "there is {a} {r} {b}", "an image of {a} {r} {b}"),
    "text": ('the text "{t}"', 'the word "{t}"', 'a sign that says "{t}"'),
}
# Longer sentences with their parts in another order. They too are held out of all RL training.
HARD_SENTENCES = {
    "one": ("somewhere in this picture you can see {a}", "on a dark background please draw {a}"),
    "placed": ("in the {p} of this picture you can see {a}", "towards the {p} please draw {a}"),
    "two": ("next to {b} this picture also shows {a}", "please draw {b} and then also draw {a}"),
    "position": ("{r} {b} you can see {a}", "on a dark background {r} {b} please draw {a}"),
    "text": ('please write "{t}" in large letters', 'you can read "{t}" in this picture'),
}


def cells_of_places():
    """{name of a place: (column, row)}."""
    cells = {}
    for row, names in enumerate(PLACES):
        for column, name in enumerate(names):
            cells[name] = (column, row)
    return cells


CELLS = cells_of_places()


def plural(noun):
    """'circle' -> 'circles', 'box' -> 'boxes'."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def article(noun):
    """'a' or 'an', as the noun or adjective that follows sounds."""
    return "an" if noun.startswith(("a", "e", "i", "o", "u", "hour")) else "a"


def noun_phrase(clause, words):
    """'a red circle' or 'two circles'. words: a function that picks one of three wordings."""
    noun = words(SHAPE_WORDS[clause["class"]])
    if clause["count"] > 1:
        # The noun's word is drawn before the count's: an rng may stand behind `words`.
        return f"{words(COUNT_WORDS[clause['count']])} {plural(noun)}"
    if "color" in clause:
        noun = f"{words(COLOR_WORDS[clause['color']])} {noun}"
    return f"{article(noun)} {noun}"


def hard_noun_phrase(clause, words):
    """'a circle which is colored red' or 'circles, two of them'."""
    noun = words(SHAPE_WORDS[clause["class"]])
    if clause["count"] > 1:
        return f"{plural(noun)}, {COUNT_WORDS[clause['count']][0]} of them"
    phrase = f"{article(noun)} {noun}"
    if "color" in clause:
        phrase += f" which is colored {words(COLOR_WORDS[clause['color']])}"
    return phrase


def say(content, words, flip=False, hard=False):
    """The sentence for a content.

    words: a function that picks one of several wordings. With flip, a position is said from the other
    object's side. With hard, the sentence is one of HARD_SENTENCES.
    """
    sentences = HARD_SENTENCES if hard else SENTENCES
    phrase_of = hard_noun_phrase if hard else noun_phrase
    if content["tag"] == "text":
        return words(sentences["text"]).format(t=content["text"])
    include = content["include"]
    phrases = [phrase_of(clause, words) for clause in include]
    if len(phrases) == 1 and "place" in include[0]:
        sentence = words(sentences["placed"])
        return sentence.format(a=phrases[0], p=words(PLACE_WORDS[include[0]["place"]]))
    if len(phrases) == 1:
        return words(sentences["one"]).format(a=phrases[0])
    if content["tag"] == "position":
        # In the metadata, the second object stands in the relation to the first.
        target, subject = phrases
        relation = include[1]["position"][0]
        if flip:
            subject, target = phrases
            relation = INVERSE[relation]
        sentence = words(sentences["position"])
        return sentence.format(a=subject, b=target, r=words(RELATION_WORDS[relation]))
    return words(sentences["two"]).format(a=phrases[0], b=phrases[1])


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


def hard_paraphrase(content, rng):
    """A long rewording with its parts in another order, in any of the three words for everything."""
    return say(content, rng.choice, flip=rng.random() < 0.5, hard=True)


def place(x, y):
    """The name of the ninth of the image that a point lies in."""
    return place_of((x, y, x, y), SIZE, SIZE)


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
    if tag == "single_object":  # a shape alone would make only eight contents: each is asked for at a place
        return [[clause | {"place": place}] for clause, place in itertools.product(plain, PLACE_WORDS)]
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
        if "place" in clause:
            said.append((clause["class"], "at", clause["place"]))
        if "position" in clause:
            relation, index = clause["position"]
            subject = clause["class"]
            target = content["include"][index]["class"]
            if relation in ("left of", "above"):
                said.append((subject, relation, target))
            else:
                said.append((target, INVERSE[relation], subject))
    return tuple(sorted(said, key=str))


def text_content(text):
    """The content of a text to draw."""
    return {"tag": "text", "text": text}


def random_text(rng):
    """Two or three characters."""
    return "".join(rng.choices(CHARACTERS, k=rng.choice((2, 3))))


# ---- scenes ----
def fits(thing, others):
    """True where a thing keeps its distance from all others."""
    for other in others:
        distance = max(abs(thing.x - other.x), abs(thing.y - other.y))
        if distance < thing.r + other.r + GAP:
            return False
    return True


def random_center(rng, r, place=None):
    """(x, y) for a thing of half-size r: anywhere, or in the ninth of the image that `place` names."""
    low = r + MARGIN
    high = SIZE - r - MARGIN
    if place is None:
        return rng.uniform(low, high), rng.uniform(low, high)
    center = []
    for cell in CELLS[place]:
        cell_low = cell * SIZE / 3 + PLACE_MARGIN
        cell_high = (cell + 1) * SIZE / 3 - PLACE_MARGIN
        center.append(rng.uniform(max(low, cell_low), min(high, cell_high)))
    return tuple(center)


def random_thing(rng, shape, color, place=None):
    """A thing of random size at a random place, or in the ninth of the image that `place` names."""
    r = rng.uniform(*RADIUS)
    x, y = random_center(rng, r, place)
    return Thing(shape, color, x, y, r)


def random_free_thing(rng, clause, color, others):
    """A random thing for a clause that fits beside the others, or None after twenty tries."""
    for _ in range(20):
        thing = random_thing(rng, clause["class"], color, clause.get("place"))
        if fits(thing, others):
            return thing
    return None


def box_of(thing):
    """(x0, y0, x1, y1) of a thing, in pixels."""
    return (thing.x - thing.r, thing.y - thing.r, thing.x + thing.r, thing.y + thing.r)


def clearly_related(thing, relation, target):
    """True where a relation holds, and still holds after a shift of one pixel in any direction."""
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        shifted = thing._replace(x=thing.x + dx, y=thing.y + dy)
        if relation not in relative_position(box_of(shifted), box_of(target)):
            return False
    return True


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
            thing = random_free_thing(rng, clause, color, things)
            if thing is None:
                return None
            if "position" in clause:
                relation, index = clause["position"]
                if not clearly_related(thing, relation, things[index]):
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


def sample(rng, text_share=TEXT_SHARE):
    """One training example: (content, things, image). For a text, things is empty."""
    if rng.random() < text_share:
        content = text_content(random_text(rng))
        return content, [], draw_text(content["text"], rng)
    content = rng.choice(CONTENTS[rng.choice(TAGS)])
    things = realise(content, rng)
    return content, things, draw(things)


def wording(content, things, rng):
    """A prompt for an example: 53% canonical, 15% paraphrased, 7% hard, 25% detailed."""
    kind = rng.random()
    if kind < 0.53:
        return canonical(content)
    if kind < 0.68:
        return paraphrase(content, rng, held_out=rng.random() < 0.5)
    if kind < 0.75:
        return hard_paraphrase(content, rng)
    return detailed(content, things)


# ---- edits ----
EDITS = ("recolour", "add", "remove", "move", "replace")


class Edit(NamedTuple):
    """An edit of a scene: what is asked for, and what the result must show, as things and as metadata."""

    instruction: str
    reworded: str  # the same instruction in synonyms
    target: list
    content: dict
    kept: list  # the things of the target whose place the instruction leaves as it was


def sample_source(rng):
    """The things of a scene to edit: one or two, of different shapes, in any colours."""
    shapes = rng.sample(CLASSES, rng.choice((1, 2)))
    include = [{"class": shape, "count": 1} for shape in shapes]
    return realise(content_of("edit", include), rng)


def sample_edit(rng):
    """(source things, Edit)."""
    while True:
        source = sample_source(rng)
        edit = edit_scene(rng.choice(EDITS), source, rng)
        if edit is not None:
            return source, edit


def edit_scene(kind, source, rng):
    """A random Edit of this kind, or None where the scene does not allow it. It edits the first thing."""
    thing = source[0]
    rest = source[1:]
    shapes = [thing.shape for thing in source]
    other_shapes = [shape for shape in CLASSES if shape not in shapes]
    new = None
    asked_place = None
    if kind == "recolour":
        color = rng.choice([color for color in PALETTE if color != thing.color])
        new = thing._replace(color=color)
        target = [new] + rest
        kept = target
    elif kind == "add":
        new = random_thing(rng, rng.choice(other_shapes), rng.choice(list(PALETTE)))
        target = source + [new]
        kept = source
    elif kind == "remove":
        if not rest:
            return None
        target = rest
        kept = rest
    elif kind == "move":
        asked_place = rng.choice(list(PLACE_WORDS))
        if asked_place == place(thing.x, thing.y):
            return None
        x, y = random_center(rng, thing.r, asked_place)
        target = [thing._replace(x=x, y=y)] + rest
        kept = rest
    else:
        new = thing._replace(shape=rng.choice(other_shapes))
        target = [new] + rest
        kept = target
    instruction = say_edit(kind, thing, new, asked_place, lambda options: options[0])
    reworded = say_edit(kind, thing, new, asked_place, lambda options: options[1])
    for i, thing in enumerate(target):
        if not fits(thing, target[:i]):
            return None
    include = [{"class": thing.shape, "count": 1, "color": thing.color} for thing in target]
    if asked_place:
        include[0]["place"] = asked_place
    return Edit(instruction, reworded, target, content_of(kind, include), kept)


def say_edit(kind, old, new, new_place, words):
    """'make the red circle blue'.

    old, new: the thing to edit, and the one that the edit brings. new_place: where to move it to.
    words: a function that picks one of three wordings.
    """
    name = f"the {words(COLOR_WORDS[old.color])} {words(SHAPE_WORDS[old.shape])}"
    if kind == "remove":
        return f"remove {name}"
    if kind == "move":
        return f"move {name} to the {words(PLACE_WORDS[new_place])}"
    color = words(COLOR_WORDS[new.color])
    shape = words(SHAPE_WORDS[new.shape])
    if kind == "recolour":
        return f"make {name} {color}"
    if kind == "add":
        return f"add {article(color)} {color} {shape}"
    return f"replace {name} with {article(shape)} {shape}"


CONTENTS = {tag: all_contents(tag) for tag in TAGS}


def show(path):
    """Draws a sheet of 8 x 12 examples."""
    images = [sample(random.Random(i))[2] for i in range(96)]
    rows = [np.concatenate(images[i : i + 12], axis=1) for i in range(0, 96, 12)]
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE.png", default="world.png", help="where to draw the sheet to")
    show(parser.parse_args().out)
