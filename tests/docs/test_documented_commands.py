"""Every documented command can be run, and those for real models have the settings of the papers.

The tiny world's defaults are wrong for a real model: its learning rates are up to a thousand times too high,
and its images have 64 pixels. So each documented command for a real model is parsed, and compared with what
the papers used.
"""

import importlib
import importlib.util
import re
from typing import NamedTuple

import documents
import pytest
import tyro
from documents import ALGORITHMS, ELLIPSIS, ROOT, is_placeholder, value_of

from benchmark.run_seeds import fill
from rewards import command_line

COMMANDS = documents.commands()
OF_ALGORITHMS = [command for command in COMMANDS if command.target in ALGORITHMS]
OF_OTHERS = [command for command in COMMANDS if command.target not in ALGORITHMS]


class Between(NamedTuple):
    """A range of settings: where the papers leave one open, or where it depends on the hardware."""

    low: float
    high: float

    def allows(self, value):
        return self.low <= value <= self.high

    def __str__(self):
        return f"between {self.low:g} and {self.high:g}"


class OneOf(tuple):
    """The settings that a paper used."""

    def allows(self, value):
        return value in self

    def __str__(self):
        return " or ".join(map(str, self))


def one_of(*values):
    return OneOf(values)


# ---- the papers' settings ----
# Flow-GRPO's official configurations for SD3.5 at 512 x 512, for 32 GPUs, and smaller batches for 4 and 1.
# beta: the official code has 0.04, and 0.01 for PickScore, but its KL lacks the step size dt, which is 1 / T
# on average. Ours is the exact KL, as in the paper's formula, so the same strength is a tenth of that.
FLOW_GRPO = {
    "resolution": one_of(512),
    "max_sequence_length": one_of(128, 256),  # of T5
    "lora_rank": one_of(32),
    "learning_rate": one_of(3e-4),
    "clip_range": one_of(1e-4),
    "kl_coef": {"ocr": one_of(0.004), "geneval": one_of(0.004), "pickscore": one_of(0.001)},
    "guidance_scale": one_of(4.5),
    "noise_level": one_of(0.7),
    "num_inference_steps": one_of(10),
    "eval_num_inference_steps": one_of(40),
    "sde_window": one_of(0),  # all steps are trained
    "num_prompts_per_iteration": one_of(8, 16, 48),
    "num_images_per_prompt": one_of(8, 16, 24),
    "num_updates_per_iteration": one_of(2),
    # OCR reaches 90% after 1,000 optimiser steps of two per iteration, GenEval takes 5,000 to 6,000.
    "num_iterations": Between(500, 3000),
    "max_grad_norm": one_of(1.0),
}
# Flow-GRPO's official configurations for FLUX.1-dev with PickScore, and for Kontext: no KL, more noise, six
# steps in training. The LoRA and the batch are smaller here, for one GPU. A window of steps is its fast
# variant.
FLOW_GRPO_FLUX = FLOW_GRPO | {
    "max_sequence_length": one_of(512),
    "kl_coef": one_of(0),
    "guidance_scale": {"pickscore": one_of(3.5), "editreward": one_of(2.5)},
    "noise_level": one_of(0.9),
    "num_inference_steps": one_of(6),
    "eval_num_inference_steps": one_of(28),
    "sde_window": Between(2, 3),
}
# SuperFlow's own settings are unknown but for the model, the LoRA and the noise: the rest is Flow-GRPO's.
SUPERFLOW = FLOW_GRPO
# FDFO's official configuration: 432 pairs, or 448 where 8 processes share 4 updates.
FDFO = {
    "resolution": one_of(512),
    "max_sequence_length": one_of(128),
    "lora_rank": one_of(32),
    "learning_rate": one_of(3e-5),
    "clip_range": one_of(0.03),
    "kl_coef": one_of(0),
    "guidance_scale": one_of(1.0),
    "churn": one_of("raw"),
    "churn_weight": one_of(0.0025),
    "num_inference_steps": one_of(40),
    "eval_num_inference_steps": one_of(40),
    "num_prompts_per_iteration": one_of(432, 448),
    "num_updates_per_iteration": one_of(4),
    "num_iterations": Between(100, 1000),  # 100 are "reasonably good", the runs had 1,000
    "max_grad_norm": one_of(1.0),
}
# PromptRL, table 7: all weights of FLUX.1-dev and of Qwen2.5-VL-3B. The rates of LoRAs and the guidance of
# SD3.5 are our choice.
PROMPTRL = {
    "lm": one_of("Qwen/Qwen2.5-VL-3B-Instruct"),
    "resolution": one_of(512),
    "max_sequence_length": one_of(128, 256, 512),
    "max_new_tokens": one_of(256, 512),
    "learning_rate": {"all weights": one_of(3e-7), "lora": Between(1e-5, 3e-4)},
    "lm_learning_rate": {"all weights": one_of(1e-6), "lora": Between(1e-6, 1e-4)},
    "clip_range": one_of(1e-4),
    "kl_coef": {"ocr": one_of(4e-3), "geneval": one_of(4e-3), "pickscore": one_of(2e-3)},
    "lm_kl_coef": one_of(0.01),
    "guidance_scale": one_of(3.5, 4.5),
    "noise_level": one_of(0.8),
    "num_inference_steps": one_of(20),
    "eval_num_inference_steps": one_of(20),
    "sde_window": one_of(0),
    "num_prompts_per_iteration": one_of(8),
    "num_images_per_prompt": one_of(8),
    "num_original_prompts": one_of(2),
    # 0.2, 0.05 and 0.13 million images, 64 per iteration
    "num_iterations": {"geneval": one_of(3125), "ocr": one_of(781), "pickscore": one_of(2031)},
}
# PromptLoop: of the paper's settings only the models, the LoRA, N_R = 5 and T = 50 are known.
PROMPTLOOP = {
    "lm": one_of("Qwen/Qwen2.5-VL-3B-Instruct"),
    "lm_lora_rank": Between(8, 128),
    "lm_learning_rate": Between(1e-6, 1e-4),
    "lm_kl_coef": Between(0.01, 0.04),
    "token_clip_range": one_of(0.2),
    "preview_size": one_of(336, 448),
    "max_new_tokens": one_of(77),  # what CLIP reads
    "num_refinements": one_of(5),
    "num_inference_steps": one_of(50),
    "eval_num_inference_steps": one_of(50),
    "guidance_scale": Between(3.5, 7.5),
    "num_images_per_prompt": one_of(8),
    "num_iterations": Between(100, 3000),
}
PAPERS = {
    "flow_grpo.py": FLOW_GRPO,
    "superflow.py": SUPERFLOW,
    "fdfo.py": FDFO,
    "promptrl.py": PROMPTRL,
    "promptloop.py": PROMPTLOOP,
}
LARGEST_MICRO_BATCH = 16  # the default, 64, needs about 306 GB for SD3.5 at 512 x 512


