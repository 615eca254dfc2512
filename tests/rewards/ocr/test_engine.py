"""The real OCR engine on rendered text, and its workers: order, faults, ends."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import flow_grpo
from rewards.ocr import engine
from rewards.ocr import reward as ocr
from tests.rewards.drawing import to_batch

ROOT = Path(__file__).resolve().parents[3]


WORDS = (
    "Hello,World,Flow Matching,Coffee Shop,OPEN 24 HOURS,Diffusion,Happy Birthday,Exit 42,New York,Reward"
).split(",")


def render(text, kind, seed):
    """(512, 512, 3) uint8: the text in the middle, dark on light."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (512, 512), (235, 235, 225))
    if kind in ("textured", "noisy"):
        patches = rng.integers(140, 256, (6, 6, 3)) if kind == "textured" else np.full((6, 6, 3), 230)
        image = Image.fromarray(patches.astype(np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    size = int(rng.integers(36, 60))
    color = tuple(int(value) for value in rng.integers(0, 90, 3))
    draw = ImageDraw.Draw(image)
    draw.text((256, 256), text, fill=color, font=ImageFont.load_default(size=size), anchor="mm")
    if kind == "rotated":
        image = image.rotate(12, resample=Image.Resampling.BICUBIC, fillcolor=(235, 235, 225))
    pixels = np.array(image).astype(float)
    pixels += rng.normal(0, 12, pixels.shape) if kind == "noisy" else 0
    return pixels.clip(0, 255).astype(np.uint8)


def signs(words):
    return [f'a sign that says "{word}" on a wall' for word in words]


@pytest.fixture(scope="module")
def reward():
    prompts = signs(WORDS)
    return ocr.make_ocr([{"prompt": prompt} for prompt in prompts], "cpu")


def test_rendered_text_is_read(reward):
    kinds = ("plain", "noisy", "textured", "rotated")
    cases = [(WORDS[i % 10], kinds[i % 4]) for i in range(30)]
    images = to_batch([render(word, kind, seed) for seed, (word, kind) in enumerate(cases)])
    values = reward(images, signs(word for word, _ in cases), [{}] * 30)
    assert values.shape == (30,) and values.dtype == torch.float32
    assert values.mean() >= 0.95, [(case, value) for case, value in zip(cases, values.tolist()) if value < 1]
    wrong = reward(images[:4], signs(["zzzz", "qqqq", "vvvv", "jjjj"]), [{}] * 4)
    assert wrong.max() <= 0.25


def test_images_without_text_score_exactly_zero(reward):
    noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    blank = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 256, 256)
    assert reward(torch.cat([blank, noise]), signs(WORDS[:4]), [{}] * 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_float_type_is_read(reward, dtype):
    images = to_batch([render("Hello", "plain", 0)]).to(dtype)
    assert reward(images, signs(["Hello"]), [{}]).tolist() == [1]


def test_colours_reach_the_engine_in_the_order_it_expects(reward, monkeypatch):
    class Engine:
        def __init__(self, params):
            pass

        def __call__(self, pixels, **options):
            assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
            seen.append(tuple(pixels[0, 0].tolist()))
            return type("Output", (), {"txts": None})

    import rapidocr

    seen = []
    monkeypatch.setattr(rapidocr, "RapidOCR", Engine)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    assert engine.make_engine()(red) == ""
    assert seen[-1] == (0, 0, 200)  # rapidocr takes arrays as BGR


def test_a_run_on_quoted_text_uses_the_engine(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(signs(WORDS[:2])))
    (tmp_path / "eval.txt").write_text(signs(["Welcome"])[0])
    flags = dict(num_prompts_per_iteration=2, num_images_per_prompt=2, num_iterations=1, device="cpu")
    flags |= dict(num_inference_steps=3, eval_num_inference_steps=2, output_dir=str(tmp_path / "runs"))
    run_dir = flow_grpo.train(flow_grpo.Args(rewards="ocr", prompts=str(tmp_path / "train.txt"), **flags))
    assert '"eval/ocr": 0.0' in (run_dir / "metrics.jsonl").read_text()  # the tiny model writes no such word


WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "rewards/ocr")!r})
import engine

