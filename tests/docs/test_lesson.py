"""The lesson's notebook runs from its first cell to its last, with fewer samples and shorter runs."""

import json
import os
import re
import subprocess
import sys

from documents import ROOT

NOTEBOOK = ROOT / "docs" / "lesson.ipynb"


def cells(kind):
    """The texts of the notebook's cells of a kind, "code" or "markdown"."""
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_lesson_runs(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text("\n".join(cells("code")))
    environment = os.environ | {"QUICK": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    spreads = [float(number) for number in re.findall(r"spread of a cloud ([\d.]+)", done.stdout)]
    ode, wrong, sde = spreads
    assert abs(ode - 0.2) < 0.04 and abs(sde - 0.2) < 0.04 and wrong > 0.3
    assert "velocity +   0%: mean ratio 1.0000" in done.stdout


def test_every_part_with_exercises_has_answers():
    parts = []
    title = None
    for text in cells("markdown"):
        title = next(iter(re.findall(r"^## (.+)$", text, re.MULTILINE)), title)
        if "**Exercises.**" in text and title not in parts:
            parts.append(title)
    answers = (ROOT / "docs" / "lesson_answers.md").read_text()
    assert len(parts) == 6
    assert re.findall(r"^## (.+)$", answers, re.MULTILINE) == parts