def case_of(field, args):
    """Which of a setting's cases applies to a command: the way of training, or the reward."""
    if field == "learning_rate":
        return "lora" if args.lora_rank else "all weights"
    if field == "lm_learning_rate":
        return "lora" if args.lm_lora_rank else "all weights"
    return re.split("[:,@]", args.rewards)[0]


def problems(script, args):
    """What differs from the paper in the Args of a command for a real model."""
    found = []
    settings = FLOW_GRPO_FLUX if script == "flow_grpo.py" and "FLUX" in args.model else PAPERS[script]
    for field, allowed in settings.items():
        if isinstance(allowed, dict):
            case = case_of(field, args)
            if case not in allowed:
                found.append(f"{field}: the paper has none for {case!r}")
                continue
            allowed = allowed[case]
        value = getattr(args, field)
        if not allowed.allows(value):
            found.append(f"{command_line.flag(field)} is {value}, the paper's is {allowed}")
    if args.micro_batch_size > LARGEST_MICRO_BATCH:
        found.append(f"--micro-batch-size {args.micro_batch_size} fits no GPU")
    if not args.eval_prompts and "train" not in args.prompts.rsplit("/", 1)[-1]:
        found.append("--eval-prompts is missing: --prompts has no `train` in its name")
    return found


def is_for_a_real_model(command):
    """True where a command names a model of the hub."""
    model = value_of(command.words, "--model")
    return "/" in model and not model.startswith(("tiny/", "runs/")) and not is_placeholder(model)


def parse_flags(command):
    """The Args of a command of an algorithm file. Raises AssertionError where a flag is wrong."""
    assert ELLIPSIS not in command.words, "`...` stands for flags that the reader cannot know"
    module = importlib.import_module(command.target.removesuffix(".py"))
    try:
        return tyro.cli(module.Args, args=command.words)
    except SystemExit as error:
        assert error.code == 0, f"the flags of `{command}` are wrong"  # 0 is --help
        return module.Args()


def test_commands_are_found():
    documents_with_commands = {command.document for command in COMMANDS}
    assert documents_with_commands >= {"README.md", "tiny/README.md", "docs/flow_grpo.md", *ALGORITHMS}
    assert len(OF_ALGORITHMS) > 30 and len(OF_OTHERS) > 15


