"""What the files of the project import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from small_runs import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]


FORBIDDEN = {
    "torchvision",
    "scipy",
    "open_clip",
    "mmdet",
    "paddle",
    "paddleocr",
    "clip",
    "ImageReward",
    "hpsv3",
}


def test_no_file_imports_what_makes_setting_up_hard():
    paths = [ROOT / f"{name}.py" for name in ALGORITHMS]
    for folder in ("rewards", "tiny", "tests", "benchmark"):
        paths += (ROOT / folder).rglob("*.py")
    imported = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                imported.setdefault(name.split(".")[0], path.name)
    assert len(paths) > 20 and {"torch", "transformers", "rapidocr"} <= imported.keys()
    assert {name: path for name, path in imported.items() if name in FORBIDDEN} == {}


def module_names():
    """{name of a module of rewards/: its path}; a package is its __init__.py."""
    names = {}
    for path in sorted((ROOT / "rewards").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(source, names):
    """The modules of rewards/ that a source imports anywhere, functions included, or names as a factory's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in names else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.partition(":")[0])  # as in REGISTRY, "rewards.jpeg:make_compressibility"
    return found & names.keys()


def find_circle(graph):
    """A list of modules that import each other in a circle, [] if there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name) :] + [name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            circle = visit(other, path + [name])
            if circle:
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        circle = visit(name, [])
        if circle:
            return circle
    return []


def test_the_modules_of_rewards_import_each_other_without_a_circle():
    names = module_names()
    graph = {name: imports_of(path.read_text(), names) for name, path in names.items()}
    assert len(graph) > 25 and find_circle(graph) == []
    # the registry and imports inside of functions are seen
    assert {"rewards.geneval.reward", "rewards.prompts", "rewards.weighted_sum"} <= graph["rewards"]
    assert "rewards.geneval.mask2former" in graph["rewards.geneval.reward"]
    leaves = {name for name, others in graph.items() if not others}
    assert {
        "rewards.errors",
        "rewards.geneval.detection",
        "rewards.image_file",
        "rewards.ocr.engine",
    } <= leaves


@pytest.mark.parametrize(
    "sources, circle",
    [
        ({"a": "import b", "b": "import c", "c": ""}, []),
        ({"a": "import b", "b": "import a"}, ["a", "b", "a"]),
        ({"a": "import b", "b": "def f():\n    from a import x"}, ["a", "b", "a"]),
        ({"a": "R = {'x': 'b:make'}", "b": "from a import y"}, ["a", "b", "a"]),
        ({"a": "", "b": "import a, c", "c": "import d", "d": "from c import z"}, ["c", "d", "c"]),
        ({"a": "import a"}, ["a", "a"]),
    ],
)
def test_a_circle_is_found(sources, circle):
    graph = {name: imports_of(source, sources) for name, source in sources.items()}
    assert find_circle(graph) == circle


def test_rewards_alone_is_imported_without_torch():
    code = "import sys, rewards; print('torch' in sys.modules, 'numpy' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout == "False False\n"
