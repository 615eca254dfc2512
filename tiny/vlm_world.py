"""What tiny/vlm learns, supervised only: tasks over the tiny world, and a parser of its wordings.

An example is (image or None, question, answer). There are four tasks:
  rewrite   a prompt -> another wording of the same content, in <answer></answer>
  refine    a prompt and the preview of an unfinished image -> a wording for the rest of the way
  edit      a source image and an instruction -> a clearer instruction, or what the target shows
  caption   an image -> its detailed wording

Every question has many right answers, drawn anew each time, so that samples at temperature 1 differ. All
answers keep the meaning, which `keeps_meaning` checks: what a prompt leaves open may be decided, but what it
says may not change. Answers never use the words that are held out of all RL training, because rewrites would
let those words in. Questions do use them.
"""

import itertools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from rewards.geneval.detection import TAGS
from rewards.geneval.rule import relative_position
from rewards.tiny_world.shapes import PALETTE
from tiny import world

REWRITE = "Improve this image prompt: {prompt}. Answer inside <answer> </answer>."  # promptrl.py's default
REFINE = (
    "Preview at {percent}%. Current prompt: {current}. Original prompt: {prompt}. "
    "Improve it inside <answer> </answer>."
)
REFINE_BLIND = REFINE.replace("Preview at {percent}%.", "No preview yet.")
EDIT = "Improve this edit instruction: {prompt}. Answer inside <answer> </answer>."
CAPTION = "Describe the image."
TEXTS = (  # how answers word a text: the world's own wordings, and parts of its detailed one
    'the text "{t}"',
    'the word "{t}"',
    'large white text "{t}" center',
    'large white text "{t}"',
    'white text "{t}" center',
    'the white text "{t}"',
    'the large text "{t}"',
    'the large white word "{t}"',
)


# ---- parser ----
class Said(NamedTuple):
    """What a sentence says: a text to draw, or objects and at most one relation between them."""

    text: str | None
    objects: list  # of (class, color or None, place or None)
    relation: tuple | None  # (class, relation, class)


def word_table(options):
    """{word: meaning} from a table {meaning: words}."""
    table = {}
    for meaning, words in options.items():
        for word in words:
            table[word] = meaning
    return table


SHAPES = word_table(world.SHAPE_WORDS)
COLORS = word_table(world.COLOR_WORDS)
COUNTS = word_table(world.COUNT_WORDS)
RELATIONS = word_table(world.RELATION_WORDS)
PLURALS = {world.plural(noun): shape for noun, shape in SHAPES.items()}
PLACE_NAMES = word_table(world.PLACE_WORDS)


def parse_phrase(phrase):
    """'a red circle' or 'two circles', in plain or hard words -> its objects, a list. None for all else."""
    hard = re.fullmatch(r"(\w+), (\w+) of them", phrase)
    if hard:
        phrase = f"{hard[2]} {hard[1]}"
    count, _, noun = phrase.rpartition(" ")
    if noun in PLURALS and count in COUNTS:
        return [(PLURALS[noun], None, None)] * COUNTS[count]
    hard = re.fullmatch(r"(an? \w+) which is colored (\w+)", phrase)
    if hard:
        objects = parse_phrase(hard[1])
        if objects is None or hard[2] not in COLORS:
            return None
        shape, color, place = objects[0]
        return [(shape, COLORS[hard[2]], place)] if color is None else None
    first, _, rest = phrase.partition(" ")
    color, _, noun = rest.rpartition(" ")
    if noun not in SHAPES or (color and color not in COLORS):
        return None
    if first != world.article(rest):
        return None
    return [(SHAPES[noun], COLORS.get(color), None)]


def parse_item(item):
    """'red circle top left', an item of a detailed wording -> its object. None where it is none."""
    words = item.split(" ", 2)
    if len(words) < 3:
        return None
    color, shape, place = words
    if shape in world.SHAPE_WORDS and color in PALETTE and place in world.CELLS:
        return (shape, color, place)
    return None


