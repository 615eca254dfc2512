"""Counts how the algorithm files differ, and keeps the numbers of README.md true.

    python -m benchmark.count_differences            prints the numbers
    python -m benchmark.count_differences --write    writes them into README.md

A variant is read as a difference from flow_grpo.py: what counts are the lines added and removed, and the
hunks, of a unified diff after the headers of both files. promptloop.py is read beside promptrl.py instead:
what counts are the functions that both files have, and those of them whose code is the same.

README.md holds each number between two markers: <!-- superflow.py -->...<!-- end -->.
"""

import argparse
import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BASELINE = "flow_grpo.py"
VARIANTS = ("superflow.py", "fdfo.py", "promptrl.py")
READ_BESIDE = ("promptloop.py", "promptrl.py")


def body(source):
    """The lines of a file after its header."""
    header = ast.parse(source).body[0]
    return source.splitlines()[header.end_lineno :]


def difference(a, b):
    """(lines added and removed, hunks) of a unified diff of two files after their headers."""
    # A file's common lines, such as `else:`, must count as equal lines: difflib ignores them by default.
    matcher = difflib.SequenceMatcher(None, body(a), body(b), autojunk=False)
    lines = 0
    for tag, a_from, a_to, b_from, b_to in matcher.get_opcodes():
        if tag != "equal":
            lines += (a_to - a_from) + (b_to - b_from)
    return lines, len(list(matcher.get_grouped_opcodes(3)))


def functions(source):
    """{name: code} of a file's functions, without `train`: code has no comments, docstrings or formatting."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name != "train":
            if ast.get_docstring(node):
                node.body = node.body[1:]
            found[node.name] = ast.unparse(node)
    return found


def shared_functions(a, b):
    """(functions of the same name, those of them with the same code) of two files."""
    a = functions(a)
    b = functions(b)
    names = a.keys() & b.keys()
    return len(names), sum(a[name] == b[name] for name in names)


def numbers(root=ROOT):
    """{file: what README.md says of it}."""
    sources = {path.name: path.read_text() for path in root.glob("*.py")}
    said = {}
    for name in VARIANTS:
        lines, hunks = difference(sources[BASELINE], sources[name])
        said[name] = f"{lines} lines in {hunks} hunks"
    one, other = READ_BESIDE
    shared, same = shared_functions(sources[one], sources[other])
    said[one] = f"{shared} functions, {same} with the same code"
    return said


def write(text, said):
    """README's text with the numbers between its markers. Raises ValueError where a marker is missing."""
    for name, words in said.items():
        pattern = rf"(<!-- {re.escape(name)} -->).*?(<!-- end -->)"
        text, count = re.subn(pattern, rf"\g<1>{words}\g<2>", text)
        if count == 0:
            raise ValueError(f"README.md has no <!-- {name} -->...<!-- end -->")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the numbers into README.md")
    args = parser.parse_args()
    said = numbers()
    for name, words in said.items():
        print(f"{name}: {words}")
    if args.write:
        README.write_text(write(README.read_text(), said))
        print(f"wrote {README.name}")
