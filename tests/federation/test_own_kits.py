"""Kits for gRPC, made without NVFlare: who may read them, what they serve for, and that nothing bad passes quietly."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from lichen import cli
from lichen.core.errors import LichenError
from lichen.federation.kits import tool
from lichen.federation.kits.make import accept
from lichen.federation.kits.members import admit, read_federation
from lichen.federation.kits.settle import open_kit, settle
from lichen.federation.kits.signing import authority_of, require_proof, sign_as_site


class Made(NamedTuple):
    """A federation's folder, a request to it, its answer and a kit."""

    folder: Path
    request: Path
    answer: Path
    kit: Path
    fingerprint: str


def command(*words: str) -> dict[str, str]:
    """What a command says."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["federation", *words, "--json"]) == 0
    return dict(json.loads(out.getvalue()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("kits")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.importlib.util, "find_spec", lambda name: None)  # NVFlare is not there
        place = ("--host", "127.0.0.1", "--port", "18199", "--transport", "grpc")
        told = command("new", "trial", *place, "--sites", "site-1")
        sent = command("ask", "--name", "hospital-a", "--for", "trial", "--transport", "grpc")
        shutil.copytree("trial-hospital-a", "untouched")
        admitted = command("admit", sent["request"])
        assert (admitted["sum"], admitted["fingerprint"]) == (sent["sum"], told["fingerprint"])
        kit = command("accept", admitted["answer"], "--fingerprint", told["fingerprint"])["kit"]
    answer = folder / admitted["answer"]
    return Made(folder / "trial", folder / sent["request"], answer, folder / kit, told["fingerprint"])


def changed(archive: Path, to: Path, members: Mapping[str, bytes]) -> Path:
    """An archive with other parts."""
    with zipfile.ZipFile(archive) as packed:
        whole = {name: packed.read(name) for name in packed.namelist()} | members
    with zipfile.ZipFile(to, "w") as packed:
        for name, data in whole.items():
            packed.writestr(name, data)
    return to


def says(archive: Path, member: str, **other: object) -> dict[str, bytes]:
    """A part that says something else of itself."""
    with zipfile.ZipFile(archive) as packed:
        return {member: json.dumps(json.loads(packed.read(member)) | other).encode()}


def test_only_the_owner_reads_anything_and_no_key_travels(made: Made) -> None:
    every = [path for top in (made.folder, made.kit.parent) for path in (top, *top.rglob("*"))]
    assert {path: oct(path.stat().st_mode) for path in every if path.stat().st_mode & 0o077} == {}
    keys = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*.key")}
    assert keys == {"authority/rootCA.key", "server/startup/server.key", "kits/site-1/startup/client.key"}
    for archive in (made.request, made.answer):
        with zipfile.ZipFile(archive) as packed:
            assert not any(b"PRIVATE KEY" in packed.read(name) for name in packed.namelist())


def test_a_kit_says_what_it_is_and_which_transport_it_is_for(made: Made) -> None:
    assert open_kit(made.kit)[1:] == ("site", "trial", "hospital-a", "127.0.0.1", 18199, "grpc")
    assert open_kit(made.folder / "server")[1:3] == ("server", "trial")
    assert open_kit(made.folder / "kits" / "site-1").name == "site-1"
    assert settle(made.kit) == open_kit(made.kit)
    assert read_federation(made.folder).fingerprint == made.fingerprint


@pytest.mark.parametrize("text", ["", "[]", '{"transport": "grpc"}', '{"transport": "pigeons", "kind": "site"}'])
def test_a_damaged_kit_is_told_so(text: str, made: Made, tmp_path: Path) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "kit.json").write_text(text)
    with pytest.raises(LichenError, match="is damaged"):
        open_kit(tmp_path)


def test_certificates_serve_for_one_end_only(made: Made) -> None:
    root = x509.load_pem_x509_certificate((made.folder / "authority" / "rootCA.pem").read_bytes())
    uses = {}
    for file in (made.kit / "startup/client.crt", made.folder / "server/startup/server.crt"):
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        certificate.verify_directly_issued_by(root)
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        uses[file.stem] = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert 1094 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 1096
    assert uses == {"client": [ExtendedKeyUsageOID.CLIENT_AUTH], "server": [ExtendedKeyUsageOID.SERVER_AUTH]}
    host = x509.load_pem_x509_certificate((made.folder / "server/startup/server.crt").read_bytes())
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl here")
@pytest.mark.parametrize(("purpose", "which"), [("sslclient", "client"), ("sslserver", "server")])
def test_another_program_reads_them_in_the_same_way(purpose: str, which: str, made: Made) -> None:
    for kit, name in ((made.kit, "client"), (made.folder / "server", "server")):
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose]
        words += ["-CAfile", str(made.folder / "authority/rootCA.pem"), str(kit / f"startup/{name}.crt")]
        assert (subprocess.run(words, capture_output=True, check=False).returncode == 0) == (name == which)


def test_papers_are_signed_by_the_kit_as_by_those_of_nvflare(made: Made) -> None:
    kit = open_kit(made.kit)
    certificate, proof = sign_as_site(kit, b"statement")
    require_proof("hospital-a", certificate, proof, b"statement", authority_of(made.kit))
    with pytest.raises(ValueError, match="no signature"):
        require_proof("hospital-a", certificate, proof, b"another", authority_of(made.kit))
    server = (made.folder / "server/startup/server.crt").read_text()
    with pytest.raises(ValueError, match="another certificate"):
        require_proof("127.0.0.1", server, proof, b"statement", authority_of(made.kit))


def test_a_request_is_signed_only_as_its_key_has_signed_it(made: Made, tmp_path: Path) -> None:
    with zipfile.ZipFile(made.request) as packed:
        asked = packed.read("hospital-a.csr")
    other = {**says(made.request, "request.json", name="hospital-b"), "hospital-b.csr": asked}
    for number, members in enumerate((other, {**other, "hospital-b.csr": b"none"})):
        with pytest.raises(LichenError, match="has not signed this name"):
            admit(changed(made.request, tmp_path / f"{number}.zip", members), made.folder)
    assert not (made.folder / "admitted" / "hospital-b.signed.zip").exists()


@pytest.mark.parametrize("transport", ["nvflare", "pigeons"])
def test_a_request_for_another_transport_is_told_so(transport: str, made: Made, tmp_path: Path) -> None:
    members = says(made.request, "request.json", transport=transport)
    with pytest.raises(LichenError, match=rf"over {transport}, and the kits of this federation are for grpc") as caught:
        admit(changed(made.request, tmp_path / "other.zip", members), made.folder)
    assert caught.value.fix == "let the site ask again with --transport grpc"


def test_an_answer_is_accepted_as_the_right_authority_has_signed_it_only(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(made.kit.parents[1] / "untouched", folder)
    wrong = made.fingerprint[:-2] + ("00" if made.fingerprint[-2:] != "00" else "11")
    with pytest.raises(LichenError, match="another fingerprint"):
        accept(made.answer, folder, fingerprint=wrong)
    for number, other in enumerate(({"host": "evil.example"}, {"port": 1}, {"project": "other"}, {"certificate": ""})):
        answer = changed(made.answer, tmp_path / f"{number}.zip", says(made.answer, "signed.json", **other))
        with pytest.raises(LichenError, match="has not signed it as it is"):
            accept(answer, folder, fingerprint=made.fingerprint)
    server = (made.folder / "server/startup/server.crt").read_bytes()
    with pytest.raises(LichenError, match="has not signed it as it is"):
        accept(
            changed(made.answer, tmp_path / "s.zip", {"hospital-a.crt": server}), folder, fingerprint=made.fingerprint
        )
    shutil.copy(made.folder / "kits/site-1/startup/client.key", folder / "request/hospital-a.key")
    with pytest.raises(LichenError, match="no key of hospital-a"):
        accept(made.answer, folder, fingerprint=made.fingerprint)
    assert not (folder / "kit").exists()


def test_bad_input_is_one_sentence_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["--host", "localhost", "--port", "1"]
    for words in (["new", "a", *place], ["ask", "--name", "b", "--for", "c"]):
        assert cli.main(["federation", *words, "--transport", "pigeons"]) == 2
        assert "--transport: 'pigeons' is no transport\n  fix: one of: nvflare, grpc" in capsys.readouterr().err
    assert cli.main(["federation", "new", "a", *place, "--transport", "grpc"]) == 0
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["federation", "connect", "a/server", "--seconds", "1"]) == 2
    assert 'pip install "lichen[grpc]"' in capsys.readouterr().err
