"""The tables of the arms beside the defaults, from records made up here."""

import json

import pytest

from benchmark import arm_tables
from benchmark.settings import GROUPS


def record(seed, plain, rewritten):
    """A run whose scores rise from half of these."""
    metrics = []
    for share in (0.5, 1):
        row = {arm_tables.STRICT: share * plain}
        if rewritten is not None:
            row[arm_tables.REWRITTEN] = share * rewritten
        metrics.append(row)
    return {"seed": seed, "seconds": 60 * seed, "metrics": metrics}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(arm_tables, "RESULTS", tmp_path)
    arms = {"default": (0.5, 0.9), "flow_only": (0.6, None), "originals_0": (0.3, 0.9)}
    for name, (plain, rewritten) in arms.items():
        folder = tmp_path / "promptrl" / name
        folder.mkdir(parents=True)
        for seed in (1, 2, 3):
            row = record(seed, plain + seed / 100, rewritten)
            (folder / f"seed-{seed}.json").write_text(json.dumps(row))
    (tmp_path / "promptrl/flow_only/seed-3.json").unlink()


def test_a_row_per_arm_that_has_been_run_over_the_seeds_that_all_have(results):
    lines = arm_tables.arms_table("promptrl")
    assert lines[0].startswith("| mean over the seeds 1, 2 | flags | plain prompts | with rewrites |")
    assert lines[2:] == [
        "| before any training |  | 0.258 | 0.450 |  |",
        "| PromptRL as the file has it |  | 0.515 | 0.900 | 1.5 |",
        "| the flow model alone, no rewrites | `--num-original-prompts 8` | 0.615 |  | 1.5 |",
        "| all images from rewrites | `--num-original-prompts 0` | 0.315 | 0.900 | 1.5 |",
    ]


def test_a_claim_is_about_the_seeds_that_both_arms_have(results):
    lines = arm_tables.claims_table("promptrl")[2:]
    assert len(lines) == 3
    assert lines[0].startswith("| P1: ") and "| +0.290, +0.280 |" in lines[0]
    assert "| +0.200, +0.200, +0.200 |" in lines[1] and lines[1].endswith("| supported |")
    assert "| -0.100, -0.100 |" in lines[2] and lines[2].endswith("| contradicted |")


def test_claims_are_about_arms_of_the_settings():
    names = {setting.name for group in GROUPS.values() for setting in group}
    for claims in arm_tables.CLAIMS.values():
        assert {claim.better for claim in claims} | {claim.worse for claim in claims} <= names
