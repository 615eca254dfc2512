"""Where records are, and what a script says when they are there, or when what it needs is not."""

import json
import re
import subprocess

import pytest

from benchmark import records


def test_seeds_with_a_record_are_named_and_left_out(tmp_path, capsys):
    records.write_record(records.record_path("fdfo/default", 2, tmp_path), {"seed": 2})
    capsys.readouterr()
    assert records.missing_seeds("fdfo/default", [1, 2, 3], tmp_path) == [1, 3]
    said = capsys.readouterr().out
    assert "seed 2 is not run" in said and "--results" in said and "seed 1" not in said


def test_records_are_read_in_the_order_of_their_seeds(tmp_path):
    for seed in (10, 9):
        records.write_record(
            records.record_path("fdfo/default", seed, tmp_path), {"seed": seed, "metrics": []}
        )
    records.write_record(records.record_path("elsewhere", 1, tmp_path), {"seed": 1})
    records.write_record(records.record_path("earlier_weights/first/fdfo", 1, tmp_path), {"metrics": []})
    runs = records.read_runs(tmp_path)
    assert list(runs) == ["fdfo/default"]
    assert [record["seed"] for record in runs["fdfo/default"]] == [9, 10]
    assert records.settings_of(runs, "fdfo") == runs and records.settings_of(runs, "fd") == {}


def test_a_run_that_is_missing_is_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs" / "benchmark")
    with pytest.raises(SystemExit) as error:
        records.newest_run("promptrl/flow_only", 3)
    assert "benchmark.run_seeds promptrl/flow_only promptrl.py --seeds 3" in str(error.value)
    assert "\n" not in str(error.value)
    for time in (1, 2):
        (tmp_path / "runs" / "benchmark" / "promptrl" / "flow_only" / f"seed-3-{time}" / "run").mkdir(
            parents=True
        )
    assert records.newest_run("promptrl/flow_only", 3).name == "run"


def test_commands_have_todays_names_and_records_keep_their_own():
    record = {"command": "python -m benchmark.swap --seeds 1"}
    assert records.current_command(record) == "python -m benchmark.swap_promptrl_models --seeds 1"
    assert record["command"] == "python -m benchmark.swap --seeds 1"
    for new in records.NEW_NAMES.values():
        assert (records.ROOT / f"{new.replace('.', '/')}.py").is_file()


def test_a_tree_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.commit() == "unknown"


def test_a_changed_tree_is_not_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run(git + words, cwd=tmp_path, check=True)
    clean = records.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "record").write_text("new")
    assert records.commit() == clean
    (tmp_path / "file").write_text("2")
    assert records.commit() == clean + "-dirty"


def test_a_hash_is_that_of_names_and_contents(tmp_path):
    hashes = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "1")):
        folder = tmp_path / name / content
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
        hashes.add(records.hash_of(folder))
    assert len(hashes) == 3
    again = tmp_path / "again"
    again.mkdir()
    (again / "a").write_text("1")
    assert records.hash_of(again) == records.hash_of(tmp_path / "a" / "1")
    assert records.hash_of(again / "a") != records.hash_of(tmp_path / "a" / "2" / "a")


def test_records_are_valid_json(tmp_path):
    path = records.record_path("a/b", 1, tmp_path)
    records.write_record(path, {"seed": 1})
    assert json.loads(path.read_text()) == {"seed": 1}
