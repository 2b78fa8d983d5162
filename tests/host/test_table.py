"""The table in the documentation is the one that the tests go through, and every row of it is tested."""

from __future__ import annotations

import re
from pathlib import Path

from host import _features as features

HERE = Path(__file__).parent


def test_the_page_is_up_to_date() -> None:
    committed = (HERE.parents[1] / "docs" / "host.md").read_text(encoding="utf-8")
    assert committed == features.page(), "run docs/make_host.py"


def test_every_row_is_tested() -> None:
    tested = re.findall(
        r'cells\("(.*?)"\)', "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    )
    assert set(tested) == set(features.FEATURES)


def test_blanks_are_of_families() -> None:
    names = {case.name for case in features.FAMILIES}
    assert all(set(feature.blanks) <= names for feature in features.FEATURES.values())
