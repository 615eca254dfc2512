"""What is installed: the same packages by pip, from requirements.txt, and by uv, from pyproject.toml."""

import tomllib

from documents import ROOT


def test_both_lists_of_packages_are_the_same():
    required = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [line for line in required if line and not line.startswith("#")]
