"""The moving picture of a run: a frame per evaluation, with its score."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark import make_moving_picture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    """A run's folder with three iterations, of which the first and the last were evaluated."""
    rows = []
    (tmp_path / "samples").mkdir()
    for iteration, color in enumerate(("red", "green", "blue")):
        row = {"iteration": iteration, "charts/num_images": 1000 * iteration}
        if color != "green":
            row["eval/geneval_strict"] = 0.25 * (1 + iteration)
            Image.new("RGB", (900, 60), color).save(tmp_path / "samples" / f"{iteration:06d}.png")
        rows.append(json.dumps(row))
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_each_evaluation_has_a_frame_with_its_own_pictures(run):
    words = [sys.executable, "-m", "benchmark.make_moving_picture", str(run), str(run / "moving.png")]
    subprocess.run(words, check=True, cwd=ROOT)
    moving = Image.open(run / "moving.png")
    assert moving.n_frames == 2 and moving.size == (900, 60 + make_moving_picture.TITLE_HEIGHT)
    bars = []
    for number, color in enumerate(((255, 0, 0), (0, 0, 255))):
        moving.seek(number)
        pixels = np.array(moving.convert("RGB"))
        assert (pixels[-60:] == color).all()
        bars.append((pixels[make_moving_picture.TITLE_HEIGHT - 3] == 0).all(axis=1).sum())
    assert bars[0] <= 1 and bars[1] == 900  # how far the run is


def test_the_title_says_what_was_measured():
    row = {"iteration": 16, "charts/num_images": 4096, "eval/geneval_strict_loop": 0.625}
    last_row = {"iteration": 32}
    expected = "iteration 16 of 32, 4,096 images sampled, strict GenEval on held-out prompts: 0.625"
    assert make_moving_picture.title(row, last_row, "_loop") == expected


def test_a_run_with_one_evaluation_does_not_move(run):
    (run / "samples" / "000002.png").unlink()
    words = [sys.executable, "-m", "benchmark.make_moving_picture", str(run), str(run / "moving.png")]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "pictures of 1 evaluations: two are needed" in result.stderr
