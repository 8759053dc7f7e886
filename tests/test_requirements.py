"""docs/requirements.md has a row for each id in the name of a test, and no other row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_each_id_of_a_test_has_one_row_and_each_row_a_test():
    names = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names |= set(re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    of_tests = {f"S{number}" for name in names for number in re.findall(r"_s(\d+)(?=_|$)", name)}
    page = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (S\d+) \| .+\. \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(of_tests)
