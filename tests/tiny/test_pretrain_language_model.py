"""tiny/pretrain_language_model.py: what the shipped language model learnt."""

import numpy as np
import torch

from rewards.prompts import load_prompts
from tiny import splits, vlm_world
from tiny.pretrain_language_model import Answerer, inside_tags


def test_the_shipped_model_keeps_the_meaning_in_many_words():
    model = Answerer(splits.PROMPTS.parent / "vlm")
    prompts, metadata = load_prompts(splits.PROMPTS / "fold_0" / "dev.jsonl")
    rows = range(0, len(prompts), len(prompts) // 12)
    questions = []
    for row in rows:
        questions += [(None, vlm_world.REWRITE.format(prompt=prompts[row]))] * 8
    torch.manual_seed(0)
    answers = model.rewrite(questions, {"do_sample": True, "top_k": 0})
    kept = [vlm_world.keeps_meaning(text, metadata[rows[i // 8]]) for i, text in enumerate(answers)]
    distinct = [len(set(answers[i : i + 8])) for i in range(0, len(answers), 8)]
    assert np.mean(kept) > 0.9 and np.mean(distinct) > 4


def test_answers_are_what_stands_between_the_tags():
    assert inside_tags("<answer>a circle</answer>") == "a circle"
    assert inside_tags("<answer>a circle") == inside_tags("a circle") == ""
