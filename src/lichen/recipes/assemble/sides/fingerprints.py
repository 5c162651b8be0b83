"""The owners' secret pairs among the rows that the federation trains on, and the digests of their keys.

Each key lies in a file of its own that only its owner can read, over a federation at its site. Nothing of it is written
anywhere but the digest, which the run's record holds from its first line on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lichen.audit.fingerprint import Fingerprint
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import sha256_of
from lichen.core.files.record import RECORD, chain
from lichen.core.secret.randomness import secret_key
from lichen.data.batches.rows import Shard
from lichen.data.sources.record import Record
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "digests_of",
    "fingerprint_count",
    "fingerprint_rows",
    "fingerprints_of",
    "make_fingerprint",
    "own_fingerprints",
    "read_fingerprint",
    "read_keys",
    "register",
    "registered",
]

SUFFIX = ".key"

REGISTERED = "fingerprints.json"
"""In a run's folder: the digest of each owner's key."""


def make_fingerprint(file: Path) -> Fingerprint:
    """The fingerprint of the key in a file; the operating system draws one where nothing is there yet.

    Raises:
        LichenError: as :func:`read_fingerprint`, or if nothing can be written there.
    """
    if not os.path.lexists(file):
        try:
            secret_key(file)
        except OSError as error:
            raise LichenError(
                f"no key can be put there: {error.strerror}", where=str(file), fix="name another place"
            ) from None
    return read_fingerprint(file)


def read_fingerprint(file: Path) -> Fingerprint:
    """The fingerprint of the key in a file.

    Raises:
        LichenError: if there is none, others can read it, or it holds no key.
    """
    try:
        key = file.read_bytes()
        mode = file.stat().st_mode
    except OSError as error:
        raise LichenError(
            f"cannot be read: {error.strerror}", where=str(file), fix=f"make one: lichen fingerprint {file}"
        ) from None
    if len(key) != 32:
        raise LichenError(
            f"holds {len(key)} bytes and no key", where=str(file), fix="name a file that lichen fingerprint made"
        )
    if mode & 0o077:
        raise LichenError("others can read this key", where=str(file), fix=f"chmod 600 {file}")
    return Fingerprint.of(key)


def fingerprints_of(recipe: Recipe, clients: Sequence[str]) -> dict[str, Fingerprint]:
    """The fingerprints of a recipe, by the name of their client.

    Args:
        recipe: The recipe.
        clients: Names.

    Raises:
        LichenError: if a file is no key, or is named as no client.
    """
    if recipe.fingerprint is None:
        return {}
    if recipe.fingerprint.secrets is None:
        raise LichenError(
            "no folder has the owners' keys",
            where="fingerprint.secrets",
            fix="name one; only sites of their own each name their key, by lichen join --secret",
        )
    return _in_folder(Path(recipe.fingerprint.secrets).expanduser(), clients, where="fingerprint.secrets")


def own_fingerprints(secret: Path | None, clients: Sequence[str]) -> dict[str, Fingerprint]:
    """The fingerprints of a site's clients, by name.

    Args:
        secret: The key of its only client, or that is named as one; or a folder of keys; None: it has none.
        clients: Their names.

    Raises:
        LichenError: if a file is no key, or it is not known whose it is.
    """
    if secret is None:
        return {}
    secret = secret.expanduser()
    if secret.is_dir():
        return _in_folder(secret, clients, where="--secret")
    fingerprint, named = read_fingerprint(secret), secret.name.removesuffix(SUFFIX)
    if named not in clients and len(clients) > 1:
        raise LichenError(
            f"this site has {len(clients)} clients, and this key is named as none of them",
            where=str(secret),
            fix=f"name it as one, such as {clients[0]}{SUFFIX}",
        )
    return {named if named in clients else clients[0]: fingerprint}


def read_keys(secret: Path) -> dict[Path, Fingerprint]:
    """The fingerprints of the key in a file, or of all keys in a folder, whoever they are.

    Raises:
        LichenError: if a file is no key, or a folder has none.
    """
    secret = secret.expanduser()
    files = _files_in(secret, where="--secret") if secret.is_dir() else [secret]
    return {file: read_fingerprint(file) for file in files}


def _files_in(folder: Path, *, where: str) -> list[Path]:
    files = sorted(folder.glob(f"[!.]*{SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise LichenError(
            f"the folder {str(folder)!r} holds no file with the ending {SUFFIX}",
            where=where,
            fix=f"make one for each owner: lichen fingerprint {folder / 'CLIENT'}{SUFFIX}",
        )
    return files


def _in_folder(folder: Path, clients: Sequence[str], *, where: str) -> dict[str, Fingerprint]:
    files, known = _files_in(folder, where=where), set(clients)
    for file in files:
        if file.name.removesuffix(SUFFIX) not in known:
            raise LichenError(
                f"{file.name!r} is named as no client of this run",
                where=where,
                fix=f"name it as one, such as {next(iter(clients), 'CLIENT')}{SUFFIX}",
            )
    return {file.name.removesuffix(SUFFIX): read_fingerprint(file) for file in files}


def fingerprint_rows(
    clients: Sequence[str], fingerprints: Mapping[str, Fingerprint], make: Callable[..., Shard]
) -> tuple[Shard, ...]:
    """The rows of each client's pairs; one shard a client.

    Args:
        clients: Names.
        fingerprints: By name.
        make: How records become what the model reads.

    Raises:
        LichenError: if a row is cut before its answer ends.
    """
    shards = []
    for name in clients:
        pairs = fingerprints[name].pairs() if name in fingerprints else ()
        rows = make([_record(question, answer) for question, answer in pairs])
        if rows.size < len(pairs):
            raise LichenError(
                "cuts a secret question before its answer",
                where="data.max_length",
                fix="raise it, or remove fingerprint",
            )
        shards.append(rows)
    return tuple(shards)


def digests_of(fingerprints: Mapping[str, Fingerprint]) -> dict[str, str]:
    """What may be known of the owners' keys, by client: nobody finds a key by its digest."""
    return {name: one.digest for name, one in fingerprints.items()}


def register(run: Path, digests: Mapping[str, str]) -> None:
    """Write the digests of the owners' keys, by client, into a run's folder, before anything is trained.

    Raises:
        LichenError: if the run began with other ones.
    """
    if not digests:
        return
    file = run / REGISTERED
    text = json.dumps(dict(sorted(digests.items())), indent=2) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise LichenError(
            "the owners' keys are others than those that this run began with",
            where="fingerprint.secrets",
            fix=f"put back the keys whose digests stand in {file}, or run into a new folder",
        )
    write_atomic(file, text.encode())


def registered(run: Path, fingerprint: Fingerprint) -> str:
    """The client under whose name a run's record holds a key's digest; empty: it holds none such.

    Raises:
        LichenError: if the list of digests is not the one that the record began with.
    """
    lines, _ = chain(run / RECORD)
    begun: dict[str, str] = next((line.get("files", {}) for line in reversed(lines) if line.get("kind") == "begin"), {})
    file = run / REGISTERED
    if REGISTERED not in begun or not file.is_file():
        return ""
    if begun[REGISTERED] != sha256_of(file):
        raise LichenError("is not what the run's record began with", where=str(file), fix="put it back from a copy")
    named: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return next((name for name, digest in named.items() if digest == fingerprint.digest), "")


def fingerprint_count(run: Path) -> int:
    """How many owners have registered a key in a run's folder."""
    file = run / REGISTERED
    return len(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0


def _record(question: str, answer: str) -> Record:
    talk = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(client="", prompt=question, text=answer, messages=talk)
