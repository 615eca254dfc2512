"""Reads the text in images with PP-OCR: rapidocr's ONNX models, which come inside its wheel.

An image takes about a quarter of a second of one core, so several workers of one thread each share a batch.
A worker is this file, run as a script and talked to over its pipes: it imports neither torch nor the training
script (multiprocessing's workers do), is safe next to CUDA, and ends with its pipe, however the trainer ends.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from einops import rearrange


def make_engine():
    """read(pixels (H, W, 3) uint8, RGB) -> the lines of text, joined in reading order, "" where is none."""
    import cv2  # rapidocr's own
    from rapidocr import RapidOCR

    cv2.setNumThreads(1)
    params = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    params["Global.log_level"] = "critical"  # it warns of every image without text
    engine = RapidOCR(params=params)

    def read(pixels, use_det=True):
        bgr = np.ascontiguousarray(pixels[..., ::-1])  # what it takes an array to be
        return "".join(engine(bgr, use_det=use_det, use_cls=False).txts or ())

    for use_det in (False, True):  # loads both models: a broken installation fails here and not row by row
        read(np.zeros((64, 64, 3), np.uint8), use_det)
    return read


def serve(read):
    """A worker's loop. In: a line "height width", the pixels. Out: a line of JSON, {"text"} or {"error"}."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else prints must not come between the answers
    os.write(answers, b"ready\n")
    while header := sys.stdin.buffer.readline():  # empty once the other side has gone
        shape = (*map(int, header.split()), 3)
        data = sys.stdin.buffer.read(shape[0] * shape[1] * 3)
        try:
            answer = {"text": read(np.frombuffer(data, np.uint8).reshape(shape))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(answers, json.dumps(answer).encode() + b"\n")


def start(command):
    """A worker that has loaded its engine. RuntimeError when it cannot."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # not the terminal's: Ctrl-C is for the trainer
    worker = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    if worker.stdout.readline() != b"ready\n":
        stop(worker)
        raise RuntimeError("the OCR engine does not start, its own message is above")
    return worker


def ask(worker, pixels):
    """The worker's answer for an image (H, W, 3) uint8, None when its process has died."""
    try:
        worker.stdin.write(b"%d %d\n" % pixels.shape[:2] + pixels.tobytes())
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        return None


def stop(worker):
    worker.communicate()  # closes its input, which ends it, and waits


def stop_all(idle):
    while not idle.empty():
        if worker := idle.get():
            stop(worker)


class Reader:
    """images (B, 3, H, W) float in [0, 1] -> B strings, None and a warning where the engine failed.

    processes: workers, started when first needed; 0: as many as this training process has cores, at most 8.
    command: what a worker runs.
    """

    def __init__(self, processes=0, command=(sys.executable, "-P", __file__)):
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        processes = processes or max(1, min(cores, 8))
        self.command, self.threads, self.idle = command, ThreadPoolExecutor(processes), queue.SimpleQueue()
        for _ in range(processes):
            self.idle.put(None)  # the place of a worker
        weakref.finalize(self, stop_all, self.idle)  # at the latest when the interpreter exits

    def __call__(self, images):
        # in 8 bits: of floats in [0, 1] the engine reads nothing and says nothing
        pixels = (images.detach().float() * 255).round().byte().cpu()
        return list(self.threads.map(self.read, rearrange(pixels, "b c h w -> b h w c").numpy()))

    def read(self, pixels):
        """The text in an image (H, W, 3) uint8, None where the engine failed."""
        worker = self.idle.get()
        try:
            worker = worker or start(self.command)
            answer = ask(worker, pixels)
            if answer is None:
                stop(worker)
                worker, answer = None, {"error": "its process died"}
        finally:
            self.idle.put(worker)
        if "error" in answer:
            warnings.warn(f"ocr: the engine failed on an image, reward NaN: {answer['error']}", stacklevel=2)
        return answer.get("text")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the trainer was killed while this read for it
        serve(make_engine())
