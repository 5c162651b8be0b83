"""Every aggregator is a monoid whose bytes do not depend on order, grouping or blocks.

Legend: C clients, d features, K classes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lichen.clients.training.optimize import clip_C
from lichen.core.conventions.reach import REACH
from lichen.core.expected import Expected, MetricSpec, specs_of
from lichen.core.message import Message, concatenate_messages, take_client
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.tree import digest, plain
from lichen.core.wire.shared import Shared
from lichen.fl.testing import LAWS
from lichen.research.gkt.gather import GatherFeatures
from lichen.research.pate.pate import NoisyMax
from lichen.server.allow_empty import AllowEmpty
from lichen.server.by_name import by_name
from lichen.server.evolution import Evolution
from lichen.server.fairness.minmax import MinMax
from lichen.server.fairness.qffl import QFFL
from lichen.server.fairness.tilted import TiltedMean
from lichen.server.heterogeneity.feddyn import dynamic_mean
from lichen.server.heterogeneity.fednova import normalized
from lichen.server.heterogeneity.scaffold import controlled, with_controls
from lichen.server.knowledge.ensemble import Ensemble
from lichen.server.knowledge.votes import Votes
from lichen.server.kseed import SeedSums
from lichen.server.lda import Lda
from lichen.server.lowrank.fedsvd import FedSVD
from lichen.server.lowrank.hetlora import HetLoRA
from lichen.server.lowrank.lowrank import FedEx, FedIT
from lichen.server.lowrank.redistribute import FlexLoRA, FLoRIST
from lichen.server.lowrank.stacking import FLoRA
from lichen.server.mean import Mean
from lichen.server.private_mean import PrivateMean
from lichen.server.ridge import Ridge
from lichen.server.robust.fltrust import FLTrust
from lichen.server.robust.robust import Robust
from lichen.server.sums.fixed_point import layout_of
from lichen.server.sums.masked import form_of
from support.flat import closed
from support.masked_talk import Talk

SHARED = {
    "a.lora_A": torch.linspace(-1, 1, 14).view(2, 7),
    "a.lora_B": torch.linspace(-0.5, 1, 6).view(3, 2),
    "head.bias": torch.zeros(4),
}

SEARCH = {"mean": torch.linspace(-1, 1, 5), "std": torch.full((5,), 0.5, dtype=torch.float16)}


def updates(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return Message(
        group="g",
        client_C=torch.randperm(100, generator=g)[:clients],
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={n: torch.randn(clients, *x.shape, generator=g) * 0.3 for n, x in SHARED.items()},
        # The first always counts, so that something is folded in; others may weigh nothing.
        weight_C=torch.cat([torch.ones(1), torch.randint(0, 9, (clients - 1,), generator=g)]).double(),
    )


def beside_controls(clients: int, seed: int) -> Any:
    message, control = updates(clients, seed), updates(clients, seed + 1)
    return replace(message, tensors=message.tensors | {f"control.{n}": x for n, x in control.tensors.items()})


def beside_reach(clients: int, seed: int) -> Any:
    message = updates(clients, seed)
    return replace(message, tensors={**message.tensors, REACH: 1.0 + message.client_C[:, None].double() % 3})


def unequal(clients: int, seed: int) -> Any:
    """Ranks 2 and 1 and no layer at all, by client: one message for each kind, in turn."""
    message = updates(clients, seed)
    parts = {}
    for k in range(clients):
        parts.setdefault(int(message.client_C[k]) % 3, []).append(take_client(message, k))
    cut = []
    for kind, ones in sorted(parts.items()):
        whole = concatenate_messages(ones)
        A, B, bias = (whole.tensors[n] for n in SHARED)
        few = {"a.lora_A": A[:, : kind or 2], "a.lora_B": B[:, :, : kind or 2], "head.bias": bias}
        cut.append(replace(whole, tensors=few if kind else {"head.bias": bias}))
    return cut


def only_B(clients: int, seed: int) -> Any:
    message = updates(clients, seed)
    return replace(message, tensors={n: x for n, x in message.tensors.items() if n != "a.lora_A"})


def statistics(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    x_CBd = (torch.randn(clients, 6, 4, generator=g, dtype=torch.float64) * 2**18).round() / 2**18
    y_CBK = torch.eye(3, dtype=torch.float64)[torch.randint(0, 3, (clients, 6), generator=g)]
    return replace(
        updates(clients, seed),
        tensors={
            "G": torch.einsum("cbi,cbj->cij", x_CBd, x_CBd),
            "H": torch.einsum("cbi,cbk->cik", x_CBd, y_CBK),
            "n": y_CBK.sum(1),
        },
    )


def searches(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    tensors = {"mean": torch.randn(clients, 5, generator=g), "std": torch.rand(clients, 5, generator=g).half()}
    return replace(updates(clients, seed), tensors=tensors)


def seed_pairs(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return replace(
        updates(clients, seed),
        tensors={
            "kseed.index": torch.randint(-1, 12, (clients, 5), generator=g, dtype=torch.int16),
            "kseed.units": torch.randint(-(2**20), 2**20, (clients, 5), generator=g, dtype=torch.int32),
        },
    )


def histograms(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    votes_CM = torch.randint(0, 60, (clients, 9), generator=g, dtype=torch.int32)
    return replace(updates(clients, seed), group="votes/9/0", tensors={"votes": votes_CM})


def answers(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    n_CK = torch.randint(0, 5, (clients, 3), generator=g).double()
    n_CK[0] += 1
    return replace(
        updates(clients, seed), tensors={"logits": 4 * torch.randn(clients, 5, 3, generator=g).half(), "n": n_CK}
    )


def top_answers(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    prob, index = torch.rand(clients, 5, 3, generator=g).softmax(-1).sort(-1, descending=True)
    tensors = {"index": index[..., :2].to(torch.int8), "prob": prob[..., :2].half()}
    return replace(updates(clients, seed), tensors=tensors)


def offers(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    shapes = {"features": (4, 6), "logits": (4, 3), "labels": (4,)}
    return replace(
        updates(clients, seed), tensors={n: torch.randn(clients, *s, generator=g) for n, s in shapes.items()}
    )


def told_losses(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    message = updates(clients, seed)
    sums = torch.rand(clients, generator=g, dtype=torch.float64) * message.weight_C
    return replace(message, metrics={"loss_sum": sums, "count": message.weight_C})


def ballots(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return replace(updates(clients, seed), tensors={"votes": torch.randint(-1, 3, (clients, 7), generator=g).char()})


MIXTURE = tuple(2 * k / 9900 for k in range(100))

SECRET = SecretRandomness.of_seed(3)

FAMILY = {
    "mean": (Mean(), updates),
    "mean-uniform": (Mean("uniform"), updates),
    "mean-plain": (Mean(divisor="plain"), updates),
    "mean-roster": (Mean("uniform", divisor=100.0), updates),
    "private": (PrivateMean(10.0, layout=layout_of(updates(1, 0)), stream=SECRET.stream), updates),
    "by-name": (by_name({"head.": Mean("uniform"), ".lora_B": Mean(scale=36), "": Mean()}), updates),
    "by-name-single": (by_name({"head.": Mean("uniform"), "": FedEx(2.0)}), updates),
    "scaffold": (controlled(Mean(), clients=100), beside_controls),
    "feddyn": (dynamic_mean(clients=100), updates),
    "fednova": (normalized(Mean()), beside_reach),
    "allow-empty": (AllowEmpty(Mean()), updates),
    "kseed": (SeedSums(12), seed_pairs),
    "fedit": (FedIT(), updates),
    "fedex": (FedEx(2.0), updates),
    "flora": (FLoRA(2.0), updates),
    "flexlora": (FlexLoRA(), updates),
    "florist": (FLoRIST(0.9), updates),
    "hetlora": (HetLoRA(), updates),
    "fedsvd": (FedSVD(), only_B),
    "fedsvd-fedit": (FedSVD(FedIT()), only_B),
    "ridge": (Ridge(0.5), statistics),
    "qffl": (QFFL(2.0, lr=0.1), told_losses),
    "minmax": (MinMax(MIXTURE), told_losses),
    "tilted": (TiltedMean(1.5, level=0.8), told_losses),
    "pate": (NoisyMax(3, sigma=2.0, seed=5), ballots),
    "pate-confident": (NoisyMax(3, sigma=0.5, seed=5, threshold=1.5, threshold_sigma=1.0), ballots),
    "lda": (Lda(0.3), statistics),
    "ensemble": (Ensemble(classes=3, weigh="examples"), answers),
    "ensemble-logits": (Ensemble("logits", classes=3, keep=2), answers),
    "ensemble-sharp": (Ensemble(classes=3, weigh="confidence", sharpen=0.1), answers),
    "ensemble-classes": (Ensemble(classes=3, weigh="classes"), answers),
    "ensemble-top": (Ensemble(classes=3), top_answers),
    "offers": (GatherFeatures(), offers),
    "votes": (Votes(), histograms),
    "votes-noisy": (Votes(3.0, seed=7), histograms),
    "evolution": (Evolution(), searches),
    "evolution-mixture": (Evolution(between=1.0), searches),
    "krum": (Robust("krum"), updates),
    "multi-krum": (Robust("multi_krum", memory=200), updates),
    "multi-krum-mixed": (Robust("multi_krum", mixing=True), updates),
    "multi-krum-products": (Robust("multi_krum", liars=0, of="products"), updates),
    "geometric-median": (Robust("geometric_median", memory=0), updates),
    "centred-clipping": (Robust("centred_clipping", radius=0.5), updates),
    "norm-bound": (Robust("norm_bound", mixing=True), updates),
    "median": (Robust("median"), updates),
    "trimmed-mean": (Robust("trimmed_mean", memory=300), updates),
    "fltrust": (FLTrust(lambda shared, version: {n: x + version for n, x in SHARED.items()}), updates),
}
UNEQUAL = {
    "fedit": FedIT(),
    "fedex": FedEx(2.0),
    "flora": FLoRA(2.0),
    "flexlora": FlexLoRA("uniform"),
    "florist": FLoRIST(0.9),
    "hetlora": HetLoRA(),
}
every = pytest.mark.parametrize("name", FAMILY)
sums = pytest.mark.parametrize("name", [name for name, (member, _) in FAMILY.items() if member.needs == "sum"])
some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def shared_of(member: Any) -> dict[str, torch.Tensor]:
    return {**with_controls(Shared(SHARED)).flat(), **SEARCH} if not isinstance(member, Ridge | Lda) else {}


def outcome(member: Any, total: Any) -> Any:
    change, metrics = closed(member, total, shared_of(member))
    return digest(change), metrics


def obeys(law: str, name: str, clients: int, seed: int, *, cut: int | None = None) -> None:
    """Hold a member to a law of :mod:`lichen.fl.testing`; ``cut`` is how many clients' total crosses."""
    member, make = FAMILY[name]
    LAWS[law](member, make(clients, seed), Shared.of_flat(shared_of(member)), seed + 1 if cut is None else cut)


