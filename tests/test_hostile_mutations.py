"""Damaged files by the thousand: each loads or is refused by an error that names it; nothing else happens."""

from __future__ import annotations

import pytest
from hostile.good import make_good_files
from hostile.mutations import COUNTS, open_damaged


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    make_good_files(root)
    return root


def test_h_over_a_hundred_damaged_files_load_or_are_refused(good, tmp_path):
    outcomes, defects = open_damaged(good, tmp_path, long=False)
    assert defects == []
    assert outcomes.total() >= 110
    _check(outcomes, long=False)


@pytest.mark.long
def test_h_thousands_of_damaged_files_load_or_are_refused(good, tmp_path):
    outcomes, defects = open_damaged(good, tmp_path, long=True, seed=1)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:20} {outcome:10} {count:5}")
    assert defects == []
    assert outcomes.total() >= 5000
    _check(outcomes, long=True)


def _check(outcomes, long):
    """Damage that a digest covers is always found; elsewhere some files are good ones again."""
    assert outcomes["ckpt_bytes", "loaded"] <= outcomes["ckpt_bytes", "refused"] / 10
    for make, counts in COUNTS.items():
        assert (outcomes[make.__name__, "refused"] > 0) == (counts[long] > 0), make.__name__
