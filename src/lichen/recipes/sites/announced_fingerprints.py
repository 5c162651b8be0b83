"""What sites announce of their owners' secret keys: the digest of each, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from lichen.core.errors import LichenError
from lichen.recipes.schema.recipe import Recipe

__all__ = ["check_fingerprints", "enrolled_fingerprints"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_fingerprints(plain: object, members: Collection[str]) -> None:
    """Refuse what is no digest of a client of the site, by its name.

    Raises:
        LichenError: saying so.
    """
    whole = isinstance(plain, Mapping) and plain.keys() <= set(members)
    if not whole or not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in dict(plain).values()):  # type: ignore[call-overload]
        what = "a site announces fingerprints as digests of 64 hex digits, by the names of its clients"
        raise LichenError(what, where="roster", fix="both ends must run the same version of lichen")


def enrolled_fingerprints(recipe: Recipe, announced: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The digests of all owners' keys, by client.

    Args:
        recipe: The recipe.
        announced: Those of each site; clients have names of their own.

    Raises:
        LichenError: if the recipe has no fingerprint, or nobody has a key for it, or two have one.
    """
    found = {name: digest for one in announced for name, digest in one.items()}
    if found and recipe.fingerprint is None:
        fix = "leave this site out; its version of lichen may be another"
        raise LichenError("a site announces a fingerprint, and the recipe has none", where="roster", fix=fix)
    if recipe.fingerprint is not None and not found:
        fix = "let an owner's site join with --secret, or remove it"
        raise LichenError("no site has a secret key", where="fingerprint", fix=fix)
    owner = {digest: name for name, digest in found.items()}
    for name, digest in found.items():
        if owner[digest] != name:
            what = f"clients {name!r} and {owner[digest]!r} announce one key"
            raise LichenError(what, where="roster", fix="let each make its own: lichen fingerprint FILE")
    return found
