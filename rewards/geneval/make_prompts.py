"""Writes training prompts in GenEval's templates, with its metadata, for `--rewards geneval`.

    python -m rewards.geneval.make_prompts --output geneval/train.jsonl --exclude evaluation_metadata.jsonl

Templates, classes and colours are GenEval's (Ghosh et al. 2023), its plurals ("sandwichs") too, so that the
prompts read as those of the evaluation do. The default shares of the tasks are Flow-GRPO's (arXiv
2505.05470). Prompts repeat: the task counting has only 240 different ones.

No prompt asks for what a line of the --exclude file asks for, in whatever order or from whichever side it is
said. Pass GenEval's evaluation_metadata.jsonl, its 553 prompts, to keep the evaluation held out.
"""

import dataclasses
import json
import random
from pathlib import Path

from rewards import command_line
from rewards.command_line import NonNegativeInt, PositiveInt, Seed
from rewards.errors import BadInput
from rewards.geneval.detection import CLASSES, COLORS, RELATIONS, TAGS
from rewards.geneval.rule import asked_color, asked_position, check_metadata
from rewards.prompts import load_prompts

NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORED = {"right of": "left of", "below": "above"}
PATIENCE = 10_000  # excluded draws in a row after which a task is taken to have no other prompts


@dataclasses.dataclass
class Args:
    output: str
    """The .jsonl to write, a prompt and its metadata per line."""
    exclude: str = ""
    """A prompt file in GenEval's format. Nothing that it asks for is written. Empty: exclude nothing."""
    num_prompts: PositiveInt = 50_000
    """Lines to write. Some prompts occur several times."""
    seed: Seed = 1
    """Seeds all draws: the same flags write the same file."""
    position: NonNegativeInt = 7
    """Share of prompts such as "a photo of a dog left of a cat"."""
    counting: NonNegativeInt = 5
    """Share of prompts such as "a photo of three dogs"."""
    color_attr: NonNegativeInt = 3
    """Share of prompts such as "a photo of a red dog and a blue cat"."""
    colors: NonNegativeInt = 1
    """Share of prompts such as "a photo of a red dog"."""
    two_object: NonNegativeInt = 1
    """Share of prompts such as "a photo of a dog and a cat"."""
    single_object: NonNegativeInt = 0
    """Share of prompts such as "a photo of a dog". GenEval's evaluation has all 80 of them."""


def phrase(words):
    """'a dog', 'an orange dog'."""
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def plural(name):
    """GenEval's rule, which is not English's: 'buses', but 'benchs'."""
    return name + ("es" if name.endswith("s") else "s")


def draw(tag, rng):
    """A random prompt of a GenEval task, as its metadata."""
    names = [name for name in CLASSES if name != "person" or "color" not in tag]  # GenEval has no blue people
    a, b = rng.sample(names, 2)
    first = {"class": a, "count": 1}
    second = {"class": b, "count": 1}
    if tag == "single_object":
        return {"tag": tag, "include": [first], "prompt": f"a photo of {phrase(a)}"}
    if tag == "two_object":
        return {"tag": tag, "include": [first, second], "prompt": f"a photo of {phrase(a)} and {phrase(b)}"}
    if tag == "counting":
        count = rng.choice(list(NUMBERS))
        return {
            "tag": tag,
            "include": [first | {"count": count}],
            "exclude": [first | {"count": count + 1}],
            "prompt": f"a photo of {NUMBERS[count]} {plural(a)}",
        }
    if tag == "position":  # the second of the clauses is said first
        relation = rng.choice(RELATIONS)
        include = [first, second | {"position": [relation, 0]}]
        return {"tag": tag, "include": include, "prompt": f"a photo of {phrase(b)} {relation} {phrase(a)}"}
    color_a, color_b = rng.sample(COLORS, 2)
    first = first | {"color": color_a}
    words = phrase(f"{color_a} {a}")
    if tag == "colors":
        return {"tag": tag, "include": [first], "prompt": f"a photo of {words}"}
    include = [first, second | {"color": color_b}]
    other_words = phrase(f"{color_b} {b}")
    return {"tag": tag, "include": include, "prompt": f"a photo of {words} and {other_words}"}


def content(metadata):
    """What a prompt asks for: equal for "a dog and a cat" and "a cat and a dog", and for "a dog above a cat"
    and "a cat below a dog"."""
    include = metadata["include"]
    things = []
    places = []
    for clause in include:
        things.append((clause["class"], clause["count"], asked_color(clause) or ""))
        position = asked_position(clause)
        if position is not None:
            relation, index = position
            a = clause["class"]
            b = include[index]["class"]
            if relation in MIRRORED:
                places.append((MIRRORED[relation], b, a))
            else:
                places.append((relation, a, b))
    return tuple(sorted(things)), tuple(sorted(places))


def generate(shares, num_prompts, excluded, seed):
    """num_prompts metadata rows: tasks drawn by shares {tag: int}, none with its content in excluded (a set).

    The same arguments give the same rows. Raises BadInput when all prompts of a task are excluded.
    """
    if min(shares.values()) < 0 or sum(shares.values()) == 0 or num_prompts < 1:
        raise BadInput("--num-prompts must be at least 1, the shares of the tasks 0 or more and not all 0")
    rng = random.Random(seed)
    rows = []
    for tag in rng.choices(list(shares), list(shares.values()), k=num_prompts):
        rows.append(draw_allowed(tag, rng, excluded))
    return rows


def draw_allowed(tag, rng, excluded):
    """A random prompt of a task whose content is not excluded. Raises BadInput when there is none."""
    for _ in range(PATIENCE):
        row = draw(tag, rng)
        if content(row) not in excluded:
            return row
    raise BadInput(f"every prompt of the task {tag} is excluded: set --{tag.replace('_', '-')} 0")


def read_contents(path):
    """The contents of a prompt file in GenEval's format, a set. Raises BadInput for a row that is none."""
    contents = set()
    file = load_prompts(path)
    for prompt, row in zip(file.prompts, file.metadata):
        try:
            check_metadata(row)
        except ValueError as error:
            raise BadInput(f"{row.place}, prompt {prompt!r}: {error}") from None
        contents.add(content(row))
    return contents


def main(args):
    """Writes the prompts and says how many of them are different."""
    shares = {tag: getattr(args, tag) for tag in TAGS}
    excluded = read_contents(args.exclude) if args.exclude else set()
    rows = generate(shares, args.num_prompts, excluded, args.seed)
    path = Path(args.output)
    if path.suffix != ".jsonl":
        raise BadInput(f"--output {path} must end in .jsonl: a .txt has prompts without metadata")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--output {path} cannot be written: {error.strerror}") from None
    print(f"{path}: {len(rows)} prompts, {len({content(row) for row in rows})} different contents")


if __name__ == "__main__":
    command_line.run(main, Args, __doc__, prog="python -m rewards.geneval.make_prompts")
