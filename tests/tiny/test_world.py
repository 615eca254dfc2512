import json
import random
import re

import pytest
import torch
from einops import rearrange

from rewards.geneval import detection, rule
from rewards.tiny_world import shapes
from tiny import world

FILES = ("train", "eval", "eval_paraphrased", "text_train", "text_eval", "edit_train", "edit_eval")
WORD_TABLES = (world.SHAPE_WORDS, world.COLOR_WORDS, world.COUNT_WORDS, world.RELATION_WORDS)


def shipped(name):
    return [json.loads(line) for line in (world.PROMPTS / f"{name}.jsonl").read_text().splitlines()]


def detect(pictures):
    """Detections of lists of Things, as the detector sees their renders."""
    batch = torch.stack([torch.from_numpy(world.draw(things)) for things in pictures])
    return shapes.detect(rearrange(batch, "b h w c -> b c h w").float() / 255)


def as_detections(things):
    """What a perfect detector would say."""
    return [detection.Detection(t.shape, world.box_of(t), 1.0, t.color) for t in things]


def first(options):
    return options[0]


def held_out_phrases():
    """Words and parts of sentences that only the held-out wording has, as patterns at a word's start."""
    phrases = {options[2] for table in WORD_TABLES for options in table.values()}
    seen = {phrase for table in WORD_TABLES for options in table.values() for phrase in options[:2]}
    for canonical, synonym, held_out in world.SENTENCES.values():
        phrases |= {part.strip(' "') for part in re.split(r"\{\w\}", held_out)}
        seen |= {part.strip(' "') for text in (canonical, synonym) for part in re.split(r"\{\w\}", text)}
    return [re.compile(rf"\b{re.escape(phrase)}") for phrase in sorted(phrases - seen - {""})]


# ---- splits ----
@pytest.mark.parametrize("tag", detection.TAGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_contents_split_into_disjoint_facts(tag, seed):
    train, evaluation = world.split_contents(tag, seed)
    assert train and evaluation
    assert not {world.facts(c) for c in train} & {world.facts(c) for c in evaluation}
    assert sorted(map(str, train + evaluation)) == sorted(map(str, world.all_contents(tag)))
    assert len(evaluation) / len(train) == pytest.approx(1 / 2, abs=0.17)


def test_no_content_is_there_twice_and_each_is_well_formed():
    contents = [content for tag in detection.TAGS for content in world.all_contents(tag)]
    assert len({str(content) for content in contents}) == len(contents)
    for content in contents:
        rule.check_metadata(content)


def test_the_shipped_training_and_evaluation_prompts_share_no_facts():
    train, evaluation = shipped("train"), shipped("eval")
    assert not {world.facts(row) for row in train} & {world.facts(row) for row in evaluation}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}


def test_the_shipped_texts_to_write_are_disjoint():
    train, evaluation = ({row["text"] for row in shipped(name)} for name in ("text_train", "text_eval"))
    assert len(train) > 500 and len(evaluation) > 100
    assert not train & evaluation
    assert {len(text) for text in train | evaluation} == {2, 3}


@pytest.mark.parametrize("name", ["train", "text_train"])
def test_held_out_words_never_occur_in_training_prompts(name):
    patterns = held_out_phrases()
    assert len(patterns) >= 20
    assert [row["prompt"] for row in shipped(name) if any(p.search(row["prompt"]) for p in patterns)] == []


def test_every_paraphrased_evaluation_prompt_has_a_held_out_word():
    patterns = held_out_phrases()
    assert all(any(p.search(row["prompt"]) for p in patterns) for row in shipped("eval_paraphrased"))


def test_the_paraphrased_prompts_say_the_same_contents_in_other_words():
    plain, paraphrased = shipped("eval"), shipped("eval_paraphrased")
    assert [row | {"prompt": ""} for row in plain] == [row | {"prompt": ""} for row in paraphrased]
    assert all(a["prompt"] != b["prompt"] for a, b in zip(plain, paraphrased))


