"""Reads the text in images with PP-OCR: rapidocr's ONNX models, which come inside its wheel.

An image takes about a quarter of a second of one core, so several workers of one thread each share a batch.
A worker is this file, run as a script and talked to over its pipes. It imports neither torch nor the training
script (multiprocessing's workers do) and is safe next to CUDA.

No worker outlives its training process. An idle one ends with its pipe; a busy, hanging or stopped one is
killed: by the training process where that ends by itself, by Ctrl-C or by an exception; by the kernel where
it is killed (on Linux).
"""

import contextlib
import ctypes
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import Future, wait

import numpy as np
from einops import rearrange


class EngineError(RuntimeError):
    """The engine does not start."""


# === in a worker ===


def make_engine():
    """read(pixels (H, W, 3) uint8, RGB) -> the lines of text, joined in reading order, "" where is none."""
    import cv2  # rapidocr's own
    from rapidocr import RapidOCR

    cv2.setNumThreads(1)
    params = {
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        "Global.log_level": "critical",  # it warns of every image without text
    }
    engine = RapidOCR(params=params)

    def read(pixels, use_det=True):
        bgr = np.ascontiguousarray(pixels[..., ::-1])  # what it takes an array to be
        lines = engine(bgr, use_det=use_det, use_cls=False).txts
        return "".join(lines or ())

    for use_det in (False, True):  # loads both models: a broken installation fails here and not row by row
        read(np.zeros((64, 64, 3), np.uint8), use_det)
    return read


def end_with_parent():
    """Linux kills this process when the thread that started it ends, even if it hangs or is stopped."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(read):
    """A worker's loop. In: a line "height width", the pixels. Out: a line of JSON, {"text"} or {"error"}."""
    end_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else prints must not come between the answers
    os.write(answers, b"ready\n")
    while True:
        header = sys.stdin.buffer.readline()
        if not header:  # the other side has gone
            return
        height, width = [int(word) for word in header.split()]
        data = sys.stdin.buffer.read(height * width * 3)
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3)
        try:
            answer = {"text": read(pixels)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(answers, json.dumps(answer).encode() + b"\n")


# === in the training process ===


def kill(worker):
    """Ends a worker and what it started, whatever they are doing. A stopped process ends as well."""
    if worker.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


def stop(worker):
    """Kills a worker, closes its pipes and waits for its end."""
    kill(worker)
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):  # what was still to be written is of no use
            pipe.close()
    worker.wait()


def stop_all(idle, busy, interrupted, threads):
    """Stops the workers and threads of a Reader that is no more."""
    interrupted.set()
    threads.stop()
    for worker in list(busy):
        stop(worker)
    while not idle.empty():
        worker = idle.get()
        if worker is not None:
            stop(worker)


class Threads:
    """Threads that make calls in the background, each call in the first thread that is free.

    At the end of the program nothing waits for them. It would wait for those of a ThreadPoolExecutor, so that
    a Ctrl-C had to wait for all images that are still to be read.
    """

    def __init__(self, count):
        self.count = count
        self.calls = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=make_calls, args=(self.calls,), name="ocr", daemon=True).start()

    def submit(self, function, argument):
        """The Future of function(argument)."""
        future = Future()
        self.calls.put((future, function, argument))
        return future

    def stop(self):
        """Ends each thread after the call that it makes; calls that wait are dropped."""
        while not self.calls.empty():
            self.calls.get()
        for _ in range(self.count):
            self.calls.put(None)


def make_calls(calls):
    """What a thread of Threads does, until it gets None."""
    while True:
        call = calls.get()
        if call is None:
            return
        future, function, argument = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(argument))
            except BaseException as error:
                future.set_exception(error)
        del call, future, function, argument  # a thread that waits must not keep a Reader alive


class Deadline:
    """Kills a worker that is not done in time: `with Deadline(worker, seconds) as deadline: ...`

    deadline.passed says whether that happened. A kill is what ends a read from or a write to its pipes.
    """

    def __init__(self, worker, seconds):
        self.worker = worker
        self.passed = False
        self.timer = threading.Timer(seconds, self.pass_by)
        self.timer.daemon = True

    def pass_by(self):
        self.passed = True
        kill(self.worker)

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *error):
        self.timer.cancel()


