"""The tiny world's language model, untrained: Qwen2.5-VL's classes and chat format, a thousandth of its size.

`pretrain_language_model.py` trains it. `chat_inputs` puts examples into the chat format.
"""

import random

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny import vlm_world, world

CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_chat_tokenizer(seed=0):
    """A byte-level BPE tokenizer, which reads any text, trained on the world's sentences.

    The world's words are a token each, and so are capitals, digits and the two answer tags. The answer tags
    are text and not special tokens, so decoding keeps them.
    """
    tokenizer = Tokenizer(models.BPE())
    single_characters = pre_tokenizers.Split(Regex("[A-Z0-9](?![a-z])"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single_characters, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = list(vlm_world.sentences(random.Random(seed), 500))
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 100
    tokenizer.train_from_iterator(corpus, trainer)
    for tag in ("<answer>", "</answer>"):
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in CHAT_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def build_vlm(tokenizer):
    """Text: 4 layers of width 128. Vision: 3 layers on 8 x 8 patches, four of which make a token: 16 tokens
    per image."""
    ids = dict(zip(CHAT_TOKENS, tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS))))
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        # The default, 0.02, is for wide models. These would learn far more slowly with it.
        "initializer_range": 128**-0.5,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Frequencies from 1 to 0.013. The slowest tell an image's columns, 0 to 3, and must not stand still.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision_config = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "initializer_range": 96**-0.5,
        "num_heads": 3,
        "patch_size": 8,
        "window_size": world.SIZE,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0, 1, 2],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_image_processor():
    """Qwen2-VL's image processor, which brings any image to 64 x 64 pixels."""
    pixels = world.SIZE**2  # transformers names these limits edges, but they are counts of pixels
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)


def chat_inputs(tokenizer, processor, examples, side):
    """A model's inputs for (image or None, question, answer) examples, each one turn of the user's.

    side: "left" or "right", where rows are padded. Only an answer and the end of its turn are learnt. With
    answers "", these are inputs to generate from.
    """
    images = [image for image, _, _ in examples if image is not None]
    pictures = {}
    tokens_per_image = 0
    if images:
        pictures = dict(processor(images=images, return_tensors="pt"))
        patches = int(pictures["image_grid_thw"][0].prod())  # all images have one size here
        tokens_per_image = patches // processor.merge_size**2
    turns = []
    replies = []
    for image, question, answer in examples:
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image"})
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        turn = turn.replace("<|image_pad|>", tokens_per_image * "<|image_pad|>")
        turns.append(tokenizer(turn).input_ids)
        replies.append(tokenizer(answer + "<|im_end|>").input_ids if answer else [])
    ids = []
    mask = []
    labels = []
    for turn, reply in zip(turns, replies):
        ids.append(turn + reply)
        mask.append([1] * len(turn + reply))
        labels.append([-100] * len(turn) + reply)
    input_ids = pad(ids, tokenizer.pad_token_id, side)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return pictures | {
        "input_ids": input_ids,
        "attention_mask": pad(mask, 0, side),
        "mm_token_type_ids": (input_ids == image_token).int(),
        "labels": pad(labels, -100, side),
    }


def pad(rows, value, side):
    """Rows of numbers as one tensor (rows, length), filled up with a value on one side."""
    length = max(len(row) for row in rows)
    padded = []
    for row in rows:
        filling = [value] * (length - len(row))
        padded.append(filling + row if side == "left" else row + filling)
    return torch.tensor(padded)
