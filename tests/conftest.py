"""The fixtures that tests of several files share. Those about runs work for any algorithm file.

A file whose runs need more flags has a fixture of its own on top of `small`:

    @pytest.fixture
    def small(small, lm_folder):
        return lambda **changes: small(**{"lm": lm_folder, "max_new_tokens": 4} | changes)

Plain helpers are in small_runs.py: `from small_runs import Brightness, metrics, saved`.
"""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from rewards import report
from small_runs import ROOT, torchrun_environments, work


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """The defaults of the flags are paths from the root of the repository."""
    monkeypatch.chdir(ROOT)


# === what a run gets ===


@pytest.fixture
def write_prompts(tmp_path):
    """write_prompts(train=10, eval=3): path of a training file, with the other files beside it.

    Each has this many distinct prompts, spread over the shipped file of that name, or over the development
    prompts for the evaluation. A file is left out where its number is 0.
    """

    def write(train=10, eval=3, eval_paraphrased=0):
        counts = {"train": train, "eval": eval, "eval_paraphrased": eval_paraphrased}
        for name, count in counts.items():
            shipped = ROOT / "tiny/prompts/fold_0" / f"{name.replace('eval', 'dev')}.jsonl"
            lines = shipped.read_text().splitlines(keepends=True)
            distinct = list({json.loads(line)["prompt"]: line for line in lines}.values())
            if count > 0:
                chosen = distinct[:: len(distinct) // count][:count]
                (tmp_path / f"{name}.jsonl").write_text("".join(chosen))
        return str(tmp_path / "train.jsonl")

    return write


@pytest.fixture
def small(tmp_path, write_prompts):
    """small(num_iterations=3): flags of a run that takes about a second, as a dict for any file's Args."""
    flags = dict(
        prompts=write_prompts(),
        output_dir=str(tmp_path / "runs"),
        num_prompts_per_iteration=2,
        num_images_per_prompt=4,
        num_inference_steps=4,
        eval_num_inference_steps=2,
        num_iterations=2,
        device="cpu",
    )
    return lambda **changes: flags | changes


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    """Folder of an untrained vision-language model, of the classes of tiny/vlm."""
    from tiny import language_model  # here: most tests need none of it

    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    tokenizer = language_model.build_chat_tokenizer()
    vlm = language_model.build_vlm(tokenizer)
    # Sampling defaults as checkpoints on the hub have them, but worse: they must be ignored.
    vlm.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    for part in (tokenizer, language_model.build_image_processor(), vlm.half()):
        part.save_pretrained(folder)
    return str(folder)


# === what a run leaves behind ===


@pytest.fixture
def without_pictures(monkeypatch):
    """Runs write empty files as pictures, and print no summary: drawing takes longer than a small run."""
    for name in list(vars(report.log)):
        if name.startswith("save_"):
            monkeypatch.setattr(report.log, name, lambda path, *_: Path(path).write_bytes(b""))
    monkeypatch.setattr(report.Log, "close", lambda _: None)


@pytest.fixture
def spy(monkeypatch):
    """spy(module, "refine"): a list of (arguments, result), of all calls of that function from now on."""

    def watch(module, name):
        original = getattr(module, name)
        calls = []

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


@pytest.fixture
def interrupted_run(monkeypatch):
    """interrupted_run(train, args, iteration=2): folder of a run that was cut off in that iteration.

    The interruption comes after the iteration's row in metrics.jsonl and before its checkpoint.
    """

    def run(train, args, iteration=2):
        write = report.Log.write

        def interrupted(self, row, evaluations):
            write(self, row, evaluations)
            if row["iteration"] == iteration:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(report.Log, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(args)
        (run_dir,) = Path(args.output_dir).iterdir()
        return run_dir

    return run


# === several processes ===


@pytest.fixture
def start_processes(monkeypatch):
    """start_processes(superflow, flags, count=2, prepare=None) starts a run by several processes.

    Returns a function wait() that waits for them, asserts that all ended well, and returns the run's folder.
    What the test does in between runs beside them. prepare: a function at the top level of a test module that
    each process calls first, because monkeypatch does not reach other processes.
    """
    started = []

    def start(module, flags, count=2, prepare=None):
        spawn = multiprocessing.get_context("spawn")
        processes = []
        for environment in torchrun_environments(count):
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                process = spawn.Process(target=work, args=(module.__name__, flags, prepare))
                process.start()
            processes.append(process)
        started.extend(processes)

        def wait():
            for process in processes:
                process.join(300)
            assert [process.exitcode for process in processes] == [0] * count
            if flags.get("resume"):
                return Path(flags["resume"])
            (run_dir,) = Path(flags["output_dir"]).iterdir()
            return run_dir

        return wait

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
