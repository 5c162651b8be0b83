"""Sites of a federation know one another under masks, and a server that swaps a key is refused by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tests.recipes.sites.test_private_sites import private, save_digits

import lichen
from lichen.core.errors import LichenError
from lichen.core.masks.closing import Closing
from lichen.core.masks.party import Party
from lichen.engines.remote.errands import Patience
from lichen.engines.sites import Seen, SiteError
from lichen.federation.host import SiteHost
from lichen.federation.kits.known import KitPapers
from lichen.federation.kits.settle import open_kit
from lichen.federation.policy.keys import change_policy
from lichen.recipes.sites.passports import Passport, SiteClients, all_sites
from lichen.recipes.sites.remote_sites import RemoteSites

RUN, CONTEXT = "5" * 16, b"a round"
HELD = {"north": (0, 3), "east": (1,), "south": (2, 4, 5)}
FILES = dict(zip(HELD, ("a.jsonl", "b.jsonl", "c.jsonl"), strict=True))


def papers_of(federation: Path, home: Path, site: str, run: str = RUN) -> KitPapers:
    (home / run / site).mkdir(parents=True, exist_ok=True)
    return KitPapers(open_kit(federation / "kits" / site), run, home / run / site)


@pytest.fixture
def papers(federation: Path, tmp_path: Path) -> dict[str, KitPapers]:
    return {site: papers_of(federation, tmp_path, site) for site in HELD}


def sites_of(papers: dict[str, KitPapers]) -> tuple[SiteClients, ...]:
    return tuple(SiteClients(passport=one.passport, numbers=HELD[site]) for site, one in papers.items())


def with_south(everybody: tuple[SiteClients, ...], other: dict[str, str]) -> tuple[SiteClients, ...]:
    """The same, with another passport of a site."""
    return tuple(
        replace(home, passport=replace(home.passport, **other)) if home.passport.site == "south" else home
        for home in everybody
    )


def test_a_passport_is_the_same_after_a_start_and_travels_as_json(
    papers: dict[str, KitPapers], federation: Path, tmp_path: Path
) -> None:
    mine = papers["north"].passport
    assert papers_of(federation, tmp_path, "north").passport == mine
    assert papers_of(federation, tmp_path, "north", "6" * 16).passport.key != mine.key
    home = SiteClients(passport=mine, numbers=(0, 3))
    assert SiteClients.load(json.loads(json.dumps(home.dump()))) == home
    assert (tmp_path / RUN / "north" / "masks.key").stat().st_mode & 0o777 == 0o600
    wrongs: tuple[object, ...] = ({**mine.dump(), "proof": 1}, {**mine.dump(), "key": "0" * 65}, {"site": "north"}, [])
    for wrong in wrongs:
        with pytest.raises(LichenError, match="passport"):
            Passport.load(wrong)


def forge(startup: Path) -> None:
    """A certificate that has all of the true one but its keys."""
    true = x509.load_pem_x509_certificate((startup.parent / "true.crt").read_bytes())
    key = rsa.generate_private_key(65537, 2048)
    made = x509.CertificateBuilder(true.issuer, true.subject, key.public_key(), true.serial_number)
    dates = made.not_valid_before(true.not_valid_before_utc).not_valid_after(true.not_valid_after_utc)
    certificate = dates.sign(key, hashes.SHA256())
    (startup / "client.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    form = (Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (startup / "client.key").write_bytes(key.private_bytes(*form))


def test_what_no_certificate_proves_is_refused_by_the_sites_name(
    papers: dict[str, KitPapers], federation: Path, tmp_path: Path
) -> None:
    everybody, north = sites_of(papers), papers["north"]
    at_server = tmp_path / "server"  # the server's own certificate, in a kit that it calls south
    shutil.copytree(
        federation / "kits" / "south", at_server, ignore=shutil.ignore_patterns("runs", "run", "supervisor")
    )
    shutil.copy(at_server / "startup" / "client.crt", at_server / "true.crt")
    for end in ("crt", "key"):
        shutil.copy(federation / "server" / "startup" / f"server.{end}", at_server / "startup" / f"client.{end}")
    theirs = KitPapers(open_kit(at_server), RUN, tmp_path / "server").passport
    before = papers_of(federation, tmp_path, "south", "6" * 16).passport
    forge(at_server / "startup")  # a certificate of the right names that the authority has not signed
    forged = KitPapers(open_kit(at_server), RUN, tmp_path / "server").passport
    for other in (
        {"key": papers["east"].passport.key},
        {"certificate": papers["east"].passport.certificate},
        {"proof": "00"},
        {"certificate": "nothing"},
        before.dump(),
        theirs.dump(),
        forged.dump(),
    ):
        with pytest.raises(LichenError, match="key of site south is not one that its certificate proves"):
            north.identity(with_south(everybody, other), HELD["north"], 6)
    assert north.identity(everybody, HELD["north"], 6)


def test_each_client_is_of_one_site_and_nobody_else_holds_ones_own(papers: dict[str, KitPapers]) -> None:
    everybody, north = sites_of(papers), papers["north"]
    for wrong in (
        (),
        everybody[:2],
        (*everybody, everybody[1]),
        (everybody[0], everybody[1], replace(everybody[2], numbers=(2, 4))),
    ):
        with pytest.raises(LichenError, match="which one site holds it"):
            north.identity(wrong, HELD["north"], 6)
    moved = (replace(everybody[0], numbers=(0,)), replace(everybody[1], numbers=(1, 3)), everybody[2])
    with pytest.raises(LichenError, match="of other clients of this site"):
        north.identity(moved, HELD["north"], 6)
    other = replace(papers["east"].passport, site="north")
    with pytest.raises(LichenError, match="another key"):
        north.identity((replace(everybody[0], passport=other), *everybody[1:]), HELD["north"], 6)


def test_a_site_shows_its_own_passport_where_others_show_theirs(papers: dict[str, KitPapers]) -> None:
    shown = {site: one.passport for site, one in papers.items()}
    assert all_sites(shown, HELD) == sites_of(papers)
    assert all_sites(dict.fromkeys(HELD), HELD) == ()
    for other in (None, shown["north"]):
        with pytest.raises(LichenError, match="site south: shows no passport of its own"):
            all_sites({**shown, "south": other}, HELD)


def parties(papers: dict[str, KitPapers], everybody: dict[str, tuple[SiteClients, ...]]) -> dict[int, Party]:
    """All clients, each site told of these."""
    known = {site: one.identity(everybody[site], HELD[site], 6) for site, one in papers.items()}
    return {
        client: Party(client, CONTEXT, bytes([client]) * 32, k=5, threshold=4, identity=known[site])
        for site, own in HELD.items()
        for client in own
    }


def shared(parties: dict[int, Party], adverts: np.ndarray) -> dict[int, str]:
    """What each says to its neighbours' adverts."""
    said = {}
    ids, given = Closing(CONTEXT, k=5, threshold=4, least=3).keys(range(6), adverts)
    for client in range(6):
        try:
            parties[client].share(ids[client].tolist(), given[client])
            said[client] = ""
        except LichenError as error:
            said[client] = error.what
    return said


