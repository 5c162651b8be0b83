"""How a federation stands, as a page of one machine: what it shows, to whom, and what strangers can put there."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.engines.sites import Seen, SiteError
from lichen.federation import standing as standing_module
from lichen.federation.page import Page
from lichen.federation.shown import HEADS, standing_table
from lichen.federation.standing import STATUS, standing
from lichen.present.table import table_text

parser = pytest.importorskip("prometheus_client.parser")

ROWS: list[dict[str, Any]] = [
    {
        **{"site": "a", "there": True, "since": 100.0, "last": 160.0, "recipe": "trial", "clients": 2, "rows": 3000},
        **{"round": 3, "rounds": 20, "bytes_up": 5_600_000, "bytes_down": 7, "doing": "<script>alert(1)</script>"},
    },
    {"site": "b", "there": False, "doing": "is not connected"},
]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    made = Page(0, title="federation <trial>", rows=lambda: ROWS)
    yield made
    made.close()


def get(page: Page, path: str, host: str = "127.0.0.1") -> tuple[int, dict[str, str], str]:
    link = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    link.request("GET", path, headers={"Host": f"{host}:{page.port}"})
    answer = link.getresponse()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()


def test_the_page_shows_all_sites_and_runs_nothing(page: Page) -> None:
    status, heads, text = get(page, "/")
    assert status == 200
    assert "default-src 'none'" in heads["content-security-policy"]
    assert all(f"<th>{head}</th>" in text for head in HEADS)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "federation &lt;trial&gt;" in text
    assert "3 of 20" in text
    assert not re.findall(r"https?://|src=|href=", text)
    assert json.loads(get(page, "/status.json")[2]) == ROWS
    assert get(page, "/etc/passwd")[0] == 404


def test_prometheus_reads_the_numbers(page: Page) -> None:
    families = {one.name: one for one in parser.text_string_to_metric_families(get(page, "/metrics")[2])}
    found = {name: {s.labels["site"]: s.value for s in one.samples} for name, one in families.items()}
    assert found["lichen_site_there"] == {"a": 1.0, "b": 0.0}
    assert found["lichen_site_bytes_up"] == {"a": 5_600_000.0}
    assert found["lichen_site_round"] == {"a": 3.0}


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", ""])
def test_a_page_of_elsewhere_cannot_read_it(page: Page, host: str) -> None:
    for path in ("/", "/status.json", "/metrics"):
        status, _, text = get(page, path, host)
        assert status == 403
        assert "3000" not in text


def test_it_listens_on_this_machine_alone_and_says_whose_port_it_wanted(page: Page) -> None:
    with pytest.raises(LichenError, match="cannot be used") as caught:
        Page(page.port, title="again", rows=list)
    assert caught.value.where == f"--page {page.port}"
    own = socket.gethostbyname(socket.gethostname())
    if own != "127.0.0.1":
        with pytest.raises(ConnectionRefusedError), socket.create_connection((own, page.port), timeout=2):
            pass


def test_a_table_has_a_row_for_each_site() -> None:
    text = table_text(standing_table(ROWS))
    assert len([line for line in text.splitlines() if "3 of 20" in line or "is not connected" in line]) == 2


class Lying:
    """Sites that say anything; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, answers: dict[str, bytes | None]) -> None:
        self.answers = answers

    def start(self) -> None:
        """Nothing."""

    def seen(self) -> dict[str, Seen]:
        return {name: Seen(since=1.0, last=2.0, instance="x") for name in self.answers}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        assert kind == STATUS
        answer = self.answers[site]
        if answer is None:
            raise SiteError(site, "silent", LichenError("did not answer in time", where=f"site {site}"))
        return b"w" + answer

    def close(self) -> None:
        """Nothing."""


def test_what_a_site_says_of_itself_is_only_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "a": b"no json",
        "b": b"[1, 2]",
        "c": json.dumps({"doing": "x" * 900, "rows": "many", "clients": True, "site": "z", "there": False}).encode(),
        "d": json.dumps({"doing": "trains", "rows": 7, "round": 2, "rounds": 3}).encode(),
        "e": None,
    }
    monkeypatch.setattr(standing_module, "admitted", lambda folder: (*answers, "f"))
    rows = {row["site"]: row for row in standing(Path(), Lying(answers))}
    assert [rows[name]["there"] for name in "abcdef"] == [True] * 5 + [False]
    assert rows["d"] | {"doing": "trains", "rows": 7, "round": 2, "rounds": 3} == rows["d"]
    assert len(rows["c"]["doing"]) == 100
    assert not rows["c"].keys() & {"rows", "clients"}
    assert "did not answer" in rows["e"]["doing"]
    table_text(standing_table(list(rows.values())))
