"""The commands of the page of federations, as people type them at hosts; a name or a file is replaced in one place."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from support.hosts import Host

__all__ = ["NAMES", "Guide", "page_commands", "page_recipe"]

PAGE = Path(__file__).parents[2] / "docs" / "federation.md"

NAMES = {
    "hospital-a": "site",
    "hospital-a.csv": "data",
    "SHA256:49:39:...": "fingerprint",
    "notes.yaml": "recipe",
    "smollm2-135m": "model",
    "policy.yaml": "policy",
    "submitted.yaml": "submitted",
    "KIT": "kit",
}
"""All that is typed otherwise than it stands on the page, each by what is said of it to :meth:`Guide.words`."""


def page_recipe() -> str:
    """The recipe on the page."""
    (found,) = re.findall(r"```yaml\n(name: .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def page_commands() -> list[str]:
    """Every whole command of ``lichen`` on the page, in its order."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = [line for block in re.findall(r"```(?:ba)?sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines = [*blocks, *re.findall(r"`(lichen [^`]*)`", text)]
    found = [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in lines]
    return [line for line in dict.fromkeys(found) if line.startswith("lichen ")]


class Guide:
    """Types commands of the page.

    Attributes:
        typed: The page's words of each command that was typed.
    """

    def __init__(self) -> None:
        self.typed: set[str] = set()

    def words(self, start: str, **names: str | Path) -> list[str]:
        """The command of the page that starts with these words, with :data:`NAMES` replaced.

        Args:
            start: Its first words, or all; of several that begin so, the first one.
            names: What stands in place of the page's names.
        """
        known = page_commands()
        line = start if start in known else next(line for line in known if line.startswith(f"{start} "))
        self.typed.add(line)
        for name in sorted(NAMES, key=len, reverse=True):
            if NAMES[name] in names:
                line = re.sub(rf"(?<![\w./]){re.escape(name)}(?![\w])", str(names[NAMES[name]]), line)
        return shlex.split(line)

    def type(self, host: Host, start: str, *more: str, **names: str | Path) -> Any:
        """Type a command at a host, with ``--json``, and give what it says.

        Args:
            host: Where.
            start: The page's first words.
            more: Words after the page's.
            names: As of :meth:`words`.
        """
        done = host.run([*self.words(start, **names), *more, "--json"])
        assert done.returncode == 0, (start, done.stderr[-3000:])
        return json.loads(done.stdout)