@every
@given(clients=st.integers(2, 9), seed=seeds)
@some
def test_any_order_blocks_and_merging_give_the_same_bytes(name: str, clients: int, seed: int) -> None:
    obeys("order", name, clients, seed)


@pytest.mark.parametrize("name", UNEQUAL)
@given(clients=st.integers(2, 9), seed=seeds)
@some
def test_unequal_ranks_and_layers_in_any_order_give_the_same_bytes(name: str, clients: int, seed: int) -> None:
    member, messages = UNEQUAL[name], unequal(clients, seed)
    whole = member.zero()
    for message in messages:
        whole = member.add(whole, message)
    ones = [take_client(message, k) for message in messages for k in range(len(message.client_C))]
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
    line, left, right = member.zero(), member.zero(), member.zero()
    for at, k in enumerate(order):
        line = member.add(line, ones[k])
        left, right = (member.add(left, ones[k]), right) if at % 2 else (left, member.add(right, ones[k]))
    tensors, header = member.dump(left)
    crossed = member.load(load(save(plain(tensors))), json.loads(json.dumps(header)))
    told = outcome(member, whole)
    assert outcome(member, line) == told
    assert outcome(member, member.merge(right, crossed)) == told
    assert outcome(member, member.merge(crossed, right)) == told


@every
@given(seed=seeds)
@some
def test_is_a_monoid(name: str, seed: int) -> None:
    obeys("monoid", name, 3, seed)


