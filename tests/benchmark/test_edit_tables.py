"""The tables of the editing experiment, from records made up here."""

import json

import pytest

from benchmark import edit_tables
from tiny.world import EDITS

# of each arm: the reward before, before with rewrites, after, after with rewrites; None: not evaluated
SCORES = {
    "edit_both": (0.5, 0.4, 0.6, 0.8),
    "edit_flow_only": (0.5, None, 0.7, None),
    "edit_lm_only": (0.5, 0.4, 0.5, 0.75),
}


def record(seed, scores):
    """A run whose reward is 0.01 times its seed above these scores. Its strict scores are half of these."""
    metrics = [{"charts/num_images": 0}, {"charts/num_images": 5120}]
    rows = [metrics[0], metrics[0], metrics[1], metrics[1]]
    for row, suffix, score in zip(rows, ("", "_enhanced") * 2, scores):
        if score is None:
            continue
        row[f"eval/edit{suffix}"] = score + 0.01 * seed
        row[f"eval/edit_strict{suffix}"] = score / 2
        for number, kind in enumerate(EDITS):
            row[f"eval/edit_strict{suffix}/{kind}"] = score / 2 + number / 1000
    return {"seed": seed, "seconds": 600, "metrics": metrics}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(edit_tables, "RESULTS", tmp_path)
    for setting, scores in SCORES.items():
        folder = tmp_path / "promptrl" / setting
        folder.mkdir(parents=True)
        for seed in (1, 2, 3):
            (folder / f"seed-{seed}.json").write_text(json.dumps(record(seed, scores)))
    return tmp_path


def test_a_row_per_run(results):
    lines = edit_tables.runs_table(edit_tables.read_runs())[2:]
    assert len(lines) == 9
    assert lines[0] == "| both models | 1 | 0.510 | 0.410 | 0.610 | 0.810 | 5,120 | 10.0 |"
    assert lines[5] == "| flow model, no rewrites | 3 | 0.530 |  | 0.730 |  | 5,120 | 10.0 |"


def test_the_strict_score_of_each_kind(results):
    lines = edit_tables.kinds_table(edit_tables.read_runs())
    assert lines[2] == "| before training | 0.250 | 0.250 | 0.251 | 0.252 | 0.253 | 0.254 |"
    assert lines[4].startswith("| flow model trained, no rewrites | 0.350 |")
    assert lines[6].startswith("| both trained, rewritten | 0.400 | 0.400 | 0.401 |")


def test_claims_are_differences_of_the_same_seeds(results):
    """Made-up seeds differ by a constant, so each difference is the same for all of them."""
    lines = edit_tables.claims_table(edit_tables.read_runs())[2:]
    expected = [0.1, 0.2, 0.1, 0.3, 0.2, 0.4, 0.05]
    assert len(lines) == len(expected)
    for line, difference in zip(lines, expected):
        assert f"| {', '.join([f'{difference:+.3f}'] * 3)} | {difference:+.3f} [" in line
        assert line.endswith("| supported |")


def test_an_arm_without_all_seeds_is_left_out(results):
    (results / "promptrl" / "edit_lm_only" / "seed-2.json").unlink()
    runs = edit_tables.read_runs()
    assert list(runs) == ["edit_both", "edit_flow_only"]
    assert len(edit_tables.runs_table(runs)) == 2 + 6
    tables = edit_tables.kinds_table(runs) + edit_tables.claims_table(runs)
    assert len(tables) == 2 + 5 + 2 + 6
    assert not any("language model alone" in line or "language model trained" in line for line in tables)
