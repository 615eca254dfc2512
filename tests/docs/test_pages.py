"""Links, pictures and layouts of the pages are true."""

import re

import documents
import pytest
from documents import ROOT


def targets(text):
    """Targets of a page's links and pictures that are files of this repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if not target.startswith(("http", "#"))]


def anchors(text):
    """Anchors of a page's headings, as GitHub makes them."""
    found = []
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", title.lower())
        found.append(words.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", documents.pages())
def test_links_lead_somewhere(page):
    for target in targets((ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{page}: {target}"


def path_spans(text):
    """Paths of this repository between backquotes, without placeholders."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:benchmark|docs|rewards|tests|tiny)/[\w./-]*)`", without_blocks)
    return [path for path in found if not path.endswith("-")]


@pytest.mark.parametrize("page", documents.pages())
def test_paths_in_sentences_are_there(page):
    missing = [path for path in path_spans((ROOT / page).read_text()) if not (ROOT / path).exists()]
    # An example of a file that the reader makes stands in a block of the same page.
    made = [path for path in missing if f"# {path}\n" in (ROOT / page).read_text()]
    assert [path for path in missing if path not in made] == []


def test_the_layout_in_the_readme_is_the_repositorys():
    text = (ROOT / "README.md").read_text()
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", text, re.DOTALL)
    named = {word.rstrip("/") for word in re.findall(r"[\w.]+(?:\.py|/)(?=\s)", layout)}
    here = set(documents.ALGORITHMS)
    ignored = {"runs", "wandb"}  # what running leaves behind
    for path in ROOT.iterdir():
        if path.is_dir() and not path.name.startswith((".", "_")) and path.name not in ignored:
            here.add(path.name)
    assert named == here


def test_broken_links_and_paths_are_found():
    text = (
        'see [a](b.md#c) and ![d](e.png) <img src="f.png"> [g](https://h)\n`tiny/nothing.py`, `python x.py`'
    )
    assert targets(text) == ["b.md#c", "e.png", "f.png"]
    assert path_spans(text) == ["tiny/nothing.py"]
    assert anchors("# The `a` b\n## Two-fold, yes\n") == ["the-a-b", "two-fold-yes"]


def test_the_cheat_sheet_names_functions_of_the_files():
    """Each section names functions of its own file."""
    sections = (documents.ROOT / "docs/cheat_sheet.md").read_text().split("\n## ")[1:]
    names = {"Flow-GRPO": "flow_grpo", "SuperFlow": "superflow", "FDFO": "fdfo"}
    names |= {"PromptRL": "promptrl", "PromptLoop": "promptloop"}
    checked = 0
    for section in sections:
        title, _, text = section.partition("\n")
        if title in names:
            source = (documents.ROOT / f"{names[title]}.py").read_text()
            for function in re.findall(r"`(\w+)`", text):
                assert f"\ndef {function}(" in source, f"{title}: {function}"
                checked += 1
    assert checked > 10
