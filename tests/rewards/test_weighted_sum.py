"""Several rewards as one, on prompts with and without tags."""

import json
import math
from pathlib import Path

import pytest
import torch

import flow_grpo
import rewards
from rewards import jpeg
from rewards.ocr import reward as ocr
from rewards.prompts import load_prompts
from rewards.weighted_sum import WeightedSum, check_images

ROOT = Path(__file__).resolve().parents[2]


NAN = float("nan")


def images_with(row, value):
    images = torch.full((3, 3, 4, 4), 0.5)
    images[row, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    "images, num_prompts, num_rows, said",
    [
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), 3, 3, r"floats.*torch.uint8"),
        (torch.zeros(3, 4, 4), 3, 3, r"\(B, 3, H, W\).*\(3, 4, 4\)"),
        (torch.zeros(3, 4, 4, 3), 3, 3, r"\(B, 3, H, W\).*\(3, 4, 4, 3\)"),
        (torch.zeros(3, 3, 4, 4), 2, 3, "3 images, 2 prompts and 3 metadata"),
        (torch.zeros(3, 3, 4, 4), 3, 4, "3 images, 3 prompts and 4 metadata"),
        (images_with(1, 1.001), 3, 3, "row 1 "),
        (images_with(2, -0.001), 3, 3, "row 2 "),
        (images_with(0, NAN), 3, 3, "row 0 .*not finite"),
        (images_with(2, math.inf), 3, 3, "row 2 .*not finite"),
    ],
)
def test_check_images_names_the_mistake(images, num_prompts, num_rows, said):
    with pytest.raises(ValueError, match=said):
        check_images(images, [""] * num_prompts, [{}] * num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_images_accepts_every_float_type(dtype):
    check_images(torch.tensor([0.0, 0.5, 1.0], dtype=dtype).expand(2, 3, 4, 3), ["", ""], [{}, {}])


def test_the_weighted_sum_equals_its_parts(scenes):
    rows, images = scenes
    images, prompts = images[:16], [""] * 16
    metadata = [content | {"tag": "text", "text": "A1"} for content, _ in rows[1:17]]
    reward = rewards.build("geneval:0.7,jpeg:0.2,ocr:-3", prompts, metadata)
    details = reward.details(images, prompts, metadata)
    assert set(details) == {
        "reward", "geneval", "geneval_soft", "geneval_strict", "geneval_official", "jpeg", "ocr",
    }  # fmt: skip
    parts = {
        name: rewards.build(name, prompts, metadata)(images, prompts, metadata)
        for name in ("geneval", "jpeg", "ocr")
    }
    for name, value in parts.items():
        assert torch.equal(details[name], value)
    expected = 0.7 * parts["geneval"] + 0.2 * parts["jpeg"] - 3 * parts["ocr"]
    assert torch.equal(details["reward"], expected)
    assert torch.equal(reward(images, prompts, metadata), expected)
    assert expected.shape == (16,) and expected.dtype == torch.float32 and expected.std() > 0


def test_nan_in_a_part_makes_the_row_nan_and_only_it(scenes):
    images, prompts, metadata = scenes[1][:3], ['the text "K7"'] * 3, [{}] * 3
    fails_on_the_second = ocr.OCR(lambda images: ["K7", None, ""])
    total = WeightedSum(
        {"ocr": (fails_on_the_second, 0.5), "jpeg": (jpeg.make_compressibility(metadata, "cpu"), 1.0)}
    )
    details = total.details(images, prompts, metadata)
    assert details["reward"].isnan().tolist() == [False, True, False]
    torch.testing.assert_close(details["ocr"], torch.tensor([1, NAN, 0]), equal_nan=True)
    assert not details["jpeg"].isnan().any()


def test_the_weighted_sum_checks_its_images():
    with pytest.raises(ValueError, match="row 1"):
        rewards.build("jpeg", [""] * 3, [{}] * 3)(images_with(1, 2.0), [""] * 3, [{}] * 3)


class Size:
    """A reward that notes what it is asked: the image's first pixel, and with details its double."""

    def __init__(self, metadata, model=None):
        self.metadata, self.model, self.checked, self.asked = metadata, model, [], []

    def check(self, prompt, metadata):
        self.checked.append(prompt)

    def details(self, images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata) > 0
        assert [row["prompt"] for row in metadata] == prompts
        self.asked += prompts
        value = images[:, 0, 0, 0]
        return {"size": value, "size_double": 2 * value}


def make_size(metadata, device, model="default"):
    return Size(metadata, model)


def make_ten(metadata, device):
    return lambda images, prompts, metadata: torch.full((len(images),), 10.0)


@pytest.fixture
def size_and_ten(monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "size", f"{__name__}:make_size")
    monkeypatch.setitem(rewards.REGISTRY, "ten", f"{__name__}:make_ten")


def tagged_rows(*tags):
    metadata = [{"prompt": f"prompt {i}"} | ({"reward": tag} if tag else {}) for i, tag in enumerate(tags)]
    images = torch.arange(len(tags)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 8
    return images, [row["prompt"] for row in metadata], metadata


def test_a_tagged_row_has_the_raw_value_of_its_reward_alone(size_and_ten):
    images, prompts, metadata = tagged_rows("size", None, "ten", "size", None)
    reward = rewards.build("size:4,ten:-0.5", prompts, metadata)
    size = reward.parts["size"][0]
    judged = ["prompt 0", "prompt 1", "prompt 3", "prompt 4"]
    assert size.checked == judged and [row["prompt"] for row in size.metadata] == judged
    size.asked.clear()
    details = reward.details(images, prompts, metadata)
    assert size.asked == judged
    expected = {
        "reward": [0, 4 / 8 - 5, 10, 3 / 8, 4 * 4 / 8 - 5],
        "size": [0, 1 / 8, NAN, 3 / 8, 4 / 8],
        "size_double": [0, 2 / 8, NAN, 6 / 8, 8 / 8],
        "ten": [NAN, 10, 10, NAN, 10],
    }
    assert list(details) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(details[name], torch.tensor(values), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(reward(images, prompts, metadata), details["reward"])


def test_every_batch_of_a_tagged_file_has_the_same_names(size_and_ten):
    images, prompts, metadata = tagged_rows("ten", "size", "ten")
    reward = rewards.build("ten,size", prompts, metadata)
    whole = reward.details(images, prompts, metadata)
    parts = [reward.details(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1]) for i in range(3)]
    for name, values in whole.items():
        together = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(together, values, equal_nan=True, rtol=0, atol=0)
    assert all(list(part) == ["reward", "ten", "size", "size_double"] for part in parts)


def test_a_row_with_a_tag_that_was_not_built_is_an_error_not_a_zero(size_and_ten):
    images, prompts, metadata = tagged_rows("ten", None)
    with pytest.raises(ValueError, match="prompt 2 .*'size'"):
        rewards.build("ten", prompts, metadata)(images, prompts, [metadata[0], {"reward": "size"}])


def test_tags_load_and_split_as_written(tmp_path, size_and_ten):
    rows = [{"prompt": "prompt 0", "reward": "ten"}, {"prompt": "prompt 1"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = rewards.build("size,ten", *load_prompts(tmp_path / "a.jsonl"))
    assert reward.parts["size"][0].metadata == rows[1:]


def test_what_follows_the_at_sign_is_the_factorys_model(size_and_ten):
    for spec, model in (("size", "default"), ("size@org/name:2", "org/name"), ("size@org/name", "org/name")):
        reward, weight = rewards.build(spec, *tagged_rows(None)[1:]).parts["size"]
        assert (reward.model, weight) == (model, 2 if ":" in spec else 1)


def test_a_run_on_a_tagged_file(tmp_path):
    rows = [
        json.loads(line) for line in (ROOT / "tiny/prompts/fold_0/train.jsonl").read_text().splitlines()[:4]
    ]
    rows = [row | {"reward": tag} for row, tag in zip(rows, ("geneval", "jpeg", "geneval", "jpeg"))]
    for name, lines in (("train", rows), ("eval", rows[:2]), ("eval_paraphrased", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = dict(num_prompts_per_iteration=4, num_images_per_prompt=2, num_iterations=1, micro_batch_size=2)
    flags |= dict(num_inference_steps=3, eval_num_inference_steps=2, output_dir=str(tmp_path / "runs"))
    flags |= dict(rewards="geneval,jpeg:0.1", model=str(ROOT / "tiny/sd3"), device="cpu", eval_wordings=True)
    run_dir = flow_grpo.train(flow_grpo.Args(prompts=str(tmp_path / "train.jsonl"), **flags))
    before, after = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    assert after["charts/nan_fraction"] == 0 and after["rewards/geneval"] >= 0 > after["rewards/jpeg"]
    mean = (after["rewards/geneval"] + after["rewards/jpeg"]) / 2  # as many rows each, no weight
    assert after["charts/reward_mean"] == pytest.approx(mean, abs=1e-5)
    assert before["eval/jpeg"] < 0 <= before["eval/geneval_strict"]
    assert "eval/geneval_soft_paraphrased" in before and "eval/jpeg_paraphrased" not in before
    assert all(math.isfinite(value) for row in (before, after) for value in row.values())


# ---- rewards that go on in the background ----
class Background:
    """A reward that has begun when asked, and scores when waited for: each image's first pixel."""

    def __init__(self, events):
        self.events = events

    def __call__(self, images, prompts, metadata):
        return self.start_scoring(images, prompts, metadata)()

    def start_scoring(self, images, prompts, metadata):
        self.events.append("began " + " ".join(prompts))

        def wait():
            self.events.append("waited " + " ".join(prompts))
            if "fail" in prompts:
                raise ValueError("out of paper")
            return images[:, 0, 0, 0]

        return wait


def test_batches_are_started_before_the_first_is_waited_for():
    events = []

    def at_once(images, prompts, metadata):
        events.append("scored " + " ".join(prompts))
        return images[:, 0, 0, 0]

    reward = WeightedSum({"slow": (Background(events), 2.0), "quick": (at_once, 1.0)})
    batches = [(torch.full((1, 3, 2, 2), value), [name], [{}]) for name, value in (("a", 0.5), ("b", 0.25))]
    waits = [reward.start_scoring(*batch) for batch in batches]
    assert events == ["began a", "scored a", "began b", "scored b"]
    values = [wait() for wait in waits]
    assert events[4:] == ["waited a", "waited b"]
    for value, batch in zip(values, batches):
        expected = reward.details(*batch)
        assert list(value) == list(expected) == ["reward", "slow", "quick"]
        for name in value:
            assert torch.equal(value[name], expected[name])
    assert [value["reward"].item() for value in values] == [1.5, 0.75]


def test_a_failure_in_the_background_is_named_when_it_is_waited_for():
    reward = WeightedSum({"slow": (Background([]), 1.0)})
    wait = reward.start_scoring(torch.zeros(1, 3, 2, 2), ["fail"], [{}])
    with pytest.raises(rewards.RewardError, match="reward 'slow' failed with ValueError"):
        wait()


def test_images_that_are_none_are_refused_at_once():
    reward = WeightedSum({"slow": (Background([]), 1.0)})
    with pytest.raises(rewards.BadInput, match="outside"):
        reward.start_scoring(torch.full((1, 3, 2, 2), 2.0), ["a"], [{}])
