"""Rewards from CLIP: the cosine of an image's and a prompt's embedding, and what was trained on top of it.

  clipscore   cosine, CLIP ViT-L/14 (Radford et al. 2021); not Hessel et al.'s 2.5 max(cosine, 0) of ViT-B/32
  pickscore   exp(logit_scale) cosine, CLIP ViT-H/14 trained on preferences (Kirstain et al. 2023)
  hpsv2       cosine, CLIP ViT-H/14 trained on preferences (Wu et al. 2023), its weights of version 2.1
  aesthetic   five linear layers on CLIP ViT-L/14's image embedding (Schuhmann 2022); ignores the prompt

Flow-GRPO divides PickScore by 26: that is a weight here, `pickscore:0.03846`.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from rewards.weights import file_from_hub, from_hub, from_open_clip, from_state, load_exactly, read_state

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VIT_L = "openai/clip-vit-large-patch14"
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the ViT-H/14 that PickScore and HPSv2 started from


def resize(images, height, width):
    """Bicubic like Pillow's on 8-bit images: (B, 3, H, W) in [0, 1] -> (B, 3, height, width), steps of 1/255.

    Pillow, which made the networks' training images, rounds to 8 bits after each of its two passes: without
    that, a fifth of all values is off by a step and noise by many. (Pillow since 12.3 starts tall images with
    the vertical pass; here the horizontal one always comes first, as it did when the networks were trained.)
    """
    pixels = (images.float() * 255).round()
    for size in ((pixels.shape[-2], width), (height, width)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 255).round()
    return pixels / 255


def normalise(images, mean=MEAN, std=STD):
    """Images (..., 3, H, W) minus a mean colour, divided by its deviation."""
    mean = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(std, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def preprocess(images, size=224, fit="crop"):
    """What CLIP looks at: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised, on the same device.

    fit: "crop" scales the short side to size and cuts the centre out (CLIPImageProcessor), "pad" scales the
    long side to size and adds black bars (HPSv2).
    """
    H, W = images.shape[-2:]
    if fit == "crop":
        short = min(H, W)
        height = int(size * H / short)
        width = int(size * W / short)
        images = resize(images, height, width)
        top = (height - size) // 2
        left = (width - size) // 2
        images = images[..., top : top + size, left : left + size]
    else:
        long = max(H, W)
        height = max(round(size * H / long), 1)
        width = max(round(size * W / long), 1)
        images = resize(images, height, width)
        left = (size - width) // 2
        top = (size - height) // 2
        right = size - width - left
        bottom = size - height - top
        images = F.pad(images, (left, right, top, bottom))
    return normalise(images)


class Clip:
    """Embeddings of a CLIPModel, given in float32; it may be cast and moved afterwards."""

    def __init__(self, model, tokenizer, batch_size=32):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.scale = model.logit_scale.float().exp().item()  # now: in bfloat16, 100 becomes 98.9

    @torch.no_grad()
    def image_embeds(self, images, fit="crop"):
        """images (B, 3, H, W) in [0, 1] -> (B, D) float32 of length 1, on the model's device."""
        size = self.model.config.vision_config.image_size
        embeds = []
        for chunk in images.split(self.batch_size):
            pixels = preprocess(chunk.to(self.model.device), size, fit)
            features = self.model.get_image_features(pixels.to(self.model.dtype))
            embeds.append(features.pooler_output.float())
        return F.normalize(torch.cat(embeds), dim=-1)

    @torch.no_grad()
    def text_embeds(self, texts):
        """B texts, cut to the model's 77 tokens -> (B, D) float32 of length 1, on the model's device.

        A mark such as <|endoftext|> in a text is text: as a token, it would hide all that follows.
        """
        length = self.model.config.text_config.max_position_embeddings
        embeds = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=length,
                split_special_tokens=True,
                return_tensors="pt",
            ).to(self.model.device)
            features = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            embeds.append(features.pooler_output.float())
        return F.normalize(torch.cat(embeds), dim=-1)


class Cosine:
    """The reward scale * cosine(image, prompt)."""

    def __init__(self, clip, scale=1.0, fit="crop"):
        self.clip = clip
        self.scale = scale
        self.fit = fit

    def __call__(self, images, prompts, metadata):
        image_embeds = self.clip.image_embeds(images, self.fit)
        text_embeds = self.clip.text_embeds(prompts)
        cosine = (image_embeds * text_embeds).sum(-1)
        return (self.scale * cosine).to(images.device)


class Aesthetic:
    """The reward head(image embedding). head: (B, D) -> (B, 1), float32."""

    def __init__(self, clip, head):
        self.clip = clip
        self.head = head.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        embeds = self.clip.image_embeds(images)
        return self.head(embeds)[:, 0].to(images.device)


def linear_head(width=768):
    """The head of the aesthetic predictor and of ImageReward. Their dropout layers, idle here, keep their
    places: the weights are numbered with them.
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def precision(device):
    """The precision of a reward's network: bfloat16 on CUDA."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def vit_h_config():
    """LAION_H's sizes, for weights that come without a configuration."""
    both = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
    text = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "eos_token_id": 49407,
    }
    vision = {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "intermediate_size": 5120,
        "patch_size": 14,
    }
    return CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=1024)


def load_clip(hub_id, device, tokenizer_id=None):
    """A Clip with the weights of a hub repository or a folder, in bfloat16 on CUDA."""
    model = from_hub(CLIPModel.from_pretrained, hub_id, dtype=torch.float32)
    tokenizer = from_hub(AutoTokenizer.from_pretrained, tokenizer_id or hub_id)
    clip = Clip(model, tokenizer)
    clip.model.to(device, precision(device))
    return clip


def make_clipscore(metadata, device, model=VIT_L):
    return Cosine(load_clip(model, device))


def make_pickscore(metadata, device, model="yuvalkirstain/PickScore_v1"):
    clip = load_clip(model, device, LAION_H)
    return Cosine(clip, clip.scale)


def make_hpsv2(metadata, device, model="xswu/HPSv2"):
    path = file_from_hub(model, "HPS_v2.1_compressed.pt")
    state = from_open_clip(read_state(path, "state_dict"))
    tokenizer = from_hub(AutoTokenizer.from_pretrained, LAION_H)
    clip = Clip(from_state(CLIPModel, vit_h_config(), state, path), tokenizer)
    clip.model.to(device, precision(device))
    return Cosine(clip, fit="pad")


def make_aesthetic(metadata, device, model="trl-lib/ddpo-aesthetic-predictor"):
    """model: the head's weights. A hub repository with aesthetic-model.pth, by default TRL's copy of them; or
    a file, such as sac+logos+ava1-l14-linearMSE.pth, the original on GitHub
    (christophschuhmann/improved-aesthetic-predictor).
    """
    path = model if os.path.isfile(model) else file_from_hub(model, "aesthetic-model.pth")
    state = {name.removeprefix("layers."): tensor for name, tensor in read_state(path).items()}
    head = load_exactly(linear_head(), state, path)
    return Aesthetic(load_clip(VIT_L, device), head.to(device, torch.float32))
