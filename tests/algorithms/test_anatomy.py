"""The rules that keep the algorithm files readable and comparable.

How many lines differ between the files is stated in the README, where a test of benchmark/ binds it.

Each check takes source text and returns the violations that it finds, so that a test below can show that it
finds them.
"""

import ast
import builtins
import io
import re
import symtable
import sys
import tokenize
import typing
from collections import Counter
from pathlib import Path

import pytest

from rewards import command_line
from small_runs import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: (ROOT / f"{name}.py").read_text() for name in sorted(ALGORITHMS)}
BANNERS = ["model", "flow", "rollout", "algorithm", "checkpoint", "train"]  # others may stand between
IMPORT_NAMES = {"pillow": "PIL"}  # where a package is imported by another name
EXEMPT = ["train", "check_args"]  # functions of which each file has its own
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MAX_TOKENS_PER_LINE = 10  # on average; the field's model files have 7 to 9
CROWDED = 30  # tokens on one line
MAX_CROWDED_LINES = 3


# === what a file is made of ===


def misplaced_banners(source):
    found = [name for name in re.findall(r"^# === (.+) ===$", source, re.MULTILINE) if name in BANNERS]
    return [] if found == BANNERS else [f"banners {found}, expected {BANNERS}"]


def required_packages(text):
    names = []
    for line in text.splitlines():
        match = re.match(r"[A-Za-z0-9._-]+", line)
        if match:
            names.append(match[0].lower())
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


def undocumented_functions(source):
    nodes = [node for node in ast.parse(source).body if isinstance(node, FUNCTIONS)]
    return [node.name for node in nodes if not ast.get_docstring(node)]


# === flags ===

# The aliases of rewards/command_line.py that hold a range: PositiveInt, Seed, ...
RANGED = {name for name, hint in vars(command_line).items() if typing.get_origin(hint) is typing.Annotated}


def args_fields(source):
    """{name: (annotation, docstring below it or "")} of Args."""
    fields = {}
    for cls in ast.parse(source).body:
        if isinstance(cls, ast.ClassDef) and cls.name == "Args":
            for node, after in zip(cls.body, [*cls.body[1:], None]):
                if isinstance(node, ast.AnnAssign):
                    text = after.value.value if is_docstring(after) else ""
                    fields[node.target.id] = (ast.unparse(node.annotation), text)
    return fields


def is_docstring(node):
    """Whether a statement is a text and nothing else."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def helpless_fields(source):
    """Args fields without a docstring. A comment is no help: where a field is long, tyro does not show it."""
    return [name for name, (_, text) in args_fields(source).items() if not text.strip()]


def open_fields(source):
    """Args fields that hold more than they should: numbers need a range, other types must be closed."""
    return [name for name, (annotation, _) in args_fields(source).items() if not is_closed(annotation)]


def is_closed(annotation):
    """Whether an annotation says all that a field may hold. Texts are free."""
    node = ast.parse(annotation, mode="eval").body
    if isinstance(node, ast.BinOp):  # a | b
        return is_closed(ast.unparse(node.left)) and is_closed(ast.unparse(node.right))
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return True
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
        kind, allowed = node.slice.elts
        is_range = isinstance(allowed, ast.Call) and ast.unparse(allowed.func) == "Range"
        return is_range and ast.unparse(kind) in ("int", "float")
    return annotation in RANGED or annotation in ("bool", "str", "None")


# === same name, same code ===


def without_docstrings(node):
    """The code of a definition as a text, without docstrings, comments and layout."""
    node = ast.parse(ast.unparse(node))
    for inner in ast.walk(node):
        if hasattr(inner, "body") and isinstance(inner.body, list):
            inner.body = [statement for statement in inner.body if not is_docstring(statement)]
    return ast.dump(node)


def shared_code(source):
    """{name: code} of what must be equal where it has the same name: functions, classes and flags' types."""
    found = {}
    for node in ast.parse(source).body:
        is_args = isinstance(node, ast.ClassDef) and node.name == "Args"
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name not in EXEMPT and not is_args:
            found[node.name] = without_docstrings(node)
    for name, (annotation, _) in args_fields(source).items():
        found["Args." + name] = annotation
    return found


