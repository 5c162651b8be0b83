"""Signs by the key of a site's certificate, and proves such a signature by the authority of all.

The authority has signed each site's certificate, which names the site. The server has one too, but as a server, and
speaks for no site. Nothing here needs torch.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.federation.kits.settle import Kit

__all__ = ["authority_of", "require_proof", "sign_as_site"]


def sign_as_site(kit: Kit, statement: bytes) -> tuple[str, str]:
    """``(certificate, proof)``: the site's certificate in PEM, and a signature by its key in hex; the same every time.

    Args:
        kit: A site's.
        statement: What is signed.

    Raises:
        LichenError: if the kit's certificate or key cannot be read.
    """
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    startup = kit.folder / "startup"
    try:
        certificate = (startup / "client.crt").read_text(encoding="ascii")
        signer = load_pem_private_key((startup / "client.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        signer = None
    if not isinstance(signer, RSAPrivateKey):
        fix = "make the kit again, from the answer file"
        raise LichenError("the kit's certificate or its key cannot be read", where=str(startup), fix=fix)
    return certificate, signer.sign(statement, *_scheme()).hex()


def authority_of(folder: Path) -> Any:
    """The authority's certificate, as a kit has it.

    Args:
        folder: The kit.

    Raises:
        LichenError: if it cannot be read.
    """
    from cryptography import x509

    file = folder / "startup" / "rootCA.pem"
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):
        raise LichenError("the authority's certificate cannot be read", where=str(file)) from None


def require_proof(site: str, certificate: str, proof: str, statement: bytes, authority: Any) -> None:
    """Nothing, if the authority has named the site, and the site has signed the statement.

    Args:
        site: Its name.
        certificate: Its certificate, in PEM.
        proof: The signature, in hex.
        statement: What was signed.
        authority: The certificate of :func:`authority_of`.

    Raises:
        ValueError: if not.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    try:
        read = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        read.verify_directly_issued_by(authority)
        names, kinds = (
            [str(one.value) for one in read.subject.get_attributes_for_oid(oid)]
            for oid in (NameOID.COMMON_NAME, NameOID.UNSTRUCTURED_NAME)
        )
        holds = read.not_valid_before_utc <= now <= read.not_valid_after_utc
        signer = read.public_key()
        if names != [site] or kinds != ["client"] or not holds or not isinstance(signer, RSAPublicKey):
            raise ValueError("another certificate")
        signer.verify(bytes.fromhex(proof), statement, *_scheme())
    except (TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise ValueError("no signature of this site") from None


def _scheme() -> tuple[Any, Any]:
    """How certificates' keys sign: by RSA as PKCS #1 v1.5 has it, which signs the same twice in the same way."""
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    return PKCS1v15(), SHA256()
