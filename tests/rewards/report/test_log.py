"""The log: rows that are valid JSON, pictures at every evaluation, and lines on the terminal."""

import errno
import io
import json
import math
import os
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from rewards import BadInput, report
from rewards.prompts import PromptFile
from rewards.report import files, pictures
from rewards.report.evaluation import Evaluation, merge
from rewards.report.log import format_duration


def make_evaluation(name="eval", count=16, score=0.5, caption="a red circle", films=None, side=8):
    shown = {row: torch.full((3, side, side), 0.5) for row in range(count)}
    scores = {"reward": dict.fromkeys(range(count), score)}
    captions = dict.fromkeys(range(count), caption)
    return Evaluation(name, [{}] * count, scores, captions, shown, films or {})


@pytest.fixture
def log(world):
    args = miniature.Args()
    return report.Log(Path("runs/x"), miniature.__file__, args, -1)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read_rows(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_nan_and_infinity_are_null(log):
    log.write(
        {"iteration": 0, "charts/num_images": 0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1}, []
    )
    assert read_rows(log.run_dir) == [
        {"iteration": 0, "charts/num_images": 0, "a": None, "b": None, "c": None, "d": 1}
    ]


def test_an_evaluation_without_a_score_goes_through(log, capsys):
    for iteration in (0, 1):
        metrics = {"iteration": iteration, "charts/num_images": iteration}
        log.write(metrics, [make_evaluation(score=math.nan)])
    log.close()
    assert "not scored" in capsys.readouterr().out
    assert read_rows(log.run_dir)[1]["eval/reward"] is None


def test_the_pictures_are_drawn_at_every_evaluation(log):
    sizes = []
    for iteration in (0, 1, 2):
        metrics = {"iteration": iteration, "charts/num_images": iteration}
        log.write(metrics, [make_evaluation(score=iteration)] if iteration != 1 else [])
        with Image.open(log.run_dir / "before_after.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] and sizes[2] == (sizes[0][0], 2 * sizes[0][1])
    assert (log.run_dir / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not list(log.run_dir.rglob("*.tmp"))


def test_before_after_says_what_it_shows(world, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "rewards.report.log.save_before_after", lambda path, sheets: shown.append(list(sheets))
    )
    monkeypatch.setattr("rewards.report.log.write_aside", files.contextlib.nullcontext)
    log = report.Log.__new__(report.Log)
    log.run_dir = world
    log.num_iterations = 24
    (world / "samples").mkdir()
    for name in (
        "000000",
        "000000_paraphrased",
        "000000_hard",
        "000012",
        "000012_loop",
        "000012_paraphrased",
        "000012_paraphrased_loop",
        "000012_hard",
        "000012_hard_loop",
        "000012_loop_films",
    ):
        Image.new("RGB", (4, 4)).save(world / f"samples/{name}.png")
    log.rows = [{"iteration": 0, "charts/num_images": 0, "eval/reward": 0.25}]
    log.draw_overview()
    log.rows.append({"iteration": 12, "charts/num_images": 3, "eval/reward": 0.5, "eval/reward_loop": 0.75})
    log.draw_overview()
    log.rows[1]["eval/reward_loop"] = None
    log.draw_overview()
    (world / "samples/000012_loop.png").write_bytes(b"torn")
    log.draw_overview()
    base = "Base model: mean held-out reward 0.250"
    assert shown == [
        [base],
        [base, "Iteration 12 of 24 (loop): mean held-out reward 0.750"],
        [base, "Iteration 12 of 24 (loop): mean held-out reward not scored"],
        [base],
    ]


def test_before_after_holds_both_pictures_whole(tmp_path):
    low, high = Image.new("RGB", (600, 4), "red"), Image.new("RGB", (500, 9), "blue")
    pictures.save_before_after(tmp_path / "both.png", {"Base model": low, "Iteration 3": high})
    both = np.array(Image.open(tmp_path / "both.png"))
    assert both.shape == (40 + 4 + 40 + 9, 600, 3)
    assert (both[40:44] == (255, 0, 0)).all() and (both[84:, :500] == (0, 0, 255)).all()
    for title in (both[:40], both[44:84]):
        assert title.min() == 0 and (title[0] == 255).all()  # black letters on white


def test_close_says_what_changed(log, capsys):
    log.rows = [
        {"iteration": 0, "charts/num_images": 0, "eval/reward": 0.25, "eval/jpeg": 1, "eval/reward/tag": 0.1},
        {"iteration": 1, "charts/num_images": 9},
        {"iteration": 2, "charts/num_images": 18, "eval/reward": 0.5},
    ]
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "eval/jpeg                            before 1.000   after 1.000   change +0.000",
        "eval/reward                          before 0.250   after 0.500   change +0.250",
    ]
    assert lines[3].startswith("18 images, 0 s, folder runs/x") and "before_after.png" in lines[4]


@pytest.mark.parametrize("rows", [[], [{"iteration": 0}], [{"iteration": 0, "eval/reward": None}]])
def test_close_never_fails(log, rows):
    log.rows = rows
    log.draw_overview()
    log.close()


def test_a_run_that_began_in_the_same_second_is_not_written_over(log):
    before = (log.run_dir / "args.json").read_bytes()
    with pytest.raises(BadInput, match="another run began that second"):
        report.Log(log.run_dir, miniature.__file__, miniature.Args(seed=2), -1)
    assert (log.run_dir / "args.json").read_bytes() == before


# === drawing ===


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a",
        "word " * 200,
        "a" * 500,
        "\n\n",
        "\0\x1b[31m",
        "\ud800",
        "Привет κόσμε 日本 🙂",
        "$x^2$ \\frac",
    ],
)
def test_any_caption_can_be_drawn(tmp_path, caption):
    films = {0: [(None, caption), (torch.zeros(8, 8, 3), caption)], 1: [(None, caption)]}
    evaluation = make_evaluation(caption=caption, films=films)
    pictures.save_samples(tmp_path / "samples.png", evaluation)
    pictures.save_films(tmp_path / "films.png", evaluation)
    for name in ("samples.png", "films.png"):
        Image.open(tmp_path / name).load()


