"""What is said of a model that has forgotten a client, against plain counting, and its interval against scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import lichen
from lichen.audit.separation import auc, separation
from lichen.core.errors import LichenError
from lichen.core.store import load_tree, save_tree
from lichen.core.wire.shared import Shared
from lichen.present.table import table_text
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe, recipe_of
from lichen.recipes.withdrawal.proof import prove
from lichen.recipes.withdrawal.report import REPORT, proof_table, proof_words, write_report
from lichen.recipes.withdrawal.request import Request

FINAL = Path("state/final.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    short = [
        "federation={rounds: 3, local_steps: 3, batch_size: 8}",
        "compare.baselines=[]",
        "data.partition.clients=4",
        "data.valid=0.3",
        "optimizer.lr=[0.3]",
    ]
    return lichen.run(read_recipe("digits", short), out=tmp_path_factory.mktemp("proof") / "run").folder


def copied(done: Path, out: Path, factor: float) -> Path:
    """A folder whose model is the run's, times a factor."""
    tree, _ = load_tree(done / FINAL)
    save_tree(out / FINAL, {name: factor * x for name, x in tree.items()})
    return out


def test_losses_and_scores_by_hand(done: Path, tmp_path: Path) -> None:
    new, replayed = copied(done, tmp_path / "new", 0.5), copied(done, tmp_path / "replayed", 0.25)
    proof = prove(done, new, 1, against=replayed)
    loaded = open_recipe(recipe_of(done))
    clients = loaded.experiment.clients
    shared = Shared.of_flat(load_tree(new / FINAL)[0])
    losses, right = {}, []
    for name, shard in (("train", clients.train[1]), ("held_out", clients.valid[1])):  # all share one test set
        logits = _logits(loaded, shared, shard)
        losses[name] = cross_entropy(logits, torch.tensor(shard.labels), reduction="none").double().numpy()
    for place in (0, 2, 3):
        shard = clients.test[place]
        right.append(float((_logits(loaded, shared, shard).argmax(1).numpy() == shard.labels).mean()))
    assert proof.new.train == pytest.approx(losses["train"].mean(), abs=1e-6)
    assert proof.new.held_out == pytest.approx(losses["held_out"].mean(), abs=1e-6)
    assert proof.new.gap == proof.new.held_out - proof.new.train
    assert proof.new.auc == pytest.approx(auc(-losses["train"], -losses["held_out"]), abs=1e-3)
    assert proof.new.auc_low < proof.new.auc < proof.new.auc_high
    assert proof.new.others == pytest.approx(np.mean(right), abs=1e-6)
    assert (proof.rows, proof.held_out_rows) == (clients.train[1].size, clients.valid[1].size)
    # Halving twice: 0.5 - 0.25 of the model's norm, where the old one is 1 - 0.25 away.
    assert proof.distance == pytest.approx(1 / 3, abs=1e-6)
    same = prove(done, done, 1, against=done)
    assert same.new == same.old == same.replayed


def _logits(loaded: object, shared: Shared, shard: object) -> torch.Tensor:
    batch = {"x_CBF": torch.tensor(shard.x)[None], "active_C": torch.ones(1, dtype=torch.bool)}
    params = {name: x[None] for name, x in shared.trainable.items()}
    return loaded.experiment.model.logits(params, {}, batch)[0].detach()


def asked(done: Path, how: str, out: Path) -> Request:
    names = [row["client"] for row in lichen.report(done).runs[0].clients()]
    return Request(folder=done, client=names[0], number=0, how=how, out=out)


def test_the_report_says_how_far_it_is_from_the_model_trained_without(done: Path, tmp_path: Path) -> None:
    new, replayed = copied(done, tmp_path / "new", 0.5), copied(done, tmp_path / "replayed", 0.25)
    found = write_report(asked(done, "npo", new), against=replayed, more={"seconds": 3.0})
    assert json.loads((new / REPORT).read_text()) == found
    assert (found["how"], found["approximate"], found["seconds"]) == ("npo", True, 3.0)
    assert found["options"] == {"beta": 0.1, "alpha": 1.0, "gamma": 1.0, "rounds": 4}
    proof = prove(done, new, 0, against=replayed)
    assert found["proof"]["from_replayed"]["train"] == abs(proof.new.train - proof.replayed.train)
    assert found["proof"]["old"]["gap"] == proof.old.gap
    text, words = table_text(proof_table(found)), proof_words(found)
    assert [line.split()[0] for line in text.splitlines() if line.strip()][2:] == ["old", "new", "trained"]
    assert any("not the model of a run without" in line for line in words)
    apart = proof.replayed.train - proof.new.train
    assert any(f"{apart:.4g} below" in line for line in words)
    assert any("0.333 times as far" in line for line in words)


def test_without_another_model_or_numbers_it_says_so(done: Path, tmp_path: Path) -> None:
    broken = copied(done, tmp_path / "broken", float("nan"))
    found = write_report(asked(done, "replay", broken))
    assert (found["approximate"], found["options"], found["proof"]["new"]["auc"]) == (False, {}, None)
    assert len(proof_words(found)) == 1
    assert "-" in table_text(proof_table(found))
    assert any("--against" in line for line in proof_words(write_report(asked(done, "negate", broken))))
    save_tree(tmp_path / "other" / FINAL, {"w": torch.zeros(2)})
    with pytest.raises(LichenError, match="other tensors"):
        write_report(asked(done, "npo", broken), against=tmp_path / "other")
    odd = write_report(asked(done, "subtract", tmp_path / "other"))
    assert odd["proof"] is None
    assert proof_table(odd) is None
    assert "other tensors" in proof_words(odd)[0]


def test_the_area_and_its_interval_are_those_of_scikit_learn_and_scipy() -> None:
    """The area is roc_auc_score's; the interval that of scipy's bootstrap, and near the one of DeLong."""
    from scipy import stats
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    member, other = draw.normal(0.4, 1, 120), draw.normal(0, 1, 90)
    found = separation(member, other, seed=0)
    wanted = roc_auc_score(np.r_[np.ones(120), np.zeros(90)], np.r_[member, other])
    assert found.auc == pytest.approx(wanted, abs=1e-12)
    by_scipy = stats.bootstrap(
        (member, other), auc, vectorized=False, method="percentile", n_resamples=1000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.auc_low == pytest.approx(by_scipy.low, abs=0.01)
    assert found.auc_high == pytest.approx(by_scipy.high, abs=0.01)
    above = (member[:, None] > other[None, :]).astype(float)
    deviation = np.sqrt(above.mean(1).var(ddof=1) / 120 + above.mean(0).var(ddof=1) / 90)
    assert found.auc_low == pytest.approx(wanted - 1.96 * deviation, abs=0.012)
    assert found.auc_high == pytest.approx(wanted + 1.96 * deviation, abs=0.012)