class Reader:
    """images (B, 3, H, W) float in [0, 1] -> B strings, None and a warning where the engine failed.

    processes: workers, started when first needed; 0: as many as this training process has cores, at most 8.
    command: what a worker runs. start_seconds, image_seconds: how long a worker may take to start, and for an
    image; after that it counts as hanging and is replaced.
    Raises EngineError where a worker does not start.
    """

    def __init__(
        self, processes=0, command=(sys.executable, "-P", __file__), start_seconds=300, image_seconds=60
    ):
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        processes = processes or max(1, min(cores, 8))
        self.command = command
        self.start_seconds = start_seconds
        self.image_seconds = image_seconds
        self.threads = Threads(processes)
        self.busy = set()  # workers that are starting or reading
        self.interrupted = threading.Event()
        self.idle = queue.SimpleQueue()
        for _ in range(processes):
            self.idle.put(None)  # the place of a worker
        # at the latest when the interpreter exits
        weakref.finalize(self, stop_all, self.idle, self.busy, self.interrupted, self.threads)

    def __call__(self, images):
        return self.start_reading(images)()

    def start_reading(self, images):
        """Begins to read in the background. Returns a function that waits for the texts."""
        # in 8 bits: of floats in [0, 1] the engine reads nothing and says nothing
        pixels = (images.detach().float() * 255).round().byte().cpu()
        return self.start_reading_pixels(rearrange(pixels, "b c h w -> b h w c").numpy())

    def start_reading_pixels(self, pixels):
        """The same for images (B, H, W, 3) uint8."""
        self.interrupted.clear()
        futures = [self.threads.submit(self.read, image) for image in pixels]
        return functools.partial(self.wait_for, futures)

    def wait_for(self, futures):
        """The texts of images that are being read. An exception meanwhile, such as Ctrl-C, ends at once."""
        try:
            return [future.result() for future in futures]
        except BaseException:  # nothing may wait for a worker now
            for future in futures:
                future.cancel()
            self.interrupt()
            wait(futures, timeout=5)  # they have ended, in a moment
            raise

    def enlist(self, worker):
        """Notes that a worker is busy. Where an interruption has come first, kills it."""
        self.busy.add(worker)
        if self.interrupted.is_set():
            kill(worker)

    def interrupt(self):
        """Kills the workers that are busy, so that no thread waits for them."""
        self.interrupted.set()
        for worker in list(self.busy):
            kill(worker)

    def read(self, pixels):
        """The text in an image (H, W, 3) uint8, None where the engine failed or was interrupted."""
        if self.interrupted.is_set():
            return None
        worker = self.idle.get()
        try:
            if worker is None:
                worker = self.start()
            self.enlist(worker)
            answer = self.ask(worker, pixels)
            if answer is None:
                answer = {}
                stop(worker)
                worker = None
        finally:
            self.busy.discard(worker)
            self.idle.put(worker)
        if "error" in answer:
            self.warn(answer["error"])
        return answer.get("text")

    def start(self):
        """A worker that has loaded its engine."""
        worker = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # not the terminal's: Ctrl-C is for the trainer
        )
        self.enlist(worker)
        with Deadline(worker, self.start_seconds) as deadline:
            ready = worker.stdout.readline() == b"ready\n"
        if not ready:
            self.busy.discard(worker)
            stop(worker)
            reason = f"took over {self.start_seconds} s" if deadline.passed else "its own message is above"
            raise EngineError(f"the OCR engine does not start: {reason}")
        return worker

    def ask(self, worker, pixels):
        """The worker's answer for an image (H, W, 3) uint8, None when its process has died or hung."""
        height, width, _ = pixels.shape
        answer = None
        with Deadline(worker, self.image_seconds) as deadline:
            try:
                worker.stdin.write(b"%d %d\n" % (height, width))
                worker.stdin.write(pixels.tobytes())
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
            except (OSError, ValueError):  # a broken pipe, or half an answer
                pass
        if deadline.passed:  # the worker is killed, even if it has answered in the last moment
            self.warn(f"it took over {self.image_seconds} s and was replaced")
            return None
        if answer is None and not self.interrupted.is_set():  # else it was killed to end this wait
            self.warn("its process died")
        return answer

    def warn(self, reason):
        warnings.warn(f"ocr: the engine failed on an image, reward NaN: {reason}", stacklevel=2)


if __name__ == "__main__":
    end_with_parent()
    with contextlib.suppress(BrokenPipeError):  # the trainer was killed while this read for it
        serve(make_engine())
