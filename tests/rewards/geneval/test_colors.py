"""The colour of an object, by CLIP."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rewards.clip import Clip
from rewards.geneval import colors, detection


def noise(B, H, W):
    """Images (B, 3, H, W) of speckles, each of another tint."""
    generator = torch.Generator().manual_seed(B)
    return torch.rand(B, 3, 1, 1, generator=generator) * torch.rand(B, 3, H, W, generator=generator)


def test_cut_out_equals_pillow():
    image, box = noise(1, 40, 60)[0].mul(255).round() / 255, (5, 10, 47, 33)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[12:30, 5:40] = mask[10:33, 20:47] = True
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    grey = Image.new("RGB", picture.size, color="#999")
    expected = Image.composite(picture, grey, Image.fromarray(mask.numpy())).crop(box)
    found = (colors.cut_out(image, box, mask) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(found.numpy(), np.asarray(expected))


RGB = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}


class ByMean:
    """Embeds an image as its mean colour, a text as the colour that it names."""

    def __init__(self):
        self.asked = []

    def image_embeds(self, images):
        return nn.functional.normalize(images.mean(dim=(2, 3)), dim=1)

    def text_embeds(self, texts):
        self.asked += texts
        names = [next(color for color in detection.COLORS if f"a {color}" in text) for text in texts]
        vectors = torch.tensor([RGB.get(name, (-1, -1, -1)) for name in names], dtype=torch.float32)
        return nn.functional.normalize(vectors, dim=1)


@pytest.mark.parametrize("color", RGB)
def test_the_classifier_names_the_colour_of_the_masked_object(color):
    clip, mask = ByMean(), torch.zeros(40, 60, dtype=torch.bool)
    classify = colors.ColorClassifier(clip)
    mask[10:30, 20:40] = True
    other = "blue" if color != "blue" else "red"
    image = torch.tensor(RGB[other], dtype=torch.float32).view(3, 1, 1).repeat(1, 40, 60)
    image[:, 10:30, 20:40] = torch.tensor(RGB[color], dtype=torch.float32).view(3, 1, 1)
    assert classify(image, (20, 10, 40, 30), mask, "hot dog") == color
    assert classify(image, (0, 0, 20, 40), ~mask, "hot dog") == other
    assert len(clip.asked) == 30  # once for all objects of a class
    assert {"a photo of a red hot dog", "a photo of a red-colored hot dog", "a photo of a red object"} <= {
        *clip.asked
    }


def test_a_colours_description_is_the_mean_of_three_sentences(monkeypatch):
    vectors = nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    clip = ByMean()
    monkeypatch.setattr(clip, "text_embeds", lambda texts: vectors[: len(texts)])
    found = colors.ColorClassifier(clip).descriptions("dog")
    for i, description in enumerate(found):
        mean = (vectors[3 * i] + vectors[3 * i + 1] + vectors[3 * i + 2]) / 3
        torch.testing.assert_close(description, mean / mean.norm())
    assert found.shape == (10, 8)


def test_the_classifier_agrees_with_clip_step_by_step():
    torch.manual_seed(0)
    both = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=16
    )
    tokenizer = AutoTokenizer.from_pretrained("tiny/sd3/tokenizer")
    text = dict(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    vision = dict(image_size=32, patch_size=8)
    config = CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=16)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    classify = colors.ColorClassifier(Clip(model, tokenizer))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)

    def embed_text(words):
        return nn.functional.normalize(
            model.get_text_features(**tokenizer(words, return_tensors="pt")).pooler_output
        )

    found = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(3, 1, 1, generator=generator) * torch.rand(3, 50, 70, generator=generator)
        mask = torch.rand(50, 70, generator=generator) > 0.2
        box = (3, 5, 60, 45)
        picture = colors.cut_out((image * 255).round() / 255, box, mask) * 255
        pixels = processor(picture.to(torch.uint8).permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
        with torch.no_grad():
            seen = nn.functional.normalize(model.get_image_features(pixels).pooler_output)[0]
            similar = []
            for color in detection.COLORS:
                sentences = [s.format(color=color, name="circle") for s in colors.SENTENCES]
                mean = torch.cat([embed_text(s) for s in sentences]).mean(dim=0)
                similar.append(float(seen @ mean / mean.norm()))
        found.append(classify(image, box, mask, "circle"))
        assert similar[detection.COLORS.index(found[-1])] == pytest.approx(max(similar), abs=1e-3)
    assert len(set(found)) > 1