def match(template, sentence):
    """{letter: words} of a template with {a}, {b}, {p} or {t} in it. None where it does not match."""
    pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>.+)", re.escape(template))
    found = re.fullmatch(pattern, sentence)
    return found.groupdict() if found else None


def parse(sentence):
    """What a sentence says, a Said. None outside of the world's wordings. Exact: no word is skipped."""
    if sentence != " ".join(sentence.split()):
        return None
    return parse_text(sentence) or parse_list(sentence) or parse_scene(sentence)


def parse_text(sentence):
    """The Said of a sentence that asks for a text, or None."""
    for template in TEXTS + world.SENTENCES["text"] + world.HARD_SENTENCES["text"]:
        found = match(template, sentence)
        if found and re.fullmatch("[A-Z0-9]+", found["t"]):
            return Said(found["t"], [], None)
    return None


def parse_list(sentence):
    """The Said of a detailed wording, or None."""
    items = [parse_item(item) for item in sentence.split(", ")]
    return None if None in items else Said(None, items, None)


def parse_scene(sentence):
    """The Said of a sentence about one or two phrases, or None."""
    for kind in ("one", "placed", "two", "position"):
        words = RELATIONS if kind == "position" else [""]
        for template in world.SENTENCES[kind] + world.HARD_SENTENCES[kind]:
            for word in words:
                said = parse_with(template.replace("{r}", word), word, sentence)
                if said:
                    return said
    return None


def parse_with(template, relation_word, sentence):
    """The Said of a sentence that this template makes, or None. relation_word: "" where it has none."""
    found = match(template, sentence)
    if found is None:
        return None
    place_word = found.pop("p", None)
    phrases = [parse_phrase(found[letter]) for letter in sorted(found)]
    if None in phrases:
        return None
    objects = sum(phrases, [])
    if place_word is not None:
        if place_word not in PLACE_NAMES:
            return None
        objects = [(shape, color, PLACE_NAMES[place_word]) for shape, color, _ in objects]
    relation = None
    if relation_word:
        subject = phrases[0][0][0]
        target = phrases[1][0][0]
        relation = (subject, RELATIONS[relation_word], target)
    return Said(None, objects, relation)


def box_of_place(place):
    """The box of a middling object in the middle of a place."""
    column, row = world.CELLS[place]
    x = (column + 0.5) * world.SIZE / 3
    y = (row + 0.5) * world.SIZE / 3
    return world.box_of(world.Thing(None, None, x, y, sum(world.RADIUS) / 2))


def boxes_of_class(said, shape):
    """The boxes of a sentence's objects of one class, where it gives their places."""
    boxes = []
    for object_shape, _, place in said.objects:
        if object_shape == shape and place:
            boxes.append(box_of_place(place))
    return boxes


def related(said, a, relation, b):
    """True where the sentence puts its objects of class a in a relation to those of class b."""
    if said.relation in ((a, relation, b), (b, world.INVERSE[relation], a)):
        return True
    pairs = list(itertools.product(boxes_of_class(said, a), boxes_of_class(said, b)))
    return bool(pairs) and all(relation in relative_position(p, q) for p, q in pairs)


def keeps_meaning(sentence, content):
    """True where the sentence says all that the content asks for, and asks for no other object."""
    said = parse(sentence)
    if said is None:
        return False
    if content["tag"] == "text":
        return said.text == content["text"]
    counts = Counter(shape for shape, _, _ in said.objects)
    if counts != {clause["class"]: clause["count"] for clause in content["include"]}:
        return False
    for clause in content["include"]:
        colors = {color for shape, color, _ in said.objects if shape == clause["class"]}
        if "color" in clause and colors != {clause["color"]}:
            return False
        places = {place for shape, _, place in said.objects if shape == clause["class"]}
        if "place" in clause and places != {clause["place"]}:
            return False
        if "position" in clause:
            relation, index = clause["position"]
            if not related(said, clause["class"], relation, content["include"][index]["class"]):
                return False
    return True


