"""What tiny/vlm learns, supervised only: tasks over the tiny world, and a parser of its wordings.

An example is (image or None, question, answer). Four tasks:
  rewrite   a prompt -> another wording of the same content, in <answer></answer>
  refine    a prompt and the preview of an unfinished image -> a wording for the rest of the way
  edit      a source image and an instruction -> a clearer instruction, or what the target shows
  caption   an image -> its detailed wording

Every question has many right answers, drawn anew each time, so that samples at temperature 1 differ. All
answers keep the meaning, which `keeps_meaning` checks: what a prompt leaves open may be decided, what it says
may not change. Answers never use the words that are held out of all RL training, or rewrites would let them
in; questions do.
"""

import re
from collections import Counter, namedtuple

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
TEXTS = (  # the wordings of a text that answers use: the world's own, and parts of its detailed one
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
Said = namedtuple("Said", "text objects relation")  # objects: (class, color or None, place or None) each


def word_table(options):
    """{word: meaning} of a table {meaning: words}."""
    return {word: meaning for meaning, words in options.items() for word in words}


def plural(noun):
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


SHAPES, COLORS, COUNTS = map(word_table, (world.SHAPE_WORDS, world.COLOR_WORDS, world.COUNT_WORDS))
PLURALS = {plural(noun): shape for noun, shape in SHAPES.items()}
RELATIONS = word_table(world.RELATION_WORDS)
CELLS = {name: (x, y) for y, row in enumerate(world.PLACES) for x, name in enumerate(row)}


def parse_phrase(phrase):
    """'a red circle' or 'two circles' -> its objects, a list; None when it is neither."""
    count, _, noun = phrase.rpartition(" ")
    if noun in PLURALS and count in COUNTS:
        return [(PLURALS[noun], None, None)] * COUNTS[count]
    article, _, rest = phrase.partition(" ")
    color, _, noun = rest.rpartition(" ")
    if noun not in SHAPES or (color and color not in COLORS):
        return None
    if article != ("an" if rest[0] in "aeiou" else "a"):
        return None
    return [(SHAPES[noun], COLORS.get(color), None)]


def parse_item(item):
    """'red circle top left', an item of a detailed wording -> its object; None when it is none."""
    color, shape, place = (item.split(" ", 2) + ["", ""])[:3]
    return (
        (shape, color, place) if shape in world.SHAPE_WORDS and color in PALETTE and place in CELLS else None
    )


def match(template, sentence):
    """The groups of a template with {a}, {b} or {t} in it, as a dict, or None."""
    pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>.+)", re.escape(template))
    found = re.fullmatch(pattern, sentence)
    return found and found.groupdict()


def parse(sentence):
    """What a sentence says, a Said, or None outside of the world's wordings. Exact: no word is skipped."""
    if sentence != " ".join(sentence.split()):
        return None
    for template in (*TEXTS, *world.SENTENCES["text"]):
        found = match(template, sentence)
        if found and re.fullmatch("[A-Z0-9]+", found["t"]):
            return Said(found["t"], [], None)
    items = [parse_item(item) for item in sentence.split(", ")]
    if None not in items:
        return Said(None, items, None)
    for kind in ("one", "two", "position"):
        for template in world.SENTENCES[kind]:
            for word in RELATIONS if kind == "position" else [""]:
                found = match(template.replace("{r}", word), sentence)
                phrases = [parse_phrase(found[key]) for key in sorted(found)] if found else [None]
                if None not in phrases:
                    relation = (phrases[0][0][0], RELATIONS[word], phrases[1][0][0]) if word else None
                    return Said(None, sum(phrases, []), relation)
    return None


def box_of_place(place):
    """The box of an object in the middle of a place, of middling size."""
    x, y = ((cell + 0.5) * world.SIZE / 3 for cell in CELLS[place])
    return world.box_of(world.Thing(None, None, x, y, sum(world.RADIUS) / 2))


