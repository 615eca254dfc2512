"""The real OCR engine on rendered text, and its workers: order, faults, ends."""

import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
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
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT / "rewards/ocr")!r})
import engine

def read(pixels):
    value = int(pixels[-1, -1, -1])
    print("other output")
    os.write(1, b"of any kind")
    if value == 250:
        note(subprocess.Popen(["sleep", "600"]).pid)
        time.sleep(600)
    if value == 251:
        raise MemoryError("no room")
    if value == 252:
        os._exit(1)
    if value == 253:
        note(os.getpid())
        time.sleep(600)
    if value == 254:
        note(os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.05 * (value % 3))
    return str(value)

def note(pid):
    "Says in the worker's folder that a process has come this far."
    open(os.path.join(os.path.dirname(__file__), "stuck-" + str(pid)), "w").close()

if "starting" in sys.argv:
    engine.end_with_parent()
    note(os.getpid())
    time.sleep(600)
engine.serve(read)
"""


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return engine.Reader(2, [sys.executable, "-P", str(tmp_path / "worker.py")], image_seconds=2)


def greys(*values):
    """Images (B, 3, 8, 4), each of one value of 255."""
    return (torch.tensor(values).view(-1, 1, 1, 1) / 255).expand(-1, 3, 8, 4)


def test_workers_keep_the_order(reader):
    values = random.Random(0).sample(range(200), 24)
    assert reader(greys(*values)) == [str(value) for value in values]
    assert reader(greys(7)) == ["7"]
    assert reader.idle.qsize() == 2


def test_it_reads_in_the_background(reader):
    reader(greys(1, 2))  # the workers have started
    began = time.perf_counter()
    first = reader.start_reading(greys(*[2] * 20))  # a tenth of a second each
    second = reader.start_reading(greys(3, 4))
    assert time.perf_counter() - began < 0.5
    assert second() == ["3", "4"]
    assert first() == ["2"] * 20
    assert time.perf_counter() - began > 0.9


def test_a_reader_that_nobody_holds_ends_its_threads_and_workers(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    others = set(threading.enumerate())
    reader = engine.Reader(2, [sys.executable, "-P", str(tmp_path / "worker.py")])
    reader(greys(2, 2, 2, 2))
    threads = {thread for thread in threading.enumerate() if thread.name == "ocr"} - others
    worker = reader.idle.get()
    reader.idle.put(worker)
    del reader
    gc.collect()
    for thread in threads:
        thread.join(timeout=10)
    assert len(threads) == 2 and not any(thread.is_alive() for thread in threads)
    assert worker.poll() is not None


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


def state_of(pid):
    """The letter of /proc: S sleeps, T is stopped, Z has ended and nobody asked for it; "" for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def alive(pid):
    """Whether a process runs; one that has ended and whose parent never asks for it does not."""
    return state_of(pid) not in ("", "Z")


# ---- a worker that hangs ----
def test_a_worker_that_hangs_costs_one_row_and_is_replaced(reader):
    with pytest.warns(UserWarning, match="it took over 2 s and was replaced"):
        assert reader(greys(1, 253, 3, 4)) == ["1", None, "3", "4"]
    assert reader(greys(7, 8, 9)) == ["7", "8", "9"]


def test_a_worker_that_is_stopped_costs_one_row_and_is_replaced(reader):
    with pytest.warns(UserWarning, match="it took over 2 s and was replaced"):
        assert reader(greys(1, 254, 3, 4)) == ["1", None, "3", "4"]
    assert reader(greys(7, 8, 9)) == ["7", "8", "9"]


def test_an_idle_worker_that_is_stopped_is_found_by_the_next_image(reader):
    reader(greys(1, 2, 3, 4))
    workers = [reader.idle.get(), reader.idle.get()]
    for worker in workers:
        if worker is not None:
            os.kill(worker.pid, signal.SIGSTOP)
        reader.idle.put(worker)
    large = greys(7).expand(2, 3, 8, 4).repeat(1, 1, 100, 100)  # more than a pipe holds: writing hangs, too
    with pytest.warns(UserWarning, match="it took over 2 s and was replaced"):
        assert None in reader(large)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other worker may be stopped still
        reader(large)
    assert reader(large) == ["7", "7"]
    assert not any(alive(worker.pid) for worker in workers if worker is not None)


def test_an_engine_that_hangs_while_it_starts_is_an_error():
    slow = [sys.executable, "-c", "import time; time.sleep(600)"]
    reader = engine.Reader(2, slow, start_seconds=1)
    start = time.time()
    with pytest.raises(engine.EngineError, match="does not start: took over 1 s"):
        reader(greys(1, 2, 3))
    assert time.time() - start < 10 and not reader.busy


def test_what_a_worker_started_ends_with_it(tmp_path):
    """A kill of the worker alone would leave its own processes, which may hold its pipes open."""
    (tmp_path / "worker.py").write_text(WORKER)
    reader = engine.Reader(1, [sys.executable, "-P", str(tmp_path / "worker.py")], image_seconds=1)
    with pytest.warns(UserWarning, match="it took over 1 s and was replaced"):
        assert reader(greys(250)) == [None]
    (note,) = tmp_path.glob("stuck-*")
    wait_for_the_end_of([int(note.name.removeprefix("stuck-"))], seconds=5)