@pytest.mark.parametrize("command", OF_ALGORITHMS, ids=str)
def test_flags_are_the_files_own(command, monkeypatch):
    args = parse_flags(command)
    command_line.check_ranges(args)
    monkeypatch.setenv("WORLD_SIZE", str(command.num_processes))
    module = importlib.import_module(command.target.removesuffix(".py"))
    if not args.resume:
        module.check_args(args)


REAL = [command for command in OF_ALGORITHMS if is_for_a_real_model(command)]


def test_each_file_documents_a_real_model():
    assert {command.target for command in REAL if command.document in ALGORITHMS} == set(ALGORITHMS)


@pytest.mark.parametrize("command", REAL, ids=str)
def test_settings_of_real_models_are_the_papers(command):
    assert problems(command.target, parse_flags(command)) == []


@pytest.mark.parametrize("command", OF_OTHERS, ids=str)
def test_other_commands_exist_with_their_flags(command):
    spec = importlib.util.find_spec(command.target.removesuffix(".py").replace("/", "."))
    assert spec is not None, f"there is no {command.target}"
    if spec.submodule_search_locations:  # a package: its __main__ is run
        spec = importlib.util.find_spec(command.target + ".__main__")
    source = open(spec.origin).read()
    if command.target.startswith("tiny.pretrain_"):
        source += (ROOT / "tiny" / "pretraining.py").read_text()
    words = command.words
    if "--" in words:
        words = words[: words.index("--")]
    for word in words:
        if word.startswith("--"):
            field = word.removeprefix("--").replace("-", "_")
            assert f'"{word}"' in source or re.search(rf"^    {field}:", source, re.MULTILINE), word


OF_RUN_SEEDS = [command for command in OF_OTHERS if command.target == "benchmark.run_seeds"]


@pytest.mark.parametrize("command", OF_RUN_SEEDS, ids=str)
def test_flags_that_are_passed_on_are_the_files_own(command):
    scripts = [word for word in command.words if word in ALGORITHMS]
    if scripts and "--" in command.words:
        flags = fill(command.words[command.words.index("--") + 1 :], seed=1)
        parse_flags(command._replace(target=scripts[0], words=flags))


# ---- the checks find what they are for ----
def command_of(line):
    return documents.parse("a.md", line)


def flow_grpo_command():
    (command,) = [command for command in REAL if command.document == "README.md"]
    return command


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--learning-rate", "1e-3", "--learning-rate is 0.001"),
        ("--resolution", "0", "--resolution is 0"),
        ("--kl-coef", "0", "--kl-coef is 0"),
        ("--micro-batch-size", "64", "fits no GPU"),
        ("--num-iterations", "96", "--num-iterations is 96"),
        ("--eval-prompts", "", "--eval-prompts is missing"),
        ("--rewards", "jpeg", "none for 'jpeg'"),
    ],
)
def test_a_wrong_setting_is_found(flag, value, words):
    command = flow_grpo_command()
    words_before = [word if word != "ocr/train.txt" else "ocr/first.txt" for word in command.words]
    changed = command._replace(words=words_before + [flag, value])
    (found,) = problems("flow_grpo.py", parse_flags(changed))
    assert words in found


def test_commands_are_read_as_a_reader_reads_them():
    text = "python a.py --x 1 \\\n    --y 2   # why\npip install x && torchrun --nproc_per_node=2 b.py\n"
    assert documents.command_lines(text) == ["python a.py --x 1 --y 2", "torchrun --nproc_per_node=2 b.py"]
    assert documents.spans("say `python -m tiny.world\n  --show F` or `python`") == [
        "python -m tiny.world --show F"
    ]
    assert command_of("torchrun --nproc_per_node=8 flow_grpo.py --seed 1").num_processes == 8
    assert command_of("python -m pytest -q") is None
    lines = ["python fdfo.py --model a/b --seed 1", "python -m pytest", "torchrun fdfo.py ... --seed 2"]
    _, second = documents.complete("a.md", lines)
    assert second.words == ["--model", "a/b", "--seed", "1", "--seed", "2"]


def test_an_ellipsis_that_stands_for_nothing_is_found():
    with pytest.raises(AssertionError, match="cannot know"):
        parse_flags(command_of("python flow_grpo.py --model a/b ..."))


@pytest.mark.parametrize("line", ["python flow_grpo.py --no-such-flag 1", "python flow_grpo.py --seed x"])
def test_a_wrong_flag_is_found(line, capsys):
    with pytest.raises(AssertionError, match="flags of"):
        parse_flags(command_of(line))


@pytest.mark.parametrize(
    "model, real", [("a/b", True), ("tiny/sd3b", False), ("runs/X", False), ("OTHER", False)]
)
def test_real_models_are_those_of_the_hub(model, real):
    assert is_for_a_real_model(command_of(f"python flow_grpo.py --model {model}")) == real
