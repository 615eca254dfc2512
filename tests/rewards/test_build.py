"""What --rewards takes, and what is checked before a reward is used."""

import sys

import pytest
import torch

import rewards
from rewards.prompts import join_prompt_files, load_prompt_files, load_prompts
from tests.rewards.geneval.notation import ask


@pytest.mark.parametrize(
    "spec, weights",
    [
        ("geneval", {"geneval": (1, "")}),
        ("geneval:1,jpeg:0.2", {"geneval": (1, ""), "jpeg": (0.2, "")}),
        (" ocr:2 , jpeg:-1e-2", {"ocr": (2, ""), "jpeg": (-0.01, "")}),
        ("jpeg_incompressibility:1e-9", {"jpeg_incompressibility": (1e-9, "")}),
        ("jpeg:-1e9", {"jpeg": (-1e9, "")}),
        ("vlm@Qwen/Qwen2.5-VL-7B-Instruct", {"vlm": (1, "Qwen/Qwen2.5-VL-7B-Instruct")}),
        (
            "clipscore@../weights/clip.v2:-0.5,ocr",
            {"clipscore": (-0.5, "../weights/clip.v2"), "ocr": (1, "")},
        ),
        ("vlm@a/b@main:3", {"vlm": (3, "a/b@main")}),
        ("mine:warmth", {"mine:warmth": (1, "")}),
        ("ocr, my.rewards:warmth:-0.5", {"ocr": (1, ""), "my.rewards:warmth": (-0.5, "")}),
        ("mine:warmth,mine:glow:2", {"mine:warmth": (1, ""), "mine:glow": (2, "")}),
    ],
)
def test_parse_spec_reads_names_weights_and_models(spec, weights):
    assert rewards.parse_spec(spec) == weights


