"""The tables of the second edition, from records made up here."""

import json

import pytest

from benchmark import write_tables


def baselines(base, guidance_2, scripted):
    settings = {"base": base, "guidance 2": guidance_2, "scripted": scripted, "best of 4": 0.9}
    return {"settings": {name: {"strict": strict} for name, strict in settings.items()}}


def run(algorithm, seed, command, score, values):
    metrics = [{score: value, "charts/num_images": 1000 * k} for k, value in enumerate(values)]
    record = {"seed": seed, "command": command, "commit": "abc", "seconds": 90, "metrics": metrics}
    return record | {"args": {"model": "tiny/sd3"}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)
    folder = tmp_path / "baselines" / "sd3"
    folder.mkdir(parents=True)
    (folder / "fold-0-test.json").write_text(json.dumps(baselines(0.5, 0.4, 0.8)))
    (folder / "fold-1-test.json").write_text(json.dumps(baselines(0.5, 0.6, 0.7)))
    flow = "python flow_grpo.py --eval-prompts tiny/prompts/fold_{}/test.jsonl"
    records = {
        "flow_grpo/default/seed-1.json": run(
            "flow_grpo", 1, flow.format(0), "eval/geneval_strict", (0.5, 0.7)
        ),
        "flow_grpo/default/seed-2.json": run(
            "flow_grpo", 2, flow.format(1), "eval/geneval_strict", (0.5, 0.65)
        ),
        "promptrl/default/seed-1.json": run(
            "promptrl", 1, flow.format(0), "eval/geneval_strict_enhanced", (0.4, None, 0.9)
        ),
    }
    for name, record in records.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(record))
    return tmp_path


def test_each_run_stands_beside_the_baselines_of_its_own_fold(results):
    rows = write_tables.run_rows(write_tables.read_test_runs("default"))
    assert rows == [
        [
            "Flow-GRPO",
            "1",
            "0",
            "0.500",
            "0.500",
            "0.800",
            "0.500",
            "0.700",
            "+0.200",
            "-0.100",
            "1,000",
            "1.5",
        ],
        [
            "Flow-GRPO",
            "2",
            "1",
            "0.500",
            "0.600",
            "0.700",
            "0.500",
            "0.650",
            "+0.050",
            "-0.050",
            "1,000",
            "1.5",
        ],
        [
            "PromptRL",
            "1",
            "0",
            "0.500",
            "0.500",
            "0.800",
            "0.400",
            "0.900",
            "+0.400",
            "+0.100",
            "2,000",
            "1.5",
        ],
    ]


def test_replaced_defaults_have_a_table_of_their_own(results):
    default = results / "flow_grpo/default/seed-1.json"
    for name in ("superseded_1", "superseded_2"):
        path = results / "flow_grpo" / name / "seed-1.json"
        path.parent.mkdir()
        path.write_text(default.read_text().replace("0.7", "0.55" if name == "superseded_1" else "0.6"))
    runs = write_tables.read_test_runs("superseded_*")
    assert [row[7] for row in write_tables.run_rows(runs)] == ["0.550", "0.600"]
    assert [row[7] for row in write_tables.run_rows(write_tables.read_test_runs("default"))][0] == "0.700"


def test_the_short_table_compares_means_over_the_same_folds(results):
    with pytest.raises(SystemExit, match="default runs of promptrl are on other folds"):
        write_tables.short_table()
    (results / "promptrl/default/seed-1.json").unlink()
    assert write_tables.short_table() == [
        "| test prompts, mean of the folds 0, 1 | strict |",
        "| --- | --- |",
        "| nothing is learned: base | 0.500 |",
        "| nothing is learned: guidance 2 | 0.500 |",
        "| nothing is learned: scripted | 0.750 |",
        "| nothing is learned: best of 4 | 0.900 |",
        "| Flow-GRPO | 0.675 |",
    ]


