"""benchmark/choose_learning_rates.py: the same budget for each file, on prompts that no reported run has."""

import importlib

import pytest
import tyro

from benchmark import choose_learning_rates
from benchmark.choose_learning_rates import LEARNING_RATES, TRIAL_FLAGS
from tiny import splits


def parsed_trials(algorithm):
    """(the words before --, the Args of the file) of each command."""
    args_class = importlib.import_module(algorithm).Args
    trials = []
    for command in choose_learning_rates.commands(algorithm, jobs=2, threads=1):
        words = [str(word) for word in command]
        split_at = words.index("--")
        trials.append((words[:split_at], tyro.cli(args_class, args=words[split_at + 1 :])))
    return trials


@pytest.mark.parametrize("algorithm", LEARNING_RATES)
def test_each_file_gets_five_rates_and_otherwise_its_defaults(algorithm):
    flag, rates = LEARNING_RATES[algorithm]
    name = flag.removeprefix("--").replace("-", "_")
    trials = parsed_trials(algorithm)
    assert [getattr(args, name) for _, args in trials] == [float(rate) for rate in rates]
    assert len(set(rates)) == 5
    defaults = importlib.import_module(algorithm).Args()
    changed = {name} | {shared.removeprefix("--").replace("-", "_") for shared in TRIAL_FLAGS}
    for words, args in trials:
        different = {key for key in vars(args) if vars(args)[key] != vars(defaults)[key]}
        assert different <= changed
        assert args.num_iterations == 16
        assert words[words.index("--seeds") + 1 : words.index("--jobs")] == ["11", "12"]


def test_the_prompts_are_the_development_prompts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_learning_rates, "DEV_FILE", tmp_path / "prompts" / "dev.jsonl")
    choose_learning_rates.make_dev_file()
    copied = tmp_path / "prompts" / "dev.jsonl"
    assert copied.read_bytes() == (splits.PROMPTS / "fold_0" / "dev.jsonl").read_bytes()
    assert list(copied.parent.iterdir()) == [copied]
