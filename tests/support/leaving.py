"""A federation of three sites with real kits whose hosts live in this process, and its coordinator's register."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lichen
from lichen.core.errors import LichenError
from lichen.engines.remote.errands import Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import Seen, SiteError
from lichen.federation.host import SiteHost
from lichen.federation.kits.members import read_federation, signer_of
from lichen.federation.leaving.asking import RegisteredSites
from lichen.federation.leaving.marker import LEAVING, mark
from lichen.federation.leaving.register import Register
from lichen.federation.policy.keys import change_policy
from lichen.recipes.sites.remote_sites import RemoteSites
from support.sites import save_sites, sites_recipe

NAMES = ("north", "east", "south")
"""The sites, in the order of their files."""


class Members:
    """Three sites in this process; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, federation: Path, home: Path, *, named: bool = False) -> None:
        self.home, self.folder, self.named = home, home / "trial", named
        shutil.copytree(
            federation, self.folder, ignore=shutil.ignore_patterns("runs", "run", "supervisor", "withdrawn")
        )
        self.files = dict(zip(NAMES, save_sites(home / "sites", "pair", named=named), strict=True))
        sites_recipe(home, "pair", named=named)
        self.lines: dict[str, list[str]] = {name: [] for name in (*NAMES, "coordinator")}
        self.hosts: dict[str, SiteHost] = {}
        self.questions: list[tuple[str, str]] = []
        self.down = set[str]()
        self.before: Callable[[str, str, bytes], None] = lambda site, kind, body: None
        for name in NAMES:
            change_policy(self.kit(name) / "policy.yaml", [f"models={home / 'model'}"])
            self.restart(name)
        self.open_register()

    def open_register(self) -> None:
        """Start the coordinator, as if its process were a new one."""
        self.register = Register(self.folder)
        self.sites = RegisteredSites(self, self.register, say=self.lines["coordinator"].append)

    def kit(self, name: str) -> Path:
        return self.folder / "kits" / name

    def leave(self, name: str) -> None:
        """Withdraw a site, whose process runs on; the coordinator is not notified."""
        mark(self.kit(name))

    def restart(self, name: str) -> None:
        """Start a site, as if its process were a new one."""
        if name in self.hosts:
            self.hosts[name].close()
        self.hosts[name] = SiteHost(self.kit(name), self.files[name], say=self.lines[name].append)

    def start(self) -> None:
        """Nothing: they are there."""

    def seen(self) -> dict[str, Seen]:
        now = time.time()
        there = {name: host for name, host in self.hosts.items() if name not in self.down}
        return {name: Seen(since=now, last=now, instance=str(id(host))) for name, host in there.items()}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        self.questions.append((site, kind))
        self.before(site, kind, body)
        if site in self.down:
            raise SiteError(site, "gone", LichenError("is not connected", where=f"site {site}"))
        try:
            return self.hosts[site].answer(kind, body)
        except LichenError as error:
            raise SiteError(site, "refused", error) from None

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()

    def recipe(self, **federation: Any) -> dict[str, Any]:
        """Three rounds that each need two clients, over rows that only the sites know where to find."""
        fed = {"schedule": {"least": 2}, **federation}
        whole = sites_recipe(
            self.home, "pair", named=self.named, federation=fed, engine={"packing": False, "clients_per_block": 1}
        )
        whole["data"]["name"] = "/nowhere"
        return whole

    def submit(self, recipe: dict[str, Any], out: str = "run", **how: Any) -> lichen.Result:
        """Run a recipe over those who have not withdrawn; nobody is waited for longer than two minutes."""
        gone = self.register.withdrawn()
        sites = RemoteSites(
            self.sites,
            [name for name in NAMES if name not in gone],
            patience=Patience(gone=120.0, quiet=120.0, within=10.0),
            signer=signer_of(read_federation(self.folder)),
            left=self.register.refusals,
            look=self.sites.look_at,
            enrolled=self.register.enter_run,
        )
        return lichen.run(recipe, out=self.home / out, sites=sites, **how)

    def question(self, site: str, **values: Any) -> dict[str, Any]:
        """The answer to the coordinator's question whether a site has withdrawn."""
        body = {"nonce": "0" * 32, "entered": "", "withdrawn": [], **values}
        answer: dict[str, Any] = json.loads(ask_long(self, site, LEAVING, json.dumps(body).encode(), 5.0))
        return answer


def learned(run: Path) -> dict[str, bytes]:
    """All that was learned, and who took part."""
    patterns = ("state/*/*/server.safetensors", "adapter/*.safetensors", "state/final.safetensors", "roster.json")
    return {str(file.relative_to(run)): file.read_bytes() for one in patterns for file in run.glob(one)}
