"""The rules that keep the algorithm files readable: sizes, banners, imports, globals, same name same text."""

import ast
import builtins
import difflib
import io
import itertools
import re
import subprocess
import symtable
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}  # the algorithm files
LIMITS = {
    "flow_grpo": 500,
    "superflow": 500,
    "fdfo": 500,
    "promptrl": 600,
    "promptloop": 550,
}  # lines; else 600
BUDGETS = {"superflow": (12, 150), "fdfo": (20, 250)}  # hunks, changed lines from flow_grpo.py
TRAIN_LINES, FUNCTION_LINES, WIDTH = 150, 60, 110
BANNERS = ["model", "flow", "rollout", "algorithm", "checkpoint", "train"]  # others may stand between
IMPORT_NAMES = {"pillow": "PIL"}  # where a package is imported by another name
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Each check takes source text and returns the violations, so that it can be shown to find them.


def oversized(source, limit):
    lines = source.splitlines()
    found = [f"{len(lines)} lines, over {limit}"] if len(lines) > limit else []
    found += [f"line {n} is {len(line)} wide" for n, line in enumerate(lines, 1) if len(line) > WIDTH]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            length = node.end_lineno - node.lineno + 1
            if length > (TRAIN_LINES if node.name == "train" else FUNCTION_LINES):
                found.append(f"{node.name} has {length} lines")
    return found


def misplaced_banners(source):
    found = [name for name in re.findall(r"^# === (.+) ===$", source, re.MULTILINE) if name in BANNERS]
    return [] if found == BANNERS else [f"banners {found}, expected {BANNERS}"]


def required_packages(text):
    names = [match[0].lower() for line in text.splitlines() if (match := re.match(r"[A-Za-z0-9._-]+", line))]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def foreign_imports(source, packages):
    allowed = sys.stdlib_module_names | packages | {"rewards"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in allowed]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if node.level or module.split(".")[0] not in allowed or node.names[0].name == "*":
                found.append(f"from {module} import {node.names[0].name}")
    return found


def global_reads(source):
    """Names of the module that a function uses and that are no import, function or class."""
    module = symtable.symtable(source, "source", "exec")
    allowed = {s.get_name() for s in module.get_symbols() if s.is_imported() or s.is_namespace()}
    allowed |= {*dir(builtins), "__file__", "__name__"}
    found, tables = [], list(module.get_children())
    while tables:
        table = tables.pop()
        tables += table.get_children()
        if table.get_type() == "function":  # also lambdas and comprehensions
            names = {s.get_name() for s in table.get_symbols() if s.is_global()}
            found += [f"{table.get_name()}: {name}" for name in sorted(names - allowed)]
    return sorted(found)


