"""The alarm for hacked rewards: its numbers on pictures whose look is known, and when it is raised."""

import pytest
import torch

from rewards.report.looks import changed_looks, describe_pictures, summarise_looks


def numbers_of(images):
    """The summary of a batch of images."""
    looks = dict(enumerate(describe_pictures(images)))
    return {name.removeprefix("pictures/"): value for name, value in summarise_looks(looks, "").items()}


def test_numbers_of_pictures_that_are_known():
    """One half is black and one half white; one image of two is the other way round."""
    image = torch.zeros(3, 16, 16)
    image[:, :, 8:] = 1
    numbers = numbers_of(torch.stack([image, 1 - image]))
    assert numbers["brightness"] == pytest.approx(0.5) and numbers["contrast"] == pytest.approx(0.5)
    assert numbers["saturation"] == 0
    assert numbers["edges"] == pytest.approx(1 / 15)  # one of 15 pairs of columns
    assert numbers["variety"] == pytest.approx(0.5)


def test_each_number_sees_its_own_change():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator)
    before = numbers_of(images)
    darker = numbers_of(0.25 * images)
    gray = numbers_of(images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    alike = numbers_of(images[:1].expand(8, -1, -1, -1))
    smooth = numbers_of(torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2))
    assert darker["brightness"] == pytest.approx(before["brightness"] / 4)
    assert gray["saturation"] == pytest.approx(0, abs=1e-6) and before["saturation"] > 0.1
    assert alike["variety"] == pytest.approx(0, abs=1e-6) and before["variety"] > 0.05
    assert smooth["edges"] < 0.4 * before["edges"]
    assert gray["brightness"] == pytest.approx(before["brightness"], rel=1e-5)


def test_the_alarm_is_raised_by_a_large_change_alone():
    before = {
        f"pictures/{name}": 0.5 for name in ("brightness", "contrast", "saturation", "edges", "variety")
    }
    assert changed_looks(before, before) == []
    assert changed_looks(before, before | {"pictures/edges": 0.5 * 1.5}) == []
    after = before | {"pictures/edges": 0.5 * 1.7, "pictures/saturation": 0.5 / 1.7}
    names = [name for name, _ in changed_looks(before, after)]
    assert names == ["saturation", "edges"]
    assert changed_looks(before, {"losses/kl": 1.0}) == []  # nothing was evaluated


def test_rewritten_prompts_are_compared_with_the_base_model_and_paraphrases_are_not():
    before = {"pictures/variety": 0.5, "pictures/edges": 0.5}
    after = {"pictures/variety_enhanced": 0.1, "pictures/edges_enhanced": 0.5}
    assert changed_looks(before, after) == [("variety", pytest.approx(0.2))]
    after = {"pictures/variety": 0.5, "pictures/variety_hard": 0.1, "pictures/variety_paraphrased": 0.1}
    assert changed_looks(before, after) == []


def test_no_pictures_have_no_numbers():
    assert summarise_looks({}, "") == {} and summarise_looks(None, "") == {}
