"""How the algorithm files differ, and README.md's numbers."""

import pytest

from benchmark import count_differences
from benchmark.count_differences import README, difference, numbers, shared_functions, write
from small_runs import ALGORITHMS

A = '''"""A method."""

import os


def first(x):
    """Adds one."""
    return x + 1


def second(x):
    return x


def train(args):
    return 1
'''


def test_the_header_does_not_count():
    assert difference(A, A.replace("A method.", "Another method,\nlonger.")) == (0, 0)


def test_lines_and_hunks():
    assert difference(A, A.replace("x + 1", "x + 2")) == (2, 1)
    assert difference(A, A.replace("import os", "import os\nimport re").replace("return 1", "return 2")) == (
        3,
        2,
    )


def test_a_line_that_occurs_often_counts_like_any_other():
    one = A + "".join(f"    x = {number}\n    pass\n" for number in range(150))
    other = A + "".join(f"    y = {number}\n    pass\n" for number in range(150))
    assert difference(one, other) == (300, 1)


def test_functions_with_the_same_code():
    assert shared_functions(A, A) == (2, 2)  # train is left out
    assert shared_functions(A, A.replace("Adds one.", "Adds 1.")) == (2, 2)
    assert shared_functions(A, A.replace("x + 1", "x + 2")) == (2, 1)
    assert shared_functions(A, A.replace("def second", "def third")) == (1, 1)


def test_numbers_are_written_between_their_markers():
    text = "<!-- a.py -->old<!-- end --> and <!-- b.py --><!-- end -->"
    written = write(text, {"a.py": "1", "b.py": "2"})
    assert written == "<!-- a.py -->1<!-- end --> and <!-- b.py -->2<!-- end -->"
    with pytest.raises(ValueError, match="c.py"):
        write(text, {"c.py": "3"})


def test_readmes_numbers_are_true():
    """If this fails: python -m benchmark.count_differences --write"""
    text = README.read_text()
    assert write(text, numbers()) == text


def test_all_algorithm_files_are_counted():
    files = {f"{name}.py" for name in ALGORITHMS}
    assert files == {
        count_differences.BASELINE,
        count_differences.READ_BESIDE[0],
        *count_differences.VARIANTS,
    }
