"""Kits of a federation: who may read them, what they forbid, who is admitted, and that nothing bad passes quietly."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.engines.sites import SiteError
from lichen.federation import network
from lichen.federation.kits import tool
from lichen.federation.kits.make import accept
from lichen.federation.kits.members import Federation, admit, bar, find_federation, read_federation
from lichen.federation.kits.papers import check_host, check_name, check_site
from lichen.federation.kits.settle import open_kit, settle

pytest.importorskip("nvflare")


class Made(NamedTuple):
    """A federation, a request to it, and its answer, and what the commands said."""

    federation: Federation
    request: Path
    answer: Path
    kit: Path
    said: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    said: dict[str, dict[str, str]] = {}

    def command(*words: str) -> dict[str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["federation", *words, "--json"]) == 0
        said[words[0]] = dict(json.loads(out.getvalue()))
        return said[words[0]]

    folder = tmp_path_factory.mktemp("kits")
    with contextlib.chdir(folder):
        command("new", "trial", "--host", "127.0.0.1", "--port", "18199", "--sites", "site-1")
        asked = command("ask", "--name", "hospital-a", "--for", "trial")
        shutil.copytree("trial-hospital-a", "untouched")
        admitted = command("admit", asked["request"])
        bare = admitted["fingerprint"].removeprefix("SHA256:").replace(":", "").lower()
        kit = command("accept", admitted["answer"], "--fingerprint", bare)["kit"]
        federation = read_federation(find_federation(None))._replace(folder=folder / "trial")
    return Made(federation, folder / asked["request"], folder / admitted["answer"], folder / kit, said)


def forged(request: Path, to: Path, **other: str) -> Path:
    """A request that says something else of itself."""
    with zipfile.ZipFile(request) as packed:
        whole = {name: packed.read(name) for name in packed.namelist()}
    body = json.loads(whole["request.json"]) | other
    with zipfile.ZipFile(to, "w") as packed:
        for name, data in {**whole, "request.json": json.dumps(body).encode()}.items():
            packed.writestr(name, data)
    return to


def fault(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that is refused."""
    assert cli.main(["federation", *words]) == 2
    return capsys.readouterr().err


def test_only_the_owner_reads_anything(made: Made) -> None:
    every = [path for top in (made.federation.folder, made.kit.parent) for path in (top, *top.rglob("*"))]
    assert len(every) > 40
    assert {path: oct(path.stat().st_mode) for path in every if path.stat().st_mode & 0o077} == {}


def test_keys_are_where_they_belong(made: Made) -> None:
    keys = {path.relative_to(made.federation.folder).as_posix() for path in made.federation.folder.rglob("*.key")}
    assert keys == {"authority/rootCA.key", "server/startup/server.key", "kits/site-1/startup/client.key"}
    for archive in (made.request, made.answer):
        with zipfile.ZipFile(archive) as packed:
            assert not any(b"PRIVATE KEY" in packed.read(name) for name in packed.namelist())


def test_a_kit_says_what_it_is(made: Made) -> None:
    assert open_kit(made.kit)[1:] == ("site", "trial", "hospital-a", "127.0.0.1", 18199, "nvflare")
    assert open_kit(made.federation.folder / "server")[1:3] == ("server", "trial")
    assert open_kit(made.federation.folder / "kits" / "site-1").name == "site-1"
    with pytest.raises(LichenError, match="holds no kit"):
        open_kit(made.federation.folder)


@pytest.mark.parametrize("which", ["server", "kits/site-1", "hospital-a"])
def test_nobody_may_bring_or_steer_jobs(made: Made, which: str) -> None:
    kit = made.kit if which == "hospital-a" else made.federation.folder / which
    rights = json.loads((kit / "local/authorization.json").read_text())["permissions"]
    assert set(rights) == {"project_admin", "org_admin", "lead", "member"}
    allowed = {right for role in rights.values() for right, who in role.items() if who != "none"}
    assert allowed == {"view"}
    resources = json.loads((kit / "local/resources.json").read_text())
    assert resources["class_allow_list"] == []
    assert {"site_log_streamer", "log_receiver"}.isdisjoint(one["id"] for one in resources["components"])
    assert resources.get("allow_log_streaming", False) is False
    assert "/tmp/nvflare" not in json.dumps(resources)
    assert not list(kit.rglob("*.sh"))


