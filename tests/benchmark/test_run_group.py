"""The table of settings, and running and checking a group of them, with a stand-in for the algorithm file."""

import importlib
import json
import re

import pytest
import tyro

from benchmark import run_group, settings
from benchmark.records import RESULTS, ROOT, read_records
from benchmark.run_seeds import fill
from benchmark.settings import GROUPS, Setting

SETTINGS = [setting for group in GROUPS.values() for setting in group]
SCRIPT = """
import argparse, json, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--output-dir")
folder = pathlib.Path(parser.parse_args().output_dir) / "run"
folder.mkdir()
with open(folder / "metrics.jsonl", "w") as file:
    for iteration in range(3):
        row = {"iteration": iteration, "reward": 0.5 * iteration, "perf/seconds": time.time()}
        print(json.dumps(row), file=file, flush=True)
    file.write('{"iteration": 3, "rew')
    file.flush()
    time.sleep(60)
"""


def test_names_are_unique():
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_algorithm_file_takes_the_flags(setting, monkeypatch):
    module = importlib.import_module(setting.algorithm)
    monkeypatch.chdir(ROOT)
    args = tyro.cli(module.Args, args=fill(setting.flags, seed=2))
    module.check_args(args)
    assert (ROOT / args.prompts).is_file() and (ROOT / args.eval_prompts).is_file()
    assert "fold_1" in args.prompts and args.eval_seed == 2


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_what_is_recorded_has_the_flags_of_the_table(setting):
    """Other wordings may or may not have been evaluated: they change nothing of the rest."""
    for record in read_records(setting.name):
        words = ["python", setting.script, *fill(setting.flags, record["seed"])]
        expected = set(words) - {"--eval-wordings"}
        recorded = set(record["command"].split(" ")) - {"--eval-wordings"}
        assert recorded == expected | {"--seed", str(record["seed"])}


def test_every_arm_of_the_protocol_is_in_the_table_or_is_known_to_be_missing():
    protocol = (ROOT / "docs/protocol.md").read_text()
    arms = set(re.findall(r"`((?:flow_grpo|superflow|fdfo|promptrl|promptloop)/\w+\*?)`", protocol))
    names = {setting.name for setting in SETTINGS}
    missing = {arm for arm in arms if not any(re.fullmatch(arm.replace("*", r"\w+"), name) for name in names)}
    assert missing == settings.NOT_YET
    assert len(arms) > 20


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A group of one setting, with a record of three iterations."""
    script = tmp_path / "algorithm.py"
    script.write_text(SCRIPT)
    monkeypatch.setitem(GROUPS, "a group", [Setting("a/setting", "", "a stand-in")])
    rows = [{"iteration": k, "reward": 0.5 * k, "perf/seconds": 1.0} for k in range(3)]
    record = {
        "seed": 1,
        "command": f"python {script} --seed 1",
        "machine": "a processor, 2 cores, 1 thread",
        "metrics": rows,
    }
    folder = tmp_path / "records" / "a" / "setting"
    folder.mkdir(parents=True)

    def write(record):
        (folder / "seed-1.json").write_text(json.dumps(record))
        return tmp_path / "records"

    return write, record


def test_a_record_that_is_reproduced_passes_the_check(group, capsys):
    write, record = group
    assert run_group.check("a group", 2, write(record))
    assert capsys.readouterr().out == "a/setting seed 1, 2 iterations: the same\n"


def test_a_number_that_differs_in_its_last_digit_fails_the_check(group, capsys):
    write, record = group
    record["metrics"][1]["reward"] = 0.5000000000000001
    assert not run_group.check("a group", 2, write(record))
    line = "  iteration 1, reward: 0.5000000000000001, now 0.5\n"
    assert capsys.readouterr().out == "a/setting seed 1, 2 iterations: 1 differences\n" + line


def test_numbers_that_only_one_has_are_counted(group, capsys):
    write, record = group
    record["metrics"][0]["eval/geneval_hard"] = 0.5
    assert run_group.check("a group", 2, write(record))
    expected = "a/setting seed 1, 2 iterations: the same (1 numbers were measured in one of the two only)\n"
    assert capsys.readouterr().out == expected


def test_a_run_that_ends_early_fails_the_check(group, capsys):
    write, record = group
    record["command"] += " --no-such-flag"
    assert not run_group.check("a group", 2, write(record))
    assert "the run ended after 0 rows" in capsys.readouterr().out


def test_the_list_says_which_seeds_have_no_record(group):
    write, record = group
    lines = run_group.list_groups(write(record))
    assert "  a/setting                        a stand-in: no record of seeds 2 3 4" in lines


def test_a_group_is_run_by_run_seeds_with_the_flags_of_the_table(group, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run_group.run_seeds, "run_seeds", lambda args, flags: calls.append((args, flags)))
    run_group.run("defaults", [1, 2], 1, 1, RESULTS)
    assert [args.setting for args, _ in calls] == [setting.name for setting in GROUPS["defaults"]]
    args, flags = calls[0]
    assert (args.script, args.seeds, args.threads) == ("flow_grpo.py", [1, 2], 1)
    assert flags == GROUPS["defaults"][0].flags
