"""tiny/splits.py: what is in each split of each fold, and that no two splits share anything."""

import itertools
import json
import re
from collections import Counter

import pytest

from rewards.geneval.detection import TAGS
from tiny import splits, world

FOLDS = range(splits.FOLDS)
SPLITS = ("train", "dev", "test")
WORD_TABLES = (
    world.SHAPE_WORDS,
    world.COLOR_WORDS,
    world.COUNT_WORDS,
    world.RELATION_WORDS,
    world.PLACE_WORDS,
)


def shipped(fold, name):
    path = splits.PROMPTS / f"fold_{fold}" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def held_out_phrases():
    """Words and parts of sentences that only the held-out wording has, as patterns at a word's start."""
    phrases = {options[2] for table in WORD_TABLES for options in table.values()}
    seen = {phrase for table in WORD_TABLES for options in table.values() for phrase in options[:2]}
    for canonical, synonym, held_out in world.SENTENCES.values():
        phrases |= {part.strip(' "') for part in re.split(r"\{\w\}", held_out)}
        seen |= {part.strip(' "') for text in (canonical, synonym) for part in re.split(r"\{\w\}", text)}
    return [re.compile(rf"\b{re.escape(phrase)}\b") for phrase in sorted(phrases - seen - {"", "in the"})]


def has_held_out_words(prompt):
    return any(pattern.search(prompt) for pattern in held_out_phrases())


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_files_are_what_the_script_writes(tmp_path):
    splits.write_all(tmp_path)
    written = files_below(tmp_path)
    assert len(written) == splits.FOLDS * 16 + splits.FOLDS * splits.EDITS_PER_QUARTER
    assert written == files_below(splits.PROMPTS)


# ---- contents ----
@pytest.mark.parametrize("tag", TAGS)
def test_the_quarters_of_a_tag_have_all_contents_and_share_no_facts(tag):
    quarters = splits.quarters(tag)
    assert sorted(map(str, sum(quarters, []))) == sorted(map(str, world.CONTENTS[tag]))
    facts = [{world.facts(content) for content in quarter} for quarter in quarters]
    assert not any(first & second for first, second in itertools.combinations(facts, 2))
    sizes = [len(own) for own in facts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 6


def test_each_quarter_is_for_testing_in_one_fold_and_for_choosing_in_another():
    for quarter in range(splits.FOLDS):
        names = [splits.split_name(quarter, fold) for fold in FOLDS]
        assert Counter(names) == {"train": 2, "dev": 1, "test": 1}
    for fold in FOLDS:
        names = [splits.split_name(quarter, fold) for quarter in range(splits.FOLDS)]
        assert Counter(names) == {"train": 2, "dev": 1, "test": 1}


@pytest.mark.parametrize("fold", FOLDS)
def test_counts_and_places_are_spread_over_the_quarters(fold):
    test = splits.split_contents("counting", fold)["test"]
    assert Counter(content["include"][0]["count"] for content in test) == {2: 2, 3: 2, 4: 2}
    test = splits.split_contents("single_object", fold)["test"]
    assert Counter(content["include"][0]["place"] for content in test) == {
        place: 2 for place in world.PLACE_WORDS
    }


@pytest.mark.parametrize("fold", FOLDS)
def test_two_splits_share_no_contents_texts_or_edits(fold):
    kinds = {
        "contents": lambda name: {world.facts(row) for row in shipped(fold, name)},
        "prompts": lambda name: {row["prompt"] for row in shipped(fold, name)},
        "texts": lambda name: {row["text"] for row in shipped(fold, f"text_{name}")},
        "instructions": lambda name: {row["prompt"] for row in shipped(fold, f"edit_{name}")},
        "reworded": lambda name: {row["prompt"] for row in shipped(fold, f"edit_reworded_{name}")},
        "results": lambda name: {world.facts(row) for row in shipped(fold, f"edit_{name}")},
        "sources": lambda name: {row["source"] for row in shipped(fold, f"edit_{name}")},
    }
    for kind, keys in kinds.items():
        for first, second in itertools.combinations(SPLITS, 2):
            assert keys(first) and keys(second)
            assert not keys(first) & keys(second), (kind, first, second)


# ---- files ----
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", SPLITS)
def test_lines_are_spread_evenly_over_tags_and_contents(fold, name):
    rows = shipped(fold, name)
    tags = Counter(row["tag"] for row in rows)
    assert tags == {tag: splits.LINES_PER_TAG[name] for tag in TAGS}
    for tag in TAGS:
        counts = Counter(row["prompt"] for row in rows if row["tag"] == tag)
        assert len(counts) >= 6
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", ["dev", "test"])
def test_an_evaluation_has_at_least_60_effective_prompts(fold, name):
    counts = Counter(row["prompt"] for row in shipped(fold, name)).values()
    assert sum(counts) ** 2 / sum(count**2 for count in counts) >= 60


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", ["dev", "test"])
@pytest.mark.parametrize("ending", ["paraphrased", "hard"])
def test_other_wordings_say_the_same_contents(fold, name, ending):
    plain = shipped(fold, name)
    other = shipped(fold, f"{name}_{ending}")
    assert [row | {"prompt": ""} for row in plain] == [row | {"prompt": ""} for row in other]
    assert all(a["prompt"] != b["prompt"] for a, b in zip(plain, other))


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", SPLITS)
def test_reworded_edits_are_the_same_edits(fold, name):
    plain = shipped(fold, f"edit_{name}")
    other = shipped(fold, f"edit_reworded_{name}")
    assert [row | {"prompt": ""} for row in plain] == [row | {"prompt": ""} for row in other]
    assert all(a["prompt"] != b["prompt"] for a, b in zip(plain, other))
    assert not [row["prompt"] for row in other if has_held_out_words(row["prompt"])]


@pytest.mark.parametrize("fold", FOLDS)
def test_held_out_words_are_in_the_paraphrases_and_never_in_training(fold):
    assert len(held_out_phrases()) >= 30
    assert all(has_held_out_words(row["prompt"]) for row in shipped(fold, "test_paraphrased"))
    for name in ("train", "text_train"):
        assert not [row["prompt"] for row in shipped(fold, name) if has_held_out_words(row["prompt"])]


@pytest.mark.parametrize("fold", FOLDS)
def test_an_edit_names_an_image_of_its_source(fold):
    for name in SPLITS:
        rows = shipped(fold, f"edit_{name}")
        assert set(Counter(row["tag"] for row in rows)) == set(world.EDITS)
        assert all((splits.PROMPTS / f"fold_{fold}" / row["source"]).is_file() for row in rows)