@pytest.mark.parametrize("count, rows", [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_a_sheet_has_eight_pictures_in_a_row(tmp_path, count, rows):
    pictures.save_samples(tmp_path / "samples.png", make_evaluation(count=count))
    width, height = Image.open(tmp_path / "samples.png").size
    assert width == 8 * 200 + 8 and height == rows * (192 + 8 + 15 + 15 + 4) + 8


def test_an_edit_stands_beside_its_source(tmp_path):
    """The source is shown as the model gets it: the square at its centre."""
    source = Image.new("RGB", (200, 100), (255, 0, 0))
    source.paste((0, 0, 255), (50, 0, 150, 100))
    source.save(tmp_path / "source.png")
    evaluation = make_evaluation(count=2)._replace(metadata=[{"source": str(tmp_path / "source.png")}] * 2)
    pictures.save_samples(tmp_path / "samples.png", evaluation)
    sheet = np.array(Image.open(tmp_path / "samples.png"))
    top = sheet.shape[0] - 8 - 192
    colors = [tuple(sheet[top + 96, 8 + 200 * column + 96]) for column in range(5)]
    blue, grey, white = (0, 0, 255), (128, 128, 128), (255, 255, 255)
    assert colors == [blue, grey, blue, grey, white]


@pytest.mark.parametrize("side", [8, 64, 192, 512, 1000])
def test_a_picture_of_any_size_fills_its_place(side):
    image = pictures.to_image(torch.full((side, side, 3), 0.2))
    assert image.size == (192, 192) and np.unique(image).tolist() == [51]


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_pixels_of_small_pictures_stay_squares(in_8_bits):
    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    in_bytes = (picture * 255).round().byte()
    pixels = np.array(pictures.to_image(in_bytes if in_8_bits else picture))
    expected = in_bytes.numpy().repeat(3, 0).repeat(3, 1)
    assert (pixels == expected).all()


def test_a_film_shows_what_was_seen(tmp_path):
    """Previews are kept in 8 bits, as the policy saw them, and the image itself in [0, 1]."""
    preview = torch.tensor([200, 30, 60], dtype=torch.uint8).expand(64, 64, 3)
    evaluation = make_evaluation(films={0: [(preview.numpy(), "seen")]})
    pictures.save_films(tmp_path / "films.png", evaluation)
    colors = Image.open(tmp_path / "films.png").convert("RGB").getcolors(10**6)
    assert (192 * 192, (200, 30, 60)) in colors


def test_the_curve_is_the_rewards_and_its_legend_hides_nothing(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    rows = []
    for number in (0, 4):
        row = {"charts/num_images": number}
        for name in ("reward", "geneval", "reward/colors"):
            row[f"eval/{name}"] = number / 10
            row[f"eval/{name}_loop"] = number / 10
        rows.append(row)
    rows.append({"charts/num_images": 8, "eval/reward_loop": 0.9, "eval/reward": None})
    pictures.save_curve(tmp_path / "reward.png", rows)
    (axes,) = figures[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {"eval/reward": [[0, 0], [4, 0.4]], "eval/reward_loop": [[0, 0], [4, 0.4], [8, 0.9]]}
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1


# === evaluation ===


def test_only_what_is_shown_is_kept_in_memory():
    batches = []

    def sample(prompts, metadata, rows):
        batches.append(torch.zeros(len(rows), 3, 4, 4))
        return report.Samples(batches[-1], captions=prompts)

    file = PromptFile([str(row) for row in range(100)], [{} for _ in range(100)])
    for num_shown, shown in ((0, []), (4, [0, 25, 50, 75])):
        evaluation = report.evaluate("eval", sample, file, miniature.Brightness(), 32, num_shown=num_shown)
        assert list(evaluation.pictures) == list(evaluation.captions) == shown
        assert list(evaluation.scores["reward"]) == list(range(100))
        for picture in evaluation.pictures.values():
            assert picture.untyped_storage().nbytes() == 3 * 4 * 4 * 4  # not of a whole batch


@pytest.mark.parametrize("eval_wordings", [False, True])
def test_other_wordings_are_evaluated_where_they_are_asked_for_before_and_after_only(eval_wordings):
    args = miniature.Args(num_iterations=10, eval_every=4, eval_wordings=eval_wordings)
    files = {"eval": "a file", "eval_hard": "another"}
    names = {}
    for iteration in range(11):
        names[iteration] = list(report.files_to_evaluate(files, iteration, args))
    ends = ["eval", "eval_hard"] if eval_wordings else ["eval"]
    assert {iteration: own for iteration, own in names.items() if own} == {
        0: ends,
        4: ["eval"],
        8: ["eval"],
        10: ends,
    }


def test_every_noise_is_an_image_of_its_own_with_scores_of_its_own(log):
    """The first noise is that of an evaluation with one noise. Its pictures are the ones that are shown."""

    def sample(prompts, metadata, numbers):
        images = torch.stack([torch.full((3, 4, 4), number / 8) for number in numbers])
        return report.Samples(images, captions=prompts)

    file = PromptFile(["a", "b", "c"], [{"tag": "x"}, {}, {"tag": "y"}])
    one = report.evaluate("eval", sample, file, miniature.Brightness(), 2)
    two = report.evaluate("eval_loop", sample, file, miniature.Brightness(), 2, num_noises=2)
    assert one.captions == two.captions == {0: "a", 1: "b", 2: "c"}
    assert two.scores == {"reward": {number: number / 8 for number in range(6)}}
    two.scores["reward"][4] = math.nan
    log.write({"iteration": 0, "charts/num_images": 0}, [one, two])
    (row,) = read_rows(log.run_dir)
    assert row["eval/reward"] == 1 / 8 and row["eval/reward_loop"] == (0 + 1 + 2 + 3 + 5) / 5 / 8
    assert row["eval/reward_loop/x"] == 1.5 / 8 and row["eval/reward_loop/y"] == 3.5 / 8

    lines = (log.run_dir / "scores/000000.jsonl").read_text().splitlines()
    images = [json.loads(line, parse_constant=refuse) for line in lines]
    assert len(images) == 3 + 6
    assert images[2] == {"evaluation": "eval", "row": 2, "noise": 0, "tag": "y", "reward": 0.25}
    assert images[3 + 4] == {"evaluation": "eval_loop", "row": 1, "noise": 1, "reward": None}


# === lines on the terminal ===


def test_what_takes_time_is_announced_before_it_is_done(capsys, monkeypatch):
    times = iter([10.0, 11.5])
    monkeypatch.setattr("rewards.report.log.time.time", lambda: next(times))
    with report.announce("loading a model"):
        assert capsys.readouterr().out == "loading a model ..."
    assert capsys.readouterr().out == " 1.5 s\n"


def test_nothing_is_said_twice_by_the_processes_of_a_run(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with report.announce("loading a model"):
        pass
    assert capsys.readouterr().out == ""


def test_an_error_while_something_is_loaded_is_on_a_line_of_its_own(capsys):
    with pytest.raises(BadInput), report.announce("loading a model"):
        raise BadInput("there is none")
    assert capsys.readouterr().out == "loading a model ...\n"


def test_a_row_says_how_far_the_run_is_and_what_the_base_model_scored(log, capsys, monkeypatch):
    log.num_iterations = 41
    monkeypatch.setattr("rewards.report.log.time.time", lambda: now)
    capsys.readouterr()
    rollout = {"charts/reward_mean": 0.5, "perf/images_per_second": 30.2}
    now = 100
    log.write({"iteration": 0, "charts/num_images": 0}, [make_evaluation(score=0.25)])
    now = 130
    log.write({"iteration": 1, "charts/num_images": 9} | rollout, [])
    now = 140
    log.write({"iteration": 2, "charts/num_images": 18} | rollout, [make_evaluation(score=0.75)])
    assert capsys.readouterr().out.splitlines() == [
        "[0/41] eval/reward 0.250",
        "[1/41] reward 0.500, 30 images/s, 20 min left",
        "[2/41] reward 0.500, 30 images/s, 13 min left",
        "[2/41] eval/reward 0.750 (base model 0.250)",
    ]


@pytest.mark.parametrize(
    "seconds, words", [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_a_duration_has_a_fitting_unit(seconds, words):
    assert format_duration(seconds) == words


def test_the_shares_of_all_processes_are_one_evaluation():
    shares = [make_evaluation(count=0), make_evaluation(count=2)]
    whole = merge(shares, ["metadata"])
    assert whole.metadata == ["metadata"] and whole.scores == {"reward": {0: 0.5, 1: 0.5}}


# === files ===


def test_a_full_disk_is_told_by_every_library():
    full = OSError(28, "No space left on device")
    assert files.find_cause(full) is full
    try:
        try:
            raise full
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save does
    except RuntimeError as error:
        assert files.find_cause(error) is full
    safetensors = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert files.find_cause(safetensors).errno == 28
    assert files.find_cause(ValueError("a mistake in drawing")) is None


@pytest.mark.parametrize("number", range(4))
def test_ctrl_c_and_a_full_disk_inside_torch_save(tmp_path, number):
    class Interrupted(io.BytesIO):
        def __init__(self, error):
            super().__init__()
            self.error = error
            self.calls = 0

        def write(self, data):
            self.calls += 1
            if self.calls > number:
                raise self.error
            return super().write(data)

    state = {"a": torch.zeros(100_000), "b": torch.zeros(100_000)}
    with pytest.raises(KeyboardInterrupt), files.write_aside(tmp_path / "x"):
        torch.save(state, Interrupted(KeyboardInterrupt()))
    with pytest.raises(files.CannotWrite, match="No space left"), files.write_aside(tmp_path / "x"):
        torch.save(state, Interrupted(OSError(28, "No space left on device")))


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOENT", "EIO"])
def test_what_cannot_be_written_is_one_line(tmp_path, number):
    error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    (tmp_path / "x").write_bytes(bytes(2_000_000))
    with pytest.raises(files.CannotWrite) as failure, files.write_aside(tmp_path / "x") as temporary:
        temporary.write_bytes(bytes(3_000_000))
        raise error
    line = str(failure.value)
    assert line.startswith(f"cannot write {tmp_path / 'x'}: {error.strerror}")
    assert ("it needs at least 3.0 MB, and " in line) == (number in ("ENOSPC", "EDQUOT"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").stat().st_size == 2_000_000


@pytest.mark.parametrize("number, fails", [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)])
def test_a_file_system_that_cannot_synchronise_is_no_obstacle(tmp_path, monkeypatch, number, fails):
    def fsync(file):
        raise OSError(getattr(errno, number), "fsync")

    monkeypatch.setattr(files.os, "fsync", fsync)
    if fails:
        with pytest.raises(files.CannotWrite):
            files.write_text(tmp_path / "x", "text")
    else:
        files.write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").exists() == (not fails)


def test_a_mistake_in_drawing_is_no_full_disk(tmp_path):
    with pytest.raises(ValueError, match="a mistake"), files.write_aside(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise ValueError("a mistake")
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("old", "new"):
        with files.replace_folder(tmp_path / "x") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path, monkeypatch):
    with files.replace_folder(tmp_path / "x") as folder:
        (folder / "old").write_text("old")
    replace = files.os.replace

    def fail(source, target):
        if source.name == "x.tmp":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(files.CannotWrite, match="Permission denied"):
        with files.replace_folder(tmp_path / "x") as folder:
            (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "old"]
