"""tiny/language_model.py: the tokenizer, the chat format, and the inputs of examples."""

import itertools

import numpy as np
import pytest
import torch

from rewards.geneval.detection import TAGS
from tiny import language_model, world

CONTENTS = list(itertools.chain.from_iterable(map(world.all_contents, TAGS)))


@pytest.fixture(scope="module")
def tokenizer():
    return language_model.build_chat_tokenizer()


def test_the_tokenizer_reads_any_text_and_knows_the_worlds_words(tokenizer):
    texts = ["Ünïcode ☃ <answer>\n"] + [world.canonical(content) for content in CONTENTS[:50]]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    words = "a red circle to the left of a blue square, purple triangle top"
    assert len(tokenizer(words).input_ids) == len(words.split()) + 1  # a comma
    assert tokenizer.tokenize('"K7"</answer>') == ['"', "K", "7", '"', "</answer>"]
    ids = tokenizer("<answer>a</answer><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>a</answer>"


def test_the_chat_format_is_qwens(tokenizer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi."}]}
    turns = [user, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi.<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    text = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_with_and_without_images(tokenizer, side):
    processor = language_model.build_image_processor()
    image = np.zeros((64, 64, 3), np.uint8)
    examples = [(None, "Hi.", "<answer>a circle</answer>"), (image, "Describe the image.", "red circle top")]
    inputs = language_model.chat_inputs(tokenizer, processor, examples, side)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [0, 16]
    learnt = [row[row >= 0] for row in inputs["labels"]]
    assert tokenizer.batch_decode(learnt) == [
        "<answer>a circle</answer><|im_end|>",
        "red circle top<|im_end|>",
    ]
    padded = (inputs["attention_mask"] == 0)[0].nonzero().flatten().tolist()
    length = inputs["input_ids"].shape[1]
    expected = range(len(padded)) if side == "left" else range(length - len(padded), length)
    assert padded and padded == list(expected)

    # The loss of the batch is the mean over its learnt tokens: padding changes nothing.
    torch.manual_seed(0)
    vlm = language_model.build_vlm(tokenizer)
    total = 0.0
    with torch.no_grad():
        loss = vlm(**inputs).loss
        for example, row in zip(examples, learnt):
            alone = language_model.chat_inputs(tokenizer, processor, [example], side)
            total += len(row) * vlm(**alone).loss
    torch.testing.assert_close(loss, total / sum(map(len, learnt)), atol=1e-4, rtol=0)


def test_inputs_to_generate_from_end_where_the_reply_begins(tokenizer):
    processor = language_model.build_image_processor()
    inputs = language_model.chat_inputs(tokenizer, processor, [(None, "Hi.", "")], "left")
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("<|im_start|>assistant\n")
    assert (inputs["labels"] == -100).all()