def read(pixels):
    value = int(pixels[-1, -1, -1])
    print("other output")
    os.write(1, b"of any kind")
    if value == 251:
        raise MemoryError("no room")
    if value == 252:
        os._exit(1)
    time.sleep(30 if value == 253 else 0.05 * (value % 3))
    return str(value)

engine.serve(read)
"""


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return engine.Reader(2, [sys.executable, "-P", str(tmp_path / "worker.py")])


def greys(*values):
    """Images (B, 3, 8, 4), each of one value of 255."""
    return (torch.tensor(values).view(-1, 1, 1, 1) / 255).expand(-1, 3, 8, 4)


def test_workers_keep_the_order(reader):
    values = random.Random(0).sample(range(200), 24)
    assert reader(greys(*values)) == [str(value) for value in values]
    assert reader(greys(7)) == ["7"]
    assert reader.idle.qsize() == 2


def test_a_failing_engine_gives_nan_for_its_rows_alone(reader):
    with pytest.warns(UserWarning, match="MemoryError: no room"):
        values = ocr.OCR(reader)(greys(251, 12, 251, 251, 13), ['"12"'] * 5, [{}] * 5)
    torch.testing.assert_close(
        values, torch.tensor([math.nan, 1, math.nan, math.nan, 0.5]), equal_nan=True, rtol=0, atol=0
    )


def test_a_worker_that_dies_costs_one_row_and_is_replaced(reader):
    with pytest.warns(UserWarning, match="its process died"):
        assert reader(greys(1, 252, 3, 252, 252, 6)) == ["1", None, "3", None, None, "6"]
    assert reader(greys(7, 8, 9)) == ["7", "8", "9"]


def test_an_engine_that_does_not_start_is_an_error_not_nan():
    reader = engine.Reader(2, [sys.executable, "-c", "raise SystemExit(1)"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not start"):
            reader(greys(1, 2, 3))


def test_processes_are_shared_by_the_machines_trainers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert engine.Reader().idle.qsize() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert engine.Reader().idle.qsize() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert engine.Reader().idle.qsize() == 1


def alive(pid):
    """Whether a process runs; one that has ended and whose parent never asks for it does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


TRAINER = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import engine
reader = engine.Reader(2, [sys.executable, "-P", sys.argv[2]])
results = reader.threads.map(reader.read, np.array([1, 2, 1, 2], np.uint8).repeat(6).reshape(4, 1, 2, 3))
print(*results, flush=True)
workers = [reader.idle.get() for _ in range(2)]
print(*(worker.pid for worker in workers), flush=True)
for worker in workers:
    reader.idle.put(worker)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("ending", ["exit", "error", "kill"])
def test_workers_end_with_the_trainer(tmp_path, ending):
    (tmp_path / "worker.py").write_text(WORKER)
    last = {"exit": "", "error": "raise SystemExit(3)", "kill": "import time; time.sleep(60)"}[ending]
    (tmp_path / "trainer.py").write_text(TRAINER + last)
    words = [sys.executable, tmp_path / "trainer.py", ROOT / "rewards/ocr", tmp_path / "worker.py"]
    trainer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "1 2 1 2\n"
    workers = [int(word) for word in trainer.stdout.readline().split()]
    assert len(set(workers)) == 2
    if ending == "kill":
        assert all(map(alive, workers))
        trainer.send_signal(signal.SIGKILL)
    assert trainer.wait(timeout=60) == {"exit": 0, "error": 3, "kill": -signal.SIGKILL}[ending]
    deadline = time.time() + (30 if ending == "kill" else 0)  # else the trainer has waited for them
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