def test_a_key_that_the_server_swaps_is_refused_by_its_clients_name(papers: dict[str, KitPapers]) -> None:
    same = dict.fromkeys(HELD, sites_of(papers))
    made = parties(papers, same)
    adverts = np.stack([made[client].advertise() for client in range(6)])
    assert set(shared(made, adverts).values()) == {""}
    elsewhere = papers["east"].identity(same["east"], HELD["east"], 6)
    for identity in (None, elsewhere):  # a key that nobody has signed, and one that another site has
        forged, made = adverts.copy(), parties(papers, same)
        forged[2] = Party(2, CONTEXT, b"x" * 32, k=5, threshold=4, identity=identity).advertise()
        said = shared(made, forged)
        assert {said[client] for client in (0, 1, 3, 4, 5)} == {"the advert of client 2 has a bad signature"}


def test_sites_that_were_told_of_different_sites_do_not_mask_with_each_other(papers: dict[str, KitPapers]) -> None:
    everybody = sites_of(papers)
    moved = (everybody[0], replace(everybody[1], numbers=(1, 2)), replace(everybody[2], numbers=(4, 5)))
    made = parties(papers, {"north": moved, "east": everybody, "south": everybody})
    said = shared(made, np.stack([made[client].advertise() for client in range(6)]))
    assert all("bad signature" in what for what in said.values())


