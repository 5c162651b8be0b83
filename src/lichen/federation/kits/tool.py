"""Runs NVFlare's own commands for certificates and kits, several in one process.

Commands leave records under the home folder, so that they are given one within the federation's folder. Nothing here
needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core import private
from lichen.core.children import bound_command, bound_environment
from lichen.core.errors import LichenError

__all__ = ["Words", "needs_grpc", "needs_nvflare", "run_tool"]

Words = list[str | Path]
"""One command, without its first word, which is ``nvflare``."""

_LOOP = """
import json, os, sys
os.umask(0o077)
from nvflare.cli import main
for words in json.load(sys.stdin):
    sys.argv = ["nvflare", "--format", "json", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)
    sys.stdout.flush()
"""

_LETTERS = 400
"""Letters of what a command said that are shown where it said nothing orderly."""


def needs_nvflare() -> None:
    """Nothing, where NVFlare is installed.

    Raises:
        LichenError: if it is not.
    """
    if importlib.util.find_spec("nvflare") is None:
        fix = 'pip install "lichen[federation]"'
        raise LichenError("a federation needs packages that are not installed", where="nvflare", fix=fix)


def needs_grpc() -> None:
    """Nothing, where gRPC is installed.

    Raises:
        LichenError: if it is not.
    """
    if importlib.util.find_spec("grpc") is None:
        fix = 'pip install "lichen[grpc]"'
        raise LichenError("a federation over gRPC needs packages that are not installed", where="grpcio", fix=fix)


def run_tool(commands: Sequence[Words], *, records: Path) -> list[dict[str, Any]]:
    """Run commands of ``nvflare``, one after the other, until one fails.

    Args:
        commands: What to run.
        records: The home folder that they see, where they leave records.

    Returns:
        What each answered, as NVFlare's JSON has it under ``data``.

    Raises:
        LichenError: with the words of the one that failed.
    """
    needs_nvflare()
    private.make_folders(records)
    environment = bound_environment() | {"HOME": str(records.absolute())}
    command = bound_command([sys.executable, "-c", _LOOP])
    words = json.dumps([[str(word) for word in one] for one in commands])
    done = subprocess.run(command, input=words, env=environment, capture_output=True, text=True, check=False)
    answers = [answer for line in done.stdout.splitlines() if (answer := _envelope(line)) is not None]
    if done.returncode == 0 and len(answers) == len(commands) and all(one["status"] == "ok" for one in answers):
        return [dict(one.get("data") or {}) for one in answers]
    failed = commands[min(max(len(answers) - 1, 0), len(commands) - 1)]
    where = " ".join(["nvflare", *map(str, failed[:2])])
    wrong = next((one for one in answers if one["status"] != "ok"), None)
    if wrong is None:
        raise LichenError(
            f"ended and said: {(done.stderr or done.stdout)[-_LETTERS:].strip() or 'nothing'}", where=where
        )
    raise LichenError(str(wrong.get("message", "failed")).rstrip("."), where=where, fix=str(wrong.get("hint") or ""))


def _envelope(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "status" in value else None
