"""Writes a data card as Croissant, by which search engines and loaders find data sets.

References:
    Akhtar et al. "Croissant: A Metadata Format for ML-Ready Datasets". NeurIPS Datasets and Benchmarks, 2024.
    arXiv:2403.19546. Specifications: http://mlcommons.org/croissant/1.0 and http://mlcommons.org/croissant/RAI/1.0.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.cards.card_files import card_place, file_digests
from lichen.data.cards.licences import is_spdx_id
from lichen.recipes.rows.data_card import DataCard

__all__ = ["croissant_of"]

_CROISSANT, _RAI = "http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_FORMATS = {
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".tab": "text/tab-separated-values",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".ndjson": "application/jsonlines",
    ".parquet": "application/x-parquet",
    ".gz": "application/gzip",
}

_ADDRESS = re.compile(r"https?://\S+")


def croissant_of(rows: Path, card: DataCard) -> dict[str, Any]:
    """The JSON-LD of a file or folder of rows.

    Consent, purposes and the last day stand in the vocabulary of responsible AI.

    Args:
        rows: What the card is of.
        card: What it says.

    Raises:
        LichenError: for what Croissant needs and nobody has filled in.
    """
    for key in ("owner", "licence"):
        if not getattr(card, key):
            what, where = f"{key} is not filled in, and Croissant needs it", str(card_place(rows))
            raise LichenError(what, where=where, fix="fill it in")
    licence, source = str(card.licence), card.source or ""
    written = datetime.fromtimestamp(card_place(rows).stat().st_mtime, UTC).date().isoformat()
    found: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [_CROISSANT, _RAI],
        "name": re.sub(r"[^A-Za-z0-9_-]+", "-", rows.resolve().name.split(".")[0]).strip("-") or "rows",
        "description": source if source and not _ADDRESS.fullmatch(source) else f"Rows of {card.owner}.",
        "license": f"https://spdx.org/licenses/{licence}" if is_spdx_id(licence) else licence,
        "url": source if _ADDRESS.fullmatch(source) else f"./{rows.resolve().name}",
        "datePublished": written,
        "creator": {
            "@type": "sc:Organization",
            "name": card.owner,
            **({"email": card.contact} if card.contact else {}),
        },
        "distribution": [_file(*one) for one in file_digests(rows)],
    }
    if card.consent == "none_needed":
        found["rai:personalSensitiveInformation"] = ["None: the rows are about nobody."]
    elif card.consent is not None:
        found["rai:personalSensitiveInformation"] = [f"Lawful basis, GDPR Art. 6(1): {card.consent.replace('_', ' ')}."]
    if card.purposes:
        found["rai:dataUseCases"] = list(card.purposes)
    if card.until is not None:
        found["rai:dataReleaseMaintenancePlan"] = f"The rows may be used until {card.until}."
    return found


def _file(name: str, size: int, digest: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": _FORMATS.get(Path(name).suffix.lower(), "application/octet-stream"),
        "sha256": digest,
    }
