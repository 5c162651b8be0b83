"""The notice by which a site leaves: signed by the key of its certificate, for one question of the coordinator.

The coordinator asks with a number that it has drawn, and the notice is over that number: one that was seen before
answers no other question. It names federation and site, so that none passes for another's. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.masks.layout import frame
from lichen.federation.kits.settle import Kit
from lichen.federation.kits.signing import require_proof, sign_as_site

__all__ = ["TIME", "Notice", "make_notice", "require_notice"]

TIME = "%Y-%m-%dT%H:%M:%SZ"
"""How times are written, in UTC."""

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_NONCE = re.compile(r"[0-9a-f]{32}")
_MOST = {"federation": 60, "site": 60, "time": 20, "nonce": 32, "certificate": 16_384, "proof": 2_048}
"""Letters of each part, at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """That a site has withdrawn, as it travels.

    Attributes:
        federation: The federation's name.
        site: The site's.
        time: When, by the site's clock, in UTC.
        nonce: What the coordinator drew for its question, 32 hex digits.
        certificate: The site's, in PEM.
        proof: Its signature over all this, in hex.
    """

    federation: str
    site: str
    time: str
    nonce: str
    certificate: str
    proof: str

    def dump(self) -> dict[str, str]:
        """What JSON can write of it."""
        return asdict(self)


def make_notice(kit: Kit, time: str, nonce: str) -> Notice:
    """The notice of a kit's site.

    Args:
        kit: The site's.
        time: When it withdrew.
        nonce: What the coordinator drew.

    Raises:
        LichenError: if the kit's key cannot be read, or the nonce is none.
    """
    if not _NONCE.fullmatch(nonce):
        raise LichenError(
            "is no question of a coordinator", where="withdrawal", fix="use the same version at both ends"
        )
    certificate, proof = sign_as_site(kit, _statement(kit.federation, kit.name, time, nonce))
    return Notice(
        federation=kit.federation, site=kit.name, time=time, nonce=nonce, certificate=certificate, proof=proof
    )


def require_notice(plain: object, *, federation: str, site: str, nonce: str, authority: Any) -> Notice:
    """What a site has sent, if it is its own notice, and the answer to this question.

    Args:
        plain: What came, as JSON has it.
        federation: The federation's name.
        site: Who has sent it, by the certificate of its connection.
        nonce: What was drawn for the question.
        authority: The authority's certificate.

    Raises:
        LichenError: if it is anything else.
    """
    if not isinstance(plain, Mapping) or plain.keys() != _MOST.keys():
        raise _refused(site, f"a notice has {', '.join(_MOST)}")
    for key, most in _MOST.items():
        if not isinstance(plain[key], str) or not 0 < len(plain[key]) <= most:
            raise _refused(site, f"its {key} is no text of at most {most:,} letters")
    notice = Notice(**plain)
    if notice.site != site:
        raise _refused(site, f"it speaks for {notice.site[:60]!r}, and came from {site}")
    if notice.federation != federation:
        raise _refused(site, f"it is for the federation {notice.federation[:60]!r}")
    if notice.nonce != nonce:
        raise _refused(site, "it answers another question: it was seen before, or made up")
    if not _TIME.fullmatch(notice.time):
        raise _refused(site, "its time is none")
    try:
        statement = _statement(federation, site, notice.time, nonce)
        require_proof(site, notice.certificate, notice.proof, statement, authority)
    except ValueError:
        raise _refused(site, f"{site} has not signed it") from None
    return notice


def _statement(*parts: str) -> bytes:
    return frame("lichen withdrawal of a site", *parts)


def _refused(site: str, what: str) -> LichenError:
    return LichenError(f"a notice of withdrawal is refused: {what}", where=f"site {site}", fix="speak with its person")
