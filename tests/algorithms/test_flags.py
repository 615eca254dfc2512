"""What each flag of each algorithm file refuses: enumerated from the declarations, so that none is forgotten.

A mistake ends in one line, `error: --flag ...`, and exit code 2, before anything is loaded, joined or made.
The calls go through `command_line.execute` and the file's own `train`; the first thing that `train` does
after its checks is `open_device`, which here says that the flags were accepted.
"""

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from rewards import BadInput, command_line, report
from small_runs import ALGORITHMS, ROOT, command, torchrun_environments

HUGE = 10**30


class Accepted(BaseException):
    """Raised where a run would begin."""


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, monkeypatch):
    """An algorithm file as a module. Its runs end where they would begin."""
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "open_device", accept)
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    return module


def accept(*_):
    raise Accepted


@pytest.fixture
def refusal(algorithm, tmp_path, capfd):
    """refusal(changes): the line that ends a run with these changes to the default flags, or "" if none does.

    Asserts all that is said of a refusal above, but for what the line says. Where there would be a traceback,
    the line says so: then a test can try all cases and name all that fail.
    """

    def run(changes):
        flags = {"output_dir": str(tmp_path / "runs"), "device": "cpu"} | changes
        args = algorithm.Args(**flags)
        before = sorted(tmp_path.rglob("*"))
        began = time.process_time()
        try:
            command_line.execute(algorithm.train, args)
            line = "ended without beginning"
        except Exception as error:
            line = f"traceback: {error!r}"
        except Accepted:
            line = ""
        except SystemExit as stopped:
            assert stopped.code == 2
            out, err = capfd.readouterr()
            assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
            line = err
        assert time.process_time() - began < 1
        assert sorted(tmp_path.rglob("*")) == before
        return line.strip()

    return run


def listed(cases):
    """Cases that failed, one per line and cut."""
    lines = []
    for case in cases:
        lines.append(", ".join(repr(part)[:150] for part in case))
    return "\n" + "\n".join(lines)


# === one field ===


def hints(Args):
    """{field: type} of an Args, with the ranges."""
    return typing.get_type_hints(Args, include_extras=True)


def number_and_range(hint):
    """(int or float, Range) of a field that holds a number; (None, None) of others."""
    if typing.get_origin(hint) is not typing.Annotated:
        return None, None
    return typing.get_args(hint)[:2]


def next_number(kind, value, towards):
    """The next int or float after a value."""
    if kind is int:
        return value + (1 if towards > value else -1)
    return math.nextafter(value, towards)


def ends(hint):
    """The smallest and the largest number that a field may hold."""
    kind, allowed = number_and_range(hint)
    low, high = kind(allowed.low), kind(allowed.high)
    if allowed.above_low:
        low = next_number(kind, low, math.inf)
    if allowed.below_high:
        high = next_number(kind, high, -math.inf)
    return low, high


def good_values(hint):
    """Values that a field must accept: both ends of a range, every choice."""
    kind, _ = number_and_range(hint)
    if kind is not None:
        return list(ends(hint))
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        several = [good_values(choice) for choice in typing.get_args(hint)]
        return sum(several, [])
    return {bool: [False, True], str: ["", "text", "ä"], type(None): [None]}[hint]


def bad_values(hint):
    """Values that a field must refuse: outside of its range, not finite, of a wrong type, unknown."""
    kind, _ = number_and_range(hint)
    if kind is not None:
        low, high = ends(hint)
        values = [next_number(kind, low, -math.inf), next_number(kind, high, math.inf)]
        values += [value for value in (-1, 0) if value < low]
        values += [HUGE, -HUGE, 10**400, -(10**400), math.nan, math.inf, -math.inf]
        values += [True, False, None, "", "1", "nan", b"1", [low], (low,), {}, complex(1, 0)]
        if kind is int:
            values += [float(low), low + 0.5, 1e300]
        else:
            values += [-1e300, 1e300]
        return values
    if typing.get_origin(hint) is typing.Literal:
        first = typing.get_args(hint)[0]
        return ["unknown", "", first.upper(), first + " ", first + "\0", [first], None, 0, 1, True, math.nan]
    wrong = {
        bool: [0, 1, 0.0, 1.0, "", "true", "False", math.nan, HUGE, b"", []],
        str: ["\0", "a\0b", "text\0", 0, 1, -1, 0.5, True, False, math.nan, HUGE, b"text", ["text"], {}],
    }
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        assert set(typing.get_args(hint)) == {str, type(None)}, "say here what such a field must refuse"
        return wrong[str]
    return wrong[hint] + [None]


