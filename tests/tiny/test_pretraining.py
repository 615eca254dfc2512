"""tiny/pretraining.py: the training loop that the pretraining scripts share."""

import pytest
import torch

from tiny.pretraining import fit, learning_rate, parse_options


def options(folder, save_every):
    flags = ["--threads", "1", "--work", str(folder), "--save-every", str(save_every)]
    return parse_options("", ["train"], ["vlm"], ["train"] + flags)


def train(folder, num_steps, stop_before=None, save_every=2):
    """Weights of a small network after `fit`. stop_before: step in which the process is killed."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)

    def loss_at(step):
        if step == stop_before:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    fit("small", [network], loss_at, options(folder, save_every), num_steps, peak=0.1, ema_decay=0.9)
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("stop_before", [1, 3, 4, 9])
def test_an_interrupted_training_continues_exactly(tmp_path, stop_before):
    whole = train(tmp_path / "whole", 10)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 10, stop_before)
    resumed = train(tmp_path / "parts", 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_training_ends_with_averaged_weights(tmp_path):
    averaged = train(tmp_path, 10)
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    assert state["step"] == 10
    assert all(torch.equal(a, b) for a, b in zip(averaged, state["average"]))
    assert not all(torch.equal(a, b) for a, b in zip(averaged, state["parameters"]))


def test_a_finished_training_is_not_continued(tmp_path):
    first = train(tmp_path, 10)
    again = train(tmp_path, 10, stop_before=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rates = [learning_rate(step, 1000, peak=2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[500] == rates[750] == 2.0
    assert rates[875] == pytest.approx(1.0) and rates[1000] == 0.0
