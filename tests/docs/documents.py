"""Finds what documents tell a reader to run: code blocks, and commands in blocks, sentences and headers."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import small_runs

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = tuple(f"{name}.py" for name in small_runs.ALGORITHMS)
PAGES = ("README.md", "tiny/README.md", "benchmark/README.md", "benchmark/results/README.md")
RUNNERS = ("python", "torchrun")
ELLIPSIS = "..."  # right after a script: the flags of the document's command before it


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A command that runs a file or a module of this repository."""

    document: str
    target: str  # such as flow_grpo.py, or benchmark.run_seeds
    words: list  # what follows it
    num_processes: int = 1

    def __str__(self):
        return f"{self.document}: {self.target} {' '.join(self.words)}"[:80]


def pages():
    """Paths of all pages, relative to the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return list(PAGES) + docs


def scripts():
    """Paths of all Python files with a header that says how they are run."""
    paths = list(ALGORITHMS) + ["rewards/__main__.py", "rewards/geneval/make_prompts.py"]
    for folder in ("benchmark", "tiny"):
        paths += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py"))
    return [path for path in paths if (ROOT / path).is_file()]


def blocks(page):
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(page, language, block) for language, block in found]


def header(script):
    """The docstring of a Python file."""
    return ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""


def join_continued_lines(text):
    return re.sub(r"[ \t]*\\\n[ \t]*", " ", text)


def indented(text):
    """The lines of a text that are indented: in pages and headers, these are not sentences."""
    lines = [line for line in join_continued_lines(text).splitlines() if line.startswith("  ")]
    return "\n".join(lines)


def command_lines(text):
    """Commands of a block, one line each, without comments and explanations."""
    lines = []
    for line in join_continued_lines(text).splitlines():
        for part in line.strip().split(" && "):
            if part.startswith(tuple(f"{runner} " for runner in RUNNERS)):
                # A comment or an explanation follows after two spaces.
                lines.append(re.split(r"\s{2,}|\s#", part)[0].rstrip(":;,."))
    return lines


def spans(text):
    """Commands in sentences, between backquotes."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:python|torchrun) [^`]+)`", without_blocks)
    return [re.sub(r"\s+", " ", span) for span in found]


def parse(document, line):
    """The Command of a line, or None where it runs nothing of this repository."""
    words = shlex.split(line.replace("[", "").replace("]", ""))
    num_processes = 1
    for word in words:
        if word.startswith("--nproc_per_node="):
            num_processes = int(word.split("=")[1])
    words = [word for word in words[1:] if not word.startswith("--nproc_per_node")]
    if words[:1] == ["-m"]:
        words = words[1:]
    if not words:
        return None
    target = words[0]
    is_ours = target.endswith(".py") or target.split(".")[0] in ("benchmark", "rewards", "tiny")
    if not is_ours:
        return None
    return Command(document, target, words[1:], num_processes)


def is_recorded(document):
    """Pages of results quote commands as they were typed then: they are history and not instructions."""
    return document == "docs/results.md"


def commands():
    """All commands of all documents, with `...` replaced by the flags of the command before it."""
    found = []
    for page in pages():
        if not is_recorded(page):
            text = (ROOT / page).read_text()
            fenced = "\n".join(block.text for block in blocks(page))
            lines = command_lines(fenced) + command_lines(indented(text)) + spans(text)
            found += complete(page, lines)
    for script in scripts():
        text = header(script)
        found += complete(script, command_lines(indented(text)) + spans(text))
    return found


def complete(document, lines):
    """The Commands of lines, with `...` right after a script replaced by the flags of its last command."""
    completed = []
    last = {}
    for line in lines:
        command = parse(document, line)
        if command is None:
            continue
        if command.words[:1] == [ELLIPSIS]:
            words = last.get(command.target, []) + command.words[1:]
            command = command._replace(words=words)
        last[command.target] = command.words
        completed.append(command)
    return completed


def value_of(words, flag):
    """The last value of a flag in the words of a command, "" where it is not there."""
    value = ""
    for word, following in zip(words, words[1:]):
        if word == flag:
            value = following
    return value


def is_placeholder(text):
    """True for X, DIR, OTHER or runs/X: what the reader is to replace."""
    return bool(re.search(r"(^|/)[A-Z]+(\.\w+)?($|/)", text))
