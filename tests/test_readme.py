"""What the README says is what the records say, and what it points at is there."""

import re
from pathlib import Path

from benchmarks import readme

TEXT = readme.README.read_text()


def test_tables_are_those_of_the_records():
    assert {name for _, name, _, _ in readme.BLOCK.findall(TEXT)} == readme.TABLES.keys()
    assert readme.fill(TEXT) == TEXT


def test_intervals_in_the_text_are_in_a_report():
    """Such as +0.0510 [+0.0425, +0.0595]."""
    intervals = re.findall(r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]", readme.BLOCK.sub("", TEXT))
    assert len(intervals) > 5
    reports = "".join(path.read_text() for path in readme.RECORD.rglob("report.md"))
    for interval in intervals:
        assert interval in reports


def test_files_that_it_names_are_there():
    links = re.findall(r"\]\(([^):]+)\)", TEXT)
    named = re.findall(r"`((?:benchmarks|examples|tests|scripts|fashion_jax)/[\w./-]+)`", TEXT)
    assert len(links) > 3
    assert len(named) > 5
    for name in {*links, *named}:
        assert (Path(readme.ROOT) / name).exists(), name
