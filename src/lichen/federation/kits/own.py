"""Makes certificates, requests, answers and kits of a federation over gRPC, with ``cryptography`` alone.

They are what NVFlare's own commands make for a federation over NVFlare, file by file: an authority that signs names,
certificates for three years that name a site or the server's host, a request that its key has signed, and an answer
that the authority has signed. A site's certificate serves for a client of TLS only, and the server's for a server only.
Nothing here needs torch.

References:
    Nystrom and Kaliski. "PKCS #10: Certification Request Syntax Specification." RFC 2986, 2000.
    Cooper et al. "Internet X.509 Public Key Infrastructure Certificate and CRL Profile." RFC 5280, 2008.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.federation.kits.papers import inside, member_of
from lichen.federation.kits.settle import OWN, Kit, kit_text

__all__ = ["make_authority", "make_kit", "make_kit_of", "make_request", "sign_request"]

_BITS, _YEARS, _AUTHORITY_YEARS = 3072, 3, 10
_FILES = {"server": "server", "site": "client"}
"""How a kit's key and certificate are called, and what its certificate says of whose it is."""

_FIX = "compare the sums by telephone, and let it be made again"


def make_authority(folder: Path, federation: str) -> str:
    """Make the key that signs names, and its certificate.

    Args:
        folder: Where to.
        federation: The federation's name.

    Returns:
        The certificate's fingerprint.
    """
    from cryptography import x509

    key = _new_key(folder / "rootCA.key")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, federation)])
    made = _sign(name, name, key.public_key(), key, _AUTHORITY_YEARS, authority=True)
    write_atomic(folder / "rootCA.pem", _pem(made))
    return _fingerprint(made)


def make_kit(authority: Path, kit: Kit) -> None:
    """Make a kit with its key where the authority lies: the server's, or a site's that is handed over."""
    startup, which = kit.folder / "startup", _FILES[kit.kind]
    key, root = _new_key(startup / f"{which}.key"), _certificate((authority / "rootCA.pem").read_bytes())
    made = _signed(kit.name, kit.kind, key.public_key(), authority)
    _write_kit(kit, made, root)


def make_request(folder: Path, *, name: str, federation: str) -> Path:
    """Make a site's key, in ``request`` of the folder, and the request that is sent.

    Args:
        folder: Where to.
        name: The site's.
        federation: The name of the federation.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    key = _new_key(folder / "request" / f"{name}.key")
    csr = x509.CertificateSigningRequestBuilder().subject_name(_name(name, "site")).sign(key, SHA256())
    about = {"transport": "grpc", "project": federation, "name": name, "kind": "site", "cert_type": "client"}
    file = folder / f"{name}.request.zip"
    _pack(file, {"request.json": _json(about), f"{name}.csr": _pem(csr)})
    return file


def sign_request(request: Path, authority: Path, server: Kit, answer: Path) -> None:
    """Sign what :func:`make_request` made, and write the answer.

    Args:
        request: The file that the site sent, which says that it is for a site of this federation.
        authority: The authority's folder.
        server: The server's kit.
        answer: Where to.

    Raises:
        LichenError: if another name or no key has signed it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    site = str(inside(request, "request.json").get("name"))
    try:
        csr = x509.load_pem_x509_csr(member_of(request, f"{site}.csr"))
        key = csr.public_key()
        good = csr.is_signature_valid and csr.subject == _name(site, "site")
    except (ValueError, TypeError):
        good = False
    if not good or not isinstance(key, RSAPublicKey) or not 2048 <= key.key_size <= 8192:
        raise LichenError("its key has not signed this name", where=str(request), fix=_FIX)
    made, root = _signed(site, "site", key, authority), (authority / "rootCA.pem").read_bytes()
    about: dict[str, Any] = {"transport": "grpc", "project": server.federation, "name": site, "kind": "site"}
    about |= {"cert_type": "client", "host": server.host, "port": server.port}
    about |= {"fingerprint": _fingerprint(_certificate(root)), "certificate": hashlib.sha256(_pem(made)).hexdigest()}
    signature = _key_in(authority / "rootCA.key").sign(_json(about), *_scheme()).hex().encode()
    files = {"signed.json": _json(about), "signed.json.sig": signature, f"{site}.crt": _pem(made), "rootCA.pem": root}
    _pack(answer, files)