def test_what_somebody_opened_is_closed_again(made: Made) -> None:
    opened = made.kit / "local/authorization.json"
    before = opened.read_bytes()
    opened.write_text('{"permissions": {"lead": "any"}}')
    opened.chmod(0o666)
    (made.kit / "custom").mkdir()
    settle(made.kit)
    assert opened.read_bytes() == before
    assert opened.stat().st_mode & 0o077 == 0
    assert not (made.kit / "custom").exists()


def test_a_second_authority_is_never_made_over_a_first(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    key = made.federation.folder / "authority/rootCA.key"
    before = hashlib.sha256(key.read_bytes()).digest()
    words = ["new", "trial", "--host", "localhost", "--port", "18199", "--out", str(made.federation.folder)]
    assert "holds a federation" in fault(words, capsys)
    (made.federation.folder / "federation.json").rename(made.federation.folder / "gone.json")
    assert "holds a federation" in fault(words, capsys)
    (made.federation.folder / "gone.json").rename(made.federation.folder / "federation.json")
    assert hashlib.sha256(key.read_bytes()).digest() == before


def test_the_same_request_gets_the_same_answer_and_another_of_that_name_none(made: Made, tmp_path: Path) -> None:
    before = made.answer.read_bytes()
    assert admit(made.request, made.federation.folder).answer.read_bytes() == before
    for name in ("hospital-a", "site-1"):
        with pytest.raises(LichenError, match="admitted before"):
            admit(forged(made.request, tmp_path / "other.zip", name=name), made.federation.folder)


def test_a_request_is_signed_for_sites_of_this_federation_only(made: Made, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="asks for the federation another"):
        admit(forged(made.request, tmp_path / "1.zip", project="another"), made.federation.folder)
    for other in ({"kind": "server", "cert_type": "server"}, {"kind": "user", "cert_type": "lead"}):
        with pytest.raises(LichenError, match="something other than a site"):
            admit(forged(made.request, tmp_path / "2.zip", **other), made.federation.folder)
    with pytest.raises(LichenError, match="nvflare cert approve"):
        admit(forged(made.request, tmp_path / "3.zip", name="hospital-b"), made.federation.folder)
    torn = tmp_path / "torn.zip"
    torn.write_bytes(made.request.read_bytes()[:400])
    with pytest.raises(LichenError, match=r"holds no request\.json"):
        admit(torn, made.federation.folder)
    with pytest.raises(LichenError, match="is not there"):
        admit(tmp_path / "none.zip", made.federation.folder)


def test_an_answer_is_accepted_from_the_right_authority_with_the_right_key_only(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(made.kit.parents[1] / "untouched", folder)
    wrong = made.federation.fingerprint[:-2] + ("00" if made.federation.fingerprint[-2:] != "00" else "11")
    with pytest.raises(LichenError, match="fingerprint"):
        accept(made.answer, folder, fingerprint=wrong)
    with pytest.raises(LichenError, match="is no fingerprint"):
        accept(made.answer, folder, fingerprint="12:34")
    with pytest.raises(LichenError, match="no key of hospital-a"):
        accept(made.answer, tmp_path, fingerprint=made.federation.fingerprint)
    assert not (folder / "kit").exists()
    with pytest.raises(LichenError, match="is there already"):
        accept(made.answer, made.kit.parent, fingerprint=made.federation.fingerprint)


def test_a_barred_site_is_written_down_where_the_server_reads_it(made: Made, tmp_path: Path) -> None:
    folder = made.federation.folder
    assert bar("site-1", folder) == ["site-1"]
    assert bar("hospital-a", folder) == ["hospital-a", "site-1"]
    assert json.loads((folder / "server/disabled_clients.json").read_text())["disabled_clients"] == [
        "hospital-a",
        "site-1",
    ]
    with pytest.raises(LichenError, match="is barred"):
        admit(made.request, folder)
    with pytest.raises(LichenError, match="no site named nobody"):
        bar("nobody", folder)
    assert bar("site-1", folder, lift=True) == ["hospital-a"]
    assert bar("hospital-a", folder, lift=True) == []


@pytest.mark.parametrize("name", ["", "a b", "../a", "-a", "a/b", "ä", "a" * 61, "a.b", "a\n"])
def test_names_that_cannot_be_names_are_refused(name: str) -> None:
    with pytest.raises(LichenError, match="cannot be a name"):
        check_name(name, "NAME")


@pytest.mark.parametrize("name", ["server", "Server", "admin", "example", "EXAMPLE"])
def test_a_site_cannot_have_a_name_of_the_servers(name: str) -> None:
    with pytest.raises(LichenError, match="cannot be a site's name"):
        check_site(name, "example", "--name")


@pytest.mark.parametrize("host", ["", "a b", "http://a", "a:1", "::1", "300.1.1.1", "-a", "a..b"])
def test_hosts_that_are_none_are_refused(host: str) -> None:
    check_host("fl.example.org")
    check_host("10.0.0.1")
    with pytest.raises(LichenError, match="is no"):
        check_host(host)


def test_bad_input_is_one_sentence_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["--host", "localhost"]
    assert "--port" in fault(["new", "a", *place, "--port", "0"], capsys)
    assert "--sites" in fault(["new", "a", *place, "--port", "1", "--sites", "b,b"], capsys)
    assert "fix: " in fault(["admit", "none.zip"], capsys)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    assert "is not empty" in fault(["new", "a", *place, "--port", "1"], capsys)
    assert "is not empty" in fault(["ask", "--name", "b", "--for", "c", "--out", "a"], capsys)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "lichen[federation]"' in fault(["new", "b", *place, "--port", "1"], capsys)
    assert not (tmp_path / "b").exists()


def test_two_people_compare_the_same_sums(made: Made) -> None:
    assert made.said["admit"]["sum"] == made.said["ask"]["sum"]
    assert made.said["admit"]["fingerprint"] == made.said["new"]["fingerprint"] == made.federation.fingerprint
    assert re.fullmatch(r"SHA256(:[0-9A-F]{2}){32}", made.federation.fingerprint)
    assert made.said["new"]["sites"] == {"site-1": "trial/kits/site-1"}
    assert (made.kit, made.answer) == (made.kit.parents[1] / "trial-hospital-a/kit", Path(made.answer))


class Sites:
    """Stands in for the network."""

    def __init__(self, folder: Path, *, say: object) -> None:
        self.folder = folder

    def __enter__(self) -> Sites:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seen(self) -> dict[str, None]:
        return {"a": None, "b": None}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        if site == "b":
            raise SiteError("b", "silent", LichenError("did not answer", where="site b"))
        return body


def test_connect_says_who_answers(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "NetworkSites", Sites)
    server = str(made.federation.folder / "server")
    assert cli.main(["federation", "connect", server, "--seconds", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"a: \d+ ms\nb: does not answer\n", out)
    assert "site b: did not answer" in err
    assert cli.main(["federation", "connect", server, "--seconds", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"]["b"] is None
    monkeypatch.setattr(Sites, "seen", lambda self: {})
    assert "no site came" in fault(["connect", server, "--seconds", "0.1"], capsys)
    assert "--seconds" in fault(["connect", server, "--seconds", "0"], capsys)
    assert "--json" in fault(["connect", str(made.kit), "--json"], capsys)
    assert "holds no kit" in fault(["connect", str(made.federation.folder)], capsys)


def test_the_commands_and_their_flags_are_pinned() -> None:
    flags = {}
    for command in ("new", "ask", "admit", "accept", "bar", "connect"):
        collection = cli.app["federation"][command].assemble_argument_collection(
            default_parameter=cli.app.default_parameter
        )
        flags[command] = sorted(name for argument in collection for name in argument.names)
    assert flags == {
        "new": ["--host", "--json", "--out", "--port", "--sites", "--transport", "NAME"],
        "ask": ["--for", "--json", "--name", "--out", "--transport"],
        "admit": ["--federation", "--json", "REQUEST"],
        "accept": ["--fingerprint", "--folder", "--json", "ANSWER"],
        "bar": ["--federation", "--json", "--lift", "SITE"],
        "connect": ["--json", "--seconds", "KIT"],
    }
