"""What would be read at the cuts of a finished run: of a chat model and a classifier, by hand and by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.tiny_llama import recipe, save_model, save_rows
from torch import Tensor

import lichen
from lichen import cli
from lichen.audit.crossing import read_crossing
from lichen.core.errors import LichenError
from lichen.recipes.audit.crossings import split_audit
from lichen.transforms.activations import parse_activation_code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuts")
    save_model(folder / "llama")
    for shape in ("pair", "label"):
        save_rows(folder / f"{shape}.jsonl", shape, clients=3, rows=24)
        federation = {"rounds": 1, "local_steps": 1, "batch_size": 2}
        about = recipe(folder / "llama", folder / f"{shape}.jsonl", shape, federation=federation)
        lichen.run({**about, "compare": {"baselines": []}}, out=folder / shape)
    return folder


def test_a_chat_run_is_read_at_its_first_block_and_less_under_noise(place: Path) -> None:
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    (plain,) = split_audit(place / "pair", cuts=(1,))
    assert plain.cut == 1
    assert plain.nbytes == 4 * 32
    assert plain.labels is None
    assert plain.recovery.linear > 0.5 > 3 * plain.recovery.constant
    (coded,) = split_audit(place / "pair", code=("int8",))
    assert coded.nbytes == 34
    assert coded.recovery.linear > 0.5
    (noisy,) = split_audit(place / "pair", noise=20.0)
    assert noisy.recovery.linear < 0.3
    assert noisy == split_audit(place / "pair", noise=20.0)[0]
    assert noisy != split_audit(place / "pair", noise=20.0, seed=1)[0]
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_labels_are_read_off_gradients_where_the_head_is_not_the_clients(place: Path) -> None:
    (plain,) = split_audit(place / "label", rows=12)
    assert plain.labels == 1.0
    assert plain.recovery.linear > 0.5
    (noisy,) = split_audit(place / "label", rows=12, noise=50.0)
    assert noisy.labels is not None
    assert noisy.labels < 1.0


def test_the_command_says_so_in_plain_sentences(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["split-audit", str(place / "label"), "--cuts", "1", "--code", "topk:8/16, int8~", "--rows", "9"]) == 0
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "Who sees what crosses after block 1 reads" in out
    assert "Under 20 % of the tokens are read at none of these cuts" in out
    assert "the head stays with the client" in out
    assert cli.main(["split-audit", str(place / "pair"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["cut"] for one in shown["cuts"]] == [1]
    assert shown["cuts"][0]["recovery"]["tokens"] > 20


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--cuts", "2"), "there is no cut after block 2 of 2"),
        (("--cuts", "0"), "there is no cut after block 0 of 2"),
        (("--cuts", "one"), "'one' is no number of blocks"),
        (("--code", "int9"), "no codec is called 'int9'"),
        (("--noise", "-1"), "noise of -1.0 is not possible"),
    ],
)
def test_what_cannot_cross_is_refused(
    place: Path, words: tuple[str, str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["split-audit", str(place / "pair"), *words]) == 2
    assert part in " ".join(capsys.readouterr().err.split())


def test_rows_are_read_alike_in_any_batch_and_padding_is_no_token() -> None:
    embedding_VE = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))

    def hidden(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        assert bool((ids_BT[mask_BT == 0] == 0).all())
        return embedding_VE[ids_BT]

    rows = [torch.tensor([1, *range(2, 3 + n)]) for n in range(20)]
    found = read_crossing(hidden, rows, embedding_VE, code=parse_activation_code([]), noise=0.0, seed=0, known=500)
    assert found.tokens == sum(len(row) - 1 for row in rows)
    assert found.nearest == found.linear == 1.0
    with pytest.raises(LichenError, match="no row has a token"):
        read_crossing(hidden, [torch.tensor([1])], embedding_VE, code=parse_activation_code([]), noise=0.0, seed=0)
