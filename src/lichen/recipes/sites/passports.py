"""By what sites of a federation know one another under masks: passports, and which of them holds which clients.

A passport says that a key is a site's: the authority that all sites trust has signed the site's certificate, and the
certificate's key has signed the key with which the site signs adverts in this one run. Passports travel in
announcements. The server sends each site those of all, with the clients that each holds, and every signature is over
all of that: so clients who believe one another have been told the same.

How passports are made and proven is for whoever has a kit (:mod:`lichen.federation.kits.known`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, final

from lichen.core.errors import LichenError
from lichen.core.masks.party import Identity
from lichen.core.roster import declared_name

__all__ = ["Papers", "Passport", "SiteClients", "all_sites"]

_MOST = {"site": 60, "key": 64, "certificate": 16_384, "proof": 2_048}
"""Letters of each of a passport's parts, at most."""


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix="both ends must run the same version of lichen")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """What proves a site's key to others, as it travels.

    Attributes:
        site: Its name, as its certificate has it.
        key: Public half of the Ed25519 key that signs its clients' adverts in this run, in hex.
        certificate: The site's, in PEM.
        proof: Signature over all this by the certificate's key, in hex.
    """

    site: str
    key: str
    certificate: str
    proof: str

    def dump(self) -> dict[str, str]:
        """What JSON can write of it."""
        return asdict(self)

    @classmethod
    def load(cls, plain: object) -> Passport:
        """Undo :meth:`dump`; nothing is proven yet.

        Raises:
            LichenError: if this is no passport.
        """
        if not isinstance(plain, Mapping) or plain.keys() != _MOST.keys():
            raise _wrong(f"a passport has {', '.join(_MOST)}")
        if any(not isinstance(plain[name], str) or not 0 < len(plain[name]) <= most for name, most in _MOST.items()):
            raise _wrong("the parts of a passport are short texts")
        if declared_name(plain["site"]) != plain["site"] or not plain["certificate"].isascii():
            raise _wrong("a passport is for no name that a site can have")
        return cls(**plain)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SiteClients:
    """A site and the clients that it holds.

    Attributes:
        passport: The site's.
        numbers: Its clients' numbers in the roster.
    """

    passport: Passport
    numbers: tuple[int, ...]

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it."""
        return {"passport": self.passport.dump(), "numbers": list(self.numbers)}

    @classmethod
    def load(cls, plain: object) -> SiteClients:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is none.
        """
        if not isinstance(plain, Mapping) or plain.keys() != {"passport", "numbers"}:
            raise _wrong("a site that holds clients has a passport and their numbers")
        numbers = plain["numbers"]
        if not isinstance(numbers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise _wrong("the numbers of a site's clients are numbers")
        return cls(passport=Passport.load(plain["passport"]), numbers=tuple(numbers))


class Papers(Protocol):
    """A site's own passport, and what it takes to prove those of others."""

    @property
    def passport(self) -> Passport:
        """The site's."""
        ...

    def identity(self, sites: Sequence[SiteClients], own: Sequence[int], clients: int) -> Identity:
        """What signs for the site's own clients, and knows the signatures of all others.

        Args:
            sites: Who holds whom, as the server says.
            own: Numbers of the site's own clients.
            clients: How many there are.

        Raises:
            LichenError: if a passport proves nothing, or a client has no site, or several.
        """
        ...


def all_sites(
    passports: Mapping[str, Passport | None], numbers_of: Mapping[str, tuple[int, ...]]
) -> tuple[SiteClients, ...]:
    """Who holds whom, where sites have passports; none where no site has.

    Args:
        passports: By site, as it has announced.
        numbers_of: Numbers of its clients, by site.

    Raises:
        LichenError: for a site that shows none, or another's, where others show theirs.
    """
    if not any(passports.values()):
        return ()
    sites = []
    for site, passport in passports.items():
        if passport is None or passport.site != site:
            fix = "both ends must run the same version of lichen; else leave this site out"
            raise LichenError("shows no passport of its own, by which others know it", where=f"site {site}", fix=fix)
        sites.append(SiteClients(passport=passport, numbers=numbers_of[site]))
    return tuple(sites)