@pytest.mark.parametrize(
    "spec, said",
    [
        ("", "unknown reward ''"),
        ("genval", "unknown reward 'genval'.*geneval"),
        ("genval@a/b:1", "unknown reward 'genval'"),
        ("@a/b", "unknown reward ''"),
        ("vlm@a,vlm@b", "'vlm' is named twice"),
        ("vlm@a/b:c", "weight 'c' of reward 'vlm'"),
        ("geneval,,jpeg", "unknown reward ''"),
        ("jpeg:1,jpeg:2", "'jpeg' is named twice"),
        ("jpeg:much", "weight 'much' of reward 'jpeg'"),
        ("jpeg:1:2", "weight '1:2' of reward 'jpeg'"),
        ("jpeg:nan", "weight 'nan' of reward 'jpeg'"),
        ("jpeg:inf", "weight 'inf' of reward 'jpeg'"),
        ("jpeg:-inf", "weight '-inf' of reward 'jpeg'"),
        ("jpeg:1e999", "weight '1e999' of reward 'jpeg' is not a number"),
        ("jpeg:", "weight '' of reward 'jpeg' is not a number"),
        ("jpeg: ", "weight '' of reward 'jpeg' is not a number"),
        ("geneval:0", "weight of reward 'geneval' is zero.* remove it"),
        ("geneval:-0.0", "weight of reward 'geneval' is zero"),
        ("geneval,jpeg:1e-400", "weight of reward 'jpeg' is zero"),
        ("geneval:1e308,jpeg:1e308", "weight '1e308' of reward 'geneval' must be between 1e-09 and 1e"),
        ("geneval:1,jpeg:-1e10", "weight '-1e10' of reward 'jpeg' must be between"),
        ("jpeg:1e-45", "weight '1e-45' of reward 'jpeg' must be between"),
        ("vlm@", "'vlm' has no model after its @"),
        ("vlm@:2", "'vlm' has no model after its @"),
        ("geneval jpeg", "unknown reward 'geneval jpeg'"),
        ("genval:1", "unknown reward 'genval'.*module:function"),
        ("mine.py:warmth:", "weight '' of reward 'mine.py:warmth'"),
        ("my-rewards:warmth", "unknown reward 'my-rewards'"),
        ("mine:warmth:much", "weight 'much' of reward 'mine:warmth'"),
        ("mine:warmth,mine:warmth:2", "'mine:warmth' is named twice"),
    ],
)
def test_parse_spec_says_what_is_wrong(spec, said):
    with pytest.raises(rewards.BadInput, match=said) as error:
        rewards.parse_spec(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, prompts, metadata, said",
    [
        ("ocr", ['the text "K7"', "no quotes"], [{}, {}], "prompt 2 .*'no quotes'.*ocr needs a text"),
        ("jpeg,ocr", ["no quotes"], [{}], "prompt 1 .*ocr needs a text"),
        ("geneval", ["a yeti"], [{"include": [ask("yeti")]}], "'yeti'.*circle"),
        ("geneval", ["a circle", "b"], [{"include": [ask("circle")]}, {}], "prompt 2 .*include"),
        ("geneval", ["a circle"], [{"include": None}], "prompt 1 .*include"),
        ("nothing", ["a"], [{}], "unknown reward 'nothing'"),
        (
            "jpeg",
            ["a", "b"],
            [{}, {"reward": "geneval"}],
            "prompt 2 .'b'. has the tag .*'geneval'.*--rewards",
        ),
        ("jpeg", ["a"], [{"reward": 0.5}], "prompt 1 .* has the tag .*0.5"),
        ("jpeg", ["a"], [{"reward": ["jpeg"]}], "prompt 1 .* has the tag"),
        ("jpeg,ocr", ["a", "b"], [{"reward": "jpeg"}] * 2, "'ocr' judges no prompt"),
        ("jpeg,ocr", ["a", "b"], [{"reward": "jpeg"}, {"reward": "ocr"}], "prompt 2 .*ocr needs a text"),
        ("jpeg@a/b", ["a"], [{}], "'jpeg' takes no model, remove @a/b"),
        ("jpeg:2,ocr@a/b", ['"K7"'], [{}], "'ocr' takes no model"),
    ],
)
def test_build_says_which_prompt_cannot_be_scored(spec, prompts, metadata, said):
    with pytest.raises(ValueError, match=said):
        rewards.build(spec, prompts, metadata)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the working folder, which is not in the Python path."""
    (tmp_path / "own_rewards.py").write_text(
        "def warmth(images, prompts, metadata):\n"
        "    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2))\n\n"
        "PI = 3.14\n"
    )
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "own_broken_too.py").write_text("import own\n")  # a name that the module's begins with
    (tmp_path / "own_faulty.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.usefixtures("own_module")
def test_a_function_of_ones_own_is_a_reward():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1
    images[1, 2] = 0.5
    reward = rewards.build("own_rewards:warmth:2", ["a", "b"], [{}, {}])
    assert reward(images, ["a", "b"], [{}, {}]).tolist() == [2, -1]
    found = reward.details(images, ["a", "b"], [{}, {}])
    assert found["own_rewards:warmth"].tolist() == [1, -0.5]
    tagged = [{"reward": "own_rewards:warmth"}, {"reward": "jpeg"}]
    mixed = rewards.build("own_rewards:warmth,jpeg", ["a", "b"], tagged)
    assert mixed(images, ["a", "b"], tagged)[0] == 1


@pytest.mark.parametrize(
    "spec, said",
    [
        ("nowhere:warmth", "reward 'nowhere:warmth': there is no module 'nowhere' in this folder"),
        ("own_rewards.deeper:warmth", "there is no module 'own_rewards.deeper'"),
        ("own_rewards:cold", "own_rewards.py has no function 'cold'"),
        ("own_rewards:PI", "own_rewards.py has no function 'PI'"),
        ("own_broken:warmth", "reward 'own_broken:warmth' failed with ModuleNotFoundError, its traceback"),
        ("own_broken_too:warmth", "reward 'own_broken_too:warmth' failed with ModuleNotFoundError"),
        ("own_faulty:warmth", "reward 'own_faulty:warmth' failed with ZeroDivisionError, its traceback"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_a_function_that_is_not_there_is_named(spec, said):
    with pytest.raises((rewards.BadInput, rewards.RewardError), match=said) as error:
        rewards.build(spec, ["a"], [{}])
    assert "\n" not in str(error.value)


def test_a_row_is_named_with_its_file_and_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('\n{"prompt": "\\"K7\\""}\n\n{"prompt": "no quotes"}\n')
    (tmp_path / "eval.txt").write_text("none here\n")
    files = load_prompt_files(tmp_path / "train.jsonl", tmp_path / "eval.txt")
    every = join_prompt_files(files.values())
    with pytest.raises(rewards.BadInput, match=r"prompt 2 \(.*train.jsonl, line 4: 'no quotes'\): ocr needs"):
        rewards.build("ocr", every.prompts, every.metadata)
    with pytest.raises(rewards.BadInput, match=r"prompt 1 \(.*eval.txt, line 1: 'none here'\): ocr needs"):
        rewards.build("ocr", *files["eval"])
    (tmp_path / "tagged.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "reward": "ocr"}')
    with pytest.raises(
        rewards.BadInput, match=r"prompt 2 \(.*tagged.jsonl, line 2: 'b'\) has the tag .*'ocr'"
    ):
        rewards.build("jpeg", *load_prompts(tmp_path / "tagged.jsonl"))


def test_a_long_prompt_is_shortened_in_an_error():
    with pytest.raises(rewards.BadInput) as error:
        rewards.build("ocr", ["word " * 1000], [{}])
    assert len(str(error.value)) < 250
