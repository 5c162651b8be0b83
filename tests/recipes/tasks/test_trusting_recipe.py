"""FLTrust in a recipe: the server trains on public rows of its own, and half of the clients may lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError

KEYS = (
    "data.partition={by: iid, clients: 8}",
    "data.public={share: 0.2, labelled: 100, unlabelled: 0}",
    "optimizer.lr=[0.1]",
    "federation.rounds=6",
    "compare.baselines=[]",
)
LIARS = ("attack={kind: sign_flip, liars: 4, scale: 10}",)
TRUST = ("federation.robust={rule: fltrust}",)


def accuracy(out: Path, *keys: str, **more: Any) -> float:
    return float(
        lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more).summary["columns"]["federated"]["mean"]
    )


def final(out: Path) -> bytes:
    return (out / "state" / "final.safetensors").read_bytes()


def test_half_of_the_clients_may_lie_and_other_engines_and_a_stop_give_the_same_bytes(tmp_path: Path) -> None:
    clean = accuracy(tmp_path / "clean", *TRUST)
    trusted = accuracy(tmp_path / "trusted", *TRUST, *LIARS)
    assert accuracy(tmp_path / "mean", *LIARS) < 0.3
    assert trusted > clean - 0.1
    accuracy(tmp_path / "spawned", *TRUST, *LIARS, "engine.name=spawned", "engine.nodes=1")
    assert final(tmp_path / "spawned") == final(tmp_path / "trusted")

    class EndError(Exception):
        pass

    def end(event: Any) -> None:
        if event.report.round == 3:
            raise EndError

    with pytest.raises(EndError):
        accuracy(tmp_path / "stopped", *TRUST, *LIARS, observers=[end])
    accuracy(tmp_path / "stopped", *TRUST, *LIARS, resume=True)
    assert final(tmp_path / "stopped") == final(tmp_path / "trusted")


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        (("data.public=null",), "federation.robust.rule: the server of fltrust trains on public rows"),
        (("data.public.labelled=0", "data.public.unlabelled=100"), "federation.robust.rule: the server of fltrust"),
        (("federation.robust.liars=2",), "federation.robust.liars"),
        (("federation.robust.mixing=true",), "federation.robust.mixing"),
        (("federation.schedule={kind: buffered, arrivals: 4, concurrency: 6}",), "federation"),
        (("engine.name=distributed",), "federation.robust.rule: fltrust trains in one process"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys: tuple[str, ...], where: str) -> None:
    with pytest.raises(LichenError, match=where):
        lichen.read_recipe("digits", (*KEYS, *TRUST, *keys))