def different_code(source, others):
    """Names with other code than in the first of the other files that has the name."""
    found = []
    others = [shared_code(other) for other in others]
    for name, code in shared_code(source).items():
        first = next((other[name] for other in others if name in other), code)
        if code != first:
            found.append(name)
    return found


# === the header ===


def header_steps(source):
    """The numbers of the header's first numbered list, which is the algorithm. Differences come after it."""
    numbers = [int(n) for n in re.findall(r"^ *(\d+)\. ", ast.get_docstring(ast.parse(source)), re.MULTILINE)]
    restart = numbers.index(1, 1) if 1 in numbers[1:] else len(numbers)
    return numbers[:restart]


def train_steps(source):
    """The numbers of the comments in train: 2 and 3 of `# 2. Sample, and 3. score.`"""
    (train,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "train"]
    numbers = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        inside = train.lineno <= token.start[0] <= train.end_lineno
        if inside and token.type == tokenize.COMMENT and re.match(r"# \d+\. ", token.string):
            numbers += [int(n) for n in re.findall(r"(?:# | and )(\d+)\. ", token.string)]
    return numbers


def wrong_steps(source):
    """Steps of the header and of train that are not 1 to n, or not the same."""
    header, train = header_steps(source), train_steps(source)
    in_order = header == list(range(1, len(header) + 1)) and 5 <= len(header) <= 8
    return [] if in_order and header == train else [f"the header has {header}, train has {train}"]


def common_header(source):
    """The end of the header, which all files share: conventions, and the legend of letters."""
    header = ast.get_docstring(ast.parse(source))
    start = header.find("Conventions, the same in all five files:")
    return header[start:] if start >= 0 and "\nLetters, the same in all five files:\n" in header else ""


# === one thing per line ===


def code_tokens(source):
    """The lines of names, numbers, texts and operators, one entry per token; an f-string is one token."""
    counted = ("NAME", "NUMBER", "OP", "STRING", "FSTRING_END")
    lines = []
    inside = 0  # of f-strings: from Python 3.12 on they come in pieces
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            inside -= 1
        if name in counted and inside == 0:
            lines.append(token.start[0])
        if name == "FSTRING_START":
            inside += 1
    return lines


def density(source):
    """(tokens per line of code, crowded lines). Docstrings are no code; the help of a flag is one token."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and is_docstring(node.body[0]):
            texts.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens_of = Counter(line for line in code_tokens(source) if line not in texts)
    crowded = [line for line, count in sorted(tokens_of.items()) if count >= CROWDED]
    return sum(tokens_of.values()) / len(tokens_of), crowded


def dense_lines(source):
    mean, crowded = density(source)
    found = [] if mean <= MAX_TOKENS_PER_LINE else [f"{mean:.1f} tokens on a line"]
    if len(crowded) > MAX_CROWDED_LINES:
        found.append(f"crowded: lines {crowded}")
    return found


def crowded_statements(source):
    """Loops hidden in loops, conditions hidden in the header of a loop."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            if len(node.generators) > 1 or len(inner) > 1:
                found.append(f"line {node.lineno}: nested comprehension")
        if isinstance(node, (ast.For, ast.AsyncFor)):
            parts = list(ast.walk(node.iter))
            if any(isinstance(part, ast.IfExp) or getattr(part, "ifs", []) for part in parts):
                found.append(f"line {node.lineno}: if in the header of a for")
    return found


PREDICATES = ["all", "any", "bool", "callable", "hasattr", "isinstance", "issubclass"]