def test_what_stands_between_the_marks_is_made_anew_and_nothing_else():
    text = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\nkept\n<!-- end -->\n"
    expected = text.replace("old", "new\nlines")
    assert write_tables.fill(text, "a", ["new", "lines"]) == expected
    assert write_tables.fill(text, "c", ["new"]) == text


def test_trials_are_sorted_by_their_score_and_say_what_they_changed(results):
    command = "python flow_grpo.py --num-iterations 16 --eval-prompts x.jsonl --learning-rate {} --seed {}"
    for rate, seed, after in (("1e-3", 11, 0.6), ("1e-3", 12, 0.7), ("1e-4", 11, 0.5)):
        path = results / "trials" / "flow_grpo" / rate / f"seed-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = run("flow_grpo", seed, command.format(rate, seed), "eval/geneval_strict", (0.4, after))
        record["args"] = {"learning_rate": float(rate), "rewards": "geneval"}
        path.write_text(json.dumps(record))
    lines = write_tables.trials_table()
    assert lines[2:] == [
        "| Flow-GRPO | `--learning-rate 1e-4` | abc | 11 | 1,000 | 0.400 | 0.500 | 0.500 |",
        "| Flow-GRPO | `--learning-rate 1e-3` | abc | 11, 12 | 1,000 | 0.400 | 0.600, 0.700 | 0.650 |",
    ]


def test_trials_with_rewrites_also_show_the_score_without_them(results):
    path = results / "trials" / "promptrl_edit" / "a" / "seed-11.json"
    path.parent.mkdir(parents=True)
    command = "python promptrl.py --learning-rate 1e-3 --lm-learning-rate 1e-3 --seed 11"
    record = run("promptrl", 11, command, "eval/edit_enhanced", (0.7, 0.8))
    record["args"] = {"learning_rate": 1e-3, "lm_learning_rate": 1e-3, "rewards": "edit"}
    for row, plain in zip(record["metrics"], (0.6, 0.5)):
        row["eval/edit"] = plain
    path.write_text(json.dumps(record))
    lines = write_tables.trials_table("_edit", plain_score="eval/edit")
    assert lines[0].endswith("| mean | without rewrites: before | after |")
    assert lines[2].endswith("| 0.700 | 0.800 | 0.800 | 0.600 | 0.500 |")


@pytest.mark.parametrize(
    "algorithm, reward, measured, expected",
    [
        ("flow_grpo", "geneval", ["eval/geneval_strict"], "eval/geneval_strict"),
        (
            "promptrl",
            "geneval",
            ["eval/geneval_strict", "eval/geneval_strict_enhanced"],
            "eval/geneval_strict_enhanced",
        ),
        ("promptrl", "geneval", ["eval/geneval_strict"], "eval/geneval_strict"),
        ("promptrl", "edit", ["eval/edit", "eval/edit_enhanced"], "eval/edit_enhanced"),
        ("promptrl", "edit", ["eval/edit"], "eval/edit"),
    ],
)
def test_a_trial_is_scored_by_the_way_of_sampling_that_it_trained(algorithm, reward, measured, expected):
    """Some scores are measured before and after training only, so they are not in each row."""
    record = {
        "args": {"rewards": reward},
        "metrics": [dict.fromkeys(measured, 0.5), {"charts/num_images": 8}],
    }
    assert write_tables.trained_score(record, algorithm) == expected


@pytest.mark.parametrize(
    "args, flags, expected",
    [
        ({"learning_rate": 3e-4}, "", "--learning-rate 3e-4"),
        ({"learning_rate": 1.6e-3}, "--noise-level 1.0", "--learning-rate 1.6e-3 --noise-level 1.0"),
        ({"learning_rate": 1e-4}, "--learning-rate 1e-4 --lora-rank 8", "--learning-rate 1e-4 --lora-rank 8"),
        ({"learning_rate": 1e-4, "lm_learning_rate": 2e-3}, "", "--lm-learning-rate 2e-3"),
    ],
)
def test_a_trial_shows_its_learning_rate_even_where_it_was_the_default(args, flags, expected):
    command = f"python flow_grpo.py --num-iterations 16 --seed 11 {flags}"
    assert write_tables.own_flags({"command": command, "args": args}) == expected


