"""ImageReward (Xu et al. 2023): BLIP reads the prompt while looking at the image, a linear head scores what
it read. Standardised with the authors' constants, so about 0 on average with a spread of about 1.

The weights carry the names of BLIP's own code; `from_blip` renames them for transformers.
"""

import re

import torch
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards.clip import linear_head, precision, preprocess
from rewards.weights import file_from_hub, from_hub, from_state, load_exactly, read_state

MEAN = 0.16717362830052426
STD = 1.0333394966054072
MAX_LENGTH = 35  # tokens of the prompt; the rest is cut

BLIP_NAMES = (  # of the image encoder, applied in this order; the text encoder's are transformers' own
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def blip_configs():
    """BLIP's large image encoder and its BERT with cross-attention, as configurations of transformers."""
    # No shape shows the layer norm's eps and the text encoder's heads, and transformers' defaults differ.
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    return vision, BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)


def from_blip(state):
    """ImageReward.pt's tensors -> three state dicts for BlipVisionModel, BlipTextModel and the head."""
    vision = {}
    text = {}
    head = {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in BLIP_NAMES:
                name = re.sub(pattern, replacement, name)
            vision[name] = tensor
        elif name.startswith(("blip.vision_proj.", "blip.text_proj.")) or name.endswith(".position_ids"):
            continue  # of BLIP's pretraining, and a buffer
        elif name.startswith("blip.text_encoder."):
            text[name.removeprefix("blip.text_encoder.")] = tensor
        else:
            head[name.removeprefix("mlp.layers.")] = tensor
    return vision, text, head


class ImageReward:
    """The reward. vision: BlipVisionModel, text: BlipTextModel that attends to it, head: (B, D) -> (B, 1)."""

    def __init__(self, vision, text, head, tokenizer, batch_size=32):
        self.vision = vision.eval().requires_grad_(False)
        self.text = text.eval().requires_grad_(False)
        self.head = head.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        values = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            values.append(self.score(images[batch], prompts[batch]))
        return ((torch.cat(values) - MEAN) / STD).to(images.device)

    def score(self, images, prompts):
        """The head's output for a batch, (B,) float32 on the model's device."""
        device = self.vision.device
        pixels = preprocess(images.to(device), self.vision.config.image_size)
        patches = self.vision(pixels.to(self.vision.dtype)).last_hidden_state  # (B, 1 + patches, D)
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            split_special_tokens=True,  # [SEP] in a prompt is text
            return_tensors="pt",
        ).to(device)
        states = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
        ).last_hidden_state  # (B, L, D)
        return self.head(states[:, 0].float())[:, 0]


def make_imagereward(metadata, device, model="THUDM/ImageReward"):
    path = file_from_hub(model, "ImageReward.pt")
    vision_state, text_state, head_state = from_blip(read_state(path))
    vision_config, text_config = blip_configs()
    vision = from_state(BlipVisionModel, vision_config, vision_state, path)
    text = from_state(BlipTextModel, text_config, text_state, path, add_pooling_layer=False)
    head = load_exactly(linear_head(), head_state, path)
    tokenizer = from_hub(AutoTokenizer.from_pretrained, "google-bert/bert-base-uncased")
    vision.to(device, precision(device))
    text.to(device, precision(device))
    return ImageReward(vision, text, head.to(device, torch.float32), tokenizer)
