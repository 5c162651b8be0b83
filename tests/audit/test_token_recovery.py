"""Reading tokens back from states: all where states are a linear map of embeddings, no more than chance where noise is.

Legend: N tokens, V vocabulary, E width of an embedding, H width of a state.
"""

from __future__ import annotations

import equality
import pytest
import torch
from torch import Tensor

from lichen.audit.label_recovery import labels_below_head, labels_of_logits
from lichen.audit.token_recovery import fit_decoder, nearest_tokens, random_rows, token_recovery
from lichen.core.errors import LichenError

V, E, H = 60, 12, 16


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mapped(token_N: Tensor, embedding_VE: Tensor, noise: float, seed: int) -> Tensor:
    """States that are a linear map of embeddings, on dimensions of very different sizes, and noise."""
    scale_H = torch.logspace(-2, 2, H)
    return (embedding_VE[token_N] @ drawn(E, H, seed=1) + noise * drawn(len(token_N), H, seed=seed) + 3) * scale_H


def test_the_decoder_reads_tokens_that_its_text_never_had() -> None:
    embedding_VE = drawn(V, E, seed=0)
    known_N, token_N = torch.arange(40).repeat(5), torch.arange(40, V)
    decoder = fit_decoder(mapped(known_N, embedding_VE, 0.01, 2), known_N, embedding_VE)
    assert torch.equal(decoder.tokens(mapped(token_N, embedding_VE, 0.01, 3)), token_N)


def test_scores_are_log_densities_around_what_embeddings_predict() -> None:
    """Against the density itself, token by token."""
    embedding_VE = drawn(V, E, seed=0)
    known_N, token_N = random_rows(V, 1, 300, 0)[0], random_rows(V, 1, 50, 1)[0]
    known_NH, state_NH = mapped(known_N, embedding_VE, 0.8, 2), mapped(token_N, embedding_VE, 0.8, 3)
    decoder = fit_decoder(known_NH, known_N, embedding_VE, ridge=1e-9, shrink=1e-9)
    design = torch.cat([embedding_VE[known_N], torch.ones(300, 1)], 1).double()
    fitted = torch.linalg.lstsq(design, known_NH.double()).solution
    left = known_NH.double() - design @ fitted
    precision = torch.linalg.inv(left.T @ left / 300)
    mean_VH = torch.cat([embedding_VE, torch.ones(V, 1)], 1).double() @ fitted
    away = state_NH.double()[:, None] - mean_VH
    slow = torch.einsum("nvh,hk,nvk->nv", away, precision, away).argmin(-1)
    assert torch.equal(decoder.tokens(state_NH), slow)


def test_recovery_falls_with_noise_down_to_chance_and_is_all_of_embeddings_themselves() -> None:
    embedding_VE = drawn(V, E, seed=0)
    known_N, token_N = random_rows(V, 1, 400, 0)[0], random_rows(V, 1, 200, 1)[0]
    shares = []
    for noise in (0.01, 4.0, 1000.0):
        known = {"known_NH": mapped(known_N, embedding_VE, noise, 2), "known_N": known_N}
        found = token_recovery(mapped(token_N, embedding_VE, noise, 3), token_N, embedding_VE=embedding_VE, **known)
        shares.append(found.linear)
        assert found.nearest == 0.0  # another width
        assert found.tokens == 200
    assert shares[0] == 1.0 > shares[1] > shares[2]
    assert shares[2] < 0.06
    whole = token_recovery(
        embedding_VE[token_N], token_N, known_NH=embedding_VE[known_N], known_N=known_N, embedding_VE=embedding_VE
    )
    assert whole.nearest == whole.linear == 1.0
    assert whole.constant == max(token_N.bincount().tolist()) / 200


def test_states_of_a_models_first_block_are_read_with_random_tokens_alone() -> None:
    model = equality.tiny("llama", seed=0)
    embedding_VE = model.get_input_embeddings().weight.detach()
    known, rows = random_rows(len(embedding_VE), 200, 12, 0), random_rows(len(embedding_VE), 20, 12, 1)

    def states(ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        return hidden.flatten(0, 1)

    found = token_recovery(
        states(rows), rows.flatten(), known_NH=states(known), known_N=known.flatten(), embedding_VE=embedding_VE
    )
    assert found.linear > 0.9 > 10 * found.constant


def test_random_rows_follow_the_seed_and_begin_as_asked() -> None:
    token_BT = random_rows(50, 30, 8, 3, first=7)
    assert torch.equal(token_BT, random_rows(50, 30, 8, 3, first=7))
    assert not torch.equal(token_BT, random_rows(50, 30, 8, 4, first=7))
    assert set(token_BT[:, 0].tolist()) == {7}
    assert 0 <= int(token_BT.min()) <= int(token_BT.max()) < 50


def test_what_cannot_be_read_is_refused() -> None:
    embedding_VE, token_N = drawn(V, E, seed=0), torch.arange(4)
    with pytest.raises(LichenError, match="fit no decoder"):
        fit_decoder(drawn(1, H, seed=1), token_N[:1], embedding_VE)
    with pytest.raises(LichenError, match="outside the 60"):
        fit_decoder(drawn(4, H, seed=1), token_N + V, embedding_VE)
    with pytest.raises(LichenError, match="no finite number"):
        fit_decoder(drawn(4, H, seed=1) / 0, token_N, embedding_VE)
    with pytest.raises(LichenError, match="have no cosine"):
        nearest_tokens(drawn(4, H, seed=1), embedding_VE)
    known = {"known_NH": drawn(4, H, seed=1), "known_N": token_N}
    with pytest.raises(LichenError, match="cannot be read"):
        token_recovery(drawn(0, H, seed=1), token_N[:0], embedding_VE=embedding_VE, **known)


def test_a_gradient_names_its_label_above_and_below_a_linear_head() -> None:
    label_N = torch.arange(40) % 5
    head = torch.nn.Linear(9, 5)
    entry_NH = drawn(40, 9, seed=5).requires_grad_()
    logits_NK = head(entry_NH)
    loss = torch.nn.functional.cross_entropy(logits_NK, label_N)
    above, below = torch.autograd.grad(loss, [logits_NK, entry_NH])
    assert torch.equal(labels_of_logits(above), label_N)
    assert torch.equal(labels_below_head(below, head.weight.detach()), label_N)
    with pytest.raises(LichenError, match="did not come through"):
        labels_below_head(below, head.weight.detach()[:, :4])
