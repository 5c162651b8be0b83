"""The command ``federation``: an authority and its kits at the coordinator, a key and a kit at each site.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import App, Parameter

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say

if TYPE_CHECKING:
    from lichen.federation.kits.settle import Transport

__all__ = ["federation_app"]

federation_app = App(
    name="federation",
    help="Make and admit the members of a federation of organisations.",
    help_format="plaintext",
    default_parameter=Parameter(negative=""),
)


@federation_app.command(name="new")
def _new(
    name: str,
    /,
    *,
    host: str,
    port: int,
    sites: str = "",
    transport: str = "nvflare",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Make a federation at its coordinator: the authority that signs names, and the server's kit.

    Parameters
    ----------
    name
        The federation's name.
    host
        The server's name or IPv4 address, as the sites reach it.
    port
        The server's port, the only one that must be open.
    sites
        Names of sites, with commas between, whose keys are made here and handed over; others ask and are admitted.
    transport
        What carries bytes between server and sites: nvflare, or grpc, which needs fewer packages.
    out
        The folder; NAME if not given.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.make import new
    from lichen.federation.kits.members import KITS, SERVER
    from lichen.federation.kits.papers import check_transport

    names = [site.strip() for site in sites.split(",") if site.strip()]
    check_transport(transport)
    made = new(out or Path(name), name=name, host=host, port=port, sites=names, transport=cast("Transport", transport))
    kits = {site: str(made.folder / KITS / site) for site in names}
    result = {"folder": str(made.folder), "server": str(made.folder / SERVER), "sites": kits}
    lines = [f"made {made.folder}; keep {made.folder / 'authority'} where nobody else gets it"]
    lines += [f"kit of {site}: {kit} (hand it over in a way that nobody reads)" for site, kit in kits.items()]
    lines += [f"fingerprint of the authority, to tell each site by telephone:\n{made.fingerprint}"]
    _show(json, {**result, "fingerprint": made.fingerprint}, lines)


@federation_app.command(name="ask")
def _ask(*, name: str, for_: str, transport: str = "nvflare", out: Path | None = None, json: bool = False) -> None:
    """Ask to be admitted, at a site: make its key, which never leaves it, and a request to send.

    Parameters
    ----------
    name
        The site's name, such as hospital-a.
    for_
        The name of the federation.
    transport
        What its kits are for, as the coordinator says: nvflare or grpc.
    out
        The folder; FEDERATION-NAME if not given.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.make import ask
    from lichen.federation.kits.papers import check_transport

    check_transport(transport)
    folder = out or Path(f"{for_}-{name}")
    request, total = ask(folder, name=name, federation=for_, transport=cast("Transport", transport))
    lines = [f"send this to the coordinator: {request}", f"its sum, to compare by telephone:\n{total}"]
    _show(json, {"folder": str(folder), "request": str(request), "sum": total}, lines)


@federation_app.command(name="admit")
def _admit(request: Path, /, *, federation: Path | None = None, json: bool = False) -> None:
    """Admit a site, at the coordinator: sign its request.

    Parameters
    ----------
    request
        The file that the site sent.
    federation
        The federation's folder; the only one here if not given.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.members import admit, find_federation

    done = admit(request, find_federation(federation))
    lines = [
        f"admitted {done.site}; send this back: {done.answer}",
        f"but first compare the sum of the request with the one that the site reads out:\n{done.request}",
        f"fingerprint of the authority, to tell the site by telephone:\n{done.fingerprint}",
    ]
    answer = {"site": done.site, "answer": str(done.answer), "sum": done.request, "fingerprint": done.fingerprint}
    _show(json, answer, lines)


@federation_app.command(name="accept")
def _accept(answer: Path, /, *, fingerprint: str, folder: Path | None = None, json: bool = False) -> None:
    """Accept the coordinator's answer, at a site: make its kit.

    Parameters
    ----------
    answer
        The file that the coordinator sent.
    fingerprint
        The authority's fingerprint, as the coordinator told it by another way than the file.
    folder
        The folder that `ask` made; the one here that has the answer's key if not given.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.make import accept

    kit = accept(answer, folder, fingerprint=fingerprint)
    _show(json, {"kit": str(kit)}, [f"the kit is {kit}"])


