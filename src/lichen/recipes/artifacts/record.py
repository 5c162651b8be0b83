"""Ends the record of a finished run: the digest of every file, its head signed, and what the adapter is."""

from __future__ import annotations

from pathlib import Path

from lichen.core.collecting.run_record import beginning, ending, inputs_digests
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import MANIFEST as SEAL
from lichen.core.files.manifest import files_in, seal, sha256_of
from lichen.core.files.record import FORMAT, SIGNED, Record, Signer, signed
from lichen.data.sources.catalog import CATALOG
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.verify import KEY, MANIFEST, handed_on
from lichen.recipes.schema.recipe import Recipe

__all__ = ["end_record", "seal_run"]


def end_record(run: Path, record: Record, recipe: Recipe, signer: Signer | None = None) -> None:
    """Write the last line of a finished run's record, sign its head, and sign what the adapter is.

    Args:
        run: The run's folder, with all its files.
        record: Its record.
        recipe: The run's.
        signer: Whose key signs; None: the run's own.
    """
    signer = signer or Signer(run / KEY)
    if not record.path.exists():  # a task without rounds
        record.append(beginning(run))
    named = signer.named  # a key that is made is made before its digest is taken
    filtered = {key: count for key, count in read_summary(run)["extra"].items() if key.startswith("fm.filter.")}
    record.end({**ending(run), **named, **({"filtered": filtered} if filtered else {})})
    about = {"format": FORMAT, "head": record.head, "lines": record.lines}
    write_atomic(run / SIGNED, signed(about, signer))
    adapter = run / "adapter"
    if adapter.is_dir():
        known = CATALOG.get(recipe.model.name or "")
        body = {
            "format": FORMAT,
            "base": recipe.model.name or "",
            "base_and_start": inputs_digests(run).get("model", ""),
            "base_licence": known.licence if known else "",
            "data_licences": read_summary(run).get("licences", {}),
            "files": {name: sha256_of(adapter / name) for name in handed_on(adapter)},
            "record": record.head,
        }
        write_atomic(adapter / MANIFEST, signed(body, signer), shared=True)


def seal_run(run: Path) -> None:
    """Write down the digests of a finished run's own files, last of all."""
    own = files_in(
        run, but=("state/", "merged/", "periods/", "distilled/", "crash.txt", "adapter/README.md", SEAL, ".")
    )
    seal(run, SEAL, [*own, *(name for name in ("state/final.safetensors",) if (run / name).exists())])
