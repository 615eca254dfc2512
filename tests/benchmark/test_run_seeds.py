"""Running a setting on several seeds, with a stand-in for the algorithm file."""

import json

import pytest

from benchmark import measure_diversity, records, run_seeds
from benchmark.records import RESULTS

SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--output-dir")
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
if args.fail:
    raise SystemExit(3)
folder = pathlib.Path(args.output_dir) / "run"
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "eval/reward": args.seed}) + "\\n")
(folder / "args.json").write_text(json.dumps(vars(args) | {"model": "tiny/sd3", "prompts": "hub/name"}))
(folder / "scores").mkdir()
images = [{"evaluation": "eval", "row": row, "noise": noise, "reward": 0.5 + noise}
          for noise in (0, 1) for row in (0, 1, 2)]
if args.seed == 5:
    images = [image | {"geneval_strict": float(image["row"] == 1)} for image in images]
(folder / "scores" / "000000.jsonl").write_text("".join(json.dumps(image) + "\\n" for image in images))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(run_seeds, "RUNS", tmp_path / "runs")
    path = tmp_path / "algorithm.py"
    path.write_text(SCRIPT)
    return str(path)


def test_each_seed_leaves_a_record_and_is_not_run_twice(script, tmp_path, capsys):
    words = [
        "some/setting",
        script,
        "--seeds",
        "4",
        "5",
        "--jobs",
        "2",
        "--results",
        str(tmp_path / "records"),
    ]
    run_seeds.run_seeds(*run_seeds.parse(words))
    for seed in (4, 5):
        record = json.loads((tmp_path / "records" / "some" / "setting" / f"seed-{seed}.json").read_text())
        assert record["metrics"] == [{"iteration": 0, "eval/reward": seed}]
        assert record["command"] == f"python {script} --seed {seed}" and record["name"] == "some/setting"
        assert {"commit", "versions", "date", "machine", "seconds"} <= record.keys()
        assert "output_dir" not in record and record["args"].keys() == {"seed", "fail", "model", "prompts"}
        assert record["sha256"] == {"tiny/sd3": records.hash_of(records.ROOT / "tiny/sd3")}
        images = {4: [[0.5] * 3, [1.5] * 3], 5: ["010", "010"]}
        assert record["first images"] == record["last images"] == {"eval": images[seed]}
    capsys.readouterr()
    run_seeds.run_seeds(*run_seeds.parse(words))
    assert capsys.readouterr().out.count("is not run") == 2


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([1.0, 0.0, 1.0], "101"),
        ([1.0, None, 0.0], [1.0, None, 0.0]),
        ([0.123456, 1.0], [0.1235, 1.0]),
    ],
)
def test_scores_are_kept_short_and_unscored_images_stay(scores, expected):
    assert run_seeds.shortened(scores) == expected


@pytest.mark.parametrize("model, is_measured", [("tiny/sd3", True), ("tiny/flux", False)])
def test_diversity_is_that_of_tiny_sd3_and_a_record_does_not_wait_for_it(
    tmp_path, monkeypatch, model, is_measured
):
    """The record is there already while the diversity is measured, and stays if that fails."""
    path = tmp_path / "records" / "some" / "setting" / "seed-4.json"
    source = SCRIPT.replace("eval/reward", "eval/geneval").replace('"tiny/sd3"', f'"{model}"')
    source += '(folder / "transformer").mkdir()\n'
    (tmp_path / "algorithm.py").write_text(source)
    monkeypatch.setattr(run_seeds, "RUNS", tmp_path / "runs")
    measured = []

    def diversity(folder):
        measured.append("diversity" in json.loads(path.read_text()))
        raise RuntimeError("of another class")

    monkeypatch.setattr(measure_diversity, "diversity", diversity)
    words = ["some/setting", str(tmp_path / "algorithm.py"), "--seeds", "4"]
    words += ["--results", str(tmp_path / "records")]
    if is_measured:
        with pytest.raises(RuntimeError):
            run_seeds.run_seeds(*run_seeds.parse(words))
    else:
        run_seeds.run_seeds(*run_seeds.parse(words))
    assert measured == ([False] if is_measured else [])
    assert json.loads(path.read_text())["args"]["model"] == model


def test_a_run_that_fails_ends_in_one_line(script, tmp_path):
    words = ["s", script, "--seeds", "1", "--results", str(tmp_path / "records"), "--", "--fail"]
    with pytest.raises(SystemExit, match="--fail --seed 1 failed with exit code 3"):
        run_seeds.run_seeds(*run_seeds.parse(words))
    assert not (tmp_path / "records").exists()


def test_the_documented_command_does_not_do_nothing_silently(capsys):
    run_seeds.run_seeds(*run_seeds.parse(["flow_grpo/default", "flow_grpo.py", "--seeds", "1"]))
    said = capsys.readouterr().out
    assert "seed 1 is not run" in said and "--results" in said


def test_flags_of_the_file_stand_after_two_dashes():
    args, flags = run_seeds.parse(["a/b", "x.py", "--seeds", "1", "2", "--", "--seeds", "3"])
    assert args.seeds == [1, 2] and flags == ["--seeds", "3"] and args.results == RESULTS


def test_every_seed_has_a_fold_of_its_own(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run_seeds, "circumstances", lambda threads: {})
    monkeypatch.setattr(run_seeds.subprocess, "Popen", lambda words, **_: commands.append(words))
    for seed in (1, 2, 4, 5):
        flags = ["--prompts", "fold_{fold}/train.jsonl", "--eval-seed", "{seed}"]
        _, record = run_seeds.start("s", seed, "a.py", flags, 1)
        fold = (seed - 1) % 4
        expected = f"python a.py --prompts fold_{fold}/train.jsonl --eval-seed {seed} --seed {seed}"
        assert record["command"] == expected
    assert [words[3] for words in commands] == [f"fold_{fold}/train.jsonl" for fold in (0, 1, 3, 0)]
