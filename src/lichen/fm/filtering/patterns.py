"""Finds mail addresses, telephone and card numbers, accounts, national identity numbers and addresses of machines.

The recognisers are those of Presidio that are patterns with a checksum, or a library's own check; no language model is
loaded, and nothing is looked up on a network. Importing it takes some seconds, so that it is done where a recipe asks.

References:
    Microsoft. "Presidio: Data Protection and De-identification SDK." https://github.com/microsoft/presidio
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lichen.core.errors import LichenError
from lichen.fm.filtering.content import Finder, Found
from lichen.fm.filtering.kinds import KINDS

__all__ = ["patterns_of"]

LEAST = 0.4
"""Of Presidio's scores: below it stand patterns that any number of so many digits fits."""

_NAMES: dict[str, tuple[str, ...]] = {
    "mail": ("EmailRecognizer",),
    "phone": ("PhoneRecognizer",),
    "card": ("CreditCardRecognizer",),
    "iban": ("IbanRecognizer",),
    "id": (
        "DeSocialSecurityRecognizer",
        "DeTaxIdRecognizer",
        "EsNieRecognizer",
        "EsNifRecognizer",
        "FiPersonalIdentityCodeRecognizer",
        "InAadhaarRecognizer",
        "ItFiscalCodeRecognizer",
        "KrRrnRecognizer",
        "NhsRecognizer",
        "PlPeselRecognizer",
        "SePersonnummerRecognizer",
        "ThTninRecognizer",
        "TrNationalIdRecognizer",
        "UkNinoRecognizer",
        "UsSsnRecognizer",
        "ZaIdNumberRecognizer",
    ),
    "machine": ("IpRecognizer", "MacAddressRecognizer"),
}
"""Presidio's recognisers of each kind."""


def patterns_of(kinds: Sequence[str], *, where: str) -> Finder:
    """What finds these kinds.

    Args:
        kinds: Some of :data:`lichen.fm.filtering.kinds.KINDS`.
        where: The recipe's key, for errors.

    Raises:
        LichenError: if Presidio is not installed.
    """
    try:
        from presidio_analyzer import predefined_recognizers
    except ImportError:
        fix = "pip install 'lichen[filter]', or set kinds: []"
        raise LichenError("needs the package presidio-analyzer", where=where, fix=fix) from None
    recognisers = [
        (kind, _made(getattr(predefined_recognizers, name))) for kind in KINDS if kind in kinds for name in _NAMES[kind]
    ]

    def find(text: str) -> Iterator[Found]:
        for kind, recogniser in recognisers:
            for one in recogniser.analyze(text, recogniser.supported_entities):
                if one.score >= LEAST:
                    yield Found(one.start, one.end, kind, float(one.score))

    return find


def _made(recogniser: Any) -> Any:
    if recogniser.__name__ != "EmailRecognizer":
        return recogniser()
    mail = recogniser()
    # Its own check asks for a list of domains on the network, and lets pass what ends in a name of one's own house.
    mail.validate_result = lambda _: None
    return mail