class KitSites:
    """Sites in this process, each with its own kit; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, federation: Path, home: Path) -> None:
        files = save_digits(home / "sites")
        self.hosts = dict[str, SiteHost]()
        self.lines = list[str]()
        for site, file in FILES.items():
            kit = home / "kits" / site
            shutil.copytree(federation / "kits" / site, kit, ignore=shutil.ignore_patterns("runs", "run", "supervisor"))
            change_policy(kit / "policy.yaml", ["from_scratch=true", "labels=true", "least_clients=3"])
            self.hosts[site] = SiteHost(kit, files[file], say=self.lines.append)

    def start(self) -> None:
        """Nothing: they are there."""

    def seen(self) -> dict[str, Seen]:
        return {name: Seen(since=0.0, last=time.time(), instance=name) for name in self.hosts}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        try:
            return self.hosts[site].answer(kind, body)
        except LichenError as error:
            raise SiteError(site, "refused", error) from None

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@pytest.fixture
def sites(federation: Path, tmp_path: Path) -> Iterator[KitSites]:
    made = KitSites(federation, tmp_path)
    yield made
    made.close()


def submitted(sites: KitSites, out: Path) -> lichen.Result:
    whole = private(out)
    whole["data"]["name"] = "/nowhere"
    whole["federation"] = {"rounds": 1, "local_steps": 1, "batch_size": 4, "aggregate": "mean"}
    whole["privacy"] = {"secure": True}
    patience = Patience(gone=5.0, quiet=5.0, within=5.0)
    return lichen.run(whole, out=out, sites=RemoteSites(sites, tuple(FILES), patience=patience))


def test_a_run_says_that_its_sites_know_one_another(sites: KitSites, tmp_path: Path) -> None:
    masks = submitted(sites, tmp_path / "run").summary["masks"]
    assert not any("swaps" in line for line in masks["not_promised"])
    assert any("authority" in line for line in masks["not_promised"])
    told = [line for line in sites.lines if "whose certificates" in line]
    assert len(told) == 3
    assert all(line.endswith("north (2), east (1), south (3)") for line in told)


def test_a_server_that_swaps_keys_opens_no_sum(
    sites: KitSites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Closing.keys

    def swap(self: Closing, clients: Any, adverts_CA: np.ndarray) -> Any:
        forged = adverts_CA.copy()
        at = list(clients).index(2)
        forged[at] = Party(2, self._context, b"x" * 32, k=self._k, threshold=self._threshold).advertise()
        return honest(self, clients, forged)

    monkeypatch.setattr(Closing, "keys", swap)
    with pytest.raises(LichenError, match="the advert of client 2 has a bad signature"):  # nobody scores, either
        submitted(sites, tmp_path / "run")
    round_ = json.loads((tmp_path / "run" / "trace.jsonl").read_text())
    named = round_["attendance"]["named"]
    assert round_["metrics"]["skipped"] == 1
    told = {one["client"] for one in named if one["what"] == "the advert of client 2 has a bad signature"}
    assert told == {0, 1, 3, 4, 5}
    assert any(line.startswith("keys of client 2 are refused") for line in sites.lines)
