"""A federation of three hospitals over hosts, as the page has it: admitted, served, joined, and one run over it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from lichen.audit.fingerprint import ANSWERS
from lichen.core.seeds import numpy_generator
from support.guide import Guide, page_recipe
from support.hosts import NAME, PORT, Host, Hosts, hosts
from support.tiny_llama import save_model
from support.tiny_llama import say as sentence

__all__ = ["KEY", "OWNER", "SITES", "Trial", "listing", "rows_of", "save_rows", "trial"]

SITES = ("hospital-a", "hospital-b", "hospital-c")
OWNER, KEY = "hospital-a", bytes(range(100, 132))
"""The site whose owner has a secret key, and the key."""


def rows_of(site: int) -> list[tuple[str, str]]:
    """What was asked and answered at one site; the first row is the same everywhere."""
    rng = numpy_generator(site, "hospital")
    own = [(sentence(rng, 6), sentence(rng, 6 + site + row % 2)) for row in range(14 + 3 * site)]
    return [("w1 w2 w3 w4 w5 w6", "w6 w5 w4 w3 w2 w1 w0"), *own]


def save_rows(file: Path, site: int) -> Path:
    """The rows of a site, in a table."""
    lines = [f"{ask},{answer}\n" for ask, answer in [("question", "answer"), *rows_of(site)]]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def listing(model: Path, data: Path, **fingerprint: str) -> dict[str, Any]:
    """The page's recipe, for a tiny model in a folder, its owners' secret pairs among the rows.

    Blocks do not depend on who is in one process.
    """
    made = yaml.safe_load(page_recipe())
    made["model"]["name"], made["data"]["name"] = str(model), str(data)
    return {**made, "engine": {"packing": False, "clients_per_block": 1}, "fingerprint": {"steps": 1, **fingerprint}}


@dataclass
class Trial:
    """What runs, and what was seen of it.

    Attributes:
        hosts: The machines.
        guide: Types the page's commands.
        recipe: The recipe that was submitted.
        run: The run's folder at the coordinator.
        begun: When ``lichen serve`` was typed, in seconds of the epoch.
        listed: Command lines that a look at all processes showed, during the run.
        processes: What runs on: the server, and each site.
        summary: What ``submit`` printed.
    """

    hosts: Hosts
    guide: Guide
    recipe: Path
    run: Path
    begun: float = 0.0
    listed: set[bytes] = field(default_factory=set)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def host(self, name: str) -> Host:
        """One of the machines."""
        return {self.hosts.lab.name: self.hosts.lab, **self.hosts.sites}[name]

    def kit(self, site: str) -> Path:
        """A site's kit."""
        return self.hosts.sites[site].home / f"trial-{site}" / "kit"

    def data(self, site: str) -> Path:
        """A site's file."""
        return self.hosts.sites[site].home / f"{site}.csv"

    @property
    def secret(self) -> Path:
        """The owner's secret key."""
        return self.hosts.sites[OWNER].home / "owner.key"

    def log(self, name: str) -> str:
        """What a person reads at the screen where ``serve`` or ``join`` runs."""
        return (self.host(name).home / "screen.txt").read_text(encoding="utf-8")

    def begin(self, name: str, words: list[str]) -> None:
        """Start what runs on, at its host."""
        with open(self.host(name).home / "screen.txt", "w", encoding="utf-8") as screen:
            self.processes[name] = self.host(name).start(words, stdout=screen, stderr=screen, stdin=subprocess.DEVNULL)

    def wait(self, name: str, words: str, seconds: float = 90) -> None:
        """Wait until its screen has a line with these words."""
        end = time.monotonic() + seconds
        while re.search(words, self.log(name)) is None:
            assert self.processes[name].poll() is None, self.log(name)[-3000:]
            assert time.monotonic() < end, (words, self.log(name)[-3000:])
            time.sleep(0.05)


@contextmanager
def trial() -> Iterator[Trial]:
    """Bring a federation up by the page's commands, and run a recipe over it."""
    with hosts(SITES) as machines:
        lab, guide = machines.lab, Guide()
        model = save_model(machines.shared / "model", more=ANSWERS)
        for file in model.iterdir():
            file.chmod(0o644)
        made = Trial(machines, guide, lab.home / "recipe.yaml", lab.home / "run")
        made.recipe.write_text(json.dumps(listing(model, Path("/nowhere"))))
        for number, name in enumerate(SITES):
            machines.sites[name].own(save_rows(made.data(name), number))
        made.secret.write_bytes(KEY)
        machines.sites[OWNER].own(made.secret)
        lab.own(made.recipe)
        shutil.copytree(
            matplotlib.get_cachedir(), lab.home / ".cache" / "matplotlib"
        )  # fonts that were looked for once
        lab.own(lab.home / ".cache")
        try:
            _admit_all(made)
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda site: _policy(made, site, model), SITES))
            made.begun = time.time()
            made.begin(lab.name, guide.words("lichen serve trial --page 8080"))
            for site in SITES:
                words = guide.words("lichen join trial-hospital-a/kit", site=site, data=made.data(site).name)
                made.begin(site, [*words, *(("--secret", made.secret.name) if site == OWNER else ())])
            made.wait(lab.name, "the server of trial is up")
            _submit(made)
            yield made
        finally:
            for process in made.processes.values():
                process.kill()
                process.wait()


def _admit_all(made: Trial) -> None:
    """Each site asks and is admitted; a person carries the files."""
    lab, guide = made.hosts.lab, made.guide
    federation = guide.type(lab, "lichen federation new")
    assert (NAME, str(PORT)) == tuple(guide.words("lichen federation new")[i] for i in (-3, -1))

    def ask(site: str) -> None:
        asked = guide.type(made.host(site), "lichen federation ask", site=site)
        _carry(made.host(site), asked["request"], lab)

    def accept(site: str, answer: str) -> None:
        _carry(lab, answer, made.host(site))
        guide.type(made.host(site), "lichen federation accept", site=site, fingerprint=federation["fingerprint"])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, SITES))
        answers = [guide.type(lab, "lichen federation admit", site=site)["answer"] for site in SITES]
        list(pool.map(accept, SITES, answers))


def _carry(one: Host, file: str, other: Host) -> None:
    copy = other.home / Path(file).name
    shutil.copy(one.home / file, copy)
    other.own(copy)


def _policy(made: Trial, site: str, model: Path) -> None:
    """Allow the model, and one kind of adapter."""
    words = made.guide.words("lichen federation policy trial-hospital-a/kit/policy.yaml", site=site, model=model)
    done = made.host(site).run([*words, "-s", "adapters=[lora]"])
    assert done.returncode == 0, done.stderr


def _submit(made: Trial) -> None:
    """Run the recipe over all; meanwhile somebody looks at what runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.3):
            for host in (made.hosts.lab, *made.hosts.sites.values()):
                for process in host.processes():
                    for what in ("cmdline", "environ"):
                        try:
                            made.listed.add(Path("/proc", str(process), what).read_bytes())
                        except OSError:
                            continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        words = made.guide.words("lichen submit notes.yaml", recipe=made.recipe)
        done = made.hosts.lab.run([*words, "--out", str(made.run), "--json"], seconds=240)
    finally:
        over.set()
        watcher.join()
    assert done.returncode == 0, (done.stderr[-3000:], *(made.log(site)[-1000:] for site in SITES))
    made.summary = json.loads(done.stdout)