# ---- answers ----
def mentioned(sentence):
    """The classes of a sentence in the order of their first mention."""
    classes = []
    for word in re.findall("[a-z]+", sentence):
        shape = SHAPES.get(word) or PLURALS.get(word)
        if shape and shape not in classes:
            classes.append(shape)
    return classes


def follows(answer, prompt):
    """True where an answer names the objects in the prompt's order.

    Which colour goes with which object is easy to keep then. In another order a small model gets it wrong.
    A list of what is above what begins at the top, whatever the prompt's order.
    """
    relation = parse(prompt).relation
    is_vertical = relation is not None and relation[1] in ("above", "below")
    if ", " in answer and is_vertical:
        return True
    return mentioned(answer) == mentioned(prompt)


def rewrite_following(prompt, content, rng):
    """A rewrite that follows the prompt: drawn until one does."""
    while True:
        sentence = rewrite(content, rng)
        if follows(sentence, prompt):
            return sentence


def scene_following(prompt, content, rng):
    """As `scene`, drawn until its wording follows the prompt."""
    while True:
        things, sentence = scene(content, rng)
        if follows(sentence, prompt):
            return things, sentence


def reword(content, rng):
    """The content in the first two of the three words for everything: the third is held out of RL."""
    return world.say(content, lambda options: rng.choice(options[:2]), flip=rng.random() < 0.5)


def scene(content, rng):
    """(things, detailed wording) of a random scene whose wording says what the content asks for.

    Not every scene has such a wording: of two objects in one place, it does not tell which one is left.
    """
    while True:
        things = world.realise(content, rng)
        sentence = world.detailed(content, things)
        if keeps_meaning(sentence, content):
            return things, sentence


def colored(content, rng):
    """The content with a colour for each single object that had none."""
    clauses = []
    for clause in content["include"]:
        if "color" not in clause and clause["count"] == 1:
            clause = clause | {"color": rng.choice(list(PALETTE))}
        clauses.append(clause)
    return content | {"include": clauses}


def rewrite(content, rng):
    """A wording: a fifth each are canonical, with synonyms and with colours, two fifths are detailed."""
    if content["tag"] == "text":
        return rng.choice(TEXTS).format(t=content["text"])
    kind = rng.random()
    if kind < 0.2:
        return world.canonical(content)
    if kind < 0.4:
        return reword(content, rng)
    if kind < 0.6:
        return reword(colored(content, rng), rng)
    return scene(content, rng)[1]


def any_wording(content, rng):
    """A prompt as a person may write it: in any words, the held-out ones too, and some in hard sentences."""
    kind = rng.random()
    if kind < 0.5:
        return world.canonical(content)
    if kind < 0.85:
        return world.paraphrase(content, rng, held_out=rng.random() < 0.5)
    return world.hard_paraphrase(content, rng)


def any_content(rng):
    """A text, or a content of one of the six tags. One in four of these has a colour for everything."""
    if rng.random() < 0.2:
        return world.text_content(world.random_text(rng))
    content = rng.choice(world.CONTENTS[rng.choice(TAGS)])
    return colored(content, rng) if rng.random() < 0.25 else content


# ---- previews ----
def preview(image, done, rng):
    """An unfinished image: blurred and under smooth noise, both the more, the less is done (0 to 1)."""
    numbers = np.random.default_rng(rng.getrandbits(32)).normal(0.2, 0.15, (8, 8, 3))
    noise = Image.fromarray((numbers.clip(0, 1) * 255).astype(np.uint8))
    noise = noise.resize((world.SIZE, world.SIZE), Image.BICUBIC)
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(6 * (1 - done)))
    return np.asarray(Image.blend(blurred, noise, 0.8 * (1 - done) ** 2))


