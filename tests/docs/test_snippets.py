"""Every Python snippet of the pages runs, and so does every short command, in a copy of the repository.

A Python block is one of three: a file to make, if its first line is a comment with the file's path; an entry
of rewards.REGISTRY, if it is a line of a dictionary; or a script. A page's blocks are run in their order.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import documents
import numpy as np
import pytest
import torch
from documents import ALGORITHMS, ROOT
from einops import rearrange
from PIL import Image

from rewards.tiny_world.shapes import detect

# What a documented run of an algorithm file gets besides its own flags, to be short.
SMALL = {
    "--num-prompts-per-iteration": "2",
    "--num-images-per-prompt": "2",
    "--num-inference-steps": "3",
    "--eval-num-inference-steps": "1",
    "--sde-window": "1",
}
LONGEST_RUN = 2  # iterations
QUICK_MODULES = ("tiny.world", "benchmark.count_differences", "benchmark.make_tagged_prompts")


def python_blocks(page):
    return [block for block in documents.blocks(page) if block.language == "python"]


def pages_with(has):
    return [page for page in documents.pages() if has(page)]


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, whose large folders are links."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".md"):
            shutil.copy(path, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
    for folder in ("rewards", "benchmark", "docs", "tiny"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for weights in (ROOT / "tiny").glob("**/*.safetensors"):
        (tmp_path / weights.relative_to(ROOT)).symlink_to(weights)
    (tmp_path / "benchmark" / "results").symlink_to(ROOT / "benchmark" / "results")
    return tmp_path


def run(words, folder):
    """Runs a command in a folder. Raises AssertionError, with what it printed, if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def is_registry_entry(text):
    return bool(re.fullmatch(r'\s*"\w+": "[\w.]+:\w+",?\s*', text))


def follow(block, folder):
    """Does what a Python block asks for."""
    path = re.match(r"# ([\w/]+\.py)\n", block.text)
    if path:
        ast.parse(block.text)
        (folder / path[1]).write_text(block.text)
    elif is_registry_entry(block.text):
        init = folder / "rewards" / "__init__.py"
        text = init.read_text()
        assert text.count("REGISTRY = {") == 1
        begin = text.index("\n", text.index("REGISTRY = {")) + 1
        init.write_text(text[:begin] + block.text + text[begin:])
    else:
        (folder / "snippet.py").write_text(block.text)
        run([sys.executable, "snippet.py"], folder)


def short_commands(page):
    """Commands of a page's shell blocks that end soon: (runner, Command)."""
    found = []
    for block in documents.blocks(page):
        if block.language == "bash":
            found += documents.complete(page, documents.command_lines(block.text))
    short = []
    for command in found:
        iterations = documents.value_of(command.words, "--num-iterations")
        is_short_run = command.target in ALGORITHMS and iterations and int(iterations) <= LONGEST_RUN
        if is_short_run or command.target in QUICK_MODULES or command.words == ["--help"]:
            short.append(command)
    return short


def small_prompts(folder):
    """Prompts for a short run: (training, evaluation) files."""
    paths = []
    for name in ("train", "dev"):
        lines = (ROOT / "tiny" / "prompts" / "fold_0" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        paths.append(folder / f"small_{name}.jsonl")
        paths[-1].write_text("".join(lines[:4]))
    return paths


def words_of(command, folder):
    """How a short command is run: with fewer images than documented."""
    words = [sys.executable, command.target]
    if not command.target.endswith(".py"):
        words = [sys.executable, "-m", command.target]
    words += command.words
    if command.target in ALGORITHMS and "--help" not in words:
        prompts, eval_prompts = small_prompts(folder)
        options = SMALL | {"--prompts": str(prompts), "--eval-prompts": str(eval_prompts)}
        for flag, value in options.items():
            if flag not in words:
                words += [flag, value]
    return words


@pytest.mark.parametrize("page", pages_with(lambda page: python_blocks(page) or short_commands(page)))
def test_a_page_can_be_followed(page, copy):
    for block in python_blocks(page):
        follow(block, copy)
    for command in short_commands(page):
        printed = run(words_of(command, copy), copy)
        assert printed or command.target == "tiny.world", command


def objects_in(path):
    """The objects of the tiny world that a picture shows."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return detect(rearrange(pixels, "h w c -> 1 c h w") / 255)[0]


@pytest.mark.parametrize(
    "page, picture", [("tiny/README.md", "circle.png"), ("tiny/flux/README.md", "edited.png")]
)
def test_the_snippet_of_a_model_draws_objects(page, picture, copy):
    """With another length of the prompt than in pretraining, for example, a picture would be empty."""
    for block in python_blocks(page):
        follow(block, copy)
    assert objects_in(copy / picture)


def test_snippets_are_found():
    assert len(python_blocks("tiny/README.md")) == 1 and short_commands("tiny/README.md")
    targets = [command.target for command in short_commands("README.md")]
    assert "flow_grpo.py" in targets


def test_shell_blocks_hold_commands_only():
    """A block of commands is read by a shell: a line that is none would be an error."""
    for page in documents.pages():
        for block in documents.blocks(page):
            if block.language != "bash":
                continue
            for line in documents.join_continued_lines(block.text).splitlines():
                words = shlex.split(line, comments=True)
                assert not words or words[0] in ("python", "torchrun", "pip"), f"{page}: {line}"


# ---- the checks find what they are for ----
def block_of(text):
    return documents.Block("a.md", "python", text)


def test_a_snippet_that_fails_is_found(copy):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        follow(block_of("1 / 0\n"), copy)


def test_a_file_and_an_entry_are_put_where_they_belong(copy):
    follow(block_of("# rewards/warmth.py\nx = 1\n"), copy)
    follow(block_of('    "warmth": "rewards.warmth:make_warmth",\n'), copy)
    follow(block_of("import rewards\nassert rewards.REGISTRY['warmth']\nimport rewards.warmth\n"), copy)
