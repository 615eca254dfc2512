"""docs/first_edition.md and the records that it is made from."""

import json
import re

from benchmark import write_results
from benchmark.records import FIRST_EDITION, RESULTS, read_runs
from benchmark.write_results import DOCS, SECTIONS, results_page


def test_first_edition_md_is_what_the_script_writes(monkeypatch):
    """The page is made from the records: a number edited by hand, or a record without its page, is found."""
    monkeypatch.setattr(write_results.curves, "draw", lambda *args: None)
    assert results_page(read_runs(FIRST_EDITION)) == (DOCS / "first_edition.md").read_text()


def test_every_record_says_where_it_comes_from():
    paths = list(RESULTS.glob("**/*.json"))
    assert len(paths) > 150
    for path in paths:
        record = json.loads(path.read_text())
        assert {"command", "date", "machine"} <= record.keys(), path
        if "metrics" in record:
            assert {"commit", "name"} <= record.keys(), path
            assert "seconds" in record or "earlier_weights" in path.parts, path
            assert path.name == f"seed-{record['seed']}.json", path


def test_a_setting_has_one_name_and_all_its_runs_have_it():
    for setting, records in read_runs(FIRST_EDITION).items():
        assert len({record["name"] for record in records}) == 1, setting


def test_every_section_has_its_records_and_every_picture_is_there():
    runs = read_runs(FIRST_EDITION)
    for section in SECTIONS:
        assert section.setting in runs
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (DOCS / "first_edition.md").read_text())
    assert len(pictures) > 10
    for picture in pictures:
        assert (DOCS / picture).is_file()
