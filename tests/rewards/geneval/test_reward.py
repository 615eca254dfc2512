"""The GenEval reward, and which detector it takes."""

import json
import math
import sys

import pytest
import torch

import rewards
from rewards import BadInput
from rewards.geneval import mask2former
from rewards.geneval import reward as geneval
from rewards.prompts import load_prompts
from tests.rewards.geneval.notation import asked, shown


def test_the_geneval_reward_is_the_mean_of_soft_and_strict(scenes):
    rows, images = scenes
    metadata = [content for content, _ in rows[:32]]
    metadata = metadata[1:] + metadata[:1]  # mostly the wrong picture
    reward = geneval.make_geneval(metadata, "cpu")
    scores = reward.details(images[:32], [""] * 32, metadata)
    assert set(scores) == {"geneval", "geneval_soft", "geneval_strict", "geneval_official"}
    assert all(value.shape == (32,) and value.dtype == torch.float32 for value in scores.values())
    torch.testing.assert_close(scores["geneval"], (scores["geneval_soft"] + scores["geneval_strict"]) / 2)
    assert torch.equal(scores["geneval"], reward(images[:32], [""] * 32, metadata))
    assert (scores["geneval_strict"] <= scores["geneval_official"]).all()
    assert 0 < scores["geneval_soft"].mean() < 1


HUB_ID = "facebook/mask2former-swin-small-coco-instance"


def test_a_row_that_the_detector_failed_on_is_nan_and_only_it():
    reward = geneval.GenEval(lambda images, metadata: [shown("dog"), None, shown("cat")])
    scores = reward.details(torch.zeros(3, 3, 8, 8), [""] * 3, [asked("dog")] * 3)
    for value in scores.values():
        torch.testing.assert_close(value, torch.tensor([1, math.nan, 0]), equal_nan=True)


ROWS = [  # one in each format: GenEval's evaluation_metadata.jsonl, Flow-GRPO's train_metadata.jsonl
    '{"tag": "position", "include": [{"class": "tv remote", "count": 1}, {"class": "oven", "count": 1, '
    '"position": ["left of", 0]}], "prompt": "a photo of an oven left of a tv remote"}',
    '{"tag": "counting", "include": [{"class": "sandwich", "count": 3}], "exclude": [{"class": "sandwich", '
    '"count": 4}], "prompt": "a photo of three sandwichs"}',
]


@pytest.fixture
def loaded(monkeypatch):
    """What load_detector is called with."""
    calls = []

    def load_detector(*arguments):
        calls.append(arguments)
        return lambda images, metadata: [shown("oven @-50,0; tv remote"), shown("sandwich; sandwich")]

    monkeypatch.setattr(mask2former, "load_detector", load_detector)
    return calls


def test_published_prompt_files_load_as_they_are(tmp_path, loaded):
    (tmp_path / "train_metadata.jsonl").write_text("\n".join(ROWS) + "\n")
    prompts, metadata = load_prompts(tmp_path / "train_metadata.jsonl")
    assert prompts == ["a photo of an oven left of a tv remote", "a photo of three sandwichs"]
    reward = rewards.build("geneval", prompts, metadata)
    values = reward.details(torch.zeros(2, 3, 8, 8), prompts, metadata)
    torch.testing.assert_close(values["geneval_official"], torch.tensor([1.0, 0]))
    torch.testing.assert_close(values["geneval_soft"], torch.tensor([1, 5 / 6]))
    assert loaded == [(HUB_ID, "cpu", False)]


def test_a_datasets_export_loads_as_the_file_that_it_was_made_of(tmp_path, loaded):
    rows = [json.loads(line) for line in ROWS]
    keys = {"class": None, "count": None, "color": None, "position": None}
    exported = []
    for row in rows:
        include = [keys | clause for clause in row["include"]]
        exported.append({"exclude": None, "reward": None} | row | {"include": include})
    (tmp_path / "export.jsonl").write_text("\n".join(map(json.dumps, exported)))
    prompts, metadata = load_prompts(tmp_path / "export.jsonl")
    assert metadata == rows
    images = torch.zeros(2, 3, 8, 8)
    from_export = rewards.build("geneval", prompts, exported).details(images, prompts, exported)
    from_file = rewards.build("geneval", prompts, rows).details(images, prompts, rows)
    for name, values in from_file.items():
        assert torch.equal(values, from_export[name])
    assert [asks_colors for *_, asks_colors in loaded] == [False, False]


@pytest.mark.parametrize("word", ["mouse", "remote", "keyboard"])
def test_cocos_names_get_genevals(word, loaded):
    with pytest.raises(BadInput, match=f"GenEval's name for it is '(computer|tv) {word}'"):
        geneval.make_geneval([asked("dog"), asked(word)], "cpu")
    assert not loaded


def test_what_no_detector_knows_is_named_with_its_line(tmp_path, loaded):
    row = asked("dragon") | {"prompt": "a photo of a dragon"}
    (tmp_path / "train.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(BadInput, match="'dragon' of the prompt .*train.jsonl, line 2"):
        rewards.build("geneval", *load_prompts(tmp_path / "train.jsonl"))
    assert not loaded


def test_colours_and_the_model_are_passed_on(loaded):
    geneval.make_geneval([asked("dog"), asked("pink dog, cat")], "meta", model="some/folder")
    assert loaded == [("some/folder", "meta", True)]


def test_the_tiny_world_loads_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rewards.geneval.mask2former", None)  # importing it would fail
    image = torch.zeros(1, 3, 64, 64)
    reward = geneval.make_geneval([asked("red circle, not cross"), asked("square, circle above 0")], "cpu")
    assert reward(image, [""], [asked("circle")]).tolist() == [0]
    with pytest.raises(ImportError):
        geneval.make_geneval([asked("dog")], "cpu")


@pytest.mark.parametrize(
    "texts, said",
    [
        (["dog", "cat, dragon"], "'dragon' of the prompt 'cat, dragon'"),
        (["dog, not dragon"], "'dragon'"),
        (["circle", "square", "dog"], "'dog' of the prompt 'dog'"),  # one word off the tiny world
        (["dog", "cat", "circle"], "'circle' of the prompt 'circle'"),  # one word off GenEval
        (["pink circle"], "'pink'"),
    ],
)
def test_what_no_detector_knows_is_named_before_anything_loads(texts, said, loaded):
    with pytest.raises(BadInput, match=said):
        geneval.make_geneval([asked(text) | {"prompt": text} for text in texts], "cpu")
    metadata = [asked("dog"), asked("dog") | {"include": [{"class": "dog", "color": "silver", "count": 1}]}]
    with pytest.raises(BadInput, match="'silver'"):
        geneval.make_geneval(metadata, "cpu")
    assert not loaded


def test_a_bad_row_is_named_before_anything_loads(loaded):
    rows = [asked("dog"), {"include": [{"class": "dog", "count": 0}]}]
    with pytest.raises(BadInput, match=r"prompt 2 \('b'\).*count of 0"):
        rewards.build("geneval", ["a", "b"], rows)
    assert not loaded
