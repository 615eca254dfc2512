"""The tiny world: scenes of coloured shapes, short texts and edits, each with prompts and GenEval metadata.

    python -m tiny.world             write tiny/prompts/*.jsonl again (same seed, same files)
    python -m tiny.world --show F    draw a sheet of examples to the picture F

A scene starts as *content*, what a prompt asks for (GenEval metadata: tag, include, exclude); what the
content leaves open (a colour, a size, a place) is drawn at random. The same content can be said in three
wordings: canonical, paraphrased, detailed. Evaluation contents never occur among the training contents: see
`split_contents`.
"""

import argparse
import itertools
import json
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.geneval.detection import RELATIONS, TAGS
from rewards.geneval.rule import relative_position
from rewards.tiny_world.glyphs import CHARACTERS, bitmap
from rewards.tiny_world.shapes import BACKGROUND, CLASSES, PALETTE, inside

SIZE = 64  # pixels
RADIUS = (7, 10)  # half an object's box
GAP, MARGIN = 3, 2  # pixels between objects, and to the border
GLYPH_SCALE, GLYPH_GAP = 3, 3  # a glyph is 15 x 21 pixels
PROMPTS = Path(__file__).parent / "prompts"

Thing = namedtuple("Thing", "shape color x y r")  # centre and half-size in pixels

