"""Makes a site's passport for a run of its kit, and proves those of other sites by the authority of all.

The authority has signed each site's certificate. With the certificate's key a site signs another one, made for one run,
which signs the adverts of its clients: an advert has room for a signature of Ed25519, and certificates have RSA. What
is signed names the run and all sites with their keys and clients, so that nothing of another run or of another list of
sites passes. The server has the authority's certificate too, but as a server, and speaks for no client.

References: :mod:`lichen.core.masks.party`. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.record import private_key, public_key
from lichen.core.masks.layout import frame
from lichen.federation.kits.settle import Kit
from lichen.federation.kits.signing import authority_of, require_proof, sign_as_site
from lichen.recipes.sites.passports import Passport, SiteClients

__all__ = ["KitPapers"]

KEY = "masks.key"
"""The file of a run's folder at a site with the key that signs adverts in it."""

_FIX = "let nobody send anything; speak with the coordinator and with that site's person"


@final
class KitPapers:
    """The papers of a kit in one run; :class:`lichen.recipes.sites.passports.Papers`.

    Args:
        kit: A site's kit.
        run: The run's name.
        folder: The run's folder at the site, in which its key lies.
        say: Told with whom clients mask, a line.
    """

    def __init__(self, kit: Kit, run: str, folder: Path, *, say: Callable[[str], None] = lambda _: None) -> None:
        self._kit, self._run, self._key, self._say = kit, run, folder / KEY, say
        self._line = ""

    @cached_property
    def passport(self) -> Passport:
        """The site's in this run; the same after every start.

        Raises:
            LichenError: if the kit's certificate or key cannot be read.
        """
        key = public_key(self._key)
        certificate, proof = sign_as_site(self._kit, self._statement(self._kit.name, key))
        return Passport(site=self._kit.name, key=key, certificate=certificate, proof=proof)

    def identity(self, sites: Sequence[SiteClients], own: Sequence[int], clients: int) -> KitIdentity:
        """As :meth:`lichen.recipes.sites.passports.Papers.identity` has it."""
        names = [one.passport.site for one in sites]
        numbers = sorted(number for one in sites for number in one.numbers)
        if len(set(names)) < len(names) or numbers != list(range(clients)):
            raise _refused("the server does not say of each client which one site holds it")
        mine = [one for one in sites if one.passport.key == self.passport.key]
        if [(one.passport.site, one.numbers) for one in mine] != [(self._kit.name, tuple(own))]:
            raise _refused("the server tells others of another key or of other clients of this site")
        authority = authority_of(self._kit.folder)
        keys = {one.passport.site: self._proven(one.passport, authority) for one in sites}
        line = ", ".join(f"{one.passport.site} ({len(one.numbers)})" for one in sites)
        if line != self._line:
            self._say(f"masks with the clients of these sites, whose certificates were looked at: {line}")
            self._line = line
        of = {number: keys[one.passport.site] for one in sites for number in one.numbers}
        return KitIdentity(private_key(self._key), _bound(self._run, sites), of, say=self._say)

    def _proven(self, passport: Passport, authority: Any) -> Any:
        """The site's key, if the authority has named the site and the site has signed the key for this run."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        statement = self._statement(passport.site, passport.key)
        try:
            require_proof(passport.site, passport.certificate, passport.proof, statement, authority)
            return Ed25519PublicKey.from_public_bytes(bytes.fromhex(passport.key))
        except ValueError:
            raise _refused(f"the key of site {passport.site} is not one that its certificate proves") from None

    def _statement(self, site: str, key: str) -> bytes:
        return frame("lichen key of a site", self._kit.federation, self._run, site, key)


@final
class KitIdentity:
    """Signs for a site's own clients, and knows those of others; :class:`lichen.core.masks.party.Identity`.

    Args:
        key: The private key of the site in this run.
        bound: What all signatures of the run are bound to.
        of: The public key of the site that holds a client.
        say: Told of an advert that is refused, a line.
    """

    def __init__(
        self, key: Any, bound: bytes, of: Mapping[int, Any], *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._key, self._bound, self._of, self._say = key, bound, dict(of), say

    def sign(self, data: bytes) -> bytes:
        """The site's signature, 64 bytes."""
        signature: bytes = self._key.sign(frame("lichen advert of a site", self._bound, data))
        return signature

    def verify(self, client: int, data: bytes, signature: bytes) -> bool:
        """Whether the site that holds the client has signed the data, in this run and with this list of sites."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._of[client].verify(signature, frame("lichen advert of a site", self._bound, data))
        except (KeyError, InvalidSignature):
            self._say(
                f"keys of client {client} are refused: its site has not signed them, so the server may be between"
            )
            return False
        return True


def _bound(run: str, sites: Sequence[SiteClients]) -> bytes:
    """A digest of the run's name, and of all sites, their keys and their clients."""
    parts = sorted((one.passport.site, one.passport.key, str(sorted(one.numbers))) for one in sites)
    return hashlib.sha256(frame("lichen sites", run, *(part for one in parts for part in one))).digest()


def _refused(what: str) -> LichenError:
    return LichenError(what, where="roster", fix=_FIX)