def test_the_enumerations_hold_what_they_should():
    count = typing.Annotated[int, command_line.Range(2, 5)]
    assert {1, 6, 0, -1, HUGE, -HUGE, 2.0, 2.5, None, "1"} <= {v for v in bad_values(count) if hashable(v)}
    rate = typing.Annotated[float, command_line.Range(0, 1, above_low=True, below_high=True)]
    assert {0, -1, 1.0, HUGE, math.inf, -math.inf, None, "1"} <= {v for v in bad_values(rate) if hashable(v)}
    assert good_values(count) == [2, 5]
    assert good_values(rate) == [5e-324, math.nextafter(1, 0)]
    assert any(value != value for value in bad_values(rate))
    for good, hint in ((2, count), (5, count), (0.5, rate)):
        same_type = [value for value in bad_values(hint) if type(value) is type(good)]
        assert good not in same_type


def hashable(value):
    return not isinstance(value, (list, dict))


def test_every_field_refuses_what_it_must(algorithm, refusal):
    wrong, count = [], 0
    for name, hint in hints(algorithm.Args).items():
        for value in bad_values(hint):
            count += 1
            line = refusal({name: value})
            if not re.match(rf"error: {command_line.flag(name)} must ", line):
                wrong.append((name, value, line))
    assert not wrong, listed(wrong)
    assert count >= 10 * len(dataclasses.fields(algorithm.Args))
    print(f"{algorithm.__name__}: {count} values refused")


def test_every_field_accepts_what_it_must(algorithm):
    count = 0
    for name, hint in hints(algorithm.Args).items():
        values = good_values(hint)
        if number_and_range(hint)[0] is float:
            values += [int(value) for value in values if value == int(value)]  # 1 for 1.0
        for value in values:
            count += 1
            command_line.check_ranges(dataclasses.replace(algorithm.Args(), **{name: value}))
    assert count >= 2 * len(dataclasses.fields(algorithm.Args))


def test_the_ends_of_every_range_begin_or_are_refused_in_one_line(algorithm, refusal):
    # a million images, a thousand steps: what is too much in its relation to another flag is said at once
    for name, hint in hints(algorithm.Args).items():
        if number_and_range(hint)[0] is not None:
            for value in ends(hint):
                line = refusal({name: value})
                assert line == "" or line.startswith("error: --"), (name, value)


def test_the_defaults_are_accepted(refusal):
    assert refusal({}) == ""


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
def test_a_run_at_the_ends_of_all_ranges_of_reals_ends_without_a_traceback(
    small, without_pictures, capfd, request, name, end
):
    module = importlib.import_module(name)
    flags = small(num_iterations=1)
    few = dict(max_new_tokens=2, num_refinements=1, sde_window=1)
    flags |= {field: value for field, value in few.items() if field in hints(module.Args)}
    if "lm" in hints(module.Args):
        flags["lm"] = request.getfixturevalue("lm_folder")
    for field, hint in hints(module.Args).items():
        if number_and_range(hint)[0] is float:
            flags[field] = ends(hint)[end]
    try:
        command_line.execute(module.train, module.Args(**flags))
    except SystemExit as stopped:
        assert stopped.code == 1 and "not finite" in capfd.readouterr().err


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_lowest_noise_has_a_density(name):
    module = importlib.import_module(name)
    if "noise_level" not in hints(module.Args):
        return
    lowest, _ = ends(hints(module.Args)["noise_level"])
    x, velocity = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for sde_type in ("flow", "cps"):
        mean, std = module.step_mean_std(x, velocity, [1.0, 0.5, 0.02, 0.01, 0.0], 2, lowest, sde_type)
        noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
        found = module.log_prob(mean + std * noise, mean, std)
        expected = torch.distributions.Normal(0, std).log_prob(std * noise).mean((1, 2, 3))
        # float32 rounds the sum of mean and noise
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_a_resumed_run_refuses_what_the_command_line_refuses(algorithm, tmp_path):
    # the flags of a run that is resumed are read from its folder, where anybody may have edited them
    run_dir = tmp_path / "run"
    report.Log(run_dir, algorithm.__file__, algorithm.Args(), -1)
    saved = json.loads((run_dir / "args.json").read_text())
    wrong = []
    for name, hint in hints(algorithm.Args).items():
        for value in bad_values(hint):
            text = as_json(value)
            if text is None or name in ("resume", "resume_anyway"):  # these are the new command line's
                continue
            (run_dir / "args.json").write_text(json.dumps(saved | {name: "HERE"}).replace('"HERE"', text))
            try:
                report.open_run(algorithm.Args(resume=str(run_dir)), algorithm.__file__)
                wrong.append((name, value, "accepted"))
            except BadInput as error:
                if command_line.flag(name) not in str(error) or "\n" in str(error):
                    wrong.append((name, value, str(error)))
    assert not wrong, listed(wrong)


