"""The kinds of files: every one has a path that fits it, and a client's number is read from paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lichen.core.collecting.history import History
from lichen.core.files.journal import client_folder
from lichen.recipes.artifacts.withdrawn.kinds import KINDS, client_of, inside, kind_of

PATHS = {
    "recipe.yaml": "written",
    "roster.json": "written",
    "cards.json": "names",
    "fingerprints.json": "names",
    "classes.json": "same",
    "trace.jsonl": "written",
    "summary.json": "written",
    "clients.csv": "written",
    "contributions.json": "written",
    "payout.csv": "written",
    "influence.csv": "gone",
    "clients.png": "written",
    "curves.png": "written",
    "periods.png": "same",
    "record.jsonl": "signed",
    "manifest.json": "signed",
    "state/sites/001/own/ada/adapter_model.safetensors": "gone",
    "deletions.jsonl": "signed",
    "withdrawal.json": "names",
    "rebase.json": "same",
    "answers.jsonl": "same",
    "pool.jsonl": "same",
    "periods.json": "same",
    "stages.md": "same",
    "adapter/README.md": "signed",
    "adapter/adapter_model.safetensors": "same",
    "model/image-mlp-64/0003.safetensors": "own",
    "model/config.json": "names",
    "model/model.safetensors": "same",
    "merged/config.json": "gone",
    "int8/model.safetensors": "gone",
    "student/model.safetensors": "gone",
    "student-f16/use.py": "gone",
    "model-q8_0.gguf": "gone",
    "own/ada-q8_0.gguf": "gone",
    "own/ada/adapter_model.safetensors": "gone",
    "state/own_values/lr=0.1/000003.csv": "own",
    "crash.txt": "gone",
    "state/lock": "gone",
    "state/journal.jsonl": "gone",
    "state/recipe.sha256": "gone",
    "state/inputs.json": "written",
    "state/federated/lr=0.1/blocks.json": "same",
    "state/record.key": "ours",
    "state/privacy.key": "ours",
    "state/budget.jsonl": "ours",
    "state/sites/001/accounts/000003.jsonl": "own",
    "state/run.json": "names",
    "state/announced.json": "gone",
    "state/final.safetensors": "same",
    "state/chat_template.jinja": "same",
    "state/scratch/config.json": "same",
    "state/scores/features/train-3.safetensors": "gone",
    "state/scores/sums.safetensors": "gone",
    "state/scores/federated.safetensors": "gone",
    "state/federated/lr=0.1/checkpoints/4.safetensors": "gone",
    "state/federated/lr=0.1/checkpoints/4/clients/0/3/4.safetensors": "gone",
    "state/copied.json": "gone",
    "forgotten.json": "names",
    "state/federated/lr=0.1/history/0/0/3.safetensors": "own",
    "state/federated/lr=0.1/messages/0/0/3.safetensors": "gone",
    "state/federated/lr=0.1/clients/.answers/3/1.ab": "gone",
    "state/federated/lr=0.1/clients/.staged.7": "gone",
    "state/federated/lr=0.1/clients/0/3/12.safetensors": "own",
    "state/federated/lr=0.1/previous.safetensors": "gone",
    "state/federated/lr=0.1/server.safetensors": "same",
    "state/sites/003/announced.json": "names",
    "state/sites/003/trained.json": "gone",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_file_has_its_kind_in_a_run_a_stage_and_a_period(name: str) -> None:
    for path in (name, f"2-chat/{name}", f"periods/2026-01/{name}"):
        kind = kind_of(path)
        assert kind is not None
        assert kind.act == PATHS[name]
        assert inside(path) == name


def test_every_kind_is_met_by_one_of_these_paths_and_what_is_none_has_no_kind() -> None:
    met = {id(kind_of(name)) for name in PATHS}
    assert [kind.what for kind in KINDS if id(kind) not in met] == []
    for name in ("notes.txt", "state/secret", "state/federated/lr=0.1/more.safetensors", "Roster.json"):
        assert kind_of(name) is None
        assert client_of(name) is None


@pytest.mark.parametrize("client", [0, 7, 999, 1000, 1234567])
def test_the_number_of_a_client_is_read_from_the_paths_that_stores_write(client: int) -> None:
    column = "state/federated/lr=0.1"
    store = re.sub(r"^/x/", "", client_folder(f"/x/{column}/clients", client))
    assert client_of(f"{store}/12.safetensors") == client
    path = History(Path(f"{column}/history"))._path(3, client)
    assert client_of(path) == client
    assert client_of(f"state/own_values/lr=0.1/{client:06d}.csv") == client
    assert client_of(f"state/scores/features/valid-{client}.safetensors") == client
    assert client_of(f"{column}/checkpoints/4/{store.removeprefix(column)}/2.safetensors".replace("//", "/")) == client
    assert client_of(f"model/mlp/{client:04d}.safetensors") == client
    assert client_of("adapter/adapter_model.safetensors") is None
