"""The size of a JPEG as a reward."""

import torch

from rewards import jpeg

GENERATOR = torch.Generator().manual_seed(0)


def test_jpeg_finds_noise_larger_than_a_flat_image():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=GENERATOR)])
    small, large = jpeg.kilobytes(images).tolist()
    assert 0 < small < 1 < 5 < large < 3 * 64 * 64 / 1000 + 1


def test_compressibility_is_minus_incompressibility(scenes):
    images, prompts, metadata = scenes[1][:8], [""] * 8, [{}] * 8
    less = jpeg.make_compressibility(metadata, "cpu")(images, prompts, metadata)
    more = jpeg.make_incompressibility(metadata, "cpu")(images, prompts, metadata)
    assert (more > 0).all() and more.dtype == torch.float32
    assert torch.equal(less, -more)
