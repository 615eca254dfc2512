"""Small random vision-language models of the Qwen-VL family, and images for them."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.rewards.drawing import to_uint8

PROMPTS = ["a red circle", "two squares, one above the other", "x", "the text K7"]


TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}


def tiny_tokenizer(words=("Yes", "No")):
    """One token a byte, and the family's marks and the given words as one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_processor(family):
    if family == "qwen3_vl":
        return Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Qwen2VLImageProcessorPil()


def tiny_config(family, vocab_size):
    ids = dict(zip(("image_token_id", "video_token_id"), tiny_tokenizer().convert_tokens_to_ids(MARKS[-2:])))
    ids["vision_start_token_id"] = tiny_tokenizer().convert_tokens_to_ids("<|vision_start|>")
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, vocab_size=vocab_size, max_position_embeddings=2048)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
    if family == "qwen3_vl":
        text |= dict(head_dim=16)
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=16)
        vision |= dict(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])
    elif family == "qwen2_5_vl":
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
    else:
        vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    return FAMILIES[family][0](text_config=text, vision_config=vision, **ids)


def tiny_model(family, vocab_size=264, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[family][1](tiny_config(family, vocab_size)).eval()
    for parameter in model.parameters():  # larger than the library's own, so that everything matters
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    return model


def pictures(height, width, count, seed=0):
    """Smooth random images of different tints (count, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (
        torch.rand(count, 3, 5, 5, generator=generator)
        + torch.rand(count, 3, 1, 1, generator=generator)
        - 0.5
    )
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def unbatched_inputs(family, question, images):
    """What the library's own processor and a chat written out by hand make of one row."""
    processed = tiny_processor(family)([to_uint8(image) for image in images], return_tensors="pt")
    counts = (processed["image_grid_thw"].prod(1) // 4).tolist()
    shown = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
    text = f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tiny_tokenizer().encode(text)])
    image_ids = ids == tiny_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    return {"input_ids": ids, "mm_token_type_ids": image_ids.int(), **processed}