# ---- wording: canonical word, a synonym, and one that is held out of all RL training ----
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
SENTENCES = {  # (canonical, synonym, held out); {a} and {b} are the two objects, {r} their relation
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


def noun_phrase(clause, words):
    """'a red circle', 'two circles'. words picks a variant: words(options) -> str."""
    noun = words(SHAPE_WORDS[clause["class"]])
    if clause["count"] > 1:
        plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
        return f"{words(COUNT_WORDS[clause['count']])} {plural}"
    phrase = f"{words(COLOR_WORDS[clause['color']])} {noun}" if "color" in clause else noun
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def say(content, words, flip=False):
    """The sentence for a content. With flip, a position is said from the other object's side."""
    if content["tag"] == "text":
        return words(SENTENCES["text"]).format(t=content["text"])
    phrases = [noun_phrase(clause, words) for clause in content["include"]]
    if len(phrases) == 1:
        return words(SENTENCES["one"]).format(a=phrases[0])
    if content["tag"] == "position":  # the metadata's second object stands in the relation to its first
        relation = content["include"][1]["position"][0]
        target, subject = phrases
        if flip:
            target, subject, relation = subject, target, INVERSE[relation]
        return words(SENTENCES["position"]).format(a=subject, b=target, r=words(RELATION_WORDS[relation]))
    return words(SENTENCES["two"]).format(a=phrases[0], b=phrases[1])


def canonical(content):
    return say(content, lambda options: options[0])


def paraphrase(content, rng, held_out=False):
    """A rewording, never the canonical one. held_out uses only the words kept out of RL training."""
    if held_out:
        return say(content, lambda options: options[2], flip=rng.random() < 0.5)
    while True:
        sentence = say(content, rng.choice, flip=rng.random() < 0.5)
        if sentence != canonical(content):
            return sentence


def place(x, y):
    return PLACES[min(int(y * 3 / SIZE), 2)][min(int(x * 3 / SIZE), 2)]


def detailed(content, things):
    """Every object with its colour and place; a text is said as always, with its size."""
    if content["tag"] == "text":
        return f'large white text "{content["text"]}" center'
    ordered = sorted(things, key=lambda t: (t.y, t.x))
    return ", ".join(f"{t.color} {t.shape} {place(t.x, t.y)}" for t in ordered)


# ---- contents ----
def content_of(tag, include):
    """GenEval metadata. `exclude` lists the classes that must not appear, so that extra objects are seen."""
    asked = {clause["class"] for clause in include}
    exclude = [{"class": shape, "count": 1} for shape in CLASSES if shape not in asked]
    if tag == "counting":
        exclude.append({"class": include[0]["class"], "count": include[0]["count"] + 1})
    return {"tag": tag, "include": include, "exclude": exclude}


def all_contents(tag):
    """Every content of a GenEval tag, in a fixed order."""
    one = [{"class": shape, "count": 1} for shape in CLASSES]
    colored = [clause | {"color": color} for clause in one for color in PALETTE]
    if tag == "single_object":
        includes = [[a] for a in one]
    elif tag == "two_object":
        includes = [[a, b] for a, b in itertools.combinations(one, 2)]
    elif tag == "counting":
        includes = [[{"class": shape, "count": n}] for shape in CLASSES for n in COUNT_WORDS]
    elif tag == "colors":
        includes = [[a] for a in colored]
    elif tag == "position":
        pairs = list(itertools.permutations(one, 2))
        includes = [[a, b | {"position": [relation, 0]}] for a, b in pairs for relation in RELATIONS]
    elif tag == "color_attr":
        pairs = itertools.combinations(colored, 2)
        includes = [[a, b] for a, b in pairs if a["class"] != b["class"] and a["color"] != b["color"]]
    else:
        raise ValueError(f"unknown tag {tag!r}, expected one of {TAGS}")
    return [content_of(tag, include) for include in includes]


def facts(content):
    """What a content says, whatever the wording or the side it is said from."""
    if content["tag"] == "text":
        return ("text", content["text"])
    said = []
    for clause in content["include"]:
        said.append((clause["class"], clause.get("color"), clause["count"]))
        if "position" in clause:
            relation, index = clause["position"]
            a, b = clause["class"], content["include"][index]["class"]
            said.append((a, relation, b) if relation in ("left of", "above") else (b, INVERSE[relation], a))
    return tuple(sorted(said, key=str))


def split_contents(tag, seed=0):
    """(train, evaluation): two thirds and one third of the tag's contents, with no fact set in both."""
    groups = {}
    for content in all_contents(tag):
        groups.setdefault(facts(content), []).append(content)
    keys = sorted(groups, key=str)
    random.Random(f"{seed}-{tag}").shuffle(keys)
    cut = len(keys) - len(keys) // 3
    return [[c for key in part for c in groups[key]] for part in (keys[:cut], keys[cut:])]


def text_content(text):
    return {"tag": "text", "text": text}


def in_evaluation(key):
    """A third of all strings, always the same ones: the evaluation side of a split."""
    return random.Random(key).random() < 1 / 3


def random_text(rng, evaluation=None):
    """Two or three characters. evaluation True or False keeps to that side of the split."""
    while True:
        text = "".join(rng.choices(CHARACTERS, k=rng.choice((2, 3))))
        if evaluation is None or evaluation == in_evaluation(text):
            return text


# ---- scenes ----
def fits(thing, others):
    return all(max(abs(thing.x - o.x), abs(thing.y - o.y)) >= thing.r + o.r + GAP for o in others)


def random_thing(rng, shape, color):
    r = rng.uniform(*RADIUS)
    low, high = r + MARGIN, SIZE - r - MARGIN
    return Thing(shape, color, rng.uniform(low, high), rng.uniform(low, high), r)


def box_of(thing):
    return (thing.x - thing.r, thing.y - thing.r, thing.x + thing.r, thing.y + thing.r)


def realise(content, rng):
    """A random list of Things that shows exactly the content."""
    while True:  # a crowded or wrongly placed start is thrown away
        things, ok = [], True
        for clause in content["include"]:
            for _ in range(clause["count"]):
                color = clause.get("color") or rng.choice(list(PALETTE))
                tries = (random_thing(rng, clause["class"], color) for _ in range(20))
                thing = next((t for t in tries if fits(t, things)), None)
                ok = ok and thing is not None
                if ok and "position" in clause:
                    relation, index = clause["position"]
                    ok = relation in relative_position(box_of(thing), box_of(things[index]))
                things.append(thing)
                if not ok:
                    break
            if not ok:
                break
        if ok:
            return things


def draw(things):
    """(SIZE, SIZE, 3) uint8 image, anti-aliased over one pixel."""
    canvas = torch.tensor(BACKGROUND, dtype=torch.float32).expand(SIZE, SIZE, 3).clone()
    for t in things:
        x0, y0 = max(int(t.x - t.r) - 1, 0), max(int(t.y - t.r) - 1, 0)
        x1, y1 = min(int(t.x + t.r) + 3, SIZE), min(int(t.y + t.r) + 3, SIZE)
        u = (torch.arange(x0, x1) + 0.5 - t.x) / t.r
        v = (torch.arange(y0, y1) + 0.5 - t.y) / t.r
        coverage = (inside(t.shape, u[None, :], v[:, None]) * t.r + 0.5).clamp(0, 1)[..., None]
        color = torch.tensor(PALETTE[t.color], dtype=torch.float32)
        canvas[y0:y1, x0:x1] += coverage * (color - canvas[y0:y1, x0:x1])
    return canvas.round().to(torch.uint8).numpy()


def draw_text(text, rng):
    """(SIZE, SIZE, 3) uint8 image of white glyphs near the centre."""
    canvas = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    width = len(text) * (5 * GLYPH_SCALE + GLYPH_GAP) - GLYPH_GAP
    x = (SIZE - width) // 2 + rng.randint(-2, 2)
    y = (SIZE - 7 * GLYPH_SCALE) // 2 + rng.randint(-2, 2)
    for character in text:
        dots = np.kron(bitmap(character).numpy(), np.ones((GLYPH_SCALE, GLYPH_SCALE), dtype=bool))
        canvas[y : y + dots.shape[0], x : x + dots.shape[1]][dots] = PALETTE["white"]
        x += 5 * GLYPH_SCALE + GLYPH_GAP
    return canvas


def sample(rng, text_share=0.25):
    """One training example: (content, things, image). things is empty for a text."""
    if rng.random() < text_share:
        content = text_content(random_text(rng))
        return content, [], draw_text(content["text"], rng)
    content = rng.choice(CONTENTS[rng.choice(TAGS)])
    things = realise(content, rng)
    return content, things, draw(things)


def wording(content, things, rng):
    """A prompt for an example, unevenly worded: 60% canonical, 15% paraphrased, 25% detailed."""
    kind = rng.random()
    if kind < 0.60:
        return canonical(content)
    if kind < 0.75:
        return paraphrase(content, rng, held_out=rng.random() < 0.5)
    return detailed(content, things)


def sample_edit(rng):
    """One edit: (source things, instruction, target things, target content)."""
    while True:
        shapes = rng.sample(CLASSES, rng.choice((1, 2)))
        source = realise(content_of("edit", [{"class": s, "count": 1} for s in shapes]), rng)
        kind = rng.choice(("recolour", "add", "remove", "move", "replace"))
        thing, rest = source[0], source[1:]
        others = [s for s in CLASSES if s not in shapes]
        if kind == "recolour":
            color = rng.choice([c for c in PALETTE if c != thing.color])
            target, instruction = [thing._replace(color=color), *rest], f"make the {thing.shape} {color}"
        elif kind == "add":
            new = random_thing(rng, rng.choice(others), rng.choice(list(PALETTE)))
            target, instruction = [*source, new], f"add a {new.color} {new.shape}"
        elif kind == "remove" and rest:
            target, instruction = rest, f"remove the {thing.shape}"
        elif kind == "move":
            x, y = (rng.choice((0.17, 0.5, 0.83)) * SIZE for _ in range(2))
            target = [thing._replace(x=x, y=y), *rest]
            instruction = f"move the {thing.shape} to the {place(x, y)}"
            if place(x, y) == place(thing.x, thing.y):
                continue
        elif kind == "replace":
            shape = rng.choice(others)
            target, instruction = (
                [thing._replace(shape=shape), *rest],
                f"replace the {thing.shape} with a {shape}",
            )
        else:
            continue
        if all(fits(t, target[:i]) for i, t in enumerate(target)):
            include = [{"class": t.shape, "count": 1, "color": t.color} for t in target]
            return source, instruction, target, content_of(kind, include)


CONTENTS = {tag: all_contents(tag) for tag in TAGS}


# ---- prompt files ----
def write_prompts(seed=0):
    """Writes tiny/prompts/*.jsonl: GenEval's metadata a line, evaluation contents disjoint from training."""
    rng, files = random.Random(seed), {}
    # contents are repeated, 64 lines a tag, so that each tag weighs the same, as in GenEval
    splits = [[itertools.islice(itertools.cycle(part), 64) for part in split_contents(tag)] for tag in TAGS]
    trained, held_out = ([c for part in side for c in part] for side in zip(*splits))
    files["train"] = [c | {"prompt": canonical(c)} for c in trained]
    files["eval"] = [c | {"prompt": canonical(c)} for c in held_out]
    files["eval_paraphrased"] = [c | {"prompt": paraphrase(c, rng, held_out=True)} for c in held_out]
    for name, count in (("text_train", 1024), ("text_eval", 256)):
        texts = [random_text(rng, evaluation=name == "text_eval") for _ in range(count)]
        files[name] = [text_content(t) | {"prompt": canonical(text_content(t))} for t in texts]
    for name, count in (("edit_train", 1024), ("edit_eval", 256)):
        files[name] = []
        while len(files[name]) < count:
            source, instruction, _, content = sample_edit(rng)
            if in_evaluation(instruction + str(facts(content))) != (name == "edit_eval"):
                continue
            files[name].append(
                content | {"prompt": instruction, "source": [thing._asdict() for thing in source]}
            )
    PROMPTS.mkdir(exist_ok=True)
    for name, rows in files.items():
        (PROMPTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", metavar="PICTURE", help="draw 8 x 12 examples to this file and stop")
    arguments = parser.parse_args()
    if arguments.show:
        images = [sample(random.Random(i))[2] for i in range(96)]
        rows = [np.concatenate(images[i : i + 12], axis=1) for i in range(0, 96, 12)]
        Image.fromarray(np.concatenate(rows)).save(arguments.show)
    else:
        write_prompts()
