"""A small random CLIP, and images for it."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, PreTrainedTokenizerFast

TEXTS = ["a red circle", "two squares and a long tail of words", "x", "a blue cross left of a green circle"]


def tiny_tokenizer():
    """One token a byte, <s> before and </s> after: ids 0 to 255, 256 and 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [("<s>", 256), ("</s>", 257)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def tiny_config():
    both = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    both |= dict(hidden_act="gelu", projection_dim=24)
    text = dict(vocab_size=258, max_position_embeddings=40, eos_token_id=257, bos_token_id=256)
    vision = dict(image_size=32, patch_size=8)
    return CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=24)


def pictures(height, width, count=1, seed=0):
    """Smooth random images of different tints (count, 3, height, width) in [0, 1], the first one noise."""
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, 3, 1, 1, generator=generator)
    coarse = 0.5 * torch.rand(count, 3, 9, 9, generator=generator) + 1.5 * tint - 0.5
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    smooth[0] = torch.rand(3, height, width, generator=generator)
    return smooth
