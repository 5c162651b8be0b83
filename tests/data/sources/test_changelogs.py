"""Debian changelogs as rows: who wrote what, and when."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from lichen.core.errors import LichenError
from lichen.data.sources.catalog import cache_dir
from lichen.data.sources.fetch import fetched
from lichen.data.sources.readers import READERS
from lichen.data.sources.record import Record

TEXT = """\
dpkg (1.2) unstable; urgency=low

  [ Ann Able ]
  * Perl modules:
    - Mend a
      leak. Thanks to Bob <bob@example.org>. Closes: #1
  * Whole entry.

  [ Updated man pages translations ]
  * German.

  [ Ann Able, Bob ]
  * Of two.

 -- Cid Coe <cid@example.org>  Sat, 07 Mar 2026 13:15:41 +0100

dpkg (1.1) unstable; urgency=low

  * By whoever closed it.

 -- Cid Coe <cid@example.org>  Thu, 06 Apr 1995 11:48:13 +0000

dpkg (1.0) unstable; urgency=low

  * Without a date.

 -- Cid Coe <cid@example.org>  some day
"""


def test_an_entry_has_its_writer_its_heading_and_its_day(tmp_path: Path) -> None:
    (tmp_path / "changelog.gz").write_bytes(gzip.compress(TEXT.encode()))
    ann = {"client": "Ann Able", "group": "dpkg 1.2", "time": "2026-03-07T12:15:41"}
    assert READERS["changelogs"](tmp_path, {}) == [
        Record(prompt="Perl modules", text="Mend a leak. Thanks to Bob. Closes: #1", **ann),
        Record(text="Whole entry.", **ann),
        Record(client="Cid Coe", text="By whoever closed it.", group="dpkg 1.1", time="1995-04-06T11:48:13"),
    ]
    with pytest.raises(LichenError, match="has its own client"):
        READERS["changelogs"](tmp_path, {"client": "who"})


def test_the_changelog_as_fetched_has_thirty_years_and_no_address() -> None:
    folder = fetched("changelogs")
    if folder is None:
        pytest.skip(f"changelogs is not in {cache_dir()}")
    rows = READERS["changelogs"](folder, {})
    assert (len(rows), len({row.client for row in rows})) == (5882, 34)
    assert (min(row.time for row in rows)[:10], max(row.time for row in rows)[:10]) == ("1995-04-06", "2026-03-07")
    assert not [row.text for row in rows if ".org>" in row.text or ".net>" in row.text]