def test_texts_have_a_row_for_each_model(results):
    for model, mean in (("sd3", 0.125), ("sd3b", 0.0625)):
        path = results / "baselines" / model / "fold-0-dev.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = {"1": {"mean": mean, "std_over_noises": 0.01}, "2": {"mean": 0.05, "std_over_noises": 0.002}}
        path.write_text(json.dumps({"ocr": scores}))
    assert write_tables.texts_table(["sd3", "sd3b"]) == [
        "| OCR, mean (std over noises) | guidance 1 | guidance 2 |",
        "| --- | --- | --- |",
        "| tiny/sd3 | 0.125 (0.010) | 0.050 (0.002) |",
        "| tiny/sd3b | 0.062 (0.010) | 0.050 (0.002) |",
    ]


def test_what_compares_with_baselines_that_were_not_measured_is_empty(results):
    (results / "baselines/sd3/fold-1-test.json").unlink()
    first, second, _ = write_tables.run_rows(write_tables.read_test_runs("default"))
    assert first[3:10] == ["0.500", "0.500", "0.800", "0.500", "0.700", "+0.200", "-0.100"]
    assert second[3:10] == ["", "", "", "0.500", "0.650", "", ""]


def test_a_run_that_was_not_evaluated_on_test_prompts_is_in_no_table():
    with pytest.raises(SystemExit, match="not evaluated on the test prompts of a fold: python flow_grpo.py"):
        write_tables.fold_of_run({"command": "python flow_grpo.py --seed 1"})


def test_a_table_that_has_no_place_is_found(tmp_path, monkeypatch):
    for name in write_tables.DOCUMENTS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((write_tables.ROOT / name).read_text().replace("<!-- texts on dev -->", ""))
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="no document has a place for the table: texts on dev"):
        write_tables.write_tables()


def test_the_cost_of_a_busy_core_has_a_row_per_number_of_threads(results):
    ratios = {}
    for threads, idle, busy in (("1 thread", 1.0, 0.9), ("2 threads", 0.6, 2.0)):
        ratios |= {f"{threads}, beside an idle core": idle, f"{threads}, beside a busy core": busy}
    record = {"command": "c", "commit": "abc", "date": "d", "machine": "m", "ratio_to_one_thread": ratios}
    (results / "speed").mkdir()
    (results / "speed/busy_cores.json").write_text(json.dumps(record))
    lines = write_tables.busy_cores_table()
    assert lines[2:4] == ["| 1 thread | 1.00 | 0.90 |", "| 2 threads | 0.60 | 2.00 |"]
    assert lines[-1] == "`c`, commit abc, d, m."


def test_flow_models_are_compared_with_guidance_and_rewriters_with_the_scripted_wording(results):
    for algorithm, seed, score, after in (
        ("promptrl", 2, "eval/geneval_strict_enhanced", 0.8),
        ("promptloop", 1, "eval/geneval_strict_loop", 0.9),
        ("promptloop", 2, "eval/geneval_strict_loop", 0.8),
    ):
        command = f"python {algorithm}.py --eval-prompts tiny/prompts/fold_{seed - 1}/test.jsonl"
        record = run(algorithm, seed, command, score, (0.75, after))
        path = results / algorithm / "default" / f"seed-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    cells = [line.split(" | ")[:2] for line in write_tables.claims_table()[2:]]
    assert cells == [
        ["| Flow-GRPO ends above the base at its best guidance", "+0.200, +0.050"],
        ["| PromptRL ends above the scripted wording", "+0.100, +0.100"],
        ["| PromptLoop ends above the scripted wording", "+0.100, +0.100"],
        ["| PromptLoop ends above its own untrained policy", "+0.150, +0.050"],
    ]