def related(said, a, relation, b):
    """True when the sentence puts its objects of class a in a relation to those of class b."""
    if said.relation in ((a, relation, b), (b, world.INVERSE[relation], a)):
        return True
    places = [[box_of_place(o[2]) for o in said.objects if o[0] == name and o[2]] for name in (a, b)]
    pairs = [(p, q) for p in places[0] for q in places[1]]
    return bool(pairs) and all(relation in relative_position(p, q) for p, q in pairs)


def keeps_meaning(sentence, content):
    """True when the sentence says all that the content asks for, and asks for no other object."""
    said = parse(sentence)
    if said is None or content["tag"] == "text":
        return said is not None and said.text == content["text"]
    counts = Counter(shape for shape, _, _ in said.objects)
    if counts != {clause["class"]: clause["count"] for clause in content["include"]}:
        return False
    for clause in content["include"]:
        colors = {color for shape, color, _ in said.objects if shape == clause["class"]}
        if "color" in clause and colors != {clause["color"]}:
            return False
        if "position" in clause:
            relation, index = clause["position"]
            if not related(said, clause["class"], relation, content["include"][index]["class"]):
                return False
    return True


# ---- answers ----
def mentioned(sentence):
    """The classes of a sentence in the order of their first mention."""
    words = re.findall("[a-z]+", sentence)
    return list(dict.fromkeys(SHAPES.get(w) or PLURALS[w] for w in words if w in SHAPES or w in PLURALS))


def follows(answer, prompt):
    """True when an answer names the objects in the prompt's order. Which colour goes with which object is
    easy to keep then; otherwise a small model gets it wrong. A list of what is above what begins at the top.
    """
    relation = parse(prompt).relation
    listed = ", " in answer and relation is not None and relation[1] in ("above", "below")
    return listed or mentioned(answer) == mentioned(prompt)


def following(prompt, draw):
    """The first of draw(), draw(), ... whose wording, the last of what it returns, follows the prompt."""
    while not follows((drawn := draw())[-1], prompt):
        pass
    return drawn


def reword(content, rng):
    """The content in the world's first two words for everything, the third being held out of RL."""
    return world.say(content, lambda options: rng.choice(options[:2]), flip=rng.random() < 0.5)


def scene(content, rng):
    """(things, detailed wording) of a random scene whose wording says what the content asks for."""
    while True:  # two objects in one place, say, do not tell which is left
        things = world.realise(content, rng)
        if keeps_meaning(sentence := world.detailed(content, things), content):
            return things, sentence


def colored(content, rng):
    """The content with a colour for every single object that was left without."""
    clauses = [
        clause if "color" in clause or clause["count"] > 1 else clause | {"color": rng.choice(list(PALETTE))}
        for clause in content["include"]
    ]
    return content | {"include": clauses}


def rewrite(content, rng):
    """A wording: a fifth each canonical, with synonyms, with colours, and two fifths detailed."""
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
    """A prompt as a person may write it, in any words, held-out ones too."""
    if rng.random() < 0.5:
        return world.canonical(content)
    return world.paraphrase(content, rng, held_out=rng.random() < 0.5)


def any_content(rng):
    """A text, or a content of the six tags, one in four with a colour for everything."""
    if rng.random() < 0.2:
        return world.text_content(world.random_text(rng))
    content = rng.choice(world.CONTENTS[rng.choice(TAGS)])
    return colored(content, rng) if rng.random() < 0.25 else content


