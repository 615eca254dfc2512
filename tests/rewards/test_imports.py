"""What the files of the project import."""

import ast
import subprocess
from pathlib import Path

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
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    imported = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                imported.setdefault(name.split(".")[0], path.name)
    assert len(paths) > 20 and {"torch", "transformers", "rapidocr"} <= imported.keys()
    assert {name: path for name, path in imported.items() if name in FORBIDDEN} == {}