def is_boolean(node):
    """Whether an expression is certainly true or false, or a mask of such."""
    if isinstance(node, ast.Compare):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) or (isinstance(node.op, ast.Invert) and is_boolean(node.operand))
    if isinstance(node, ast.BoolOp):
        return all(is_boolean(value) for value in node.values)
    if isinstance(node, ast.BinOp):  # a mask of masks; but flags of one bit each are numbers
        is_mask = isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor))
        return is_mask and is_boolean(node.left) and is_boolean(node.right)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in PREDICATES
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def boolean_numbers(source):
    """Where a boolean is added, multiplied, summed or used as an index. Masks of tensors may be indices."""
    arithmetic = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
    found = []
    for node in ast.walk(ast.parse(source)):
        suspects = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, arithmetic):
            suspects = [node.left, node.right]
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, arithmetic):
            suspects = [node.value]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            suspects = [node.operand]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sum":
            suspects = [getattr(argument, "elt", None) for argument in node.args[:1]]
        elif isinstance(node, ast.Slice):
            suspects = [node.lower, node.upper, node.step]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, (ast.Tuple, ast.List, ast.Constant)):
            suspects = [node.slice]
        if any(is_boolean(suspect) for suspect in suspects):
            found.append(f"line {node.lineno}: boolean as a number")
    return found


# === closures ===


def own_nodes(scope):
    """The nodes of a function or comprehension without those of functions and comprehensions inside of it."""
    nodes = list(ast.iter_child_nodes(scope))
    while nodes:
        node = nodes.pop()
        yield node
        if isinstance(node, (*SCOPES, ast.ClassDef)):
            nodes += getattr(node, "decorator_list", [])
        elif isinstance(node, COMPREHENSIONS):
            # Its loop variables are its own. Only `:=` inside of it assigns in the function.
            nodes += [child for child in ast.walk(node) if isinstance(child, ast.NamedExpr)]
        else:
            nodes += ast.iter_child_nodes(node)


def assignments(scope):
    """{name: lines where a function assigns it}, the function's parameters included."""
    lines = {}
    for node in own_nodes(scope):
        names = []
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.NamedExpr):
            names = [node.target.id]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names = [node.name]
        for name in names:
            lines.setdefault(name, []).append(node.lineno)
    return lines


