"""The statistics behind docs/results.md, against values worked out by hand."""

import json

import numpy as np
import pytest

from benchmark import compare, loop, looping, plot, rewriting, swap, tags


def run(scores, images=100, seconds=2.0):
    """A run's record with an evaluation after every second iteration."""
    rows = []
    for iteration, score in enumerate(scores):
        rows.append({"charts/num_images": 2 * iteration * images, compare.SCORE: score})
        rows[-1] |= {"perf/seconds_train": seconds, "perf/seconds_evaluate": 100.0}
        rows.append({"charts/num_images": (2 * iteration + 1) * images, "perf/seconds_train": seconds})
    return {"metrics": rows[:-1], "command": "python x.py --seed 1"}


def test_evaluations_are_read_at_their_images_and_seconds_of_training():
    images, seconds, scores = compare.evaluations(run([0.4, 0.5, 0.7]), compare.SCORE)
    assert images == [0, 200, 400] and scores == [0.4, 0.5, 0.7]
    assert seconds == [2.0, 6.0, 10.0]  # of all the rows so far, the evaluations' own time left out


def test_curves_end_where_the_shortest_run_does():
    images, seconds, scores = compare.curves([run([0.4, 0.5, 0.7]), run([0.4, 0.6])], compare.SCORE)
    assert scores.tolist() == [[0.4, 0.5], [0.4, 0.6]] and images.shape == seconds.shape == (2, 2)


@pytest.mark.parametrize(
    "target, expected", [(0.4, 0.0), (0.45, 50.0), (0.6, 125.0), (0.8, 175.0), (0.81, np.inf), (0.3, 0.0)]
)
def test_images_to_reach_interpolates_the_first_crossing(target, expected):
    # up, down and up again: 0.6 is first passed between 100 and 150
    images, scores = [0, 100, 150, 175], [0.4, 0.5, 0.7, 0.8]
    assert compare.images_to_reach(images, scores, target) == pytest.approx(expected)


