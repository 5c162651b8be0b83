"""Learning rates that look alike share nothing."""

from __future__ import annotations

from pathlib import Path

import lichen
from lichen.core.rounds import load_state
from lichen.present.trace import read_trace


def test_rates_that_look_alike_have_checkpoints_of_their_own(tmp_path: Path) -> None:
    settings = ["federation.rounds=1", "optimizer.lr=[0.1,0.1000001]", "compare.baselines=[]"]
    folder = lichen.run(lichen.read_recipe("digits", settings), out=tmp_path / "run").folder
    names = ["lr=0.1", "lr=0.1000001"]
    assert [event.grid for event in read_trace(folder)] == names
    states = [load_state(folder / "state" / "federated" / name / "server.safetensors") for name in names]
    assert any(bool((states[0].shared.trainable[name] != x).any()) for name, x in states[1].shared.trainable.items())