def args_fields(source):
    """{name: (annotation, comments on the field's lines, docstring below it, number of lines)}."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    fields = {}
    for cls in ast.parse(source).body:
        if isinstance(cls, ast.ClassDef) and cls.name == "Args":
            for node, after in itertools.zip_longest(cls.body, cls.body[1:]):
                if isinstance(node, ast.AnnAssign):
                    rows = range(node.lineno, node.end_lineno + 1)
                    comment = " ".join(comments[n] for n in rows if n in comments)
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    text = after.value.value if is_text and isinstance(after.value.value, str) else ""
                    fields[node.target.id] = (ast.unparse(node.annotation), comment, text, len(rows))
    return fields


def helpless_fields(source):
    """Args fields without help: tyro shows a docstring, or a comment if the field is on one line."""
    fields = args_fields(source)
    return [k for k, (_, comment, text, rows) in fields.items() if not text and not (comment and rows == 1)]


def undocumented_functions(source):
    nodes = [node for node in ast.parse(source).body if isinstance(node, FUNCTIONS)]
    return [node.name for node in nodes if not ast.get_docstring(node)]


def different_texts(a, b):
    """Same name, same text: functions but for train, and Args fields but for their defaults."""

    def texts(source):
        lines, found = source.splitlines(), {}
        for node in ast.parse(source).body:
            if isinstance(node, FUNCTIONS) and node.name != "train":
                first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
                found[node.name + "()"] = lines[first - 1 : node.end_lineno]
        return found | {f"Args.{name}": field[:3] for name, field in args_fields(source).items()}

    a, b = texts(a), texts(b)
    return sorted(name for name in a.keys() & b.keys() if a[name] != b[name])


def difference(a, b):
    """(hunks, lines added and removed) of `diff -u` between two files, after their headers."""
    bodies = [source.splitlines()[ast.parse(source).body[0].end_lineno :] for source in (a, b)]
    lines = list(difflib.unified_diff(*bodies, lineterm=""))[2:]
    return sum(line.startswith("@@") for line in lines), sum(line[0] in "+-" for line in lines)


def absolute_paths(text):
    """Paths of one machine; a folder of that name inside a URL or a relative path is none."""
    return re.findall(r"(?<![\w.})])/(?:work|root|home|tmp)\b[^\s\"']*", text)


# The rules on the files of this repository.


def test_the_algorithm_files_are_found():
    assert "flow_grpo" in FILES


@pytest.mark.parametrize("name", FILES)
def test_sizes(name):
    assert oversized(FILES[name], LIMITS.get(name, 600)) == []


@pytest.mark.parametrize("name", FILES)
def test_banners_in_order(name):
    assert misplaced_banners(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    assert foreign_imports(FILES[name], required_packages((ROOT / "requirements.txt").read_text())) == []


@pytest.mark.parametrize("name", FILES)
def test_no_function_reads_a_global(name):
    assert global_reads(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_every_flag_has_help(name):
    assert "seed" in args_fields(FILES[name])
    assert helpless_fields(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_every_function_has_a_docstring(name):
    assert undocumented_functions(FILES[name]) == []


def test_same_name_same_text():
    pairs = itertools.combinations(FILES, 2)
    different = {(a, b): different_texts(FILES[a], FILES[b]) for a, b in pairs}
    assert {pair: names for pair, names in different.items() if names} == {}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_variant_is_a_small_difference_from_the_baseline(name):
    hunks, lines = difference(FILES["flow_grpo"], FILES[name])
    assert 0 < hunks <= BUDGETS[name][0] and 0 < lines <= BUDGETS[name][1]


def test_no_absolute_paths():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found, read = {}, 0
    for name in filter(None, listed.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:  # text
            read += 1
            if paths := absolute_paths(data.decode(errors="replace")):
                found[name] = paths
    assert read > 5 and found == {}


# The checks find what they are for.

GOOD = '''"""A method."""

import dataclasses

import torch
from PIL import Image

import rewards
from rewards.command_line import main


@dataclasses.dataclass
class Args:
    # run
    seed: int = 1  # of every noise
    size: float | None = 2.0
    """Side of an image."""


# === model ===


def load(path):
    """Loads."""
    return Image.open(path)


# === flow ===
# === rollout ===
# === algorithm ===


@torch.no_grad()
def loss(x):
    """A loss."""
    total = [len(str(y)) for y in x]
    return (lambda z: z + sum(total))(x), Args, load, rewards, __file__


# === evaluation ===
# === checkpoint ===
# === train ===


def train(args):
    """Trains."""
    return loss(args)


if __name__ == "__main__":
    main(train, Args())
'''
CHECKS = {
    "size": lambda source: oversized(source, 60),
    "banners": misplaced_banners,
    "imports": lambda source: foreign_imports(source, {"torch", "PIL"}),
    "globals": global_reads,
    "help": helpless_fields,
    "docstrings": undocumented_functions,
    "shared": lambda source: different_texts(GOOD, source),
}
BODY = "    return loss(args)\n"
VIOLATIONS = [
    ("size", BODY, BODY + "\n" * 10),
    ("size", '"""A method."""', '"""A method."""' + " " * 96),
    ("banners", "# === flow ===\n# === rollout ===", "# === rollout ===\n# === flow ==="),
    ("banners", "# === algorithm ===\n", ""),
    ("banners", "# === evaluation ===", "# === train ==="),
    ("imports", "import torch", "import scipy"),
    ("imports", "import torch", "import os, scipy.stats"),
    ("imports", "import torch", "from tiny.world import World"),
    ("imports", "import torch", "from flow_grpo import rollout"),
    ("imports", "import torch", "from . import rewards"),
    ("imports", "import torch", "from torch import *"),
    ("imports", BODY, "    import tiny\n" + BODY),
    ("globals", "@torch.no_grad()", "SCALE = 2\n\n\ndef f():\n    return SCALE\n"),
    ("globals", "@torch.no_grad()", "SCALE = 2\n\n\ndef f(x):\n    return [lambda: SCALE for _ in x]\n"),
    ("globals", BODY, "    global count\n    count = 1\n" + BODY),
    (
        "globals",
        "if __name__",
        "args = Args()\n\n\nclass A:\n    def f(self):\n        return args\n\n\nif __name__",
    ),
    ("globals", BODY, "    return missing\n"),
    ("help", "  # of every noise", ""),
    ("help", '\n    """Side of an image."""', ""),
    ("help", "seed: int = 1  # of every noise", "seed: int = (\n        1  # of every noise\n    )"),
    ("docstrings", '    """Loads."""\n', ""),
    ("shared", "Image.open(path)", "Image.open( path)"),
    ("shared", "@torch.no_grad()\n", ""),
    ("shared", "seed: int", "seed: float"),
    ("shared", "of every noise", "of all noise"),
    ("shared", "Side of an image", "Side of the image"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_good_file_passes(name):
    assert CHECKS[name](GOOD) == []


@pytest.mark.parametrize("name, old, new", VIOLATIONS)
def test_a_violation_is_found(name, old, new):
    assert GOOD.count(old) == 1
    assert len(CHECKS[name](GOOD.replace(old, new))) == 1


@pytest.mark.parametrize("name, limit", [("load", FUNCTION_LINES), ("train", TRAIN_LINES)])
def test_a_long_function_is_found(name, limit):
    source = f"def {name}():\n" + "    x = 1\n" * (limit - 1)
    assert oversized(source, 600) == []
    assert oversized(source + "    x = 1\n", 600) == [f"{name} has {limit + 1} lines"]


def test_train_and_defaults_may_differ_between_files():
    other = GOOD.replace(BODY, "    return 2\n").replace("= 1 ", "= 3 ").replace("= 2.0", "= None")
    assert other != GOOD and different_texts(GOOD, other) == []


def test_the_difference_counts_hunks_and_lines_but_not_the_header():
    assert difference(GOOD, GOOD.replace("A method.", "Another method,\nlonger.")) == (0, 0)
    assert difference(GOOD, GOOD.replace("A loss.", "Another.")) == (1, 2)
    assert difference(GOOD, GOOD.replace("import re", "import rewards.x\nimport re").replace(BODY, "")) == (
        2,
        2,
    )


def test_package_names():
    text = "torch==2.13.0\npillow~=13.0\n# a comment\n\nrapid-ocr>=1; python_version > '3'\n"
    assert required_packages(text) == {"torch", "PIL", "rapid_ocr"}


@pytest.mark.parametrize("folder", ["work", "root", "home", "tmp"])
def test_an_absolute_path_is_found(folder):
    path = "/" + folder
    assert absolute_paths(f"open('{path}/x.txt')\n{path}") == [f"{path}/x.txt", path]
    assert absolute_paths(f"https://example.org{path} ..{path} runs{path}/x {path}space") == []
