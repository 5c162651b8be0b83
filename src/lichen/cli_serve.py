"""The commands of a federation that runs: serve and submit at the coordinator, status and stop at both ends.

``serve`` also serves a model that lies here.

Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lichen.cli_local import serve_model
from lichen.core.errors import LichenError
from lichen.shell import crash_in, has_recipe, log, print_json, say, show

if TYPE_CHECKING:
    from lichen.engines.sites import Sites
    from lichen.federation.page import Page

__all__ = ["serve_command", "status_command", "stop_command", "submit_command"]

_LOOK = 0.5
"""Seconds between two looks at who is there."""


def serve_command(
    place: Path | None = None,
    /,
    *,
    page: int | None = None,
    resume: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    key_env: str | None = None,
    key_file: Path | None = None,
    model: str | None = None,
    json: bool = False,
) -> None:
    """Run a federation's server at its coordinator, or serve a model on this machine, until it is stopped.

    Parameters
    ----------
    place
        A federation's folder (the only one here if not given), a GGUF file, or the folder of a run, a whole model or an
        adapter.
    page
        Of a federation: a port of 127.0.0.1 for a page that shows how the sites stand, and /metrics for Prometheus.
    resume
        Of a federation: the folder of a run, which goes on with the sites that are there; the server runs on after it.
    host
        Of a model: where it listens; 127.0.0.1 by default, others need a key.
    port
        Of a model: where it listens; a free port by default.
    key_env
        Of a model: the environment's variable with the key that clients send.
    key_file
        Of a model: the file with that key, which nobody else may read.
    model
        Of an adapter: the folder of the model that it was trained on.
    json
        Print who comes and goes, or the model's address, as JSON, a line each, on standard output.
    """
    from lichen.federation.kits.members import ABOUT
    from lichen.federation.policy.keys import POLICY

    for_model = {"--host": host, "--port": port, "--key-env": key_env, "--key-file": key_file, "--model": model}
    given = [name for name, value in for_model.items() if value is not None]
    if place is None or (place / ABOUT).is_file():
        if given:
            raise LichenError("is for a model, and this is a federation", where=given[0], fix="leave it out")
        return _serve_federation(place, page, resume, json)
    for name, value in (("--page", page), ("--resume", resume)):
        if value is not None:
            raise LichenError("is for a federation, and this is none", where=name, fix="leave it out")
    if (place / POLICY).is_file():
        raise LichenError("is a site's kit", where=str(place), fix=f"start it with: lichen join {place} --data FILE")
    if not place.exists():
        fix = "name the folder that `lichen federation new` made, or a model: a GGUF file, or the folder of a run"
        raise LichenError("holds no federation, and no model", where=str(place), fix=fix)
    with crash_in(place):
        host, port = host or "127.0.0.1", port or 0
        serve_model(place, host=host, port=port, key_env=key_env, key_file=key_file, base=model, json=json)


def _serve_federation(folder: Path | None, page: int | None, resume: Path | None, json: bool) -> None:
    from contextlib import ExitStack

    from lichen.federation.kits.members import SERVER, find_federation, read_federation
    from lichen.federation.leaving.asking import Looks, RegisteredSites
    from lichen.federation.leaving.register import Register
    from lichen.federation.supervision.resumed_run import ResumedRun
    from lichen.federation.transports.choose import open_server

    federation = read_federation(find_federation(folder))
    if resume is not None and not has_recipe(resume):
        fix = f"leave it out, and start one: lichen submit RECIPE --federation {federation.folder}"
        raise LichenError("has no recipe.yaml, so no run to go on with", where=f"--resume {resume}", fix=fix)
    with ExitStack() as stack:
        sites = stack.enter_context(open_server(federation.folder / SERVER, say=log))
        log(f"the server of {federation.name} is up; stop it with Ctrl-C, or: lichen stop {federation.folder}")
        if page is not None:
            shown = _page(federation.folder, federation.name, page, sites)
            stack.callback(shown.close)
            log(f"how the sites stand: http://127.0.0.1:{shown.port}/ (and /status.json, /metrics)")
        looks = Looks(RegisteredSites(sites, Register(federation.folder), say=log))
        stack.callback(looks.close)
        run = None
        if resume is not None:
            words = [
                "submit",
                f"--resume={resume}",
                f"--federation={federation.folder}",
                *(["--quiet"] if json else []),
            ]
            command = [sys.executable, "-m", "lichen", *words]
            run = ResumedRun(command, say=lambda line: _event(str(resume), line, json, of="run"), quiet=json)
            stack.callback(run.close)
        there: dict[str, str] = {}
        while not sites.wait(_LOOK):
            now = {site: seen.instance for site, seen in sites.seen().items()}
            for site in sorted(now.keys() | there.keys()):
                if now.get(site) != there.get(site):
                    _event(site, "is there" if site in now else "has gone", json)
            there = now
            looks.look(now)
            if run is not None:
                run.look()
    log("the server was stopped")


def _page(folder: Path, name: str, port: int, sites: Sites) -> Page:
    if importlib.util.find_spec("prometheus_client") is None:
        fix = "pip install prometheus-client"
        raise LichenError("a page needs a package that is not installed", where="--page", fix=fix)

    from lichen.federation.page import Page
    from lichen.federation.standing import standing

    return Page(port, title=f"federation {name}", rows=lambda: standing(folder, sites))


def _event(name: str, what: str, json: bool, *, of: str = "site") -> None:
    if json:
        print_json({"time": time.time(), of: name, "what": what}, line=True)
    else:
        log(f"{name} {what}" if of == "site" else f"{name}: {what}")


def submit_command(
    recipe: str | None = None,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    federation: Path | None = None,
    sites: str = "",
    out: Path | None = None,
    resume: Path | None = None,
    wait: float = 60.0,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Run a recipe over the sites of a federation, at its coordinator, where it is served.

    Parameters
    ----------
    recipe
        A YAML file, or a recipe of `lichen list`; each site reads its own rows in place of data.name.
    set_
        Another value for a key of the recipe, as key=value; may be given several times.
    federation
        The federation's folder; the only one here if not given.
    sites
        Names of the sites that take part, with commas between; all that are admitted if not given, and with --resume
        those of the run.
    out
        The run's folder; runs/NAME-N if not given.
    resume
        Go on with the run in this folder, by its own recipe.
    wait
        Seconds to wait for sites that are not there yet; with --resume, it then goes on without them until they come.
    quiet
        Show no progress.
    json
        Print the summary as JSON, and nothing else, on standard output.
    """
    from lichen.cli_run import run_recipe
    from lichen.federation.kits.members import find_federation
    from lichen.federation.submitting import sites_for_run
    from lichen.recipes.sites.remote_sites import sites_of_run

    folder = find_federation(federation)
    begun = sites_of_run(resume) if resume is not None else ()
    names = [site.strip() for site in sites.split(",") if site.strip()] or begun
    run_recipe(
        recipe,
        set_,
        out=out,
        resume=resume,
        quiet=quiet,
        json=json,
        command=f"lichen submit --federation {folder}",
        sites=lambda left_out: sites_for_run(folder, names, wait=wait, say=log, left_out=left_out, begun=begun),
    )


def status_command(place: Path | None = None, /, *, json: bool = False) -> None:
    """Show how a federation stands: at its coordinator all sites, at a site that one.

    Parameters
    ----------
    place
        The federation's folder, or a site's kit; the only federation here if not given.
    json
        Print it as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.members import ABOUT, find_federation
    from lichen.federation.shown import standing_table
    from lichen.federation.standing import site_standing, standing
    from lichen.federation.submitting import served

    if place is None or (place / ABOUT).is_file():
        folder = find_federation(place)
        rows = standing(folder, served(folder))
    else:
        rows = [site_standing(place)]
    if json:
        print_json(rows)
    else:
        show(standing_table(rows))


def stop_command(place: Path | None = None, /, *, json: bool = False) -> None:
    """End the server or the site that runs on this machine; a site says goodbye.

    Parameters
    ----------
    place
        The federation's folder, or a site's kit; the only federation here if not given.
    json
        Print what was ended as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.members import find_federation
    from lichen.federation.standing import call_off

    ended = call_off(place if place is not None else find_federation(None))
    if json:
        print_json({"stopped": ended})
    else:
        say(f"stopped {ended}")
