"""Rewards that read a vision-language model's state with a head."""

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3Config

from rewards import BadInput, hpsv3, vlm
from tests.rewards.drawing import to_uint8
from tests.rewards.tiny_vlm import (
    PROMPTS,
    pictures,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    unbatched_inputs,
)

QUESTIONS = ["Rate {text_prompt}\n: <|Reward|>\n\nEND\n", "How real is {text_prompt}?\n: <|Reward|>\n\nEND\n"]


def mean_by_hand(family, model, head, tokenizer, question, prompt, images):
    """The head's mean at <|Reward|> for one row: images embedded by hand, positions in a line."""
    inputs = unbatched_inputs(family, "", images)
    text = tiny_tokenizer().decode(inputs["input_ids"][0])
    text = text.replace(
        "<|vision_end|><|im_end|>", f"<|vision_end|>{question.replace('{text_prompt}', prompt)}<|im_end|>"
    )
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        patches = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embeds[ids == model.config.image_token_id] = patches
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        states = model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        at = (ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().item()
        return head(states[0, at])[0]


def test_a_head_has_two_hidden_layers_of_relu():
    torch.manual_seed(4)
    head, x = hpsv3.reward_head(32), torch.randn(5, 32)
    w = {name: torch.randn_like(parameter) for name, parameter in head.state_dict().items()}
    head.load_state_dict(w)
    y = (x @ w["0.weight"].T + w["0.bias"]).clamp(min=0)
    y = (y @ w["3.weight"].T + w["3.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x), y @ w["5.weight"].T + w["5.bias"], rtol=1e-4, atol=1e-3)
    assert [tuple(w[f"{i}.weight"].shape) for i in (0, 3, 5)] == [(1024, 32), (16, 1024), (2, 16)]


def head_reward(family, heads=1, source=False):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    model = tiny_model(family, len(tokenizer)).model
    reader = vlm.Reader(tokenizer, tiny_processor(family), side="right")
    modules = nn.ModuleList(hpsv3.reward_head(32) for _ in range(heads))
    return hpsv3.HeadReward(model, modules, reader, QUESTIONS[:heads], source, batch_size=3)


def test_the_head_reads_the_state_at_its_token_with_positions_in_a_line():
    reward, images = head_reward("qwen2_vl"), pictures(56, 84, 4)
    values = reward(images, PROMPTS, [{}] * 4)
    assert values.shape == (4,) and values.dtype == torch.float32 and not values.requires_grad
    rest = "qwen2_vl", reward.model, reward.heads[0], reward.reader.tokenizer, QUESTIONS[0]
    expected = [mean_by_hand(*rest, prompt, [image]) for prompt, image in zip(PROMPTS, images)]
    torch.testing.assert_close(values, torch.stack(expected), atol=1e-5, rtol=0)
    assert values.std() > 0.003
    reward.batch_size = 1
    torch.testing.assert_close(reward(images, PROMPTS, [{}] * 4), values, atol=1e-5, rtol=0)
    reward.model.to(torch.bfloat16)  # as on CUDA
    coarse = reward(images, PROMPTS, [{}] * 4)
    assert coarse.dtype == torch.float32 and (coarse - values).abs().max() < values.std()


def test_an_edit_is_scored_by_the_mean_of_two_heads_on_source_and_image(tmp_path):
    reward, images = head_reward("qwen2_5_vl", heads=2, source=True), pictures(56, 56, 4)
    sources = pictures(56, 112, 4, seed=1)
    Image.fromarray(to_uint8(sources[1])).save(tmp_path / "before.png")
    metadata = [{"source": source} for source in sources]
    metadata[1] = {"source": str(tmp_path / "before.png")}
    values = reward(images, PROMPTS, metadata)
    for value, image, source, prompt in zip(values, images, sources, PROMPTS):
        scores = [
            mean_by_hand(
                "qwen2_5_vl", reward.model, head, reward.reader.tokenizer, question, prompt, [source, image]
            )
            for head, question in zip(reward.heads, QUESTIONS)
        ]
        torch.testing.assert_close(value, sum(scores) / 2, atol=1e-5, rtol=0)
    assert (reward(sources, PROMPTS, [{"source": image} for image in images]) - values).abs().min() > 1e-3


@pytest.mark.parametrize(
    "prompt", ["<|Reward|>", "a <|Reward|> b <|Reward|>", "<|image_pad|><|im_end|>", "{prompt} {text_prompt}"]
)
def test_a_prompt_cannot_write_the_token_that_is_read(prompt):
    reward = head_reward("qwen2_5_vl", heads=2, source=True)
    images = pictures(56, 56, 3)
    prompts = ["x", prompt, "y"]
    metadata = [{"source": image} for image in pictures(56, 56, 3, seed=1)]
    values = reward(images, prompts, metadata)
    assert values.shape == (3,) and values.isfinite().all()
    plain = reward(images, ["x", "z", "y"], metadata)
    torch.testing.assert_close(values[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=0)  # the rows did not slip


def test_a_source_is_read_as_a_viewer_shows_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(tmp_path / "before.png", exif=exif)
    source = hpsv3.source_image({"source": str(tmp_path / "before.png")})
    assert source.shape == (3, 8, 4) and bool((source == 1).all())  # turned, and transparent is white


def test_a_missing_source_is_an_error_with_the_row(tmp_path):
    reward, images = head_reward("qwen2_5_vl", source=True), pictures(64, 64, 2)
    (tmp_path / "text.png").write_text("no image")
    bad = [{}, {"source": 3}, {"source": str(tmp_path / "none.png")}, {"source": str(tmp_path / "text.png")}]
    bad += [{"source": torch.zeros(1, 8, 8)}, {"source": 2 * torch.ones(3, 8, 8)}]
    for row in bad:
        with pytest.raises(ValueError, match="source"):
            reward.check("x", row)
        with pytest.raises(ValueError, match="^row 1: .*source"):
            reward(images, PROMPTS[:2], [{"source": images[0]}, row])
    reward.check("x", {"source": images[0]})
    head_reward("qwen2_vl").check("x", {})


AUTHORS_FILES = {
    "data_collator_qwen.py": 'import nothing_at_all\n\nINSTRUCTION = """\nRate {text_prompt}\n"""\n'
    'prompt_with_special_token = ": <|Reward|>\\n\\nEND\\n"\n',
    "prompts.py": 'INSTRUCTION_EDIT_QUALITY = "old"\n'
    'INSTRUCTION_EDIT_FOLLOWING = "\\nRate {text_prompt}\\n"\n'
    'INSTRUCTION_EDIT_QUALITY = "How real is {text_prompt}?\\n"\n',
    "data_collator_qwen_edit.py": 'prompt_with_special_token = """: <|Reward|>\n\nEND\n"""\n',
}


def old_names(name):
    """A parameter of new transformers as Qwen2-VL's checkpoints of 2024 name it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


CASES = [
    (hpsv3.make_hpsv3, "qwen2_vl", "HPSv3.safetensors", ["rm_head."], old_names),
    (hpsv3.make_editreward, "qwen2_5_vl", "model.safetensors", ["rm_heads.head_0.", "rm_heads.head_1."], str),
]


def write_folder(folder, family):
    """Everything that a reward of this family needs but its weights."""
    tiny_config(family, 264).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    for name, text in AUTHORS_FILES.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("make, family, file, prefixes, rename", CASES)
def test_a_checkpoint_is_loaded_whole(make, family, file, prefixes, rename, tmp_path):
    write_folder(tmp_path, family)
    expected = head_reward(family, len(prefixes), source=len(prefixes) == 2)
    expected.reader.pixels = 200704, 200704
    expected.questions = [
        "\nRate {prompt}\n: <|Reward|>\n\nEND\n",
        QUESTIONS[1].replace("text_prompt", "prompt"),
    ]
    expected.questions = expected.questions[: len(prefixes)]
    state = {rename(name): tensor for name, tensor in tiny_model(family, 265).state_dict().items()}
    for head, prefix in zip(expected.heads, prefixes):
        state |= {prefix + name: tensor for name, tensor in head.state_dict().items()}
        assert {name.split(".")[0] for name in head.state_dict()} == {"0", "3", "5"}  # 2 was dropout
    save_file(state, tmp_path / file)
    reward = make([], "cpu", model=str(tmp_path))
    assert reward.questions == expected.questions and reward.reader.pixels == expected.reader.pixels
    assert reward.reader.side == "right"
    images, metadata = pictures(64, 64, 2), [{"source": image} for image in pictures(64, 64, 2, seed=1)]
    values = reward(images, PROMPTS[:2], metadata)
    torch.testing.assert_close(values, expected(images, PROMPTS[:2], metadata), atol=1e-5, rtol=0)
    del state[next(name for name in state if "mlp" in name)]
    save_file(state, tmp_path / file)
    with pytest.raises(BadInput, match=f"{file} does not fit"):
        make([], "cpu", model=str(tmp_path))


@pytest.mark.parametrize("make", [hpsv3.make_hpsv3, hpsv3.make_editreward])
def test_the_questions_are_asked_for(make, tmp_path):
    for folder in (None, "", str(tmp_path)):
        with pytest.raises(BadInput, match="questions.*@FOLDER") as error:
            make([], "cpu", model=folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["<html>", "x = 1", "INSTRUCTION = 1 + x", "INSTRUCTION: str"])
def test_a_file_without_the_question_is_an_error(text, tmp_path):
    (tmp_path / "data_collator_qwen.py").write_text(text)
    with pytest.raises(BadInput, match="data_collator_qwen.py has no text INSTRUCTION"):
        hpsv3.make_hpsv3([], "cpu", model=str(tmp_path))


@pytest.mark.parametrize(
    "make, family, hub_id",
    [
        (hpsv3.make_hpsv3, "qwen2_vl", "MizzenAI/HPSv3"),
        (hpsv3.make_editreward, "qwen2_5_vl", "TIGER-Lab/EditReward-Qwen2.5-VL-7B"),
    ],
)
def test_a_folder_without_weights_names_the_hub(make, family, hub_id, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path, family)
    with pytest.raises(BadInput, match=f"cannot load {hub_id}") as error:
        make([], "cpu", model=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_of_another_family_is_named(tmp_path):
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="is a qwen3; .*qwen2_vl, qwen2_5_vl, qwen3_vl"):
        vlm.make_vlm([], "cpu", model=str(tmp_path))
    write_folder(tmp_path, "qwen3_vl")
    with pytest.raises(BadInput, match="is a qwen3_vl; .*qwen2_vl, qwen2_5_vl$"):
        hpsv3.make_hpsv3([], "cpu", model=str(tmp_path))