def as_json(value):
    """A value as Python's json reads it back, or None where JSON has no such value."""
    if isinstance(value, (bytes, complex, tuple)):
        return None
    return json.dumps(value)


# === flags together ===

# A case is (changes, processes, what the line must say). It is tried on each file that has these flags.
CONTRADICTIONS = [
    (dict(num_prompts_per_iteration=15), 2, "--num-prompts-per-iteration 15 must be a multiple of"),
    (dict(num_prompts_per_iteration=6), 4, "--num-prompts-per-iteration 6 must be a multiple of"),
    (dict(num_prompts_per_iteration=1), 2, "--num-prompts-per-iteration 1 must be a multiple of"),
    (dict(num_prompts_per_iteration=16, num_updates_per_iteration=3), 2, "must be a multiple of 6"),
    (dict(num_prompts_per_iteration=3, num_updates_per_iteration=2), 1, "must be a multiple of 2"),
    (dict(num_prompts_per_iteration=16, num_updates_per_iteration=32), 1, "must be a multiple of 32"),
    (dict(num_prompts_per_iteration=16, num_updates_per_iteration=8), 4, "must be a multiple of 32"),
    (dict(num_prompts_per_iteration=1_000, num_images_per_prompt=10_000), 1, "at most 1,000,000"),
    (dict(num_prompts_per_iteration=1_000_000, num_images_per_prompt=4), 1, "at most 1,000,000"),
    (dict(sde_window=8, num_inference_steps=8), 1, "--sde-window 8 must be below --num-inference-steps"),
    (dict(sde_window=999, num_inference_steps=8), 1, "--sde-window 999 must be below"),
    (dict(sde_window=2, num_inference_steps=2), 1, "--sde-window 2 must be below"),
    (dict(sde_type="cps", noise_level=1.5), 1, "--noise-level must be at most 1 with --sde-type cps"),
    (dict(sde_type="cps", noise_level=math.nextafter(1, 2)), 1, "--noise-level must be at most 1"),
    (dict(sde_type="cps", noise_level=2.0), 1, "--noise-level must be at most 1"),
    (dict(noise_level=0.0), 1, "--noise-level"),
    (dict(num_images_per_prompt=1), 1, "--num-images-per-prompt"),
    (dict(num_inference_steps=1), 1, "--num-inference-steps"),
    (dict(rewards="beauty"), 1, "unknown reward 'beauty'"),
    (dict(rewards=""), 1, "reward"),
    (dict(rewards=","), 1, "reward"),
    (dict(rewards="geneval,geneval"), 1, "named twice"),
    (dict(rewards="geneval:heavy"), 1, "not a number"),
    (dict(rewards="geneval:nan"), 1, "geneval"),
    (dict(rewards="geneval:1e400"), 1, "geneval"),
    (dict(rewards="geneval:0"), 1, "geneval"),
    (dict(rewards="geneval:1e308,jpeg:1e308"), 1, "weight"),
    (dict(prompts=""), 1, "--prompts|prompt file"),
    (dict(prompts="tiny"), 1, "tiny"),
    (dict(prompts="nowhere/train.jsonl"), 1, "does not exist"),
    (dict(eval_prompts="nowhere.jsonl"), 1, "does not exist"),
    (dict(prompts="tiny/prompts/fold_0/dev.jsonl"), 1, "--eval-prompts"),
    (dict(lora_rank=129), 1, "--lora-rank 129 must be at most 128"),
    (dict(lora_rank=1024), 1, "--lora-rank 1024 must be at most 128"),
    (dict(lm_lora_rank=1024), 1, "--lm-lora-rank 1024 must be at most"),
    (dict(max_sequence_length=10), 1, "--max-sequence-length must be 0"),
    (dict(max_sequence_length=512), 1, "--max-sequence-length must be 0"),
    (dict(ask="hello"), 1, "--ask"),
    (dict(instruction="hello"), 1, "--instruction"),
    (dict(preview_size=17), 1, "--preview-size"),
    (dict(churn_weight=0.0), 1, "--churn-weight"),
    (dict(pool=100_000), 1, "--pool"),
    *[
        (dict(resolution=side), 1, f"--resolution {side} must be a multiple of 16 and at most 64")
        for side in (1, 8, 17, 50, 56, 60, 72, 80, 128, 1_000_000)
    ],
]
AGREEMENTS = [  # the nearest that is allowed
    (dict(num_prompts_per_iteration=8, num_updates_per_iteration=2), 4),
    (dict(num_prompts_per_iteration=16, num_updates_per_iteration=16), 1),
    (dict(num_prompts_per_iteration=100, num_images_per_prompt=10_000), 1),
    (dict(sde_window=7, num_inference_steps=8), 1),
    (dict(sde_window=0, num_inference_steps=2), 1),
    (dict(sde_type="cps", noise_level=1.0), 1),
    (dict(sde_type="flow", noise_level=2.0), 1),
    (dict(rewards="geneval:1,jpeg:0.2"), 1),
    (dict(prompts="tiny/prompts/fold_0/train.jsonl", eval_prompts="tiny/prompts/fold_0/dev.jsonl"), 1),
    (dict(lora_rank=128), 1),
    *[(dict(resolution=side), 1) for side in (0, 16, 32, 48, 64)],
]


