"""Whole runs of flow_grpo.py on the tiny world: repeatability, resume, kills, processes, LoRA, bad input."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flow_grpo
import rewards
from flow_grpo import Args, train
from rewards import BadInput, command_line, report
from rewards.report import pictures
from small_runs import ScoresWhenWaitedFor, command, metrics, saved

ROOT = Path(__file__).resolve().parents[2]
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture
def small(small, write_prompts):
    """Flags of a run that evaluates a paraphrased file too, and that saves before its end."""
    flags = dict(
        prompts=write_prompts(train=10, eval=6, eval_paraphrased=2),
        num_images_per_prompt=3,
        num_iterations=4,
        eval_every=2,
        eval_wordings=True,
        save_every=2,
    )
    return lambda **changes: small(**flags | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(sde_window=0),
        dict(sde_type="cps", ratio_norm=True),
        dict(guidance_scale=2.0, kl_coef=0.01),
        dict(lora_rank=2, kl_coef=0.01, gradient_checkpointing=True),
        dict(rewards="jpeg", sde_window=1),
        dict(rewards="geneval:1,jpeg:0.1", advantage_std="group", micro_batch_size=2),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_pictures")
def test_every_variant_runs_and_starts_on_policy(small, changes):
    run_dir = train(Args(**small(num_iterations=2, **changes)))
    rows = metrics(run_dir)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(row["losses/ratio_first"] < 1e-5 for row in rows[1:])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["charts/num_images"] == 6
    if changes.get("kl_coef"):
        assert rows[2]["losses/kl"] > 0


def test_before_after_holds_both_pictures_whole(tmp_path, monkeypatch):
    sheets = {"000000": ("red", 4), "000001": ("green", 4), "000001_enhanced": ("blue", 9)}

    def save_samples(path, evaluation):
        suffix = evaluation.name.removeprefix("eval")
        color, height = sheets[f"{len(log.rows):06d}{suffix}"]
        Image.new("RGB", (6, height), color).save(path, "PNG")

    monkeypatch.setattr(report.log, "save_samples", save_samples)
    log = report.Log(tmp_path / "run", flow_grpo.__file__, Args(), -1)
    for iteration in (0, 1):
        evaluations = []
        for name in ("eval", "eval_enhanced")[: iteration + 1]:
            scores, pictures = {"reward": {0: 0.5}}, {0: torch.zeros(3, 4, 4)}
            evaluations.append(report.Evaluation(name, [{}], scores, {0: "a text"}, pictures, {}))
        log.write({"iteration": iteration, "charts/num_images": iteration}, evaluations)
    log.close()
    both = np.array(Image.open(log.run_dir / "before_after.png"))
    red = (both == (255, 0, 0)).all(2)
    blue = (both == (0, 0, 255)).all(2)
    assert not (both == (0, 128, 0)).all(2).any()  # of the latest sheets, the last
    # each is whole, and the first is above the other. Titles with rewrites make a picture higher
    red_rows, blue_rows = (mask.any(1).nonzero()[0] for mask in (red, blue))
    assert red[red_rows].sum() == red.sum() == 4 * 6 and np.ptp(red_rows) == 3
    assert blue[blue_rows].sum() == blue.sum() == 9 * 6 and np.ptp(blue_rows) == 8
    assert red_rows.max() < blue_rows.min()


def test_the_curve_is_the_rewards_and_its_legend_hides_nothing(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    names = [
        f"eval/{name}{mode}" for name in ("reward", "geneval", "reward/colors") for mode in ("", "_loop")
    ]
    rows = [{"charts/num_images": n, **dict.fromkeys(names, n / 10)} for n in (0, 4)]
    rows.append({"charts/num_images": 8, "eval/reward_loop": 0.9})
    pictures.save_curve(tmp_path / "reward.png", rows)
    (axes,) = figures[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["eval/reward"] == [[0, 0], [4, 0.4]]
    assert curves.pop("eval/reward_loop") == [[0, 0], [4, 0.4], [8, 0.9]] and len(curves) == 1
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1


def test_run_folder_and_last_lines(small, capsys):
    run_dir = train(Args(**small()))
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert {"args.json", "metrics.jsonl", "reward.png", "before_after.png", "flow_grpo.py"} <= names
    assert {"samples/000000.png", "samples/000004.png", "checkpoint/state.pt"} <= names
    printed = capsys.readouterr().out.splitlines()
    assert str(run_dir / "before_after.png") in printed[-1] and " s, " in printed[-2]
    assert any("eval/geneval_strict_paraphrased" in line and "before" in line for line in printed)
    documented = (ROOT / "docs/flow_grpo.md").read_text()
    logged = {
        name for line in (run_dir / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    for name in logged - {"iteration"}:
        stem = name
        if name.startswith(("eval/", "rewards/", "pictures/")):
            stem = name.split("/")[0] + "/"
        assert f"`{stem}" in documented, f"{name} is not explained in docs/flow_grpo.md"


@pytest.mark.usefixtures("without_pictures")
def test_same_seed_repeats_bit_for_bit_and_another_does_not(small):
    first, second = (metrics(train(Args(**small(output_dir=small()["output_dir"] + x)))) for x in "ab")
    other = metrics(train(Args(**small(seed=2))))
    assert first == second
    assert first[0] == other[0]  # the evaluation of the base model has the same noise in every run
    assert first[1] != other[1]


@pytest.mark.usefixtures("without_pictures")
def test_micro_batch_size_does_not_change_the_result(small):
    whole, halves = (metrics(train(Args(**small(num_iterations=1, micro_batch_size=n)))) for n in (3, 1))
    for name, value in whole[1].items():
        assert halves[1][name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.usefixtures("without_pictures")
def test_resume_after_an_interruption_equals_an_uninterrupted_run(small, interrupted_run):
    expected = metrics(train(Args(**small(num_iterations=5, output_dir=small()["output_dir"] + "a"))))
    run_dir = interrupted_run(train, Args(**small(num_iterations=5)), iteration=3)
    assert len(metrics(run_dir)) == 4 and saved(run_dir)["progress"] == {"iteration": 2}
    train(Args(resume=str(run_dir)))
    assert metrics(run_dir) == expected


def test_three_kills_one_during_a_checkpoint_write_change_nothing(small):
    flags = small(num_iterations=6, save_every=1, eval_every=3, num_images_per_prompt=8)
    Path(flags["output_dir"]).mkdir()  # else it comes and goes while the run checks that it can be written
    expected = metrics(train(Args(**flags | {"output_dir": flags["output_dir"] + "a"})))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def kill_when(arguments, ready):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        while not ready() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"

    def run():
        return next(Path(flags["output_dir"]).glob("*"), Path("none"))

    def rows():
        return len(metrics(run())) if (run() / "metrics.jsonl").exists() else 0

    def has_begun():
        return (run() / "checkpoint/state.pt").exists() and rows() >= 2

    kill_when(command("flow_grpo.py", flags), has_begun)
    resume = command("flow_grpo.py", {"resume": run()})
    temporary = run() / "checkpoint/state.pt.tmp"
    temporary.unlink(missing_ok=True)
    kill_when(resume, temporary.exists)
    torn = temporary.exists()  # the half-written file of a checkpoint
    have, delay = rows(), random.uniform(0, 0.3)
    kill_when(resume, lambda: rows() > have and time.sleep(delay) is None)
    assert subprocess.run(resume, env=environment, capture_output=True).returncode == 0
    assert torn, "the second kill missed the write"
    assert metrics(run()) == expected


def test_two_processes_give_the_first_loss_and_the_images_of_one(small, start_processes):
    flags = small(num_iterations=1, num_prompts_per_iteration=4)
    wait = start_processes(flow_grpo, flags)
    alone = train(Args(**flags | {"output_dir": flags["output_dir"] + "a"}))
    both = wait()
    one, two = metrics(alone), metrics(both)
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    sheets = [np.asarray(Image.open(run / "samples/000000.png")).astype(int) for run in (alone, both)]
    # of 255: rows meet in other batches, and are rounded to 8 bits
    assert abs(sheets[0] - sheets[1]).max() <= 2
    for name in ("losses/policy_loss", "losses/grad_norm", "charts/reward_mean", "losses/ratio_first"):
        assert two[1][name] == pytest.approx(one[1][name], abs=1e-5), name


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        ["a red circle", "two squares"],
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=0,
        generator=generator,
        output_type="pt",
    ).images


@pytest.mark.usefixtures("without_pictures")
def test_saved_lora_gives_the_trained_images_in_plain_diffusers(small):
    args = Args(**small(lora_rank=4, learning_rate=3e-3))
    run_dir = train(args)
    trained, transformer, _ = flow_grpo.load_model(args, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(flow_grpo.trained_parameters(transformer).values())
    assert flow_grpo.load_checkpoint(run_dir, transformer, optimizer) == {"iteration": 4}
    plain = StableDiffusion3Pipeline.from_pretrained("tiny/sd3", dtype=torch.float32, **NO_T5)
    base = generate(plain)
    plain.load_lora_weights(run_dir / "lora")
    assert (generate(plain) - generate(trained)).abs().max() < 1e-4
    assert (generate(plain) - base).abs().max() > 1e-2
    with safe_open(run_dir / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        assert '"transformer.lora_alpha": 8' in str(file.metadata())


@pytest.mark.usefixtures("without_pictures")
def test_saved_transformer_gives_the_trained_weights_in_plain_diffusers(small):
    run_dir = train(Args(**small()))
    exported = SD3Transformer2DModel.from_pretrained(run_dir / "transformer").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in saved(run_dir)["weights"].items())
    base = SD3Transformer2DModel.from_pretrained("tiny/sd3/transformer").state_dict()
    assert any(not torch.equal(exported[name], value.float()) for name, value in base.items())


def exported_weights(run_dir):
    """{name: tensor} of what a run exports, LoRA or transformer."""
    (path,) = [*run_dir.glob("lora/*.safetensors"), *run_dir.glob("transformer/*.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("damage", ["missing", "stale"])
@pytest.mark.parametrize("rank, folder", [(0, "transformer"), (2, "lora")])
@pytest.mark.usefixtures("without_pictures")
def test_the_export_is_made_again_on_resume(small, rank, folder, damage):
    # a kill between the last checkpoint and its export leaves none, or an older one
    run_dir = train(Args(**small(lora_rank=rank, num_iterations=2)))
    expected = exported_weights(run_dir)
    if damage == "missing":
        shutil.rmtree(run_dir / folder)
    else:
        (path,) = (run_dir / folder).glob("*.safetensors")
        save_file({name: torch.zeros_like(value) for name, value in expected.items()}, path)
    train(Args(resume=str(run_dir)))
    found = exported_weights(run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class SomeNaN(ScoresWhenWaitedFor):
    """A reward that cannot score the first `bad` images of a batch."""

    def __init__(self, bad):
        self.bad = bad

    def details(self, images, prompts, metadata):
        values = images.flatten(1).mean(1)
        values[: self.bad] = float("nan")
        return {"reward": values}


@pytest.mark.usefixtures("without_pictures")
def test_nan_rewards_are_masked_and_counted(small, monkeypatch):
    monkeypatch.setattr(rewards, "build", lambda *_: SomeNaN(1))
    rows = metrics(train(Args(**small(num_iterations=1, num_images_per_prompt=12))))
    assert rows[1]["charts/nan_fraction"] == pytest.approx(1 / 12)  # two micro-batches of twelve
    assert math.isfinite(rows[1]["losses/policy_loss"]) and rows[1]["losses/grad_norm"] > 0


@pytest.mark.parametrize("bad", [2, 12])  # of the twelve images of a micro-batch
@pytest.mark.usefixtures("without_pictures")
def test_too_many_nan_rewards_stop_the_run_and_keep_the_checkpoint(small, monkeypatch, bad):
    monkeypatch.setattr(rewards, "build", lambda *_: SomeNaN(bad))
    with pytest.raises(SystemExit) as stopped:
        command_line.execute(train, Args(**small(num_images_per_prompt=12)))
    assert stopped.value.code == 1
    (run_dir,) = Path(small()["output_dir"]).iterdir()
    assert saved(run_dir)["progress"] == {"iteration": 0}


@pytest.mark.usefixtures("without_pictures")
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(small, monkeypatch):
    clipped_loss, calls = flow_grpo.clipped_loss, []

    def poisoned(*arguments):
        calls.append(1)
        factor = float("nan") if len(calls) > 12 else 1.0  # from the fourth iteration on
        return factor * clipped_loss(*arguments)

    monkeypatch.setattr(flow_grpo, "clipped_loss", poisoned)
    with pytest.raises(FloatingPointError):
        train(Args(**small()))
    (run_dir,) = Path(small()["output_dir"]).iterdir()
    state = saved(run_dir)
    assert state["progress"]["iteration"] == 2 and len(metrics(run_dir)) == 4
    assert all(value.isfinite().all() for value in state["weights"].values())


def bad_inputs():
    def change(**changes):
        return lambda flags, tmp_path: flags | changes

    def file(name, text, **changes):
        def write(flags, tmp_path):
            (tmp_path / name).write_text(text)
            return (
                flags
                | {"prompts": str(tmp_path / name), "eval_prompts": str(tmp_path / "eval.jsonl")}
                | changes
            )

        return write

    def family(flags, tmp_path):
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        return flags | {"model": str(tmp_path)}

    yield "unknown reward", change(rewards="beauty"), "unknown reward 'beauty'"
    yield "bad weight", change(rewards="geneval:heavy"), "not a number"
    yield "missing prompts", change(prompts="nowhere/train.jsonl"), "does not exist"
    yield "missing eval prompts", change(eval_prompts="nowhere.jsonl"), "does not exist"
    yield "no eval prompts", change(prompts="tiny/prompts/fold_0/dev.jsonl"), "--eval-prompts"
    yield "empty prompts", file("empty.jsonl", "\n\n"), "is empty"
    yield "bad line", file("bad.jsonl", '{"prompt": "a"}\nnot json\n'), "line 2"
    yield "no metadata", file("plain.txt", "a red circle\n"), "'a red circle'): geneval"
    yield "no quoted text", change(rewards="ocr"), "double quotes"
    yield "prompts do not divide", change(num_prompts_per_iteration=3), "multiple of 2"
    yield "group of one", change(num_images_per_prompt=1), "at least 2"
    yield "window too long", change(sde_window=4), "--sde-window 4"
    yield "no noise", change(noise_level=0.0), "--noise-level"
    yield "not a pipeline", change(model="tiny/prompts"), "model_index.json"
    yield "another family", family, "is a StableDiffusionPipeline; supported"
    yield "resume of nothing", change(resume="nowhere"), "cannot resume"
    if not torch.cuda.is_available():
        yield "no cuda", change(device="cuda"), "--device cpu"


@pytest.mark.parametrize(
    ("make", "message"), [case[1:] for case in bad_inputs()], ids=[c[0] for c in bad_inputs()]
)
def test_bad_input_is_one_line_exit_code_2_and_no_run_folder(small, tmp_path, capsys, make, message):
    with pytest.raises(SystemExit) as stopped:
        command_line.execute(train, Args(**make(small(), tmp_path)))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path(small()["output_dir"]).exists()


@pytest.mark.usefixtures("without_pictures")
def test_resume_of_a_damaged_or_foreign_run_is_refused(small, tmp_path):
    run_dir = train(Args(**small(num_iterations=2)))

    def copy_with(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_dir, copy)
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        return Args(resume=str(copy))

    for name, change, message in (
        ("args.json", lambda text: text[:40], "cannot resume"),
        ("args.json", lambda text: text.replace(b'"flow_grpo"', b'"fdfo"'), "another algorithm"),
        ("args.json", lambda text: text.replace(b'"seed"', b'"sead"'), "cannot resume"),
        ("checkpoint/state.pt", lambda data: data[: len(data) // 2], "damaged"),
        ("metrics.jsonl", lambda text: text[:30], "damaged"),
    ):
        with pytest.raises(BadInput, match=message):
            train(copy_with(name, change))


def test_track_writes_an_offline_wandb_run(small, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = train(Args(**small(num_iterations=1, track=True)))
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