def test_images_to_reach_takes_the_first_of_several_crossings():
    assert compare.images_to_reach([0, 10, 20, 30], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(5)


def test_efficiency_of_a_method_that_is_twice_as_fast():
    slow = [run([0.4, 0.5, 0.6, 0.7, 0.8])] * 3
    fast = [run([0.4, 0.6, 0.8, 0.9, 0.9])] * 3
    assert compare.efficiency(fast, slow) == pytest.approx((0.5, 0.5, 0.5))
    assert compare.efficiency(slow, slow) == pytest.approx((1.0, 1.0, 1.0))
    assert compare.efficiency([run([0.4, 0.5, 0.6, 0.7, 0.7])] * 3, slow) == (np.inf,) * 3


def test_efficiency_has_an_interval_that_may_end_at_never():
    slow = [run([0.4, 0.5, 0.6])] * 2
    estimate, low, high = compare.efficiency([run([0.4, 0.8, 0.8]), run([0.4, 0.45, 0.5])], slow)
    # means 0.4, 0.625, 0.65: at 0.6 after 8/9 of 200 of 400 images; resampled, half of that or never
    assert estimate == pytest.approx(4 / 9) and low == pytest.approx(0.25) and high == np.inf


def with_rewrites(plain, enhanced):
    """A run of PromptRL: `plain` on the prompts as they are, `enhanced` with rewrites."""
    made = run(plain)
    for row, better in zip(made["metrics"][::2], enhanced):
        row |= {compare.SCORE + "_paraphrased": 0.4, rewriting.ENHANCED: better}
        row |= {compare.SCORE + "_paraphrased_enhanced": 0.3}
    return made


@pytest.fixture
def promptrl_runs():
    flow_only = run([0.4, 0.5, 0.6])
    for row in flow_only["metrics"][::2]:
        row[compare.SCORE + "_paraphrased"] = 0.2
    return {
        "promptrl_flow_only": [flow_only] * 3,
        "promptrl_frozen_lm": [with_rewrites([0.4, 0.5, 0.5], [0.4, 0.7, 0.8])] * 3,
        "promptrl_m0": [with_rewrites([0.4, 0.4, 0.4], [0.4, 0.7, 0.8])] * 3,
        "promptrl_m4": [with_rewrites([0.4, 0.4, last], [0.4, 0.7, 0.8]) for last in (0.4, 0.5, 0.6)],
        "promptrl": [with_rewrites([0.4, 0.4, 0.5], [0.4, 0.8, 0.9])] * 3,
    }


def test_promptrls_parts_are_compared_with_the_flow_model_alone(promptrl_runs):
    _, _, first, *_, full, _ = rewriting.parts(promptrl_runs)
    assert "| 0.400, 0.600 [0.600, 0.600] |  | 0.200, 0.200 [0.200, 0.200] |  | 100% [100%, 100%] |" in first
    # 0.6 is half way between 0.4 and 0.8, at 100 of 400 images
    assert "| 0.400, 0.500 [0.500, 0.500] | 0.400, 0.900 [0.900, 0.900] | 0.400, 0.400" in full
    assert full.endswith("| 0.300, 0.300 [0.300, 0.300] | 25% [25%, 25%] | .94 |")


def test_promptrls_claims_are_judged_by_their_intervals(promptrl_runs):
    def swap(own, untrained):
        titles = {"both": own, "flow": untrained, "other": 0.85, "lm": 0.4}
        return {title: {rewriting.ENHANCED: value} for title, value in titles.items()}

    lines = rewriting.claims(promptrl_runs, [swap(0.9, 0.8), swap(0.9, 0.7), swap(0.9, 0.75)])[2:]
    (flow_only, frozen, m0, m4, untrained, other, moved) = lines
    assert flow_only.endswith("| 25% [25%, 25%] | holds here |")
    # 0.8 is at 200 images of 400
    assert "| 50% [50%, 50%] |" in frozen
    assert m0.endswith("| +0.100 [+0.100, +0.100] | holds here |")
    assert "+0.000 [-0.100, +0.100] | not seen here" in m4
    assert untrained.endswith("| -0.150 [-0.200, -0.100] | holds here |")
    assert "| -0.050 [-0.050, -0.050] |" in other
    assert "| +0.000 [+0.000, +0.000] | not seen here" in moved


def test_a_claim_of_the_other_sign_does_not_hold():
    assert rewriting.direction(np.array([0.1, 0.2]), -1).startswith("does not hold here")
    assert rewriting.direction(np.array([0.1, 0.2]), 1) == "holds here"


def test_trials_are_listed_with_their_flags():
    trial = with_rewrites([0.4, 0.5], [0.4, 0.7]) | {"commit": "abc", "seed": 4}
    trial["command"] = "python promptrl.py --num-iterations 16 --seed 4"
    trial["metrics"][-1]["losses/lm_entropy"] = 0.25
    flow_only = run([0.4, 0.6]) | {"commit": "abc", "seed": 5, "command": "python promptrl.py --seed 5"}
    flow_only["metrics"][-1]["losses/lm_entropy"] = 0.0
    lines = rewriting.trials({"promptrl_lr_1": [trial], "promptrl_flow_w4": [flow_only], "promptrl": [trial]})
    assert lines[3:] == ["| `--num-iterations 16` | abc | 4 | 200 | 0.500 | 0.700 | 0.250 |"]
    assert lines[2].endswith("| abc | 5 | 200 | 0.600 |  |  |")


def test_tags_compare_a_specialist_with_several_at_once():
    def scored(before, after, names=tuple(rewriting.SCORES)):
        rows = [{"charts/num_images": n} for n in (0, 256)]
        for row, value in zip(rows, (before, after)):
            row |= {f"{rewriting.SCORES[name]}_enhanced": value for name in names}
        return {"metrics": rows}

    runs = {f"promptrl_tags_{name}": [scored(0.4, 0.7)] * 3 for name in rewriting.SCORES}
    runs["promptrl_tags_all"] = [scored(0.4, 0.6)] * 3
    runs["promptrl_tags_two"] = [scored(0.4, 0.8, ("geneval", "ocr"))] * 3
    *both, jpeg = rewriting.tags(runs)[2:]
    alone, all_three = (
        "| 0.400, 0.700 [0.700, 0.700] |",
        "| 0.400, 0.600 [0.600, 0.600] | -0.100 [-0.100, -0.100] |",
    )
    assert all(line.endswith("| does not hold here |") for line in (*both, jpeg))
    for line in both:
        assert f"{alone} 0.400, 0.800 [0.800, 0.800] | +0.100 [+0.100, +0.100] {all_three}" in line
    assert f"{alone}  |  {all_three}" in jpeg


def test_tagged_prompts_have_one_reward_each_and_as_many_lines_in_training():
    parts = tags.kinds("train")
    assert {row["reward"] for rows in parts.values() for row in rows} == {"geneval", "ocr", "jpeg"}
    prompts = [{row["prompt"] for row in rows} for rows in parts.values()]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert len(parts["geneval"]) == tags.LINES and len(parts["ocr"]) >= tags.LINES


def test_a_swap_puts_the_trained_transformer_into_a_whole_pipeline(monkeypatch, tmp_path):
    run_dir, seen = tmp_path / "run", {}
    (run_dir / "transformer").mkdir(parents=True)
    (run_dir / "transformer" / "config.json").write_text("trained")
    (run_dir / "metrics.jsonl").write_text(
        '{"iteration": 0, "eval/geneval_strict": 0.5, "eval/reward": 1.0}\n'
    )

    def train(args):
        model = swap.Path(args.model)
        seen[args.lm] = (model / "transformer" / "config.json").read_text(), (model / "vae").is_dir()
        assert args.num_iterations == 0
        return run_dir

    monkeypatch.setattr(swap.promptrl, "train", train)
    assert swap.evaluate(run_dir, run_dir) == swap.evaluate(None, None) == {"eval/geneval_strict": 0.5}
    assert seen[str(run_dir / "lm")] == ("trained", True)
    assert seen["tiny/vlm"][0] != "trained" and seen["tiny/vlm"][1]


def test_a_loops_seconds_are_kept_apart_from_those_without_previews(monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "eval/geneval_strict_loop": 0.5}\n')
    clock = iter(range(100))

    def sample(pipe, texts, noise, schedules, write, *rest):
        for step in schedules[0]:
            write([0], step, texts, (lambda: None) if step else None)

    def train(args):
        assert (args.evaluate, args.num_refinements, args.num_iterations) == ("X", 2, 0)
        for schedule, looks in (((), False), ((0, 4), True), ((0, 4), False), ((0,), False)):
            schedules = [list(schedule)]
            write = lambda rows, step, current, look, looks=looks: look() if look and looks else None  # noqa: E731
            loop.promptloop.sample(None, ["a circle"], None, schedules, write)
        return tmp_path

    monkeypatch.setattr(loop.promptloop, "sample", sample)
    monkeypatch.setattr(loop.promptloop, "train", train)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    scores, seconds = loop.evaluate("X", num_refinements=2)
    assert scores == {"eval/geneval_strict_loop": 0.5} and seconds == {"plain": 1, "loop": 1, "blind": 1}
    assert loop.promptloop.sample is sample


@pytest.fixture
def promptloop_runs():
    def made(after):
        rows = [{"charts/num_images": n} for n in (0, 512)]
        for row, value in zip(rows, (0.3, after)):
            row |= {looping.LOOP: value, looping.APRIORI: value - 0.1}
        rows[0][compare.SCORE] = 0.4
        return {"metrics": rows}

    ends = {"promptloop_once": 0.5, "promptloop_none": 0.5, "promptloop_shuffled": 0.7, "promptloop": 0.6}
    return {name: [made(end)] * 3 for name, end in ends.items()}


def test_promptloops_parts_are_judged_by_the_difference_of_their_runs(promptloop_runs):
    lines = looping.parts(promptloop_runs)
    assert lines[2] == "| the image model alone |  | 0.400 |  | .082 |"
    assert lines[3] == "| 5 refinements by the untrained policy |  | 0.300 | 0.200 | -.232 |"
    assert "| 512 | 0.600 [0.600, 0.600] | 0.500 [0.500, 0.500] | .632 |" in lines[7]
    harms, trained, once, training, several, helps, content, all_of_it = lines[-8:]
    assert harms.endswith("| -0.313 | -0.100 | holds here |")
    assert "| +0.200 [" in trained and "| +0.100 [" in once and "| +0.300 [" in training
    assert "| +0.000 [+0.000, +0.000] | not seen here" in several
    assert helps.endswith("| +0.141 | +0.100 [+0.100, +0.100] | holds here |")
    assert "| -0.100 [-0.100, -0.100] | does not hold here" in content
    assert "| +0.198 | +0.100 [" in all_of_it


def test_trials_of_promptloop_are_listed_with_their_flags(promptloop_runs):
    (run, *_) = promptloop_runs["promptloop"]
    run["metrics"][-1]["losses/lm_entropy"] = 0.25
    trial = run | {
        "seed": 4,
        "commit": "abc",
        "command": "python promptloop.py --lm-learning-rate 1 --seed 4",
    }
    plain = trial | {"seed": 5, "command": "python promptloop.py --seed 5"}
    lines = looping.trials({"promptloop_try": [trial], "promptloop_p16": [plain], "promptloop": [trial]})
    assert lines[2:] == [
        "|  | abc | 5 | 512 | 0.600 | 0.500 | 0.250 |",
        "| `--lm-learning-rate 1` | abc | 4 | 512 | 0.600 | 0.500 | 0.250 |",
    ]


def test_a_policys_other_uses_are_measured_by_what_they_keep_of_its_gain(promptloop_runs):
    def use(before, after, factor=1.0):
        scores = {compare.SCORE: before, looping.LOOP: after, looping.APRIORI: before}
        return {"scores": scores, "seconds": {"plain": 2.0, "loop": 2.0 * factor}}

    titles = {f"refinements_{n}": use(0.4, 0.5, 1 + n / 10) for n in (1, 2, 3, 5)}
    titles |= {"second_model": use(0.2, 0.3), "flow_grpo": use(0.5, 0.6)}
    record = {f"{title}_{who}": value for title, value in titles.items() for who in ("trained", "untrained")}
    record["second_model_untrained"] = use(0.2, 0.25)
    lines = looping.uses(promptloop_runs, [record] * 3)
    assert lines[2].startswith("| 1 | 0.500") and lines[2].endswith("| 1.10 [1.10, 1.10] | 1.05 |")
    # in training the gain was 0.6 - 0.4: half of it is kept
    assert "| 0.400, 0.600 [0.600, 0.600] | -0.100 | +0.200" in lines[9]
    assert "| 0.200, 0.300 [0.300, 0.300] | +0.050 | +0.100 [+0.100, +0.100] | 50% [50%, 50%] |" in lines[10]
    assert lines[11].endswith("| 50% [50%, 50%] | 69 to 80% |")
    more, time, unseen, kept = lines[-4:]
    assert more.endswith("| rises | +0.000 [+0.000, +0.000] | not seen here: the interval has zero in it |")
    assert time.endswith("| 1.23 | 1.50 [1.50, 1.50] | does not hold here |")
    assert unseen.endswith("| +0.100 [+0.100, +0.100] | holds here |")
    assert kept.endswith("| 69 to 80% | 50% [50%, 50%] | does not hold here |")


def test_interval_of_a_mean_over_seeds():
    low, high = compare.interval(np.array([[0.0, 5.0], [1.0, 5.0]]))
    assert low.tolist() == [0.0, 5.0] and high.tolist() == [1.0, 5.0]
    spread = compare.interval(np.linspace(-1, 1, 101))
    # of 101 values with a deviation of 0.583 the mean is within +-1.96 * 0.058
    assert spread == pytest.approx((-0.114, 0.114), abs=0.015)


@pytest.mark.parametrize(
    "values, expected",
    [(range(12), 5.5), ([0, 1, 5, 9], 3.0), ([1, 2, 9], (0.25 + 2 + 2.25) / 1.5), ([4], 4)],
)
def test_interquartile_mean(values, expected):
    assert compare.interquartile_mean(np.array(values, float)) == pytest.approx(expected)


def test_interquartile_mean_ignores_an_outlier():
    assert compare.interquartile_mean(np.array([0, 1, 1, 1, 1, 1, 1, 1e9])) == 1


def test_verdicts():
    assert compare.verdict(high=0.16, claim=1 / 6) == "holds here"
    assert compare.verdict(high=0.9, claim=1 / 6).startswith("holds in part")
    assert compare.verdict(high=1.0, claim=1 / 6) == "does not hold here"
    assert compare.verdict(high=np.inf, claim=1 / 6) == "does not hold here"


def test_results_md_is_what_the_script_writes(tmp_path, monkeypatch):
    """The page is made from the records; a number edited by hand, or a record added without it, is found."""
    monkeypatch.setattr(plot, "draw", lambda *args: None)
    assert plot.write(plot.load()) == (plot.DOCS / "results.md").read_text()


def test_every_record_says_where_it_comes_from():
    for path in plot.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert {"command", "date", "machine"} <= record.keys(), path.name
        if "metrics" in record:
            assert {"commit", "seed", "seconds"} <= record.keys(), path.name
            assert path.name == f"{record['name']}-{record['seed']}.json"
