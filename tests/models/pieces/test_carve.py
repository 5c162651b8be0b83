"""Pieces of a model are the model: forward, gradients and steps, whatever the cuts."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora
from lichen.models.pieces.carve import carve, spec_within
from lichen.models.pieces.piece_cohort import PieceCohort
from support.pieces import (
    BLOCKS,
    NAMES,
    batch_of,
    four_blocks,
    moved,
    piece_of,
    pieces_of,
    pieces_step,
    spec_of,
    whole_of,
    whole_step,
)
from support.tiny_families import made

CUTS = [cuts for n in (1, 2, 3) for cuts in combinations(range(1, BLOCKS), n)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-6 * float(b.norm()) + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_any_cutting_is_the_whole_bit_for_bit(name: str) -> None:
    whole = whole_of(name)
    for clients in (1, 3):
        batch, params_C = batch_of(name, clients), moved(whole.init(0), clients)
        loss_C, grads_C = whole_step(whole, params_C, batch)
        for cuts in CUTS:
            got_C, found_C = pieces_step(pieces_of(name, cuts), params_C, batch)
            assert torch.equal(got_C, loss_C), cuts
            assert found_C.keys() == grads_C.keys()
            assert [n for n in grads_C if not torch.equal(grads_C[n], found_C[n])] == [], cuts


@pytest.mark.parametrize("name", NAMES)
def test_stacked_pieces_are_the_whole_but_for_rounding(name: str) -> None:
    whole, pieces = whole_of(name), pieces_of(name, (1, 3), reference=False)
    batch, params_C = batch_of(name, 3), moved(whole.init(0), 3)
    loss_C, grads_C = whole_step(whole, params_C, batch)
    got_C, found_C = pieces_step(pieces, params_C, batch)
    assert close(got_C, loss_C)
    assert all(close(found_C[n], grads_C[n]) for n in grads_C)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_of_pieces_are_ten_of_the_whole(name: str) -> None:
    whole, pieces = whole_of(name), pieces_of(name, (2,))
    batch, ends = batch_of(name, 3), list[Tree]()
    for step in (partial(whole_step, whole), partial(pieces_step, pieces)):
        params_C = moved(whole.init(0), 3)
        for _ in range(10):
            grads_C = step(params_C, batch)[1]
            params_C = {n: x - 0.02 * grads_C[n] for n, x in params_C.items()}
        ends.append(params_C)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_pieces_start_is_that_part_of_the_wholes(name: str) -> None:
    whole, pieces = whole_of(name), pieces_of(name, (1, 3))
    start, parts = whole.init(7), [piece.init(7) for piece in pieces]
    assert sorted(start) == sorted(n for part in parts for n in part)
    assert all(torch.equal(start[n], x) for part in parts for n, x in part.items())
    assert len({piece.group for piece in pieces}) == len({piece.base for piece in pieces}) == 3
    assert pieces[0].group.startswith(f"{name}[0:1]/")


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_clients_of_a_last_piece_do_not_touch_each_other(name: str) -> None:
    for start in (2, 3):
        piece = piece_of(name, start, BLOCKS, prove=True)
        assert (piece.alone, piece.packed) == (None, False)


def test_a_piece_shares_the_wholes_weights_and_leaves_it_as_it_is() -> None:
    model = four_blocks("qwen2")
    names = [n for n, _ in model.named_parameters()]
    piece = carve(model, 1, 3)
    assert {n: x.data_ptr() for n, x in piece.named_parameters()} == {
        n: x.data_ptr() for n, x in model.named_parameters() if n.split(".")[2] in ("1", "2")
    }
    assert [n for n, _ in model.named_parameters()] == names
    assert model.config.num_hidden_layers == BLOCKS
    # Both ends of a tied model hold the one matrix.
    first, last = carve(model, 0, 1), carve(model, 3, BLOCKS)
    assert first.get_input_embeddings().weight is last.get_output_embeddings().weight


def test_what_cannot_be_cut_is_refused() -> None:
    for start, stop in ((2, 2), (3, 2), (-1, 2), (0, BLOCKS + 1)):
        with pytest.raises(LichenError, match=f"blocks {start}:{stop} of a model with 4"):
            carve(four_blocks("llama"), start, stop)
    with pytest.raises(LichenError, match=r"a gemma cannot be cut into pieces[\s\S]*llama, qwen2, gpt2, bert"):
        carve(made("gemma"), 0, 1)
    with pytest.raises(LichenError, match=r"LlamaForSequenceClassification cannot be cut[\s\S]*task: chat"):
        carve(made("llama-classifier"), 0, 1)
    model = four_blocks("qwen2")
    for head in ("lm_head", "embed_tokens"):
        with pytest.raises(LichenError, match="one matrix with the other end"):
            spec_within(Lora(targets=("q_proj",), heads=(head,)), model, carve(model, 0, 1))
    with pytest.raises(LichenError, match="no layer is called 'query'"):
        spec_within(Lora(targets=("query",)), model, carve(model, 0, 1))
    with pytest.raises(LichenError, match="a ia3 adapter is not trained in pieces"):
        spec_within(IA3(targets=("q_proj",), feedforward=()), model, carve(model, 0, 1))


def test_only_the_last_blocks_are_trained_where_the_recipe_says_so() -> None:
    model = four_blocks("llama")
    spec = Lora(targets="all-linear", rank=2, last=2)
    parts = [spec_within(spec, model, carve(model, a, b)) for a, b in ((0, 2), (2, 3), (3, 4))]
    assert [len(part.targets) for part in parts if isinstance(part, Lora)] == [0, 7, 7]


def test_hidden_states_and_tokens_are_not_mixed_up() -> None:
    batch = batch_of("bert", 1)
    first, middle = piece_of("bert", 0, 1), piece_of("bert", 1, 3)
    hidden_CBTH = first.hidden(moved(first.init(0), 1), {}, batch)
    params_C = moved(middle.init(0), 1)
    with pytest.raises(LichenError, match="the piece 1:3 takes hidden_CBTH"):
        middle.hidden(params_C, {}, batch)
    with pytest.raises(LichenError, match=r"hidden_CBTH has shape \(1, 3, 13, 31\), expected \(1, 3, 13, 32\)"):
        middle.hidden(params_C, {}, {**batch, "hidden_CBTH": hidden_CBTH[..., 1:]})
    with pytest.raises(LichenError, match="takes hidden states, not tokens"):
        middle.wrapped.model(input_ids=batch["input_ids_CBT"][0])
    with pytest.raises(LichenError, match="no first or middle piece"):
        PieceCohort(carve(four_blocks("bert"), 1, BLOCKS), adapter=spec_of("bert"), name="bert")
