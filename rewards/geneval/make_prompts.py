"""Writes training prompts in GenEval's templates, with its metadata, for `--rewards geneval`.

    python -m rewards.geneval.make_prompts --output geneval/train.jsonl --exclude evaluation_metadata.jsonl

Templates, classes and colours are GenEval's (Ghosh et al. 2023), its plurals ("sandwichs") too, so that the
prompts read as those of the evaluation do. The shares of the tasks are Flow-GRPO's (2505.05470): position 7,
counting 5, color_attr 3, colors 1, two_object 1, single_object 0. Prompts repeat: counting has 240 in all.

No prompt asks for what a line of the --exclude file asks for, in whatever order or from whichever side it is
said. Pass GenEval's evaluation_metadata.jsonl, its 553 prompts, to keep the evaluation held out.
"""

import dataclasses
import json
import random
from pathlib import Path

from rewards import BadInput, command_line
from rewards.geneval.detection import CLASSES, COLORS, RELATIONS, TAGS
from rewards.geneval.rule import check_metadata
from rewards.prompts import load_prompts

NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORED = {"right of": "left of", "below": "above"}
PATIENCE = 10_000  # excluded draws in a row after which a task is taken to have no other prompts


@dataclasses.dataclass
class Args:
    output: str  # the .jsonl to write, a prompt and its metadata a line
    exclude: str = ""  # a .jsonl in GenEval's format: nothing that it asks for is written
    num_prompts: int = 50_000  # lines to write; some prompts occur several times
    seed: int = 1  # the same flags write the same file
    position: int = 7  # share of "a photo of a dog left of a cat"
    counting: int = 5  # share of "a photo of three dogs"
    color_attr: int = 3  # share of "a photo of a red dog and a blue cat"
    colors: int = 1  # share of "a photo of a red dog"
    two_object: int = 1  # share of "a photo of a dog and a cat"
    single_object: int = 0  # share of "a photo of a dog"; GenEval's evaluation has all 80


def phrase(words):
    """'a dog', 'an orange dog'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name):
    """GenEval's rule, which is not English's: 'buses', but 'benchs'."""
    return name + ("es" if name.endswith("s") else "s")


def draw(tag, rng):
    """A random prompt of a GenEval task, as its metadata."""
    names = [name for name in CLASSES if name != "person" or "color" not in tag]  # GenEval has no blue people
    a, b = rng.sample(names, 2)
    first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
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
    one, other = rng.sample(COLORS, 2)
    first, words = first | {"color": one}, phrase(f"{one} {a}")
    if tag == "colors":
        return {"tag": tag, "include": [first], "prompt": f"a photo of {words}"}
    include = [first, second | {"color": other}]
    return {"tag": tag, "include": include, "prompt": f"a photo of {words} and {phrase(f'{other} {b}')}"}


def content(metadata):
    """What a prompt asks for: equal for "a dog and a cat" and "a cat and a dog", and for "a dog above a cat"
    and "a cat below a dog"."""
    include, things, places = metadata["include"], [], []
    for clause in include:
        things.append((clause["class"], clause["count"], clause.get("color", "")))
        if "position" in clause:
            relation, index = clause["position"]
            a, b = clause["class"], include[index]["class"]
            places.append((MIRRORED[relation], b, a) if relation in MIRRORED else (relation, a, b))
    return tuple(sorted(things)), tuple(sorted(places))


def generate(shares, num_prompts, excluded, seed):
    """num_prompts metadata rows: tasks drawn by shares {tag: int}, none with its content in excluded (a set).

    The same arguments give the same rows. Raises BadInput when all prompts of a task are excluded.
    """
    if min(shares.values()) < 0 or sum(shares.values()) == 0 or num_prompts < 1:
        raise BadInput("--num-prompts must be at least 1, the shares of the tasks 0 or more and not all 0")
    rng, rows = random.Random(seed), []
    for tag in rng.choices(list(shares), list(shares.values()), k=num_prompts):
        tries = (draw(tag, rng) for _ in range(PATIENCE))
        row = next((row for row in tries if content(row) not in excluded), None)
        if row is None:
            raise BadInput(f"every prompt of the task {tag} is excluded: set --{tag.replace('_', '-')} 0")
        rows.append(row)
    return rows


def read_contents(path):
    """The contents of a .jsonl in GenEval's format, a set. Raises BadInput for a row that is none."""
    contents = set()
    for prompt, row in zip(*load_prompts(path)):
        try:
            check_metadata(row)
        except ValueError as error:
            raise BadInput(f"{path}, prompt {prompt!r}: {error}") from None
        contents.add(content(row))
    return contents


def main(args):
    shares = {tag: getattr(args, tag) for tag in TAGS}
    excluded = read_contents(args.exclude) if args.exclude else set()
    rows = generate(shares, args.num_prompts, excluded, args.seed)
    path = Path(args.output)
    if path.suffix != ".jsonl":
        raise BadInput(f"--output {path} must end in .jsonl: a .txt has prompts without metadata")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} prompts, {len({content(row) for row in rows})} different contents")


if __name__ == "__main__":
    command_line.run(main, Args, __doc__, prog="python -m rewards.geneval.make_prompts")