def with_flags_of(algorithm, cases):
    """The cases whose flags this file has."""
    names = {field.name for field in dataclasses.fields(algorithm.Args)}
    return [case for case in cases if names >= set(case[0])]


def test_contradictions_are_refused(algorithm, refusal, monkeypatch):
    wrong = []
    for changes, processes, message in with_flags_of(algorithm, CONTRADICTIONS):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        line = refusal(changes)
        if not re.search(message, line):
            wrong.append((changes, processes, line))
    assert not wrong, listed(wrong)


def test_what_is_just_allowed_is_accepted(algorithm, refusal, monkeypatch):
    wrong = []
    for changes, processes in with_flags_of(algorithm, AGREEMENTS):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        line = refusal(changes)
        if line:
            wrong.append((changes, processes, line))
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("output_dir", ["file", "file/below", "x" * 300])
def test_an_output_folder_that_cannot_be_made(refusal, tmp_path, output_dir):
    (tmp_path / "file").write_text("in the way")
    assert refusal({"output_dir": str(tmp_path / output_dir)}).startswith("error: --output-dir ")


WRONG_IN_EACH_PROCESS = """
import dataclasses
from rewards import command_line

@dataclasses.dataclass
class Args:
    seed: command_line.Seed = -1

command_line.execute(print, Args())
"""


def test_what_is_wrong_is_said_once_by_several_processes():
    # as torchrun does, the others are ended as soon as one has failed
    processes = []
    for environment in torchrun_environments(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRONG_IN_EACH_PROCESS],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    while all(process.poll() is None for process in processes):
        time.sleep(0.1)
    time.sleep(1)
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert errors[0].startswith("error: --seed must be ") and errors[0].count("\n") == 1
    assert errors[1:] == ["", ""] and processes[0].returncode == 2


# === models ===


