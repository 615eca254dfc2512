"""Every name that a run logs is explained on the algorithm's page, and every explained name is logged."""

import importlib
import json
import re

import pytest
from documents import ALGORITHMS, ROOT

PLACEHOLDERS = {"<name>": r"[a-z0-9_]+", "<tag>": r"[a-z_]+", "<phase>": r"[a-z]+"}
SMALL = {
    "num_iterations": 1,
    "num_prompts_per_iteration": 2,
    "num_images_per_prompt": 4,  # at least SuperFlow's number of bins
    "num_inference_steps": 3,
    "eval_num_inference_steps": 1,
    "num_updates_per_iteration": 1,
    "sde_window": 1,
    "num_original_prompts": 1,
    "num_refinements": 1,
    "max_new_tokens": 4,
    "micro_batch_size": 8,
    "eval_wordings": True,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A training and an evaluation file, with paraphrases, of a few lines each."""
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("train", "dev", "dev_paraphrased"):
        lines = (ROOT / "tiny" / "prompts" / "fold_0" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:4]))
    return str(folder / "train.jsonl")


def logged_names(script, prompts, output_dir):
    """All names in metrics.jsonl of a short run."""
    module = importlib.import_module(script.removesuffix(".py"))
    fields = module.Args.__dataclass_fields__
    flags = {name: value for name, value in SMALL.items() if name in fields}
    run_dir = module.train(module.Args(prompts=prompts, output_dir=str(output_dir), **flags))
    names = set()
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        names.update(json.loads(line))
    return names


def explained_names(page):
    """Names in the first column of a page's tables whose names have a slash, as patterns: {pattern: name}."""
    patterns = {}
    for line in (ROOT / page).read_text().splitlines():
        if not line.startswith("| `"):
            continue
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            if "/" in name or name == "iteration":
                pattern = re.escape(name)
                for placeholder, words in PLACEHOLDERS.items():
                    pattern = pattern.replace(placeholder, words)
                patterns[pattern] = name
    return patterns


def explains(patterns, name):
    """Whether one of the patterns is of this name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def section(page, title):
    """The text of one section of a page."""
    text = (ROOT / page).read_text()
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def explained_elsewhere(page):
    """What the pages explain that an algorithm's section on metrics links to, and the baseline's page."""
    explained = explained_names("docs/flow_grpo.md")
    for other in re.findall(r"\((\w+\.md)[#)]", section(page, "Logged metrics")):
        explained |= explained_names(f"docs/{other}")
    return explained


@pytest.mark.parametrize("script", ALGORITHMS)
def test_logged_names_are_explained(script, prompts, tmp_path):
    page = f"docs/{script.removesuffix('.py')}.md"
    own = explained_names(page)
    assert own
    explained = own | explained_elsewhere(page)
    logged = logged_names(script, prompts, tmp_path)
    assert len(logged) > 20
    assert [name for name in sorted(logged) if not explains(explained, name)] == []
    unlogged = []
    for pattern, name in own.items():
        if not any(re.fullmatch(pattern, other) for other in logged):
            unlogged.append(name)
    assert unlogged == []


def test_names_are_read_from_tables(tmp_path, monkeypatch):
    text = "| name | meaning |\n|---|---|\n| `losses/kl`, `eval/<name>/<tag>` | see `losses/x` |\n"
    text += "| `m` | `a/b` |\n"
    monkeypatch.setattr("test_logged_names.ROOT", tmp_path)
    (tmp_path / "a.md").write_text(text)
    assert list(explained_names("a.md").values()) == ["losses/kl", "eval/<name>/<tag>"]
    assert any(re.fullmatch(pattern, "eval/geneval_strict/colors") for pattern in explained_names("a.md"))