@every
@given(seed=seeds)
@some
def test_folding_in_changes_neither_the_state_nor_the_message(name: str, seed: int) -> None:
    obeys("pure", name, 4, seed)


@every
@given(clients=st.integers(2, 6), seed=seeds)
@some
def test_a_client_of_weight_zero_might_as_well_have_stayed_away(name: str, clients: int, seed: int) -> None:
    obeys("weight_zero", name, clients, seed)


@every
@given(clients=st.integers(0, 5), seed=seeds)
@some
def test_a_total_that_crossed_as_bytes_merges_and_closes_to_the_same(name: str, clients: int, seed: int) -> None:
    obeys("crossing", name, 5, seed=seed, cut=clients)


@every
@given(clients=st.integers(2, 6), seed=seeds)
@some
def test_clients_of_a_weight_are_counted(name: str, clients: int, seed: int) -> None:
    obeys("clients", name, clients, seed)


@every
@given(clients=st.integers(2, 6), seed=seeds)
@some
def test_a_discount_of_one_is_none_and_others_belong_to_their_clients(name: str, clients: int, seed: int) -> None:
    obeys("discount", name, clients, seed)


@every
@given(clients=st.integers(2, 6), seed=seeds)
@some
def test_lifted_messages_give_the_same_bytes_under_masks(name: str, clients: int, seed: int) -> None:
    obeys("lifting", name, clients, seed)


