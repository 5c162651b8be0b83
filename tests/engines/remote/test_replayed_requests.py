"""Bytes of an earlier start of the server, sent again: a site refuses them by name, and the run goes on unhurt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lichen.core.collecting.collect import drain
from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_message
from lichen.core.store import ClientStore
from lichen.engines.federated import FederatedEngine
from lichen.engines.remote.newest import NewestSessions
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.requests import CANCEL, FETCH, HAND, pack_values, unpack_values
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.recipes.assemble.parts import client_tasks
from support.missing import WorkerSites
from support.small_experiment import experiment

MADE = experiment(2)
JOB = Job(work="train lr=0.1", shared=MADE.start, version=0, clients=(0, 1), seed=5)
OLD, NEW = f"{10**18:x}-{'a' * 16}", f"{2 * 10**18:x}-{'0' * 16}"


@contextmanager
def site(folder: Path, instance: str) -> Iterator[SiteWorker]:
    """A site of one kit: a later one of the same folder is the same site, started again."""
    talks = Talks(client_tasks(MADE), ClientStore(folder / "clients"))
    worker = SiteWorker(lambda state: talks, recipe="r1", instance=instance, memory=folder / "sessions.json")
    with WorkerSites({"site": worker}):
        yield worker


def recorded(sites: WorkerSites) -> list[tuple[str, bytes]]:
    """What the site is asked from now on."""
    asked, worker = list[tuple[str, bytes]](), sites.workers["site"]

    def answer(kind: str, body: bytes) -> bytes:
        asked.append((kind, bytes(body)))
        return worker.answer(kind, body)

    sites.answers["site"] = Pieces(answer)
    return asked


@pytest.mark.parametrize("restarted", [False, True])
def test_recorded_requests_of_an_earlier_start_are_refused_and_the_run_goes_on(tmp_path: Path, restarted: bool) -> None:
    folder = tmp_path / "kit"
    folder.mkdir()

    def sites(instance: str) -> WorkerSites:
        talks = Talks(client_tasks(MADE), ClientStore(folder / "clients"))
        worker = SiteWorker(lambda state: talks, recipe="r1", instance=instance, memory=folder / "sessions.json")
        return WorkerSites({"site": worker})

    with sites("first") as there:
        asked = recorded(there)
        with FederatedEngine(there, lambda client: "site", recipe="r1") as first:
            before = [pack_message(message) for message in drain(first, JOB)]
            first.cancel(first.submit(replace(JOB, version=1)))
        old = list(asked)
        with FederatedEngine(there, lambda client: "site", recipe="r1") as second:
            again = [pack_message(message) for message in drain(second, JOB)]
            with sites("second") if restarted else nothing(there) as now:
                worker = now.workers["site"]
                kinds = set()
                for kind, body in old:
                    if kind in (HAND, FETCH, CANCEL):
                        kinds.add(kind)
                        with pytest.raises(LichenError, match=r"earlier start of the server|taken this one's place"):
                            worker.answer(kind, body)
                assert HAND in kinds
                values, _ = unpack_values(next(body for kind, body in old if kind == HAND))
                for kind in (FETCH, CANCEL):
                    about = {**{name: values[name] for name in ("session", "recipe", "state")}, "order": 1}
                    with pytest.raises(LichenError, match=r"earlier start of the server|taken this one's place"):
                        worker.answer(kind, pack_values({**about, "after": 0, "wait": 0}))
            assert [pack_message(message) for message in drain(second, JOB)] == again == before


@contextmanager
def nothing(there: WorkerSites) -> Iterator[WorkerSites]:
    yield there


def test_a_request_of_another_recipe_or_without_a_field_is_refused_by_name(tmp_path: Path) -> None:
    with site(tmp_path, "first") as worker:
        about = {"session": NEW, "recipe": "r1", "state": "", "after": 0, "wait": 0}
        worker.answer(FETCH, pack_values(about))
        with pytest.raises(LichenError, match="the server's recipe is r2, this site's is r1"):
            worker.answer(FETCH, pack_values({**about, "recipe": "r2"}))
        with pytest.raises(LichenError, match="lacks something"):
            worker.answer(FETCH, pack_values({name: x for name, x in about.items() if name != "session"}))
        with pytest.raises(LichenError, match="earlier start"):
            worker.answer(FETCH, pack_values({**about, "session": OLD}))
        worker.answer(FETCH, pack_values({**about, "session": OLD, "state": "another"}))


def test_the_newest_is_remembered_and_a_spoilt_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    NewestSessions(path).admit("s", NEW)
    for _ in range(2):
        newest = NewestSessions(path)
        newest.admit("s", NEW)
        with pytest.raises(LichenError, match="its clock was set back") as refused:
            newest.admit("s", OLD)
        assert refused.value.where == "session"
    NewestSessions().admit("s", OLD)
    path.write_bytes(b"[1")
    NewestSessions(path).admit("s", OLD)
    NewestSessions(path).admit("s", "no time")