def test_the_shipped_files_are_what_the_script_writes(tmp_path, monkeypatch):
    folder = world.PROMPTS
    monkeypatch.setattr(world, "PROMPTS", tmp_path / "prompts")
    world.write_prompts()
    assert sorted(path.name for path in world.PROMPTS.iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        assert (world.PROMPTS / f"{name}.jsonl").read_text() == (folder / f"{name}.jsonl").read_text(), name


@pytest.mark.parametrize("name", ["train", "eval", "eval_paraphrased"])
def test_each_tag_has_64_lines(name):
    tags = [row["tag"] for row in shipped(name)]
    assert {tag: tags.count(tag) for tag in tags} == {tag: 64 for tag in detection.TAGS}


# ---- scenes ----
@pytest.mark.parametrize("tag", detection.TAGS)
def test_realise_shows_exactly_the_content(tag):
    rng = random.Random(0)
    contents = [rng.choice(world.CONTENTS[tag]) for _ in range(60)]
    pictures = [world.realise(content, rng) for content in contents]
    for content, things in zip(contents, pictures):
        assert rule.passes(as_detections(things), content, exact=True)
        assert rule.soft_score(as_detections(things), content) == 1
    passed = [rule.passes(d, content, exact=True) for d, content in zip(detect(pictures), contents)]
    assert sum(passed) >= 59


def test_objects_never_overlap_and_stay_inside():
    rng = random.Random(1)
    for _ in range(400):
        _, things, image = world.sample(rng, text_share=0)
        assert image.shape == (world.SIZE, world.SIZE, 3)
        assert things
        for i, a in enumerate(things):
            box = world.box_of(a)
            assert min(box) >= world.MARGIN - 1e-9 and max(box) <= world.SIZE - world.MARGIN + 1e-9
            assert world.RADIUS[0] <= a.r <= world.RADIUS[1]
            assert world.fits(a, things[:i])
            for b in things[:i]:
                other = world.box_of(b)
                gaps = [max(box[k] - other[k + 2], other[k] - box[k + 2]) for k in (0, 1)]
                assert max(gaps) >= world.GAP - 1e-9


def test_the_same_seed_draws_the_same_examples():
    def draw_all(seed):
        rng = random.Random(seed)
        examples = [world.sample(rng) for _ in range(40)]
        return [(c, t, i.tobytes(), world.wording(c, t, rng)) for c, t, i in examples], [
            world.sample_edit(rng) for _ in range(10)
        ]

    assert draw_all(3) == draw_all(3)
    assert draw_all(3) != draw_all(4)


def test_samples_cover_every_tag_and_texts():
    rng = random.Random(0)
    tags = [world.sample(rng)[0]["tag"] for _ in range(400)]
    assert set(tags) == {*detection.TAGS, "text"}
    assert 0.15 < tags.count("text") / len(tags) < 0.35


# ---- edits ----
@pytest.fixture(scope="module")
def edits():
    rng = random.Random(0)
    return [world.sample_edit(rng) for _ in range(200)]


def test_an_edit_changes_the_picture_and_reaches_its_metadata(edits):
    assert {content["tag"] for *_, content in edits} == {"recolour", "add", "remove", "move", "replace"}
    for source, _, target, content in edits:
        rule.check_metadata(content)
        assert source != target
        assert (world.draw(source) != world.draw(target)).any()
        assert rule.passes(as_detections(target), content, exact=True)
        assert all(world.fits(thing, target[:i]) for i, thing in enumerate(target))
        assert all(0 <= min(world.box_of(t)) and max(world.box_of(t)) <= world.SIZE for t in target)
    passed = [rule.passes(d, e[3], exact=True) for d, e in zip(detect([e[2] for e in edits]), edits)]
    assert sum(passed) >= 199


@pytest.mark.parametrize("kind", ["recolour", "add", "remove", "replace"])
def test_an_unchanged_source_does_not_pass_as_edited(edits, kind):
    chosen = [edit for edit in edits if edit[3]["tag"] == kind]
    assert chosen
    assert not any(rule.passes(as_detections(source), content, exact=True) for source, *_, content in chosen)


def test_a_move_goes_where_the_instruction_says(edits):
    moves = [(source, said, target) for source, said, target, content in edits if content["tag"] == "move"]
    for source, said, target in moves:
        before, after = source[0], target[0]
        assert source[1:] == target[1:] and before._replace(x=after.x, y=after.y) == after
        assert said == f"move the {after.shape} to the {world.place(after.x, after.y)}"
        assert world.place(before.x, before.y) != world.place(after.x, after.y)


# ---- wording ----
@pytest.mark.parametrize(
    "tag, include, canonical, held_out",
    [
        ("single_object", [("cross", 1, {})], "a cross", "an image of a cruciform"),
        ("colors", [("circle", 1, {"color": "blue"})], "a blue circle", "an image of a navy ball"),
        ("counting", [("square", 3, {})], "three squares", "an image of a triple of blocks"),
        ("counting", [("cross", 2, {})], "two crosses", "an image of a couple of cruciforms"),
        (
            "two_object",
            [("circle", 1, {}), ("triangle", 1, {})],
            "a circle and a triangle",
            "both a pyramid and a ball",
        ),
        (
            "position",
            [("circle", 1, {}), ("square", 1, {"position": ["left of", 0]})],
            "a square left of a circle",
            "an image of a block west of a ball",
        ),
    ],
)
def test_contents_are_said_in_words(tag, include, canonical, held_out):
    clauses = [{"class": name, "count": count} | more for name, count, more in include]
    content = world.content_of(tag, clauses)
    assert world.canonical(content) == canonical
    assert world.say(content, lambda options: options[2]) == held_out


def test_an_article_agrees_with_its_word():
    content = world.content_of("colors", [{"class": "circle", "count": 1, "color": "blue"}])
    assert world.say(content, lambda options: options[1]) == "there is an azure disc"


def test_saying_a_position_from_the_other_side_keeps_the_facts():
    for content in world.all_contents("position"):
        a, b = content["include"]
        relation = b["position"][0]
        plain_b = {"class": b["class"], "count": b["count"]}
        mirrored = world.content_of("position", [plain_b, a | {"position": [world.INVERSE[relation], 0]}])
        assert world.facts(mirrored) == world.facts(content)
        assert world.say(content, first, flip=True) == world.canonical(mirrored) != world.canonical(content)
        swapped = world.content_of("position", [plain_b, a | {"position": [relation, 0]}])
        assert world.facts(swapped) != world.facts(content)


def test_a_mirrored_position_is_shown_by_the_same_picture():
    rng = random.Random(0)
    for content in world.all_contents("position"):
        a, b = content["include"]
        relation = world.INVERSE[b["position"][0]]
        mirrored = {"include": [{"class": b["class"], "count": 1}, a | {"position": [relation, 0]}]}
        assert rule.passes(as_detections(world.realise(content, rng)), mirrored, exact=True)


def test_different_canonical_sentences_mean_different_contents():
    contents = [content for tag in detection.TAGS for content in world.all_contents(tag)]
    assert len({world.canonical(content) for content in contents}) == len(contents)
