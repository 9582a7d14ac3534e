"""The short form of benchmarks/fuzz.py: damaged files are refused by name, or read as they were."""

import collections
import contextlib

import pytest

from benchmarks import fuzz

CASES = 150


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_damage_goes_unnoticed(name):
    with fuzz.TARGETS[name]() as target:
        outcomes = fuzz.run(target, CASES // target.share, seed=1)
    assert not [outcome for outcome in outcomes if outcome.end in fuzz.FAILURES]
    ends = collections.Counter(outcome.end for outcome in outcomes)
    # A damaged checkpoint is passed over for the one before it.
    assert ends["refused"] > len(outcomes) / 4 or (name == "checkpoint" and ends["read as it was"] == len(outcomes))


def test_what_is_not_noticed_is_told():
    """Readers without checks, without names and without care."""

    def crash(directory):
        raise KeyError("header")

    def nameless(directory):
        raise ValueError("damaged")

    with fuzz.small_set(compressed=False) as target:
        for load, end in zip((lambda directory: False, nameless, crash), fuzz.FAILURES, strict=True):
            assert {outcome.end for outcome in fuzz.run(target._replace(load=load), 5, seed=0)} == {end}


def test_the_record_counts_every_case(tmp_path, monkeypatch, capsys):
    flags = fuzz.Flags(cases=20, targets=("read_idx, gzip",), output=tmp_path)
    assert fuzz.main(flags) == 0
    assert "20 damaged cases, 0 failures" in capsys.readouterr().out
    assert '"cases": 20' in (tmp_path / "fuzz.json").read_text()

    @contextlib.contextmanager
    def careless():
        with fuzz.any_idx_file(compressed=True) as target:
            yield target._replace(load=lambda directory: False)

    monkeypatch.setattr(fuzz, "TARGETS", {"read_idx, gzip": careless})
    assert fuzz.main(flags) == 1
    assert "20 failures" in capsys.readouterr().out


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"--targets must be among load, small set, .* got idx, load"):
        fuzz.main(fuzz.Flags(targets=("load", "idx")))
