"""A site's work: it says yes or no to recipes that are submitted, and does the jobs of the one it has accepted.

One recipe at a time. A site that was started again goes on with the run that it was in. In the kit's folder ``runs``
each run has one, by its name: the recipe as it came, the site's place in the roster, and what its clients keep.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

from lichen.core import private
from lichen.core.errors import LichenError, traceback_text
from lichen.core.files.durable import write_atomic
from lichen.core.machine import machine_fault
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.worker import SiteWorker
from lichen.federation.kits.known import KitPapers
from lichen.federation.kits.settle import CURRENT, RUNS, current_run, is_run, open_kit
from lichen.federation.leaving.marker import LEAVING, answer_leaving, marker_of, refuse_left
from lichen.federation.policy.accepted import accept_recipe
from lichen.federation.policy.guard import PolicyGuard
from lichen.federation.policy.keys import POLICY, read_policy
from lichen.federation.standing import STATUS
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.node import talks_in
from lichen.recipes.sites.open_site import Site, open_site
from lichen.recipes.sites.place import SitePlace
from lichen.recipes.sites.remote_sites import OVER, PROPOSE
from lichen.recipes.sites.site_node import ANNOUNCE, JOIN, WAITING, site_answers

__all__ = ["SiteHost"]

RECIPE = "recipe.yaml"
SESSIONS = "sessions.json"

_WAIT = 10.0
"""Seconds that the server waits for rows that are being read, before it is to ask again."""


@final
class HostedRun:
    """A run that a site has said yes to.

    Args:
        name: The run's.
        text: The recipe, as it came.
        kit: The site's kit.
        data: The site's file or folder.
        secret: The key of its owner, or a folder of keys; None: it has none.
        say: Told what happens, a line each.

    Raises:
        LichenError: if the policy does not allow the recipe.
    """

    def __init__(
        self, name: str, text: str, kit: Path, data: Path, secret: Path | None, say: Callable[[str], None]
    ) -> None:
        self.name, self.text, self.folder = name, text, kit / RUNS / name
        self._kit, self._policy, self._data, self._secret, self._say = kit, kit / POLICY, data, secret, say
        self.accepted = accept_recipe(read_policy(self._policy), text)
        private.make_folders(self.folder)
        if _saved_recipe(self.folder) != text:  # a run that is gone on with needs no room on the disk
            write_atomic(self.folder / RECIPE, text.encode())
        refuse = partial(refuse_left, kit)
        self.guard = PolicyGuard(
            self._policy, self.accepted, mine=self._mine, folder=self.folder, say=say, refuse=refuse
        )
        self._place: Future[SitePlace] = Future()
        self.worker = SiteWorker(
            talks_in(self.accepted.recipe, self.folder, lambda: self._place.result().loaded(), guard=self.guard),
            recipe=self.accepted.sha256,
            also={ANNOUNCE: self._announce, JOIN: lambda body: site_answers(self._ready())[JOIN](body)},
            memory=self.folder / SESSIONS,
        )
        threading.Thread(target=self._open, daemon=True).start()
        self.thread = self.worker.start()

    def _open(self) -> None:
        try:
            site = open_site(self.accepted.recipe, self._data, secret=self._secret, say=self._say)
            if self.accepted.recipe.masked is not None:
                site = site.known(KitPapers(open_kit(self._kit), self.name, self.folder, say=self._say))
            self._place.set_result(SitePlace(self._allowed(site), self.folder))
        except Exception as error:
            self._place.set_exception(self._withheld(error))

    def _allowed(self, site: Site) -> Site:
        """A site that announces no label where its policy has ``labels: false``."""
        if read_policy(self._policy).labels:
            return site
        return replace(site, announcement=replace(site.announcement, labels=()))

    def _withheld(self, error: Exception) -> LichenError:
        """What the server reads of rows that cannot be opened: the recipe's key alone; the rest may quote a row."""
        known = error if isinstance(error, LichenError) else machine_fault(error)
        if known is None:
            self._say(traceback_text(error))
        self._say(f"this run cannot begin: {known or type(error).__name__}")
        where = known.where if known is not None and _is_key(known.where) else "data"
        what = "this site cannot open its rows as the recipe has it; what it reads there says why, and stays there"
        return LichenError(what, where=where, fix="speak with its person")

    def _ready(self) -> SitePlace:
        if not self._place.done():
            raise LichenError("has not read its rows yet", where="site", fix="let it announce itself first")
        return self._place.result()

    def _announce(self, body: bytes) -> bytes:
        try:
            place = self._place.result(timeout=_WAIT)
        except TimeoutError:
            return json.dumps(WAITING).encode()
        return site_answers(place)[ANNOUNCE](body)

    def _mine(self) -> tuple[int, ...]:
        place = self._place.result().assigned
        return () if place is None else place.numbers

    def status(self) -> dict[str, Any]:
        """What it is doing, as JSON can hold it."""
        place = self._place.result() if self._place.done() and self._place.exception() is None else None
        members = () if place is None else place.site.announcement.members
        rounds = self.accepted.recipe.federation.rounds
        if not self._place.done():
            doing = "reads its rows"
        elif place is None:
            doing = "cannot open its rows"
        else:
            doing = str(self.worker.doing)
        return {
            "run": self.name,
            "recipe": self.accepted.recipe.name,
            "clients": len(members),
            "rows": sum(sum(member.rows.values()) for member in members),
            "round": max(0, min(self.guard.round + 1, rounds)),
            "rounds": rounds,
            "bytes_up": self.guard.bytes_up,
            "bytes_down": self.guard.bytes_down,
            "doing": doing,
        }

    def close(self) -> None:
        """Do no more than the client that is at work."""
        self.worker.close()


