"""The measures of diversity, against values worked out by hand."""

from collections import Counter, namedtuple

import pytest
import torch

from benchmark import measure_diversity

Thing = namedtuple("Thing", "box color class_name")


def test_entropy():
    assert measure_diversity.entropy(Counter("aabb")) == 1
    assert measure_diversity.entropy(Counter("abcd")) == 2
    assert measure_diversity.entropy(Counter("aaaa")) == 0


def test_distances_are_of_all_pairs():
    images = torch.zeros(3, 3, 4, 4)
    images[1] = 1
    assert measure_diversity.distances(images) == [1, 0, 1]


def test_places_spread_around_their_mean():
    things = [Thing((0, 0, 2, 2), "red", "circle"), Thing((6, 0, 8, 2), "red", "circle")]
    assert measure_diversity.spread_of_places(things) == pytest.approx(3)


@pytest.mark.parametrize(
    "prompt, named", [("a red circle", True), ("a circle", False), ("a red square", False)]
)
def test_colors_count_where_the_prompt_leaves_them_open(prompt, named):
    things = [Thing((0, 0, 2, 2), "red", "circle"), Thing((0, 0, 2, 2), "blue", "circle")]
    assert measure_diversity.names_a_color(prompt, things) == named


def test_the_shortest_prompts_are_distinct():
    prompts = measure_diversity.shortest_prompts()
    assert len(set(prompts)) == 24 and max(map(len, prompts)) < 25
