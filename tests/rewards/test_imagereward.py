"""ImageReward."""

import pytest
import torch
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards import clip, imagereward
from tests.rewards.tiny_clip import TEXTS, pictures, tiny_tokenizer


@pytest.fixture(scope="module")
def images():
    return pictures(48, 48, 4)


def tiny_blip_configs():
    both = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = dict(vocab_size=258, encoder_hidden_size=32, max_position_embeddings=64)
    return BlipVisionConfig(**both, image_size=32, patch_size=8), BlipTextConfig(**both, **text)


def imagereward_checkpoint(vision, text, head, make):
    """What ImageReward's authors saved, for these sizes: {name: make(shape)}."""
    v, w, mlp = vision.hidden_size, text.hidden_size, text.intermediate_size
    tokens, side = (vision.image_size // vision.patch_size) ** 2 + 1, vision.patch_size
    shapes = {"cls_token": (1, 1, v), "pos_embed": (1, tokens, v), "norm.weight": (v,), "norm.bias": (v,)}
    shapes |= {"patch_embed.proj.weight": (v, 3, side, side), "patch_embed.proj.bias": (v,)}
    linear = {"attn.qkv": (3 * v, v), "attn.proj": (v, v), "mlp.fc1": (vision.intermediate_size, v)}
    linear |= {"mlp.fc2": (v, vision.intermediate_size), "norm1": (v,), "norm2": (v,)}
    for i in range(vision.num_hidden_layers):
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    encoder = {"embeddings.word_embeddings.weight": (text.vocab_size, w)}
    encoder |= {"embeddings.position_embeddings.weight": (text.max_position_embeddings, w)}
    encoder |= {"embeddings.LayerNorm.weight": (w,), "embeddings.LayerNorm.bias": (w,)}
    encoder |= {"embeddings.position_ids": (1, text.max_position_embeddings)}
    linear = {"intermediate.dense": (mlp, w), "output.dense": (w, mlp), "output.LayerNorm": (w,)}
    for kind, width in {"attention": w, "crossattention": v}.items():
        linear |= {
            f"{kind}.self.query": (w, w),
            f"{kind}.self.key": (w, width),
            f"{kind}.self.value": (w, width),
        }
        linear |= {f"{kind}.output.dense": (w, w), f"{kind}.output.LayerNorm": (w,)}
    for i in range(text.num_hidden_layers):
        for name, shape in linear.items():
            encoder |= {
                f"encoder.layer.{i}.{name}.weight": shape,
                f"encoder.layer.{i}.{name}.bias": shape[:1],
            }
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in encoder.items()}
    shapes |= {"blip.vision_proj.weight": (256, v), "blip.vision_proj.bias": (256,)}
    shapes |= {"blip.text_proj.weight": (256, w), "blip.text_proj.bias": (256,)}
    shapes |= {f"mlp.layers.{name}": tensor.shape for name, tensor in head.state_dict().items()}
    return {name: make(shape) for name, shape in shapes.items()}


def test_imagerewards_names_are_all_converted():
    configs = imagereward.blip_configs()
    with torch.device("meta"):
        head = clip.linear_head()
        modules = BlipVisionModel(configs[0]), BlipTextModel(configs[1], add_pooling_layer=False), head
    state = imagereward_checkpoint(*configs, head, lambda shape: torch.empty(shape, device="meta"))
    for module, converted in zip(modules, imagereward.from_blip(state), strict=True):
        expected = module.state_dict()
        assert {name: t.shape for name, t in converted.items()} == {
            name: t.shape for name, t in expected.items()
        }
    # the values of the authors' med_config.json and of their image encoder that no shape shows
    assert (configs[0].num_attention_heads, configs[0].layer_norm_eps, configs[0].hidden_act) == (
        16,
        1e-6,
        "gelu",
    )
    assert (configs[1].num_attention_heads, configs[1].layer_norm_eps, configs[1].hidden_act) == (
        12,
        1e-12,
        "gelu",
    )


def test_imagereward_scores_the_first_state_of_the_text_that_saw_the_image(tmp_path, monkeypatch, images):
    torch.manual_seed(3)
    configs, head = tiny_blip_configs(), clip.linear_head(32)
    state = imagereward_checkpoint(
        *configs, head, lambda shape: 2 * torch.randn(shape) / (shape[-1] ** 0.5 + 1)
    )
    torch.save(state, tmp_path / "ImageReward.pt")
    monkeypatch.setattr(imagereward, "file_from_hub", lambda name, filename: tmp_path / filename)
    monkeypatch.setattr(imagereward, "from_hub", lambda *_: tiny_tokenizer())
    monkeypatch.setattr(imagereward, "blip_configs", lambda: configs)
    monkeypatch.setattr(imagereward, "linear_head", lambda: head)
    reward = imagereward.make_imagereward([], "cpu")
    values = reward(images, TEXTS, [{}] * 4)
    assert values.shape == (4,) and values.dtype == torch.float32 and not values.requires_grad
    for image, prompt, value in zip(images, TEXTS, values):  # one by one, so without padding
        ids = torch.tensor([[256, *tiny_tokenizer()(prompt, add_special_tokens=False).input_ids[:33], 257]])
        patches = reward.vision(clip.preprocess(image[None], 32)).last_hidden_state
        state = reward.text(ids, encoder_hidden_states=patches).last_hidden_state[0, 0]
        expected = (reward.head(state) - 0.16717362830052426) / 1.0333394966054072
        torch.testing.assert_close(value, expected[0], atol=1e-4, rtol=0)
    swapped = reward(images.flip(0), TEXTS, [{}] * 4)
    assert (swapped - values).abs().min() > 0.01  # it does look at the image
    reward.batch_size = 3
    torch.testing.assert_close(reward(images, TEXTS, [{}] * 4), values, atol=1e-4, rtol=0)
    reward.vision.to(torch.bfloat16), reward.text.to(torch.bfloat16)  # as on CUDA
    coarse = reward(images, TEXTS, [{}] * 4)
    assert coarse.dtype == torch.float32 and (coarse - values).abs().max() < 0.2 * values.std()