@federation_app.command(name="bar")
def _bar(site: str, /, *, federation: Path | None = None, lift: bool = False, json: bool = False) -> None:
    """Bar a site, at the coordinator: it is closed out within seconds, and after every start of the server.

    Parameters
    ----------
    site
        The site's name.
    federation
        The federation's folder; the only one here if not given.
    lift
        Let the site in again instead.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.members import bar, find_federation

    names = bar(site, find_federation(federation), lift=lift)
    _show(json, {"barred": names}, [f"{site} may come back" if lift else f"{site} is barred"])


@federation_app.command(name="policy")
def _policy(
    file: Path,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    recipe: Path | None = None,
    json: bool = False,
) -> None:
    """Write a site's policy where there is none, or check it, and tell what it answers to a recipe.

    Parameters
    ----------
    file
        The policy: policy.yaml in the site's kit.
    set_
        Another value for a key of the policy, as key=value, which is written; may be given several times.
    recipe
        A recipe's file, as it was submitted; it is only read.
    json
        Print the result as JSON, and nothing else, on standard output.
    """
    from lichen.core.files.durable import write_atomic
    from lichen.federation.policy.accepted import accept_recipe
    from lichen.federation.policy.keys import change_policy, policy_text, read_policy
    from lichen.recipes.schema.strict import text_of

    if set_:
        change_policy(file, set_)
    if not file.exists() and recipe is None:
        write_atomic(file, policy_text().encode())
        _show(json, {"policy": str(file)}, [f"wrote {file}, which allows no model yet"])
        return
    policy = read_policy(file)
    if recipe is None:
        models = ", ".join(policy.models) or "none"
        _show(json, {"policy": str(file), **policy.model_dump(mode="json")}, [f"{file} is good; models: {models}"])
        return
    accepted = accept_recipe(policy, text_of(recipe, kind="recipe"))
    _show(json, {"policy": str(file), "accepted": accepted.sha256}, [f"{file} says yes to {recipe}"])


@federation_app.command(name="connect")
def _connect(kit: Path, /, *, seconds: float = 60.0, json: bool = False) -> None:
    """Connect a kit and say who is there, at the server and at each site, before anything is trained.

    Parameters
    ----------
    kit
        The folder of the server's kit or a site's.
    seconds
        How long to stay.
    json
        At the server: print the sites and their answer times as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.settle import open_kit

    if seconds <= 0:
        raise LichenError("must be more than 0", where="--seconds", fix="give the seconds to stay")
    if open_kit(kit).kind == "site":
        if json:
            raise LichenError("lists sites, which the server knows", where="--json", fix="leave out --json")
        _connect_site(kit, seconds)
    else:
        _connect_server(kit, seconds, json)


def _connect_site(kit: Path, seconds: float) -> None:
    from lichen.federation.transports.choose import open_site

    def answer(kind: str, body: bytes) -> bytes:
        if kind != "echo":
            raise LichenError("is only trying its connection", where="site", fix="start the site for a run")
        return body

    with open_site(kit, answer, say=log) as site:
        end = time.monotonic() + seconds
        while not site.wait(0.2) and not site.joined.is_set() and time.monotonic() < end:
            pass
        if not site.joined.is_set():
            what = f"did not get in within {seconds:.0f} seconds"
            raise LichenError(what, where=f"site {site.name}", fix="read above what keeps it")
        say(f"{site.name} is connected")
        site.wait(max(0.0, end - time.monotonic()))


def _connect_server(kit: Path, seconds: float, json: bool) -> None:
    from lichen.engines.sites import SiteError
    from lichen.federation.transports.choose import open_server

    there: dict[str, float | None] = {}
    with open_server(kit, say=log) as sites:
        log("the server is up")
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for site in sites.seen():
                begun = time.monotonic()
                try:
                    sites.ask(site, "echo", b"there?", within=min(left, 5.0))
                    now: float | None = time.monotonic() - begun
                except SiteError as error:
                    now = None
                    log(str(error.error))
                if now is not None and there.get(site) is None:
                    log(f"{site} is there, and answers in {1000 * now:.0f} ms")
                there[site] = now
            time.sleep(min(1.0, left))
    if json:
        print_json({"seconds": there})
    for site, one in sorted(there.items()) if not json else ():
        say(f"{site}: {'does not answer' if one is None else f'{1000 * one:.0f} ms'}")
    if not there:
        raise LichenError(
            "no site came", where=str(kit), fix="look at what its person reads: lichen federation connect"
        )


def _show(json: bool, result: dict[str, Any], lines: list[str]) -> None:
    if json:
        print_json(result)
    else:
        for line in lines:
            say(line)