def spoil(things, rng):
    """A scene as a generator may get it wrong. Half of them are right.

    The others have an object lost, of another colour or of another shape.
    """
    i = rng.randrange(len(things))
    kind = rng.random()
    if kind < 0.2 and len(things) > 1:
        return things[:i] + things[i + 1 :]
    changes = {}
    if 0.2 <= kind < 0.35:
        changes["color"] = rng.choice(list(PALETTE))
    elif 0.35 <= kind < 0.5:
        changes["shape"] = rng.choice(list(world.SHAPE_WORDS))
    return things[:i] + [things[i]._replace(**changes)] + things[i + 1 :]


# ---- tasks ----
# Each returns (image or None, question, answer, what a check of the answer needs). `easy` is an extra share
# of examples that repeat the prompt or show a single object: from these a model learns to copy and to see far
# sooner.
def in_tags(answer):
    """An answer as the model writes it."""
    return f"<answer>{answer}</answer>"


def sample_rewrite(rng, easy=0.0):
    """A prompt to reword, without an image."""
    content = any_content(rng)
    prompt = any_wording(content, rng)
    answer = rewrite_following(prompt, content, rng)
    if rng.random() < 0.1 + easy:  # a prompt that is detailed already stays as it is
        prompt = answer
    return None, REWRITE.format(prompt=prompt), in_tags(answer), content


def sample_refine(rng, easy=0.0):
    """A prompt to improve, given a preview of the image.

    Three answers in four keep what the preview shows right, where it is, and say what it lacks. One question
    in five comes before there is a preview.
    """
    content = any_content(rng)
    done = rng.random()
    prompt = any_wording(content, rng)
    if content["tag"] == "text":
        image = world.draw_text(content["text"], rng)
        answer = rewrite(content, rng)
    else:
        things, answer = scene_following(prompt, content, rng)
        image = world.draw(spoil(things, rng))
    reworded = rewrite_following(prompt, content, rng)
    other = rewrite_following(prompt, content, rng)
    current = rng.choice((prompt, reworded))
    question = REFINE.format(prompt=prompt, current=current, percent=round(10 * done) * 10)
    if rng.random() < 0.25:
        answer = other
    image = preview(image, done, rng)
    if rng.random() < 0.2:
        question = REFINE_BLIND.format(prompt=prompt, current=current)
        return None, question, in_tags(other), content
    return image, question, in_tags(answer), content


def edit_answers(source, edit):
    """Three right answers: the instruction, the same with the place, and what the target shows."""
    if edit.content["tag"] == "add":
        new = edit.target[-1]
        exact_instruction = f"{edit.instruction} {world.place(new.x, new.y)}"
    else:
        thing = source[0]
        name = f"the {thing.color} {thing.shape}"
        exact = f"{name} {world.place(thing.x, thing.y)}"
        exact_instruction = edit.instruction.replace(name, exact, 1)
    return edit.instruction, exact_instruction, world.detailed(edit.content, edit.target)


def sample_edit(rng, easy=0.0):
    """An instruction to make clearer, given the source image."""
    source, edit = world.sample_edit(rng)
    answers = edit_answers(source, edit)
    answer = rng.choice(answers)
    return world.draw(source), EDIT.format(prompt=edit.instruction), in_tags(answer), answers


def sample_caption(rng, easy=0.0):
    """An image to describe."""
    if rng.random() < easy:
        content = rng.choice(world.CONTENTS["colors"])
    else:
        content = any_content(rng)
    if content["tag"] == "text":
        things = []
        image = world.draw_text(content["text"], rng)
    else:
        things = world.realise(content, rng)
        image = world.draw(things)
    return image, CAPTION, world.detailed(content, things), content


TASKS = {  # name -> (sampler, rows of a batch)
    "rewrite": (sample_rewrite, 12),
    "refine": (sample_refine, 6),
    "edit": (sample_edit, 2),
    "caption": (sample_caption, 12),
}
BATCH = sum(rows for _, rows in TASKS.values())


def sentences(rng, count):
    """Questions and answers in plain text, for the tokenizer to find its words in."""
    for sampler, _ in TASKS.values():
        for _ in range(count):
            _, question, answer, _ = sampler(rng)
            yield question
            yield answer