def edit_json(path, change):
    """Replaces the object in a JSON file by change(object)."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(*names):
    """A change that drops keys."""
    return lambda config: {name: value for name, value in config.items() if name not in names}


def setting(**values):
    """A change that sets keys."""
    return lambda config: config | values


@pytest.fixture
def model(tmp_path):
    """Folder with the configurations of tiny/sd3 and without its weights: the checks must not need them."""
    folder = tmp_path / "model"
    for path in (ROOT / "tiny/sd3").rglob("*.json"):
        copy = folder / path.relative_to(ROOT / "tiny/sd3")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def test_the_configurations_are_enough(refusal, model):
    assert refusal({"model": str(model)}) == ""


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNSUITABLE = [  # file, change, what the line must say, files that it does not concern
    (INDEX, setting(_class_name="StableDiffusionPipeline"), "is a StableDiffusionPipeline; supported: ", ""),
    (INDEX, setting(_class_name="NoSuchPipeline"), "is a NoSuchPipeline; supported: ", ""),
    (SCHEDULER, setting(_class_name="DPMSolverMultistepScheduler"), "has a DPMSolverMultistepScheduler", ""),
    # promptloop computes the shift of FLUX.1
    (SCHEDULER, setting(use_dynamic_shifting=True), "shifts its times dynamically", "promptloop"),
]


def test_a_model_that_does_not_suit_is_refused(algorithm, refusal, model):
    for name, change, message, exempt in UNSUITABLE:
        if algorithm.__name__ != exempt:
            original = (model / name).read_text()
            edit_json(model / name, change)
            assert re.search(message, refusal({"model": str(model)}))
            (model / name).write_text(original)


COMPONENTS = ["scheduler", "transformer", "vae"]
DAMAGES = [
    *[(INDEX, without(name)) for name in ["_class_name", *COMPONENTS]],
    *[(INDEX, setting(**{name: [None, None]})) for name in COMPONENTS],
    *[(INDEX, setting(**{name: 3})) for name in COMPONENTS],
    *[(INDEX, setting(**{name: []})) for name in COMPONENTS],
    (INDEX, lambda _: []),
    (INDEX, lambda _: None),
    (SCHEDULER, without("_class_name")),
    ("transformer/config.json", without("patch_size")),
    ("transformer/config.json", without("pos_embed_max_size")),
    ("transformer/config.json", lambda _: []),
    ("vae/config.json", without("block_out_channels")),
    ("vae/config.json", lambda _: []),
]
TORN = [b"", b"{", b'{"_class_name": ', b"null", b"\xff\xfe{}", b"<html>Please log in</html>", b"[" * 100_000]


def test_damaged_configurations_name_the_model(algorithm, refusal, model):
    wrong = []

    def refused(name, case):
        line = refusal({"model": str(model)})
        if not line.startswith("error: ") or str(model) not in line:
            wrong.append((name, case, line[:150]))

    files = [INDEX, SCHEDULER, "transformer/config.json", "vae/config.json"]
    for name in files:
        original = (model / name).read_bytes()
        for torn in TORN:
            (model / name).write_bytes(torn)
            refused(name, torn[:30])
        (model / name).unlink()
        refused(name, "missing")
        (model / name).mkdir()
        refused(name, "a folder")
        (model / name).rmdir()
        (model / name).write_bytes(original)
    for number, (name, change) in enumerate(DAMAGES):
        original = (model / name).read_text()
        edit_json(model / name, change)
        refused(name, f"damage {number}")
        (model / name).write_text(original)
    assert not wrong, listed(wrong)


# Each cause has its own words, so that the reader knows what to do.
CAUSES = {
    "offline": "offline|network|hf download",
    "no folder": "no such folder|does not exist|not a folder|no folder",
    "a file": "not a folder|is a file|no folder",
    "empty folder": "model_index.json",
    "another folder": "model_index.json",
    "damaged": "model_index.json.*(JSON|damaged)",
    "empty name": "--model|no name of a model",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_of_a_missing_model_is_named(refusal, tmp_path, monkeypatch, cause):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model_index.json").write_text('{"_class_name": "StableDiff')
    names = {
        "offline": "nobody/has-this-model",
        "no folder": str(tmp_path / "nowhere"),
        "a file": str(tmp_path / "file"),
        "empty folder": str(tmp_path / "empty"),
        "another folder": "tiny/prompts",
        "damaged": str(tmp_path / "damaged"),
        "empty name": "",
    }
    line = refusal({"model": names[cause]})
    assert names[cause] in line and re.search(CAUSES[cause], line), line


# === the real command line ===

COMMANDS = {  # of each file, one call; the kinds are those above
    "flow_grpo": ({"rewards": "beauty"}, "unknown reward 'beauty'"),
    "superflow": ({"learning_rate": "nan"}, "--learning-rate must be at least 0 and at most 1, not nan"),
    "fdfo": ({"model": "tiny/prompts"}, "model_index.json"),
    "promptrl": ({"sde_window": 8}, "--sde-window 8 must be below --num-inference-steps"),
    "promptloop": ({"resolution": 50}, "--resolution 50 must be a multiple of 16 and at most 64"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_command_line_prints_one_line(tmp_path, name):
    changes, message = COMMANDS[name]
    flags = {"output_dir": str(tmp_path / "runs"), "device": "cpu"} | changes
    result = subprocess.run(command(f"{name}.py", flags), capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "importing torch and diffusers ...\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path(flags["output_dir"]).exists()


@pytest.mark.parametrize("words", [["--sde-type", "none"], ["--seed", "one"], ["--seed"], ["--no-such-flag"]])
def test_what_cannot_be_parsed_ends_with_exit_code_2(monkeypatch, capfd, words):
    module = importlib.import_module("flow_grpo")
    monkeypatch.setattr(sys, "argv", ["flow_grpo.py", *words])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(accept, module.Args, module.__doc__)
    assert stopped.value.code == 2
    assert words[0] in capfd.readouterr().err


# === devices ===


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("device_name", ["auto", "cuda"])
def test_the_device_is_set_before_any_collective(monkeypatch, name, rank, device_name):
    # collectives of Python objects use the current device, which is the first one until it is set
    module = importlib.import_module(name)
    events = fake_cuda(monkeypatch, num_devices=4)
    for variable, value in {"WORLD_SIZE": 8, "RANK": 4 + rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(variable, str(value))
    device, dtype, found_rank, world_size = module.open_device(device_name, "auto")
    assert events == [("set_device", torch.device("cuda", rank)), ("init_process_group", "nccl")]
    assert device == torch.device("cuda", rank) and device.index == rank
    assert (dtype, found_rank, world_size) == (torch.bfloat16, 4 + rank, 8)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_process_on_cuda_joins_nothing(monkeypatch, name):
    module = importlib.import_module(name)
    events = fake_cuda(monkeypatch, num_devices=1)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    device, dtype, rank, world_size = module.open_device("auto", "float32")
    assert events == [("set_device", torch.device("cuda", 0))]
    assert (device.index, dtype, rank, world_size) == (0, torch.float32, 0, 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_cpu_touches_no_cuda(monkeypatch, name):
    module = importlib.import_module(name)
    events = fake_cuda(monkeypatch, num_devices=1)
    for variable, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(variable, str(value))
    assert module.open_device("cpu", "auto") == (torch.device("cpu"), torch.float32, 1, 2)
    assert events == [("init_process_group", "gloo")]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_cuda_it_is_refused_where_it_was_asked_for(monkeypatch, name):
    module = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--device cpu"):
        module.open_device("cuda", "auto")
    assert module.open_device("auto", "auto")[0] == torch.device("cpu")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("local_rank", [0, 1, 2])
def test_more_processes_than_devices_are_refused_in_each_process(monkeypatch, name, local_rank):
    # in each: only the first process says so, and the others must not wait for the third
    module = importlib.import_module(name)
    events = fake_cuda(monkeypatch, num_devices=2)
    variables = {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "RANK": local_rank, "LOCAL_RANK": local_rank}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(BadInput, match="3 processes.* 2 "):
        module.open_device("auto", "auto")
    assert events == []


def indexless_devices(source):
    """Lines that name a CUDA device without its index, which is the first one whatever the process."""
    tree = ast.parse(source)
    harmless = set()  # parts of a comparison, of a flag's choices, of torch.device("cuda", index)
    for node in ast.walk(tree):
        is_choice = isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("device")
        if isinstance(node, ast.Compare) or is_choice or (is_call and len(node.args) == 2):
            harmless.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        is_name = isinstance(node, ast.Constant) and node.value == "cuda" and node not in harmless
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".cuda")
        if is_name or is_call:
            found.append(node.lineno)
    return found


def test_no_code_names_a_cuda_device_without_its_index():
    found = {}
    for path in [*(ROOT / f"{name}.py" for name in ALGORITHMS), *(ROOT / "rewards").rglob("*.py")]:
        found[path.relative_to(ROOT).as_posix()] = len(indexless_devices(path.read_text()))
    assert found.pop("rewards/__main__.py") == 1  # a program of one process
    assert {name: count for name, count in found.items() if count} == {}


@pytest.mark.parametrize(
    "line, count",
    [
        ('x.to("cuda")', 1),
        ("x.cuda()", 1),
        ('torch.device("cuda")', 1),
        ('torch.zeros(3, device="cuda")', 1),
        ('device = "cuda" if torch.cuda.is_available() else "cpu"', 1),
        ('torch.device("cuda", 1)', 0),
        ("x.to(device)", 0),
        ('device.type == "cuda"', 0),
        ('device: Literal["cpu", "cuda"] = "cpu"', 0),
        ("torch.cuda.is_available()", 0),
    ],
)
def test_a_cuda_device_without_its_index_is_found(line, count):
    assert len(indexless_devices(line)) == count


def fake_cuda(monkeypatch, num_devices):
    """Pretends that there are CUDA devices. Returns the list of what is done with them, in order."""
    events = []

    def record(name, value):
        events.append((name, torch.device(value) if name == "set_device" else value))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: record("set_device", device))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: record("init_process_group", backend)
    )
    return events
