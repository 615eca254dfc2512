"""The tiny world's detector."""

import pytest
import torch

from rewards.geneval import rule
from rewards.tiny_world import shapes
from tests.rewards.drawing import paint, rectangles, to_batch
from tiny import world


def test_detect_is_exact_on_ground_truth_renders(scenes):
    rows, images = scenes
    passed = [
        rule.passes(found, content, exact=True) for found, (content, _) in zip(shapes.detect(images), rows)
    ]
    assert sum(passed) / len(passed) >= 0.995


def test_detect_finds_boxes_and_colours(scenes):
    rows, images = scenes
    right = 0
    for found, (_, things) in zip(shapes.detect(images), rows):
        found, things = sorted(found, key=lambda d: d.box[:2]), sorted(things, key=lambda t: (t.x, t.y))
        right += len(found) == len(things) and all(
            any(
                (d.class_name, d.color) == (t.shape, t.color)
                and all(abs(a - b) <= 3 for a, b in zip(d.box, world.box_of(t)))
                for d in found
            )
            for t in things
        )
    assert right / len(rows) >= 0.99


def test_detect_on_a_batch_equals_one_by_one(scenes):
    _, images = scenes
    batch = shapes.detect(images[:48])
    assert any(batch)
    assert batch == [shapes.detect(images[i : i + 1])[0] for i in range(48)]


@pytest.mark.parametrize("name", shapes.CLASSES)
@pytest.mark.parametrize("color", shapes.PALETTE)
def test_detect_knows_every_class_and_colour(name, color):
    image = to_batch([world.draw([world.Thing(name, color, 30, 34, 8.5)])])
    assert [(d.class_name, d.color) for d in shapes.detect(image)[0]] == [(name, color)]


GENERATOR = torch.Generator().manual_seed(0)


BLOBS = {
    "empty": paint(rectangles()),
    "black": torch.zeros(3, 64, 64),
    "filled": torch.ones(3, 64, 64),
    "filled with red": paint(rectangles((0, 0, 64, 64))),
    "speck": paint(rectangles((30, 30, 34, 34))),
    "lying bar": paint(rectangles((10, 30, 50, 34))),
    "standing bar": paint(rectangles((30, 10, 34, 50))),
    "brick": paint(rectangles((10, 10, 38, 24))),
    "L": paint(rectangles((10, 10, 16, 34), (10, 28, 34, 34))),
    "U": paint(rectangles((10, 10, 15, 30), (25, 10, 30, 30), (10, 25, 30, 30))),
    "T": paint(rectangles((10, 10, 30, 14), (18, 10, 22, 30))),
    "two squares touching at a corner": paint(rectangles((10, 10, 24, 24), (24, 24, 38, 38))),
    "huge square": paint(rectangles((10, 10, 50, 50))),
    "noise": torch.rand(3, 64, 64, generator=GENERATOR),
    "dark noise": 0.35 * torch.rand(3, 64, 64, generator=GENERATOR),
    "speckle": paint(torch.rand(64, 64, generator=GENERATOR) < 0.2),
    "dense speckle": paint(torch.rand(64, 64, generator=GENERATOR) < 0.4),
}


@pytest.mark.parametrize("image", BLOBS.values(), ids=BLOBS)
def test_detect_sees_no_shape_in_a_blob(image):
    assert shapes.detect(image[None]) == [[]]


@pytest.mark.parametrize("dx, dy", [(1, 0), (0, 1)], ids=["side by side", "stacked"])
@pytest.mark.parametrize("a", shapes.CLASSES)
@pytest.mark.parametrize("b", shapes.CLASSES)
def test_detect_sees_no_shape_in_two_touching_objects(a, b, dx, dy):
    for distance in range(15, 8, -1):  # a moon and an hourglass are narrow in the middle: they touch later
        second = world.Thing(b, "red", 24 + distance * dx, 24 + distance * dy, 8)
        image = to_batch([world.draw([world.Thing(a, "red", 24, 24, 8), second])])
        labels = shapes.connected_components(image[:, 0] > 0.5)
        if len(labels.unique()) == 2:  # the background and one blob
            break
    else:
        raise AssertionError("these shapes do not touch at any distance")
    assert shapes.detect(image) == [[]]


def test_connected_components_joins_diagonals_and_keeps_images_apart():
    first = """
        11000
        00100
        00000
        10001
        10011
    """
    second = """
        00001
        00000
        11111
        00001
        11101
    """
    rows = [[[int(c) for c in row] for row in picture.split()] for picture in (first, second)]
    mask = torch.tensor(rows, dtype=torch.bool)
    labels = shapes.connected_components(mask)
    assert labels.shape == mask.shape and labels.dtype == torch.int64
    assert torch.equal(labels > 0, mask)
    groups = [
        {(0, 0, 0), (0, 0, 1), (0, 1, 2)},
        {(0, 3, 0), (0, 4, 0)},
        {(0, 3, 4), (0, 4, 3), (0, 4, 4)},
        {(1, 0, 4)},
        {(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 2, 4), (1, 3, 4), (1, 4, 4)},
        {(1, 4, 0), (1, 4, 1), (1, 4, 2)},
    ]
    found = [set(map(tuple, (labels == i).nonzero().tolist())) for i in labels.unique() if i > 0]
    assert sorted(found, key=sorted) == sorted(groups, key=sorted)


def test_connected_components_follows_a_spiral_and_does_not_leak_across_borders():
    spiral = torch.zeros(2, 9, 9, dtype=torch.bool)
    for i in range(0, 9, 2):  # a snake over the rows, turning at alternating ends
        spiral[:, i] = True
        if i:
            spiral[:, i - 1, -1 if i % 4 else 0] = True
    labels = shapes.connected_components(spiral)
    assert [len(image[image > 0].unique()) for image in labels] == [1, 1]
    assert labels[0].max() != labels[1].max()
    edges = torch.zeros(1, 4, 4, dtype=torch.bool)
    edges[0, 1, 3] = edges[0, 2, 0] = True  # neighbours in memory, not in the picture
    assert len(shapes.connected_components(edges).unique()) == 3