def test_a_reader_that_is_thrown_away_stops_its_workers(reader):
    reader(greys(1, 2, 3, 4))
    workers = [worker for worker in (reader.idle.get(), reader.idle.get()) if worker is not None]
    for worker in workers:
        reader.idle.put(worker)
    engine.stop_all(reader.idle, reader.busy, reader.interrupted, reader.threads)
    assert workers and not any(alive(worker.pid) for worker in workers)


# ---- no process is left behind ----
TRAINER = """
import glob, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import engine
import numpy as np

def raise_interrupt(number, frame):
    raise KeyboardInterrupt

def raise_error(number, frame):
    raise RuntimeError("a mistake elsewhere")

def tell_workers():
    while len(glob.glob(os.path.dirname(sys.argv[2]) + "/stuck-*")) < 2:
        time.sleep(0.01)
    time.sleep(0.1)  # from the note to the sleep, or the stop
    print(*(worker.pid for worker in reader.busy), flush=True)

signal.signal(signal.SIGUSR1, raise_error)
if sys.argv[4] == "handled":
    signal.signal(signal.SIGTERM, raise_interrupt)
reader = engine.Reader(2, [sys.executable, "-P", sys.argv[2], sys.argv[3]])
values = [1, 2, 1, 2]
if sys.argv[3] in ("stuck", "unawaited"):
    values = [253, 254, 253, 254]  # one worker hangs, the other one is stopped
images = np.array(values, np.uint8).repeat(6).reshape(4, 1, 2, 3)
if sys.argv[3] == "idle":
    print(*reader.start_reading_pixels(images)(), flush=True)
    workers = [reader.idle.get() for _ in range(2)]
    print(*(worker.pid for worker in workers), flush=True)
    for worker in workers:
        reader.idle.put(worker)
    if sys.argv[4] == "error":
        raise SystemExit(3)
    if sys.argv[4] != "exit":
        time.sleep(60)
else:
    threading.Thread(target=tell_workers, daemon=True).start()
    wait = reader.start_reading_pixels(images)
    if sys.argv[3] == "unawaited":
        time.sleep(60)  # as if the next images were sampled
    wait()
"""
ENDINGS = {
    "exception": signal.SIGUSR1,
    "Ctrl-C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGTERM, handled": signal.SIGTERM,
    "SIGKILL": signal.SIGKILL,
}


@pytest.fixture
def start_trainer(tmp_path):
    """start_trainer(state, ending): a trainer with two workers in a state, and the workers' process ids."""
    trainers = []

    def start(state, ending):
        (tmp_path / "worker.py").write_text(WORKER)
        (tmp_path / "trainer.py").write_text(TRAINER)
        words = [tmp_path / "trainer.py", ROOT / "rewards/ocr", tmp_path / "worker.py", state, ending]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        trainer = subprocess.Popen([sys.executable, *words], **pipes)
        trainers.append(trainer)
        if state == "idle":
            assert trainer.stdout.readline() == "1 2 1 2\n"
        workers = [int(word) for word in trainer.stdout.readline().split()]
        assert len(set(workers)) == 2
        return trainer, workers

    yield start
    for trainer in trainers:  # of a test that failed
        trainer.kill()
        trainer.communicate()


def wait_for_the_end_of(processes, seconds):
    processes = list(processes)
    deadline = time.time() + seconds
    while any(map(alive, processes)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, processes))


has_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


@has_proc
@pytest.mark.parametrize("ending", ["exit", "error"])
def test_idle_workers_end_with_the_trainer(start_trainer, ending):
    trainer, workers = start_trainer("idle", ending)
    assert trainer.wait(timeout=60) == {"exit": 0, "error": 3}[ending]
    wait_for_the_end_of(workers, seconds=0)  # the trainer has waited for them


@has_proc
@pytest.mark.parametrize("state", ["idle", "stuck", "unawaited", "starting"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_workers_end_with_the_trainer(start_trainer, state, ending):
    trainer, workers = start_trainer(state, "handled" if "handled" in ending else ending)
    states = [state_of(worker) for worker in workers]
    assert all(map(alive, workers)) and ("T" in states) == (state in ("stuck", "unawaited"))
    start = time.time()
    trainer.send_signal(ENDINGS[ending])
    _, errors = trainer.communicate(timeout=60)
    assert time.time() - start < 5  # at once, and not after the image's sixty seconds
    wait_for_the_end_of(workers, seconds=5)
    if ending in ("SIGTERM", "SIGKILL"):
        assert trainer.returncode == -ENDINGS[ending] and "Error" not in errors
    else:
        kind = "RuntimeError: a mistake" if ending == "exception" else "KeyboardInterrupt"
        assert trainer.returncode != 0 and kind in errors and "UserWarning" not in errors


def test_a_reader_can_be_used_after_ctrl_c(reader):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(KeyboardInterrupt):
            reader(greys(1, 253, 253, 253))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert reader(greys(7, 8, 9)) == ["7", "8", "9"]