# ---- previews ----
def preview(image, done, rng):
    """An unfinished image: blurred, and under smooth noise, both the more the less is done (0 to 1)."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0.2, 0.15, (8, 8, 3)).clip(0, 1) * 255
    noise = Image.fromarray(noise.astype(np.uint8)).resize((world.SIZE, world.SIZE), Image.BICUBIC)
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(6 * (1 - done)))
    return np.asarray(Image.blend(blurred, noise, 0.8 * (1 - done) ** 2))


def spoil(things, rng):
    """A scene as a generator may get it wrong: an object lost, of another colour or shape; half are right."""
    i, kind = rng.randrange(len(things)), rng.random()
    if kind < 0.2 and len(things) > 1:
        return things[:i] + things[i + 1 :]
    changes = {}
    if 0.2 <= kind < 0.35:
        changes["color"] = rng.choice(list(PALETTE))
    elif 0.35 <= kind < 0.5:
        changes["shape"] = rng.choice(list(world.SHAPE_WORDS))
    return [*things[:i], things[i]._replace(**changes), *things[i + 1 :]]


# ---- tasks: (image or None, question, answer, what a check of the answer needs) ----
# easy: the share of examples that repeat the prompt, or show one object: from them a model learns to
# copy and to see far sooner.
def sample_rewrite(rng, easy=0.0):
    content = any_content(rng)
    prompt = any_wording(content, rng)
    (answer,) = following(prompt, lambda: (rewrite(content, rng),))
    if rng.random() < 0.1 + easy:  # a prompt that may be detailed already stays as it is
        prompt = answer
    return None, REWRITE.format(prompt=prompt), f"<answer>{answer}</answer>", content


def sample_refine(rng, easy=0.0):
    """Three answers of four keep what the preview shows right, where it is, and say what it lacks; one
    question of five comes before there is a preview.
    """
    content, done = any_content(rng), rng.random()
    prompt = any_wording(content, rng)
    if content["tag"] == "text":
        image, answer = world.draw_text(content["text"], rng), rewrite(content, rng)
    else:
        things, answer = following(prompt, lambda: scene(content, rng))
        image = world.draw(spoil(things, rng))
    reworded, other = (following(prompt, lambda: (rewrite(content, rng),))[0] for _ in range(2))
    current = rng.choice((prompt, reworded))
    question = REFINE.format(prompt=prompt, current=current, percent=round(10 * done) * 10)
    if rng.random() < 0.25:
        answer = other
    image = preview(image, done, rng)
    if rng.random() < 0.2:
        image, question, answer = None, REFINE_BLIND.format(prompt=prompt, current=current), other
    return image, question, f"<answer>{answer}</answer>", content


def edit_answers(source, instruction, target, content):
    """The instruction as it is, with the object's colour and place, and what the target shows."""
    if content["tag"] == "add":
        where = f"{instruction} {world.place(target[-1].x, target[-1].y)}"
    else:
        thing = source[0]
        exact = f"the {thing.color} {thing.shape} {world.place(thing.x, thing.y)}"
        where = instruction.replace(f"the {thing.shape}", exact, 1)
    return instruction, where, world.detailed(content, target)


def sample_edit(rng, easy=0.0):
    source, instruction, target, content = world.sample_edit(rng)
    answers = edit_answers(source, instruction, target, content)
    answer = rng.choice(answers)
    return world.draw(source), EDIT.format(prompt=instruction), f"<answer>{answer}</answer>", answers


def sample_caption(rng, easy=0.0):
    content = rng.choice(world.CONTENTS["colors"]) if rng.random() < easy else any_content(rng)
    if content["tag"] == "text":
        image, things = world.draw_text(content["text"], rng), []
    else:
        things = world.realise(content, rng)
        image = world.draw(things)
    return image, CAPTION, world.detailed(content, things), content


TASKS = {  # name: (sampler, rows of a batch)
    "rewrite": (sample_rewrite, 14),
    "refine": (sample_refine, 4),
    "edit": (sample_edit, 2),
    "caption": (sample_caption, 6),
}
BATCH = sum(rows for _, rows in TASKS.values())


def sentences(rng, count):
    """Questions and answers in plain text, for the tokenizer to find its words in."""
    for sampler, _ in TASKS.values():
        for _ in range(count):
            yield from sampler(rng)[1:3]
