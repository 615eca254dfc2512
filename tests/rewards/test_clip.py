"""Rewards from CLIP."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from rewards import BadInput, clip, imagereward
from rewards import weights as convert
from tests.rewards.drawing import to_uint8
from tests.rewards.tiny_clip import TEXTS, pictures, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CLIPModel(tiny_config())
    for (
        parameter
    ) in model.parameters():  # the library's own first weights are so small that all images look alike
        parameter.data = torch.randn_like(parameter) * 0.5
    model.logit_scale.data.fill_(1.7)
    return model


@pytest.fixture(scope="module")
def tiny(model):
    return clip.Clip(model, tiny_tokenizer(), batch_size=2)


@pytest.fixture(scope="module")
def images():
    return pictures(48, 48, 4)


def assert_same_pixels(pixels, reference):
    """Normalised images (3, h, w): at most two uint8 steps apart, nearly everywhere none."""
    steps = ((pixels - torch.as_tensor(reference)) * torch.tensor(clip.STD).view(3, 1, 1) * 255).abs()
    assert pixels.shape == reference.shape
    assert steps.max() < 2.01
    assert (steps > 0.01).float().mean() < 0.04


SIZES = [(64, 64), (128, 128), (224, 224), (256, 256), (300, 500), (512, 512)]


@pytest.mark.parametrize("height, width", SIZES)
def test_preprocess_equals_the_librarys_processor(height, width):
    for image in pictures(height, width, 2):
        expected = CLIPImageProcessorPil()(to_uint8(image), return_tensors="np")["pixel_values"][0]
        assert_same_pixels(clip.preprocess(image[None])[0], expected)


def test_preprocess_scales_a_tall_image_like_a_wide_one():
    image = pictures(100, 60)
    size = (1, 3, 224, 224)
    tall, wide = clip.preprocess(image), clip.preprocess(image.transpose(2, 3)).transpose(2, 3)
    assert tall.shape == wide.shape == size
    # the order of the two passes, and with it the rounding between them, is all that differs
    assert (tall - wide).abs().mean() < 0.05


@pytest.mark.parametrize("height, width", [(300, 500), (500, 300), (64, 64), (100, 99)])
def test_pad_scales_the_long_side_and_centres_on_black(height, width):
    image = pictures(height, width)[0]
    h, w = round(224 * height / max(height, width)), round(224 * width / max(height, width))
    canvas = Image.new("RGB", (224, 224))
    scaled = Image.fromarray(to_uint8(image)).resize((w, h), Image.Resampling.BICUBIC)
    canvas.paste(scaled, ((224 - w) // 2, (224 - h) // 2))
    expected = (np.asarray(canvas) / 255 - clip.MEAN) / clip.STD
    assert_same_pixels(clip.preprocess(image[None], fit="pad")[0], torch.tensor(expected).permute(2, 0, 1))


def test_images_are_rounded_to_8_bits_first():
    image = pictures(64, 64)
    rounded = (image * 255).round() / 255
    assert not torch.equal(image, rounded)
    assert torch.equal(clip.preprocess(image), clip.preprocess(rounded))


def test_image_embeds_are_the_projected_and_normalised_output(tiny, model, images):
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    pixels = processor([to_uint8(image) for image in images], return_tensors="pt")["pixel_values"]
    raw = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
    embeds = tiny.image_embeds(images)
    assert embeds.shape == (4, 24) and embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, raw / raw.norm(dim=1, keepdim=True), atol=2e-3, rtol=0)
    gaps = (embeds[:, None] - embeds).abs().amax(2) + torch.eye(4)
    assert gaps.min() > 0.02  # the images do differ


def test_text_embeds_take_the_state_of_the_end_token_whatever_the_padding(tiny, model):
    embeds = tiny.text_embeds(TEXTS)
    for embed, text in zip(embeds, TEXTS):
        ids = torch.tensor([[256, *tiny_tokenizer()(text, add_special_tokens=False).input_ids[:38], 257]])
        raw = model.text_projection(model.text_model(ids).last_hidden_state[0, -1])
        torch.testing.assert_close(embed, raw / raw.norm(), atol=1e-5, rtol=0)
    assert embeds.dtype == torch.float32 and embeds.shape == (4, 24)


def test_a_text_beyond_the_models_length_is_cut(tiny):
    long = tiny.text_embeds(["a" * 38, "a" * 39, "a" * 1000])
    torch.testing.assert_close(long[1:], long[:1].expand(2, -1))
    assert (tiny.text_embeds(["a" * 37]) - long[:1]).abs().max() > 1e-3


def test_a_mark_in_a_text_is_text(tiny):
    """As the token that ends a text, </s> would hide all that follows: the state is read at the first one."""
    ends = tiny.text_embeds(["a dog</s> and a cat", "a dog</s> and a cow", "a dog", "<s>a dog"])
    for k in (1, 2, 3):
        assert (ends[0] - ends[k]).abs().max() > 1e-3
    marked = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>", pad_token="</s>"
    )
    other = clip.Clip(tiny.model, marked)
    assert marked("a</s>").input_ids.count(257) == 2  # what it would be
    ends = other.text_embeds(["a dog</s> and a cat", "a dog</s> and a cow", "a dog"])
    assert (ends[0] - ends[1]).abs().max() > 1e-3 and (ends[0] - ends[2]).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_chunks_change_nothing_and_keep_the_order(tiny, model, images, batch_size):
    other = clip.Clip(model, tiny_tokenizer(), batch_size)
    torch.testing.assert_close(other.image_embeds(images), tiny.image_embeds(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(other.text_embeds(TEXTS), tiny.text_embeds(TEXTS), atol=1e-5, rtol=0)


def cosines(model, tiny, images, fit):
    pixels = clip.preprocess(images, 32, fit)
    tokens = tiny_tokenizer()(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    output = model(pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return F.cosine_similarity(output.image_embeds, output.text_embeds), output.logits_per_image.diag()


def test_clipscore_is_the_cosine_and_pickscore_the_models_own_logit(tiny, model, images):
    cosine, logits = cosines(model, tiny, images, "crop")
    values = clip.Cosine(tiny)(images, TEXTS, [{}] * 4)
    assert values.shape == (4,) and values.dtype == torch.float32 and not values.requires_grad
    torch.testing.assert_close(values, cosine, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        clip.Cosine(tiny, tiny.scale)(images, TEXTS, [{}] * 4), logits, atol=1e-4, rtol=0
    )
    assert torch.equal(values, clip.Cosine(tiny)(images, TEXTS, [{}] * 4))


def test_hpsv2_pads(tiny, model):
    images = pictures(32, 64, 4)
    values = clip.Cosine(tiny, fit="pad")(images, TEXTS, [{}] * 4)
    torch.testing.assert_close(values, cosines(model, tiny, images, "pad")[0], atol=1e-5, rtol=0)
    assert (values - clip.Cosine(tiny)(images, TEXTS, [{}] * 4)).abs().max() > 1e-3


def test_a_row_does_not_depend_on_its_batch(tiny, images):
    reward = clip.Cosine(tiny)
    together = reward(images, TEXTS, [{}] * 4)
    alone = torch.cat([reward(images[i : i + 1], TEXTS[i : i + 1], [{}]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_logit_scale_survives_a_cast_of_the_model():
    model = CLIPModel(tiny_config())
    model.logit_scale.data.fill_(np.log(100))
    cast = clip.Clip(model, tiny_tokenizer())
    cast.model.to(torch.bfloat16)
    assert cast.scale == pytest.approx(100, rel=1e-5)
    assert model.logit_scale.exp().item() != pytest.approx(100, rel=1e-3)  # why it is read before
    values = clip.Cosine(cast)(pictures(32, 32), TEXTS[:1], [{}])
    assert values.dtype == torch.float32 and values.isfinite().all()


def test_the_aesthetic_head_is_one_affine_map_of_the_image_embedding(tiny, images, tmp_path, monkeypatch):
    torch.manual_seed(1)
    sizes, numbers = [24, 1024, 128, 64, 16, 1], [0, 2, 4, 6, 7]
    state, weight, bias = {}, torch.eye(24), torch.zeros(24)
    for number, a, b in zip(numbers, sizes, sizes[1:]):
        w, c = torch.randn(b, a) / a**0.5, torch.randn(b)
        state |= {f"layers.{number}.weight": w, f"layers.{number}.bias": c}
        weight, bias = w @ weight, w @ bias + c
    torch.save(state, tmp_path / "head.pth")
    head = clip.linear_head
    monkeypatch.setattr(clip, "linear_head", lambda: head(24))
    monkeypatch.setattr(clip, "load_clip", lambda *_: tiny)
    values = clip.make_aesthetic([], "cpu", model=str(tmp_path / "head.pth"))(images, TEXTS, [{}] * 4)
    assert values.shape == (4,) and values.dtype == torch.float32
    torch.testing.assert_close(values, (tiny.image_embeds(images) @ weight.T + bias)[:, 0])
    for damaged in (
        state | {"layers.8.bias": torch.zeros(1)},
        {k: v for k, v in state.items() if "7" not in k},
    ):
        torch.save(damaged, tmp_path / "head.pth")
        with pytest.raises(BadInput, match="head.pth does not fit"):
            clip.make_aesthetic([], "cpu", model=str(tmp_path / "head.pth"))
    (tmp_path / "head.pth").write_bytes(b"no weights")
    with pytest.raises(BadInput, match="damaged"):
        clip.make_aesthetic([], "cpu", model=str(tmp_path / "head.pth"))


def open_clip_shapes(width, layers, mlp, dim, prefix=""):
    """Names and shapes of one transformer of an open_clip checkpoint."""
    shapes = {}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}."
        shapes |= {
            f"{block}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")
        }
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
        }
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
        shapes |= {f"{block}mlp.c_fc.weight": (mlp, width), f"{block}mlp.c_fc.bias": (mlp,)}
        shapes |= {f"{block}mlp.c_proj.weight": (width, mlp), f"{block}mlp.c_proj.bias": (width,)}
    return shapes


def open_clip_checkpoint(config, make):
    """What open_clip saves for a ViT of these sizes: {name: make(shape)}."""
    text, vision, dim = config.text_config, config.vision_config, config.projection_dim
    tokens, side = (vision.image_size // vision.patch_size) ** 2 + 1, vision.patch_size
    w, v = text.hidden_size, vision.hidden_size
    shapes = {"positional_embedding": (text.max_position_embeddings, w), "text_projection": (w, dim)}
    shapes |= {"token_embedding.weight": (text.vocab_size, w), "logit_scale": ()}
    shapes |= {"ln_final.weight": (w,), "ln_final.bias": (w,), "visual.class_embedding": (v,)}
    shapes |= {"visual.positional_embedding": (tokens, v), "visual.proj": (v, dim)}
    shapes |= {"visual.conv1.weight": (v, 3, side, side)}
    shapes |= {f"visual.{norm}.{part}": (v,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    shapes |= open_clip_shapes(w, text.num_hidden_layers, text.intermediate_size, dim)
    shapes |= open_clip_shapes(v, vision.num_hidden_layers, vision.intermediate_size, dim, "visual.")
    return {name: make(shape) for name, shape in shapes.items()}


def run_transformer(state, prefix, x, heads, mask=None):
    """A pre-norm transformer (B, L, D) -> (B, L, D) with open_clip's tensors."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])

    for i in range(2):
        block = f"{prefix}transformer.resblocks.{i}."
        get = {name.removeprefix(block): tensor for name, tensor in state.items() if name.startswith(block)}
        y = norm(block + "ln_1", x).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(y, y, y, y.shape[-1], heads, get["attn.in_proj_weight"], get["attn.in_proj_bias"]),
            *(None, None, False, 0.0, get["attn.out_proj.weight"], get["attn.out_proj.bias"]),
            **dict(attn_mask=mask, need_weights=False),
        )
        x = x + y.transpose(0, 1)
        y = F.gelu(F.linear(norm(block + "ln_2", x), get["mlp.c_fc.weight"], get["mlp.c_fc.bias"]))
        x = x + F.linear(y, get["mlp.c_proj.weight"], get["mlp.c_proj.bias"])
    return x


