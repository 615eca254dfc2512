"""What the tests of several rewards share."""

import random

import pytest

from tests.rewards.drawing import to_batch
from tiny import world


@pytest.fixture(scope="session")
def scenes():
    """500 (content, things) and their renders (500, 3, 64, 64)."""
    rng = random.Random(0)
    examples = [world.sample(rng, text_share=0) for _ in range(500)]
    return [(content, things) for content, things, _ in examples], to_batch([image for *_, image in examples])
