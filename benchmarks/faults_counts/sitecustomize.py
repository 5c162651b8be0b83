"""Counts a site's trainings for ``benchmarks/faults.py``: a line when one begins, and one when its answer is saved.

Python imports a module of this name at its start, where this folder is on its path. It changes nothing that is
computed: it wraps two methods of the package once that is imported. A line is one write to a file that is opened for
appending, so that a kill leaves whole lines.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from typing import Any

TALKS = "lichen.engines.remote.talks"


def note(**about: object) -> None:
    """Append a line."""
    os.write(FILE, json.dumps({"pid": os.getpid(), **about}).encode() + b"\n")


class _Watched(importlib.abc.Loader):
    """Loads a module as its own loader does, and wraps what is counted."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.inner.exec_module(module)
        wrap(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TALKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Watched(spec.loader)
        return spec


def wrap(module: Any) -> None:
    """Count what a site's clients train, and what is saved of it."""
    talks, saved = module.Talks, module.SavedAnswers
    train, save = talks._train, saved.save

    def counted_train(self: Any, job: Any) -> Any:
        state = str(self.store.folder)
        about = {"client": job.clients[0], "version": job.version, "work": job.work, "state": state}
        note(what="begun", digest=module._digest(job)[:16], **about)
        yield from train(self, job)

    def counted_save(self: Any, version: int, client: int, job: str, data: bytes, own: str) -> None:
        save(self, version, client, job, data, own)
        note(what="saved", digest=job[:16], client=client, version=version, state=str(self.folder.parent))

    talks._train, saved.save = counted_train, counted_save


if "FAULTS_COUNTS" in os.environ:
    FILE = os.open(os.environ["FAULTS_COUNTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.meta_path.insert(0, _Finder())