def test_the_open_clip_names_of_a_vit_h_are_all_converted():
    config = clip.vit_h_config()
    state = open_clip_checkpoint(config, lambda shape: torch.empty(shape, device="meta"))
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    converted = convert.from_open_clip(state)
    assert {name: t.shape for name, t in converted.items()} == {name: t.shape for name, t in expected.items()}
    assert (
        sum(tensor.numel() for tensor in converted.values()) == 986_109_441
    )  # open_clip's count of ViT-H-14
    for part in (config.text_config, config.vision_config):  # what no shape shows
        assert (part.hidden_act, part.num_attention_heads, part.layer_norm_eps) == ("gelu", 16, 1e-5)
    assert config.text_config.eos_token_id == 49407 and config.vision_config.image_size == 224


def test_hpsv2_computes_what_open_clip_would(tmp_path, monkeypatch):
    torch.manual_seed(2)
    config, images = tiny_config(), pictures(32, 64, 4)
    state = open_clip_checkpoint(config, lambda shape: 0.3 * torch.randn(shape))
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setattr(clip, "file_from_hub", lambda name, filename: tmp_path / filename)
    monkeypatch.setattr(clip, "vit_h_config", tiny_config)
    monkeypatch.setattr(clip, "from_hub", lambda *_: tiny_tokenizer())
    values = clip.make_hpsv2([], "cpu")(images, TEXTS, [{}] * 4)

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])

    pixels = clip.preprocess(images, 32, "pad")
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(4, 1, -1), x], 1)
        + state["visual.positional_embedding"]
    )
    x = run_transformer(state, "visual.", norm("visual.ln_pre", x), heads=4)
    image_features = norm("visual.ln_post", x[:, 0]) @ state["visual.proj"]
    for text, feature, value in zip(TEXTS, image_features, values):
        ids = [256, *tiny_tokenizer()(text, add_special_tokens=False).input_ids[:38], 257]
        x = (state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)])[None]
        causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        x = norm("ln_final", run_transformer(state, "", x, heads=4, mask=causal))
        text_feature = x[0, -1] @ state["text_projection"]
        torch.testing.assert_close(
            value, F.cosine_similarity(feature, text_feature, dim=0), atol=1e-5, rtol=0
        )

    del state["ln_final.bias"]
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(
        BadInput, match="HPS_v2.1_compressed.pt does not fit CLIPModel.*final_layer_norm.bias"
    ):
        clip.make_hpsv2([], "cpu")


