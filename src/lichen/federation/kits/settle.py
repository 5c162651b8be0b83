"""Writes a kit's local settings: Lichen's component in it, every right to bring or steer jobs closed, nothing outside.

They are written when a kit is made and again before each start, so that a kit that was moved, or whose settings
somebody opened, is closed again. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic

__all__ = [
    "BARRED",
    "CURRENT",
    "ENDED",
    "OWN",
    "RUNS",
    "SUPERVISOR",
    "Transport",
    "current_run",
    "is_run",
    "kit_text",
    "open_kit",
    "open_site_kit",
    "settle",
]

Transport = Literal["nvflare", "grpc"]

OWN = "kit.json"
"""In ``startup`` of a kit for gRPC: whose it is, and where the server is. By this file alone a kit is for gRPC."""

BARRED = "disabled_clients.json"
"""The server kit's file with those who are closed out, by NVFlare's name."""

RUNS = "runs"
"""The folder of a site's kit with what it holds of each run."""

CURRENT = "current.json"
"""In it, the run that the site is in."""

SUPERVISOR = "supervisor"
"""In a site's kit: the folder of the socket of the process that stands over its worker; after a dot, its lock."""

_RUN = re.compile(r"[0-9a-f]{16}")
"""How a run is named; it names a folder."""

ENDED = {"barred": 41, "replaced": 42, "stopped": 43, "unheard": 44}
"""Exit codes of an NVFlare process: the server has sent it away, its person has ended it, or the server is unheard."""

CLOSED = (
    *("submit_job", "clone_job", "manage_job", "download_job", "operate", "shell_commands", "byoc"),
    "server-predeployed-flwr",
)
ROLES = ("project_admin", "org_admin", "lead", "member")

_COMPONENTS = "lichen.federation.component"
_COMPONENT = {"server": f"{_COMPONENTS}.Coordinator", "site": f"{_COMPONENTS}.Site"}
_STREAMS = ("site_log_streamer", "log_receiver")
"""Components of NVFlare that send a site's log to the server, and take it there."""

_LOG_BYTES, _LOG_FILES = 4 << 20, 3


@final
class Kit(NamedTuple):
    """What a kit's folder says of itself.

    Attributes:
        folder: Where it lies.
        kind: Whose it is.
        federation: The federation's name.
        name: The site's name; the host's at the server.
        host: Where the server is.
        port: And its port.
        transport: What carries bytes between them.
    """

    folder: Path
    kind: Literal["server", "site"]
    federation: str
    name: str
    host: str
    port: int
    transport: Transport = "nvflare"


def open_kit(folder: Path) -> Kit:
    """Read a kit.

    Raises:
        LichenError: if the folder holds none, or one that is damaged.
    """
    startup = folder / "startup"
    if (startup / OWN).is_file():
        return _open_own(folder)
    at_server = (startup / "fed_server.json").is_file()
    file = startup / ("fed_server.json" if at_server else "fed_client.json")
    if not file.is_file():
        fix = "name the folder that `lichen federation new` or `accept` printed"
        raise LichenError("holds no kit", where=str(folder), fix=fix)
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        server = body["servers"][0]
        host, _, port = server["service"]["target"].rpartition(":")
        name = server["admin_server"] if at_server else body["client"]["fqsn"]
        return Kit(folder, "server" if at_server else "site", str(server["name"]), str(name), str(host), int(port))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise LichenError("is damaged", where=str(file), fix="make the kit again, from the answer file") from None


def open_site_kit(folder: Path) -> Kit:
    """Read a site's kit.

    Raises:
        LichenError: if the folder holds none, one that is damaged, or the server's.
    """
    kit = open_kit(folder)
    if kit.kind != "site":
        raise LichenError("is the server's kit", where=str(folder), fix="start it with: lichen serve FOLDER")
    return kit


def _open_own(folder: Path) -> Kit:
    file = folder / "startup" / OWN
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        if body["transport"] != "grpc" or body["kind"] not in ("server", "site"):
            raise ValueError
        federation, name, host = (str(body[key]) for key in ("federation", "name", "host"))
        return Kit(folder, body["kind"], federation, name, host, int(body["port"]), "grpc")
    except (OSError, ValueError, KeyError, TypeError):
        raise LichenError("is damaged", where=str(file), fix="make the kit again, from the answer file") from None


def kit_text(kit: Kit) -> bytes:
    """What the file :data:`OWN` of a kit for gRPC holds."""
    body = {key: value for key, value in kit._asdict().items() if key != "folder"}
    return json.dumps(body, indent=1).encode() + b"\n"


def is_run(name: str) -> bool:
    """Whether a run can be called so."""
    return _RUN.fullmatch(name) is not None


def current_run(kit: Path) -> str | None:
    """The run that a site is in, or was in when it ended; None: in none."""
    try:
        name = str(json.loads((kit / RUNS / CURRENT).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if is_run(name) else None


def settle(folder: Path) -> Kit:
    """Write the local settings of a kit, and make all of it its owner's alone.

    Returns:
        The kit.

    Raises:
        LichenError: if the folder holds no kit.
    """
    kit = open_kit(folder)
    if kit.transport == "grpc":  # it has no settings, and nobody can bring a job
        private.tighten(folder)
        return kit
    local = folder / "local"
    try:
        made = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
        components = [one for one in made["components"] if one["id"] not in _STREAMS]
    except (OSError, ValueError, KeyError, TypeError):
        where = str(local / "resources.json.default")
        raise LichenError(
            "is missing or damaged", where=where, fix="make the kit again, from the answer file"
        ) from None
    state = folder.absolute() / "state"
    for one in components:
        if one["id"] == "job_store":
            one["args"] = {"root_dir": str(state / "jobs"), "uri_root": "/"}
        elif one["id"] == "job_manager":
            one["args"] = {**one["args"], "uri_root": "/jobs"}
    made["components"] = [*components, {"id": "lichen", "path": _COMPONENT[kit.kind], "args": {}}]
    made["class_allow_list"] = []  # no class that a job could name
    if kit.kind == "server":
        private.make_folders(state / "jobs" / "jobs")  # NVFlare looks there, though nothing ever comes
        made["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(state / "snapshots")
    else:
        made["allow_log_streaming"] = False
    _write(local / "resources.json", made)
    rights = {role: {"view": "any", **dict.fromkeys(CLOSED, "none")} for role in ROLES}
    _write(local / "authorization.json", {"format_version": "1.0", "permissions": rights})
    _write(local / "log_config.json", _logging())
    for script in (folder / "startup").glob("*.sh"):  # they would start the kit without what belongs around it
        script.unlink()
    for rest in ("readme.txt", "local/privacy.json.sample", "local/log_config.json.default"):
        (folder / rest).unlink(missing_ok=True)
    shutil.rmtree(folder / "custom", ignore_errors=True)  # code that NVFlare would put on its path
    shutil.rmtree(local / "custom", ignore_errors=True)
    private.tighten(folder)
    return kit


def _write(file: Path, body: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(body, indent=1).encode() + b"\n")


def _logging() -> dict[str, Any]:
    """One file that stays small."""
    keep = {"filename": "log.txt", "mode": "a", "maxBytes": _LOG_BYTES, "backupCount": _LOG_FILES}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(name)s %(levelname)s %(message)s"}},
        "handlers": {
            "file": {"class": "logging.handlers.RotatingFileHandler", "level": "INFO", "formatter": "line", **keep}
        },
        "loggers": {"root": {"level": "INFO", "handlers": ["file"]}},
    }