def free_names(function):
    """Names that a function, a comprehension or one inside of it reads from where it stands."""
    names = set()
    for node in own_nodes(function):
        if isinstance(node, (*SCOPES, *COMPREHENSIONS)):
            names |= free_names(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names - set(assignments(function))


def late_reads(source):
    """Names that a nested function reads and that are assigned below it: its text alone does not tell what
    they will be when it runs."""
    found = []
    for scope in ast.walk(ast.parse(source)):
        if not isinstance(scope, SCOPES):
            continue
        assigned = assignments(scope)
        for node in own_nodes(scope):
            functions = [node] if isinstance(node, SCOPES) else []
            if isinstance(node, COMPREHENSIONS):
                functions = [inner for inner in ast.walk(node) if isinstance(inner, SCOPES)]
            for function in functions:
                for name in sorted(free_names(function) & free_names(node)):
                    if any(line > function.end_lineno for line in assigned.get(name, [])):
                        found.append(f"{getattr(function, 'name', 'lambda')}: {name}")
    return found


# === the tree ===


def absolute_paths(text):
    """Paths of one machine; a folder of that name inside a URL or a relative path is none."""
    return re.findall(r"(?<![\w.})])/(?:work|root|home|tmp)\b[^\s\"']*", text)


def text_files(root):
    """{path from the root: text} of the files of the project, whether or not it is a git repository."""
    found = {}
    folders = [root]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            made = path.name in ("__pycache__", "runs", "wandb") or path.name.endswith(".egg-info")
            hidden = path.name.startswith(".") and path.name not in (".ci", ".gitignore", ".github")
            if made or hidden or path.is_symlink():
                continue
            if path.is_dir():
                folders.append(path)
                continue
            data = path.read_bytes()
            if b"\0" not in data:
                found[path.relative_to(root).as_posix()] = data.decode(errors="replace")
    return found


# === the rules, on the files of this repository ===


def before(name):
    """The sources of the files that are read before this one."""
    return [FILES[other] for other in ALGORITHMS[: ALGORITHMS.index(name)]]


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
def test_no_nested_function_reads_what_is_assigned_below_it(name):
    assert late_reads(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_every_flag_has_help(name):
    assert "seed" in args_fields(FILES[name])
    assert helpless_fields(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_every_flag_has_a_range_or_a_closed_type(name):
    assert open_fields(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_every_function_has_a_docstring(name):
    assert undocumented_functions(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_the_steps_of_the_header_are_those_of_train(name):
    assert wrong_steps(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_conventions_and_letters_are_the_same_in_all_headers(name):
    assert common_header(FILES[name]) == common_header(FILES["flow_grpo"]) != ""


@pytest.mark.parametrize("name", FILES)
def test_one_thing_per_line(name):
    assert dense_lines(FILES[name]) == []
    assert crowded_statements(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_no_boolean_is_used_as_a_number(name):
    assert boolean_numbers(FILES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_same_name_same_code(name):
    assert different_code(FILES[name], before(name)) == []


def test_no_absolute_paths():
    texts = text_files(ROOT)
    assert {"README.md", ".ci/run", "flow_grpo.py", "tests/small_runs.py", "rewards/report/log.py"} <= set(
        texts
    )
    paths = {name: absolute_paths(text) for name, text in texts.items()}
    assert {name: found for name, found in paths.items() if found} == {}


# === the checks find what they are for ===

GOOD = '''"""A method.

 1. Draw.
 2. Sample, with 3. beside it.
 3. Score.
 4. Compare.
 5. Train.

Differences from the paper:
 1. None.

Conventions, the same in all five files:
  Time runs from 1 to 0.
Letters, the same in all five files:
  P prompts.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import torch
from PIL import Image

import rewards
from rewards.command_line import PositiveInt, Range, main


@dataclasses.dataclass
class Args:
    # run
    seed: PositiveInt = 1
    """Of every noise."""
    size: Annotated[float, Range(0, 9)] = (
        2.0
    )
    """Side of an image."""
    kind: Literal["a", "b"] = "a"
    """Which kind."""
    team: str | None = None
    """Who."""
    track: bool = False
    """Whether to track."""


# === model ===


class Step(NamedTuple):
    """A step."""

    index: int  # which one
    mean: torch.Tensor


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
    scale = -len(x)
    mask = (x > 0) & ~(x < 1)
    kept = x[mask & (x > 2)]
    for row in [len(y) for y in x]:
        scale += row

    def scaled(z):
        """Reads what stands above it."""
        return scale * z + sum(y for y in kept)

    index = 3
    several = [lambda: row for row in x]
    for y in x:
        several.append([row for row in x])
    row = len(x)
    return (lambda z: scaled(z) + sum(total))(index), Args, load, rewards, Step, __file__


# === evaluation ===
# === checkpoint ===


def check_args(args):
    """Nothing."""


# === train ===


def train(args):
    """Trains."""
    # 1. Draw.
    x = args
    # 2. Sample, and 3. score.
    x += 1
    # 4. Compare.
    # 5. Train. Not step 6. at all.
    return loss(x)


if __name__ == "__main__":
    main(train, Args())
'''
CHECKS = {
    "banners": misplaced_banners,
    "imports": lambda source: foreign_imports(source, {"torch", "PIL"}),
    "globals": global_reads,
    "late": late_reads,
    "help": helpless_fields,
    "open": open_fields,
    "docstrings": undocumented_functions,
    "steps": wrong_steps,
    "density": dense_lines,
    "crowded": crowded_statements,
    "booleans": boolean_numbers,
    "shared": lambda source: different_code(source, ["", GOOD]),
}
BODY = "    return loss(x)\n"
INDEX = "    index = 3\n"
CROWDED_LINE = "    x = (" + ", ".join("x" * 16) + ")\n"
VIOLATIONS = [
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
    ("late", INDEX, INDEX + "    scale = 2\n"),
    ("late", INDEX, INDEX + "    scale += 2\n"),
    ("late", INDEX, INDEX + "    for scale in x:\n        pass\n"),
    ("late", INDEX, INDEX + "    with x as scale:\n        pass\n"),
    ("late", INDEX, INDEX + "    print([(scale := y) for y in x])\n"),
    ("late", INDEX, INDEX + "    import scale\n"),
    ("late", INDEX, INDEX + "\n    def scale():\n        pass\n"),
    ("late", INDEX, INDEX + "    f = lambda: later\n    later = 1\n"),
    ("late", INDEX, INDEX + "    f = [lambda: later for _ in x]\n    later = 1\n"),
    ("late", INDEX, INDEX + "    def f():\n        return lambda: later\n    later = 1\n"),
    ("late", INDEX, INDEX + "    def f():\n        return [later for _ in x]\n    later = 1\n"),
    ("late", INDEX, INDEX + "    def f(y):\n        y[later] += 1\n    later = 1\n"),
    ("help", '    """Of every noise."""\n', ""),
    ("help", '    """Of every noise."""\n', "    # Of every noise.\n"),
    ("help", "Side of an image.", " "),
    ("help", '"""Which kind."""', "2"),
    ("open", "seed: PositiveInt", "seed: int"),
    ("open", "Annotated[float, Range(0, 9)]", "float"),
    ("open", "Annotated[float, Range(0, 9)]", "Annotated[float, 9]"),
    ("open", "Annotated[float, Range(0, 9)]", "Annotated[complex, Range(0, 9)]"),
    ("open", "str | None", "str | int"),
    ("open", "track: bool", "track: object"),
    ("docstrings", '    """Loads."""\n', ""),
    ("steps", " 5. Train.\n", ""),
    ("steps", " 3. Score.\n", ""),
    ("steps", "    # 4. Compare.\n", ""),
    ("steps", "# 2. Sample, and 3. score.", "# 2. Sample and score."),
    ("steps", "# 4. Compare.\n    # 5. Train.", "# 5. Train.\n    # 4. Compare."),
    ("density", BODY, 4 * CROWDED_LINE + BODY),
    ("density", BODY, 120 * ("    x = (" + ", ".join("x" * 11) + ")\n") + BODY),
    ("crowded", INDEX, "    index = [y for row in x for y in row]\n"),
    ("crowded", INDEX, "    index = [[y for y in row] for row in x]\n"),
    ("crowded", INDEX, "    index = {sum(y for y in row): row for row in x}\n"),
    ("crowded", "in [len(y) for y in x]:", "in x if len(x) else []:"),
    ("crowded", "in [len(y) for y in x]:", "in list(x if len(x) else []):"),
    ("crowded", "in [len(y) for y in x]:", "in [len(y) for y in x if y]:"),
    ("booleans", INDEX, "    index = 2 + (len(x) > 1)\n"),
    ("booleans", INDEX, "    index = x * (x > 1)\n"),
    ("booleans", INDEX, "    index = x / ((x > 1) & (x < 3))\n"),
    ("booleans", INDEX, "    index = 3 - (not x)\n"),
    ("booleans", INDEX, "    index = True + 2\n"),
    ("booleans", INDEX, "    index = -isinstance(x, int)\n"),
    ("booleans", INDEX, "    index = 3\n    index += hasattr(x, 'y')\n"),
    ("booleans", INDEX, "    index = sum(y > 1 for y in x)\n"),
    ("booleans", INDEX, "    index = sum([y is None for y in x])\n"),
    ("booleans", INDEX, "    index = (2, 3)[len(x) > 1]\n"),
    ("booleans", INDEX, "    index = 'ab'[len(x) > 1 and len(x) < 3]\n"),
    ("booleans", INDEX, "    index = x[len(x) > 1 :]\n"),
    ("shared", "Image.open(path)", "Image.open(path, 'r')"),
    ("shared", "@torch.no_grad()\n", ""),
    ("shared", "def load(path):", "def load(path, mode=None):"),
    ("shared", "seed: PositiveInt", "seed: int"),
    ("shared", "Range(0, 9)", "Range(0, 8)"),
    ("shared", '"a", "b"', '"a"'),
    ("shared", "    index: int  # which one\n", ""),
    (
        "shared",
        "    index: int  # which one\n    mean: torch.Tensor\n",
        "    mean: torch.Tensor\n    index: int\n",
    ),
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_good_file_passes(name):
    assert CHECKS[name](GOOD) == []


@pytest.mark.parametrize("name, old, new", VIOLATIONS)
def test_a_violation_is_found(name, old, new):
    assert GOOD.count(old) == 1
    assert len(CHECKS[name](GOOD.replace(old, new))) == 1


@pytest.mark.parametrize(
    "old, new",
    [
        (BODY, "    return 2\n"),  # train
        ('    """Nothing."""\n', '    """Nothing."""\n    assert args\n'),  # check_args
        ("PositiveInt = 1", "PositiveInt = 3"),  # a default
        ("Of every noise.", "Of all noise."),
        ('"""A loss."""', '"""Another loss, described elsewhere."""'),
        ('        """Reads what stands above it."""\n', ""),
        ('"""A step."""\n', '"""A step of this method."""\n'),
        ("  # which one", "  # i, of sigmas"),
        ("# === rollout ===", "# === rollout ===\n\n# a comment"),
        ("    return Image.open(path)", "    return Image.open(\n        path\n    )"),
    ],
)
def test_words_defaults_and_layout_may_differ_between_files(old, new):
    assert GOOD.count(old) == 1
    assert CHECKS["shared"](GOOD.replace(old, new)) == []


def test_a_file_is_compared_with_the_first_that_has_the_name():
    other = GOOD.replace("Image.open(path)", "path").replace("def loss", "def another")
    last = GOOD.replace("def loss", "def third")
    assert different_code(last, [other, GOOD]) == ["load"]
    assert different_code(last, [GOOD, other]) == []


def test_a_header_without_the_common_end_is_found():
    assert common_header(GOOD).startswith("Conventions") and common_header(GOOD).endswith("P prompts.")
    for line in ("Conventions, the same in all five files:", "Letters, the same in all five files:"):
        assert common_header(GOOD.replace(line, "")) == ""
    assert common_header(GOOD.replace("P prompts.", "P people.")) != common_header(GOOD)
    assert common_header(GOOD.replace("Time runs", "Time goes")) != common_header(GOOD)


@pytest.mark.parametrize(
    "source, mean, crowded",
    [
        ("x = 1\n", 3, []),
        ('"""A text."""\n\n# a comment\nx = "a text"\n', 3, []),
        ('class A:\n    x: int = 1\n    """Help."""\n', 3, []),  # 3, 5 and 1
        ('class A:\n    """Text."""\n\n    x: int = 1\n', 4, []),  # 3 and 5
        ("def f(a):\n    '''Text\n    of two lines.'''\n    return a\n", 4, []),  # 6 and 2
        ("x = f'{a} and {b}'\n", 3, []),
        ("x = [" + "1, " * 13 + "]\n", 30, [1]),
        ("x = [\n" + "    1,\n" * 13 + "]\n", 2, []),
    ],
)
def test_density(source, mean, crowded):
    assert density(source) == (pytest.approx(mean, abs=0.14), crowded)


def test_three_crowded_lines_are_few():
    assert dense_lines(GOOD.replace(BODY, 3 * CROWDED_LINE + BODY)) == []


def test_package_names():
    text = "torch==2.13.0\npillow~=13.0\n# a comment\n\nrapid-ocr>=1; python_version > '3'\n"
    assert required_packages(text) == {"torch", "PIL", "rapid_ocr"}


@pytest.mark.parametrize("folder", ["work", "root", "home", "tmp"])
def test_an_absolute_path_is_found(folder):
    path = "/" + folder
    assert absolute_paths(f"open('{path}/x.txt')\n{path}") == [f"{path}/x.txt", path]
    assert absolute_paths(f"https://example.org{path} ..{path} runs{path}/x {path}space") == []


def test_the_texts_of_a_tree_are_found_without_what_is_made_in_it(tmp_path):
    for name in ("a.py", "docs/b.md", ".ci/run", "tiny/sd3/c.json", ".gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (
        ".git/config",
        ".venv-ci/x.py",
        "runs/x/args.json",
        "a/__pycache__/x",
        "wandb/x",
        ".cache/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("made")
    (tmp_path / "weights.bin").write_bytes(b"text and \0")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    names = ["a.py", "docs/b.md", ".ci/run", "tiny/sd3/c.json", ".gitignore"]
    assert text_files(tmp_path) == {name: name for name in names}