def make_kit_of(answer: Path, keys: Path, folder: Path, fingerprint: str) -> None:
    """Make a site's kit of the coordinator's answer.

    Args:
        answer: The file.
        keys: The folder with the site's key.
        folder: The kit's, which is new.
        fingerprint: Of the authority, as it was told by another way.

    Raises:
        LichenError: if the answer is of another authority, was changed, or is for another key.
    """
    from cryptography.exceptions import InvalidSignature

    about = inside(answer, "signed.json")
    site = str(about.get("name"))
    try:
        root, made = _certificate(member_of(answer, "rootCA.pem")), _certificate(member_of(answer, f"{site}.crt"))
        if _fingerprint(root) != fingerprint:
            what = "is of an authority with another fingerprint than the one that was told"
            raise LichenError(what, where=str(answer), fix="ask the coordinator by telephone, and accept no other")
        signature = bytes.fromhex(member_of(answer, "signed.json.sig").decode("ascii"))
        root.public_key().verify(signature, member_of(answer, "signed.json"), *_scheme())
        made.verify_directly_issued_by(root)
        if hashlib.sha256(_pem(made)).hexdigest() != about["certificate"] or made.subject != _name(site, "site"):
            raise ValueError
        kit = Kit(folder, "site", str(about["project"]), site, str(about["host"]), int(about["port"]), "grpc")
    except (ValueError, TypeError, KeyError, InvalidSignature):
        raise LichenError("the authority has not signed it as it is", where=str(answer), fix=_FIX) from None
    key = _key_in(keys / f"{site}.key")
    if key.public_key() != made.public_key():
        fix = "name the folder that `lichen federation ask` made, with --folder"
        raise LichenError(f"there is no key of {site} to which this is the answer", where=str(keys), fix=fix)
    write_atomic(folder / "startup" / "client.key", (keys / f"{site}.key").read_bytes())
    _write_kit(kit, made, root)


def _write_kit(kit: Kit, certificate: Any, root: Any) -> None:
    startup = kit.folder / "startup"
    write_atomic(startup / f"{_FILES[kit.kind]}.crt", _pem(certificate))
    write_atomic(startup / "rootCA.pem", _pem(root))
    write_atomic(startup / OWN, kit_text(kit))


def _name(name: str, kind: str) -> Any:
    from cryptography import x509

    about = {x509.NameOID.COMMON_NAME: name, x509.NameOID.UNSTRUCTURED_NAME: _FILES[kind]}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in about.items()])


def _signed(name: str, kind: str, key: Any, authority: Path) -> Any:
    """A certificate of the authority."""
    root = _certificate((authority / "rootCA.pem").read_bytes())
    return _sign(_name(name, kind), root.subject, key, _key_in(authority / "rootCA.key"), _YEARS, kind=kind)


def _sign(
    subject: Any, issuer: Any, key: Any, signer: Any, years: int, *, authority: bool = False, kind: str = ""
) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID

    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_encipherment=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                **usage,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if kind:
        use = ExtendedKeyUsageOID.CLIENT_AUTH if kind == "site" else ExtendedKeyUsageOID.SERVER_AUTH
        made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    if kind == "server":
        host = str(subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)
        address = re.fullmatch(r"[0-9.]+", host)
        name = x509.IPAddress(ipaddress.ip_address(host)) if address else x509.DNSName(host)
        made = made.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    return made.sign(signer, SHA256())


def _new_key(file: Path) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

    key = generate_private_key(65537, _BITS)
    plain = serialization.NoEncryption()
    shape = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    write_atomic(file, key.private_bytes(*shape))
    return key


def _key_in(file: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, RSAPrivateKey):
        raise LichenError("the key cannot be read", where=str(file), fix="take it from a backup")
    return key


def _certificate(pem: bytes) -> Any:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem)


def _pem(one: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return bytes(one.public_bytes(Encoding.PEM))


def _fingerprint(certificate: Any) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256

    return f"SHA256:{certificate.fingerprint(SHA256()).hex(':').upper()}"


def _scheme() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    return PKCS1v15(), SHA256()


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode() + b"\n"


def _pack(file: Path, contents: Mapping[str, bytes]) -> None:
    with open(private.create(file), "wb") as made, zipfile.ZipFile(made, "w") as packed:
        for name, data in contents.items():
            packed.writestr(name, data)