FACTORIES = [clip.make_clipscore, clip.make_pickscore, clip.make_hpsv2, clip.make_aesthetic]


@pytest.mark.parametrize("make", [*FACTORIES, imagereward.make_imagereward])
def test_missing_weights_are_one_line_that_names_them(make, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="nobody/nothing") as error:
        make([], "cpu", model="nobody/nothing")
    assert "\n" not in str(error.value)


NEEDED = {
    clip.make_clipscore: [("openai/clip-vit-large-patch14", "model.safetensors")],
    clip.make_pickscore: [
        ("yuvalkirstain/PickScore_v1", "model.safetensors"),
        (clip.LAION_H, "tokenizer.json"),
    ],
    clip.make_hpsv2: [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (clip.LAION_H, "tokenizer.json")],
    imagereward.make_imagereward: [
        ("THUDM/ImageReward", "ImageReward.pt"),
        ("google-bert/bert-base-uncased", "tokenizer.json"),
    ],
}


@pytest.mark.parametrize("make", NEEDED)
def test_real_weights_prefer_the_prompt_that_fits(make, monkeypatch):
    if not all(isinstance(try_to_load_from_cache(*file), str) for file in NEEDED[make]):
        pytest.skip(f"{NEEDED[make]} are not in the local cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reward = make([], "cpu")
    images = torch.zeros(4, 3, 224, 224)
    images[:2, 0] = images[2:, 2] = 1  # two red ones, two blue ones
    values = reward(images, ["plain red", "plain blue"] * 2, [{}] * 4)
    assert values[0] + values[3] > values[1] + values[2]
    if make in (clip.make_clipscore, clip.make_pickscore):
        assert reward.clip.scale == pytest.approx(100, rel=0.01)  # CLIP's training stops it there


def test_real_aesthetic_weights_stay_on_their_scale(monkeypatch):
    needed = [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"), NEEDED[clip.make_clipscore][0]]
    if not all(isinstance(try_to_load_from_cache(*file), str) for file in needed):
        pytest.skip(f"{needed} are not in the local cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    values = clip.make_aesthetic([], "cpu")(pictures(224, 224, 4), [""] * 4, [{}] * 4)
    assert (values > 0).all() and (values < 10).all() and values.std() > 0.01
