"""What a server says to a site that it does not let in or cuts off, and what the site's person reads.

It is said by gRPC's status, with a code of ours in front of its details. Nothing here needs torch or gRPC.
"""

from __future__ import annotations

from lichen.core.errors import LichenError
from lichen.core.visible import visible
from lichen.federation.kits.settle import Kit

__all__ = ["METHOD", "SERVICE", "fault_of", "reason"]

SERVICE, METHOD = "lichen.Federation", "Join"

_REASONS = {
    "barred": ("the coordinator has barred this site", "speak with the coordinator"),
    "replaced": (
        "another process has connected with this kit while this one was silent",
        "end one of the two; each process needs a kit of its own",
    ),
    "other": (
        "another process is connected with this kit, perhaps on another machine",
        "end that one first; each process needs a kit of its own",
    ),
    "federation": ("the server is of another federation", "speak with the coordinator"),
    "name": ("the server does not accept this site's name", "make the kit again, from the answer file"),
    "cut": ("the server has cut this site off", "use the same version at both ends"),
}

_UNIMPLEMENTED = "UNIMPLEMENTED"
_LETTERS = 200


def reason(code: str, more: str = "") -> str:
    """The details of a status that ends a stream for good.

    Args:
        code: One of those that this module knows.
        more: What else a person should read.
    """
    return f"lichen:{code}:{more}"


def fault_of(kit: Kit, status: str, details: str) -> LichenError | None:
    """Why a site cannot be of the federation; None where the stream ended and another may begin.

    Args:
        kit: The site's.
        status: The name of gRPC's status code.
        details: Its details.
    """
    where = f"site {kit.name}"
    if status == _UNIMPLEMENTED:
        what = "the server there speaks another transport than this kit, which is for grpc"
        return LichenError(what, where=f"{kit.host}:{kit.port}", fix="ask the coordinator for a kit of its federation")
    mark, _, rest = details.partition(":")
    code, _, more = rest.partition(":")
    if mark != "lichen" or code not in _REASONS:
        return None
    what, fix = _REASONS[code]
    return LichenError(f"{what}: {visible(more[:_LETTERS])}" if more else what, where=where, fix=fix)