@sums
@given(clients=st.integers(2, 6), seed=seeds)
@some
def test_a_discount_of_zero_keeps_a_client_out(name: str, clients: int, seed: int) -> None:
    member, make = FAMILY[name]
    message = make(clients, seed)
    discount_C = torch.ones(clients)
    discount_C[-1] = 0
    without = concatenate_messages([take_client(message, k) for k in range(clients - 1)])
    discounted = member.add(member.zero(), message, discount_C)
    if name == "mean-plain":  # it still counts in the divisor
        assert member.clients(discounted) == int((message.weight_C > 0).sum())
        return
    assert outcome(member, discounted) == outcome(member, member.add(member.zero(), without))


@given(clients=st.integers(2, 6), seed=seeds, bound=st.floats(0.01, 2.0))
@some
def test_clipping_bounds_what_one_client_can_move(clients: int, seed: int, bound: Any) -> None:
    member = Mean("uniform")
    message = updates(clients, seed)
    message = replace(message, weight_C=torch.ones(clients).double())
    message.tensors["a.lora_A"][0] *= 1e6
    message = replace(message, tensors=clip_C(message.tensors, bound))

    def summed(total: Any) -> Any:
        return total.units_N.double() * 2.0**-member.scale

    whole = summed(member.add(member.zero(), message))
    for k in range(clients):
        rest = member.zero()
        for j in range(clients):
            rest = member.add(rest, take_client(message, j)) if j != k else rest
        assert float((whole - summed(rest)).norm()) <= bound * (1 + 1e-5)


@sums
def test_a_sum_of_masked_vectors_closes_to_the_bytes_of_an_open_one(name: str) -> None:
    member, make = FAMILY[name]
    message = make(6, 11)
    clients = message.client_C.tolist()
    expected = Expected(
        group=message.group,
        tensors=specs_of({key: x_C[0] for key, x_C in message.tensors.items()}),
        metrics={key: MetricSpec(shape=tuple(x_C.shape[1:])) for key, x_C in message.metrics.items()},
    )
    form = form_of(expected, member)
    vector_C = form.vector(member.lift(message))
    units = {client: vector_C[c].numpy() for c, client in enumerate(clients)}
    gone = {clients[0]: 1, clients[3]: 2}
    talk = Talk(units, k=5, threshold=4, stages=gone)
    total, left = torch.from_numpy(talk.total()), [c for c, client in enumerate(clients) if client not in gone]
    masked = member.zero()
    for part in form.messages(total, torch.tensor(sorted(clients[c] for c in left)), 0):
        masked = member.add(masked, part)
    assert member.clients(masked) == int((message.weight_C[left] > 0).sum())
    plain_total = member.zero()
    for c in left:
        plain_total = member.add(plain_total, take_client(message, c))
    assert outcome(member, masked) == outcome(member, plain_total)
