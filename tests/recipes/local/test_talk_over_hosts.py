"""Hosts that hold a piece each write what one process with the whole model writes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

import lichen
import lichen.recipes.run
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.wire.answer import pack_answer, unpack_answer
from lichen.engines.sites import Seen
from lichen.models.loading.load import load_causal
from lichen.recipes.artifacts.sampling import ask_ids
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.local.hosts.chain import Chain
from lichen.recipes.local.hosts.piece_process import NEXT, answer_next
from lichen.recipes.local.hosts.run_pieces import RunPieces
from lichen.recipes.local.hosts.talk import talk_over_hosts
from lichen.recipes.local.next_logits import LocalLogits
from support.tiny_llama import recipe, save_model, save_rows

ASK = "w1 w2 w3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a model of four blocks."""
    top = tmp_path_factory.mktemp("hosts")
    rows = save_rows(top / "rows.jsonl", "pair")
    save_model(top / "model", layers=4)
    lichen.run(recipe(top / "model", rows, "pair", federation={"rounds": 1, "local_steps": 8}), out=top / "run")
    return top / "run"


class Here:
    """Hosts in this process; counts the tokens that each is asked for."""

    def __init__(self, run: Path, hosts: int) -> None:
        self.writers = [RunPieces(run, hosts).writer(host) for host in range(hosts)]
        self.tokens = [0] * hosts

    def start(self) -> None:
        """They are there."""

    def seen(self) -> dict[str, Seen]:
        return {}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        assert kind == NEXT
        entry = unpack_answer(body[1:])[1] or {}  # behind the mark of a question that goes as a whole
        self.tokens[int(site)] += entry["entry"].shape[1]
        return body[:1] + answer_next(self.writers[int(site)], body[1:])

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_logits_are_those_of_the_whole_model_bare_and_tuned(run: Path, hosts: int) -> None:
    known, bare, tuned, tokenizer = open_models(run)
    sites = Here(run, hosts)
    for whole, learned in ((bare, False), (tuned, True)):
        chain, local = Chain(sites, hosts, tuned=learned), LocalLogits(whole)
        ids = ask_ids(tokenizer, known.data.form, ASK)
        for _ in range(6):
            found, wanted = chain(ids), local(ids)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            ids.append(int(wanted.argmax()))
        torch.testing.assert_close(chain(ids[:4]), local(ids[:4]), rtol=0, atol=1e-5)  # another text begins anew
    assert not torch.equal(Chain(sites, hosts, tuned=False)(ids), Chain(sites, hosts, tuned=True)(ids))


def test_each_token_goes_through_once_and_no_host_has_the_whole(run: Path) -> None:
    sites, ids = Here(run, 2), list(range(6, 11))
    chain = Chain(sites, 2, tuned=True)
    for _ in range(4):
        ids.append(int(chain(ids).argmax()))
    assert sites.tokens == [8, 8]
    model, _ = load_causal(run.parent / "model")
    whole = sum(x.numel() for x in model.parameters())
    assert all(sum(x.numel() for x in one._piece.parameters()) < 0.75 * whole for one in sites.writers)


def test_processes_write_the_text_of_one_and_a_lost_one_is_replaced(run: Path) -> None:
    whole = lichen.recipes.run.talk(run, max_new_tokens=8)
    with talk_over_hosts(run, 2, max_new_tokens=8) as talker:
        assert talker.names == whole.names
        assert talker.settings == whole.settings
        assert talker.answer(ASK) == whole.answer(ASK)
        hosts = [one for one in psutil.Process().children(recursive=True) if "piece" in one.cmdline()]
        assert len(hosts) == 2
        os.kill(hosts[1].pid, signal.SIGKILL)
        assert talker.answer(ASK) == whole.answer(ASK)
    assert not [one for one in psutil.Process().children(recursive=True) if "piece" in one.cmdline()]


def test_the_command_answers_and_times(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["try", str(run), "--hosts", "2", "--time", "--max-new-tokens", "3", "--delay", "0.01", ASK]) == 0
    out, err = capsys.readouterr()
    assert "2 hosts hold 2, 2 blocks, and none the whole model" in err
    assert ["0 ms" in out, "10 ms" in out, "2 hosts, resident: " in out] == [True] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "9"], "--hosts: 9 hosts for 4 blocks"),
        (["--hosts", "1"], "--hosts: 1 are not several"),
        (["--hosts", "2", "--proxy", "x"], "--hosts: the large model is not dealt out"),
        (["--hosts", "2", "--time", "--delay", "90"], "--delay: 90.0 is no delay"),
    ],
)
def test_what_cannot_be_is_refused(run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["try", str(run), *words, ASK]) == 2
    assert said in capsys.readouterr().err


def test_a_question_that_does_not_fit_what_was_seen_is_refused(run: Path) -> None:
    (writer, _) = Here(run, 2).writers
    writer.step(torch.tensor([[6, 7]]), 0, tuned=True)
    with pytest.raises(LichenError, match="2 tokens of the text have gone through here, not 3"):
        writer.step(torch.tensor([[8]]), 3, tuned=True)
    with pytest.raises(LichenError, match="without entry, known and tuned"):
        answer_next(writer, pack_answer(1, {"entry": torch.tensor([[6]])}))