@final
class SiteHost:
    """Answers what a server asks of a site; several threads may ask at once.

    Args:
        kit: The site's kit, with its policy.
        data: The site's file or folder of rows.
        secret: The key of its owner, or a folder of keys, by which they can claim a model; None: it has none.
        say: Told what happens, a line each.
    """

    def __init__(self, kit: Path, data: Path, *, secret: Path | None = None, say: Callable[[str], None]) -> None:
        self.kit, self.data, self.secret, self.say = kit, data, secret, say
        self._lock, self._pieces = threading.Lock(), Pieces(self._answer)
        self._run: HostedRun | None = None
        if marker_of(kit) is None and (name := current_run(kit)) is not None:
            try:
                text = (kit / RUNS / name / RECIPE).read_bytes().decode()
                self._run = HostedRun(name, text, kit, data, secret, say)
                say(f"goes on with run {name}")
            except (OSError, UnicodeError, LichenError) as error:
                say(f"does not go on with run {name}: {error}")

    def answer(self, kind: str, body: bytes) -> bytes:
        """Answer one question.

        Args:
            kind: What the question is.
            body: Its bytes.

        Raises:
            LichenError: if it is refused.
        """
        return self._pieces.answer(kind, body)

    def _answer(self, kind: str, body: bytes) -> bytes:
        if kind == LEAVING:
            return answer_leaving(self.kit, body, self.say)
        if kind == STATUS:
            return json.dumps(self.status()).encode()
        self._refuse_left()
        if kind == PROPOSE:
            return self._propose(_values(body))
        if kind == OVER:
            return self._end(_values(body))
        run = self._run
        if run is None:
            raise LichenError("has said yes to no recipe", where="site", fix="submit one: lichen submit RECIPE")
        return run.worker.answer(kind, body)

    def _refuse_left(self) -> None:
        """Refuse everything once the site has withdrawn, and do no more than the client that is at work."""
        if marker_of(self.kit) is not None:
            self.close()
        refuse_left(self.kit)

    def status(self) -> dict[str, Any]:
        """What the site is doing, as JSON can hold it."""
        run = self._run
        if (marker := marker_of(self.kit)) is not None:
            return {"doing": f"has withdrawn ({marker['time']})"}
        return {"doing": "waits for a recipe"} if run is None else run.status()

    def _propose(self, values: Mapping[str, Any]) -> bytes:
        name, text = str(values.get("run")), str(values.get("recipe"))
        if not is_run(name):
            raise LichenError("is no name of a run", where="run", fix="both ends must run the same version of lichen")
        with self._lock:
            before = self._run
            if before is None or (before.name, before.text) != (name, text):
                try:
                    run = HostedRun(name, text, self.kit, self.data, self.secret, self.say)
                except LichenError as error:
                    self.say(f"says no to a recipe: {error}")
                    raise
                if before is not None:
                    before.close()
                self._run = run
                write_atomic(self.kit / RUNS / CURRENT, json.dumps({"run": name}).encode())
                self.say(
                    f"says yes to {run.accepted.recipe.name or 'a recipe'} (run {name}, {run.accepted.sha256[:12]})"
                )
            assert self._run is not None
            return json.dumps({"accepted": self._run.accepted.sha256}).encode()

    def _end(self, values: Mapping[str, Any]) -> bytes:
        with self._lock:
            if self._run is not None and self._run.name == values.get("run"):
                self._run.close()
                self.say(f"run {self._run.name} is over; what its clients keep is in {self._run.folder}")
                self._run = None
                (self.kit / RUNS / CURRENT).unlink(missing_ok=True)
        return b""

    def close(self) -> None:
        """Do no more than the client that is at work; a later start goes on."""
        run = self._run
        if run is not None:
            run.close()


def _saved_recipe(folder: Path) -> str | None:
    """The recipe that lies in a run's folder."""
    try:
        return (folder / RECIPE).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def _values(body: bytes) -> Mapping[str, Any]:
    try:
        plain: Any = json.loads(body)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, Mapping):
        raise LichenError(
            "a question that is no JSON", where="site", fix="both ends must run the same version of lichen"
        )
    return plain


def _is_key(where: str) -> bool:
    """Whether it is a recipe's key, as all may know, and no path or value."""
    return re.fullmatch(r"[a-z_]+(\.[a-z_]+){0,4}", where) is not None and where.split(".")[0] in Recipe.model_fields
