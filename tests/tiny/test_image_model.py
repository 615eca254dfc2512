"""tiny/image_model.py: the word-level tokenizer of the tiny world's prompts."""

import itertools
import json
import random

import pytest

from rewards.geneval.detection import TAGS
from tiny import image_model, splits, world


@pytest.fixture(scope="module")
def tokenizer():
    return image_model.build_tokenizer()


def world_sentences():
    """Sentences of all contents in all wordings, of texts and edits, and of the shipped files."""
    rng = random.Random(0)
    sentences = set()
    for content in itertools.chain.from_iterable(map(world.all_contents, TAGS)):
        for variant in range(3):
            words = lambda options, variant=variant: options[variant]  # noqa: E731
            sentences.add(world.say(content, words))
            sentences.add(world.say(content, words, flip=True))
        for number in range(8):
            sentences.add(world.paraphrase(content, rng, held_out=number % 2 == 0))
            sentences.add(world.hard_paraphrase(content, rng))
        for _ in range(4):
            sentences.add(world.detailed(content, world.realise(content, rng)))
    for _ in range(100):
        text = world.text_content(world.random_text(rng))
        sentences.add(world.canonical(text))
        sentences.add(world.paraphrase(text, rng))
        sentences.add(world.paraphrase(text, rng, held_out=True))
        sentences.add(world.detailed(text, []))
        sentences.add(world.hard_paraphrase(text, rng))
        sentences.add(world.sample_edit(rng)[1].instruction)
    for path in splits.PROMPTS.glob("fold_*/*.jsonl"):
        for line in path.read_text().splitlines():
            sentences.add(json.loads(line)["prompt"])
    return sorted(sentences)


def test_every_wording_fits_the_tokenizer_without_unknown_words(tokenizer):
    sentences = world_sentences()
    assert len(sentences) > 2000
    ids = tokenizer(sentences).input_ids
    assert 20 <= max(map(len, ids)) <= image_model.MAX_TOKENS
    assert [s for s, row in zip(sentences, ids) if tokenizer.unk_token_id in row] == []
    assert tokenizer.unk_token_id in tokenizer("a purple elephant").input_ids


def test_the_tokenizer_keeps_sentences_apart(tokenizer):
    sentences = ["a square left of a circle", "a circle left of a square", 'the text "K7"', 'the text "7K"']
    ids = [tuple(row) for row in tokenizer(sentences).input_ids]
    assert len(set(ids)) == len(ids)
    words = tokenizer.convert_ids_to_tokens(ids[2])
    assert words == ["<start>", "the", "text", '"', "K", "7", '"', "<end>"]


def test_the_shipped_tokenizers_are_what_the_code_builds(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    built = json.loads((tmp_path / "tokenizer.json").read_text())
    for folder in ("sd3/tokenizer", "sd3/tokenizer_2", "sd3b/tokenizer", "sd3b/tokenizer_2"):
        shipped = json.loads((splits.PROMPTS.parent / folder / "tokenizer.json").read_text())
        for last_call in ("padding", "truncation"):  # a tokenizer is saved with its last call's
            shipped.pop(last_call)
        assert shipped == {name: value for name, value in built.items() if name in shipped}
