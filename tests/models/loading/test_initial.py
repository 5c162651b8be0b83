"""Where to begin: fewer layers, random weights, and a head in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lichen.clients.statistics.scale import ScaleLosses, best_scale
from lichen.clients.statistics.sufficient import Statistics
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TextShard, TrainSource
from lichen.data.batches.text import encode_classify, pad_id
from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.readers import READERS
from lichen.data.sources.records import Record
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prompt import Prompt
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.full import FullClassifier
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.initial import first_layers, head_features, head_of, head_start
from lichen.models.loading.load import base_digest, load_causal, load_encoder
from lichen.models.students.students import ImageMLP, TextCNN
from lichen.server.lda import Lda
from lichen.server.ridge import Ridge
from support.flat import closed
from support.tiny_llama import save_model

MLP = ImageMLP(6, hidden=(12,), classes=3)


def say(folder: Path) -> None:
    """A tokenizer of a few words."""
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    hf.BertModel(config).save_pretrained(folder)
    say(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=31, n_embd=16, n_layer=3, n_head=2)).save_pretrained(folder)
    say(folder)
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["encoder", "classifier", "llama", "gpt2"])
def test_the_first_layers_alone_are_the_same_layers_and_come_back_from_disk(
    kind: str, bert: Path, gpt2: Path, tmp_path: Path
) -> None:
    source = {"llama": save_model(tmp_path / "llama"), "gpt2": gpt2}.get(kind, bert)
    load: Any = {"encoder": load_encoder, "classifier": lambda s, **m: load_classifier(s, classes=3, seed=1, **m)}
    load = load.get(kind, load_causal)
    whole, _ = load(source)
    short, tokenizer = load(source, layers=1)
    assert short.config.num_hidden_layers == 1
    assert all(torch.equal(x, weights(whole)[name]) for name, x in weights(short).items())
    assert len(weights(short)) < len(weights(whole))
    assert base_digest(short) != base_digest(whole)
    ids = torch.tensor([[1, 2, 2, 1]])
    first = whole(input_ids=ids, output_hidden_states=True).hidden_states[1]
    got = short(input_ids=ids, output_hidden_states=True).hidden_states[1]
    if kind in ("encoder", "classifier"):
        assert torch.equal(got, first)
    else:
        norm = whole.model.norm if kind == "llama" else whole.transformer.ln_f
        assert torch.equal(got, norm(first))
    short.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    assert base_digest(load(tmp_path / "short")[0]) == base_digest(short)
    with pytest.raises(LichenError, match=r"model\.layers"):
        load(source, layers=5)
    odd = hf.AlbertModel(hf.AlbertConfig(vocab_size=9, embedding_size=4, hidden_size=8, num_attention_heads=2))
    with pytest.raises(LichenError, match="cannot be told apart"):
        first_layers(odd, 1)


def test_random_weights_follow_from_the_seed_and_the_config_stays(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = load_classifier(bert, classes=3, seed=1, random=5)[0]
    torch.manual_seed(2)
    same, other = (load_classifier(bert, classes=3, seed=1, random=s)[0] for s in (5, 6))
    known = load_classifier(bert, classes=3, seed=1)[0]
    assert base_digest(one) == base_digest(same) != base_digest(other)
    assert one.config.to_diff_dict() == known.config.to_diff_dict()
    assert torch.equal(one.classifier.weight, known.classifier.weight)  # all else equal, the head too
    for name, x in weights(one).items():
        if x.dim() > 1 and not name.startswith("classifier"):
            assert not torch.equal(x, weights(known)[name]), name
            assert 0.01 < float(x.std()) < 0.03
    assert not any(x.requires_grad for x in one.parameters())
    short = load_encoder(bert, layers=2, random=5)[0]
    for name, x in weights(short).items():
        if "pooler" not in name:
            assert torch.equal(x, weights(one)[f"bert.{name}"]), name
    for folder in (gpt2, save_model(tmp_path)):
        drawn, again = (load_causal(folder, random=3)[0] for _ in range(2))
        assert base_digest(drawn) == base_digest(again) != base_digest(load_causal(folder)[0])
    state = torch.random.get_rng_state()
    load_causal(gpt2, random=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def batches(rows: Any, size: int = 16, pad: int = 0) -> list[Any]:
    return [b for c in range(len(rows)) for b in EvalSource(rows, batch_size=size, pad=pad).batches((c,), 0)]


def solved(model: Any, shared: Any, rows: Any, *, rule: Any = None, bias: bool = True, pad: int = 0) -> Any:
    """A head in closed form from statistics of its input over all clients, as a server makes it."""
    shared = Shared(shared)
    width = shared.trainable[f"{head_of(model, shared)}.weight"].shape[1]
    work = Statistics(head_features(model, shared), classes=model.classes, width=width, bias=bias, bits=16)
    rule = rule or Ridge(1.0, bits=16, bias=bias)
    total = rule.zero()
    for c in range(len(rows)):
        state = work.init(Job(work="s", shared=Shared(), version=0, clients=(c,), seed=0), (c,), None)
        for batch in EvalSource(rows, batch_size=16, pad=pad).batches((c,), 0):
            state = work.step(state, batch)
        total = rule.add(total, work.final(state)[0])
    return closed(rule, total, {})[0]


def loss_of(model: Any, shared: Any, rows: Any, pad: int = 0) -> float:
    total, count = 0.0, 0
    shared = shared.trainable if isinstance(shared, Shared) else shared
    for batch in batches(rows, pad=pad):
        with torch.no_grad():
            loss_C, count_C = model.loss(trees.broadcast(shared, 1), {}, batch)
        total, count = total + float(loss_C.sum()), count + int(count_C.sum())
    return total / count


def scaled(model: Any, shared: Any, head: Any, rows: Any, pad: int = 0) -> Shared:
    """The head times what suits these rows best."""
    first, work = head_start(model, Shared.of_flat(shared), head), ScaleLosses(model)
    job = Job(work="scale", shared=first, version=0, clients=(0,), seed=0)
    state = work.init(job, (0,), None)
    for batch in EvalSource(rows, batch_size=16, pad=pad).batches((0,), 0):
        state = work.step(state, batch)
    scale = best_scale(work.final(state)[0].metrics["losses"])
    return head_start(model, Shared.of_flat(shared), head, scale=scale)


def blobs(clients: int = 3) -> list[ArrayShard]:
    rng = np.random.default_rng(0)
    out = []
    for n in (30, 41, 12)[:clients]:
        labels = rng.integers(0, 3, n)
        out.append(ArrayShard(x=(rng.normal(size=(n, 6)) + np.eye(3, 6)[labels]).astype(np.float32), labels=labels))
    return out


def test_ridge_and_lda_are_those_of_all_rows_together() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge as Oracle

    rows, shared = blobs(), MLP.init(0)
    x = torch.from_numpy(np.concatenate([r.x for r in rows]))
    y = np.concatenate([r.labels for r in rows])
    hidden = torch.relu(x @ shared["layer0.weight"].T + shared["layer0.bias"]).double().numpy()
    assert head_of(MLP, Shared.of_flat(shared)) == "layer1"
    got = torch.cat(
        [head_features(MLP, Shared.of_flat(shared))(b)[0][: int((b["index_CB"] >= 0).sum())] for b in batches(rows)]
    )
    assert torch.equal(got.double(), torch.from_numpy(hidden))
    ridge = head_start(MLP, Shared.of_flat(shared), solved(MLP, shared, rows, rule=Ridge(0.5, bits=16)))
    with_one = np.concatenate([hidden, np.ones((len(y), 1))], 1)
    oracle = Oracle(alpha=0.5, fit_intercept=False).fit(with_one, np.eye(3)[y])
    np.testing.assert_allclose(ridge.trainable["layer1.weight"], oracle.coef_[:, :-1], atol=2e-4)
    np.testing.assert_allclose(ridge.trainable["layer1.bias"], oracle.coef_[:, -1], atol=2e-4)
    assert torch.equal(ridge.trainable["layer0.weight"], shared["layer0.weight"])
    lda = head_start(MLP, Shared.of_flat(shared), solved(MLP, shared, rows, rule=Lda(0.0, bits=16)))
    known = LinearDiscriminantAnalysis(solver="lsqr").fit(hidden, y)
    logits = (
        torch.from_numpy(hidden) @ lda.trainable["layer1.weight"].double().T + lda.trainable["layer1.bias"].double()
    )
    np.testing.assert_allclose(logits.softmax(-1), known.predict_proba(hidden), atol=0.02)


@pytest.mark.parametrize("kind", ["lora", "full", "prompt", "words", "score"])
def test_features_are_what_the_models_own_head_reads(kind: str, bert: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path) if kind == "score" else bert
    base, _ = load_classifier(source, classes=3, seed=0)
    head = "score" if kind == "score" else "classifier"
    model: Any = {
        "lora": lambda: ClassifierCohort(
            base, adapter=Lora(targets=("query",), rank=2, heads=("classifier",)), name="m"
        ),
        "full": lambda: FullClassifier(base, name="m"),
        "prompt": lambda: ClassifierCohort(base, adapter=Prompt(tokens=2, heads=("classifier",)), name="m"),
        "words": lambda: TextCNN(31, width=4, classes=3),
        "score": lambda: ClassifierCohort(base, adapter=Lora(targets=("q_proj",), rank=2, heads=("score",)), name="m"),
    }[kind]()
    head = "head" if kind == "words" else head
    rng = np.random.default_rng(1)
    rows = [
        TextShard([rng.integers(4, 31, k).astype(np.int32) for k in (3, 5, 7)], labels=np.arange(3), kind="classify")
        for _ in range(2)
    ]
    shared = model.init(0)
    (batch,) = EvalSource(rows, batch_size=4).batches((0, 1), 0)
    x_CBd = head_features(model, Shared.of_flat(shared))(batch)
    logits_CBK = model.logits(trees.broadcast(shared, 2), {}, batch).detach()
    again_CBK = x_CBd @ shared[f"{head}.weight"].T
    again_CBK = again_CBK + shared[f"{head}.bias"] if f"{head}.bias" in shared else again_CBK
    torch.testing.assert_close(again_CBK, logits_CBK, rtol=1e-4, atol=1e-5)
    biased = f"{head}.bias" in shared
    own = solved(model, shared, rows, rule=Ridge(1e-2, bits=16, bias=biased), bias=biased)
    start = scaled(model, shared, own, rows)
    assert loss_of(model, start, rows) < loss_of(model, shared, rows)


def test_what_does_not_fit_is_refused(bert: Path) -> None:
    shared = MLP.init(0)
    sums = solved(MLP, shared, blobs())
    with pytest.raises(LichenError, match="does not fit the head"):
        head_start(MLP, Shared.of_flat(shared), sums, head="layer0")
    with pytest.raises(LichenError, match="does not fit the head"):
        head_start(MLP, Shared.of_flat(shared), {"head.weight": sums["head.weight"]})
    square = ImageMLP(6, hidden=(3,), classes=3)
    with pytest.raises(LichenError, match="could be any of"):
        head_of(square, Shared(square.init(0)))
    frozen = ClassifierCohort(
        load_classifier(bert, classes=3, seed=0)[0], adapter=Lora(targets=("query",), rank=2), name="m"
    )
    with pytest.raises(LichenError, match="not among the trained"):
        head_features(frozen, Shared(frozen.init(0)))


@pytest.fixture(scope="module")
def reviews() -> Any:
    """The folder of a real encoder, and reviews of clothing cut to 24 tokens: 380 to learn from, 80 to judge by."""
    try:
        model, data = fetch_entry("minilm-l6"), fetch_entry("clothing-reviews")
    except LichenError as error:
        pytest.skip(f"cannot be fetched here: {error}")
    _, tokenizer = load_classifier(model, classes=2, seed=0, layers=1)
    # Stars 1-2 against 5, in equal numbers.
    records: list[Record] = READERS["clothing-reviews"](data, {})
    order = np.random.default_rng(0).permutation(len(records))
    good, bad = ([records[i] for i in order if records[i].label in stars] for stars in ((5,), (1, 2)))
    rows = [replace(r, label=int(r.label == 5)) for pair in zip(good[:230], bad[:230], strict=True) for r in pair]
    made = TextShard.of(encode_classify(rows, tokenizer, max_length=24, classes=("0", "1")), kind="classify")
    return model, made.between(0, 380), made.between(380, 460), pad_id(tokenizer)


def test_two_pretrained_layers_learn_sooner_than_two_random_ones(reviews: Any) -> None:
    source, learn, judge, pad = reviews
    loss = {}
    for name, random in (("pretrained", None), ("random", 0)):
        base, _ = load_classifier(source, classes=2, seed=0, layers=2, random=random)
        model = FullClassifier(base, name="minilm-2", exclude=("embeddings",))
        work = Train(model, optimizer=ClientOptimizer("adamw", lr=3e-4))
        state = work.init(Job(work="t", shared=Shared(model.init(0)), version=0, clients=(0,), seed=0), (0,), None)
        for batch in TrainSource([learn.between(0, 160)], batch_size=8, steps=30, pad=pad).batches((0,), 0):
            state = work.step(state, batch)
        loss[name] = loss_of(model, {n: x[0] for n, x in state.params_C.items()}, [judge], pad)
    assert loss["pretrained"] < 0.67 < loss["random"], loss


def test_a_ridge_head_beats_a_random_one_before_the_first_round(reviews: Any) -> None:
    source, learn, judge, pad = reviews
    base, _ = load_classifier(source, classes=2, seed=0)
    adapter = Lora(targets=("query",), rank=2, heads=("classifier",))
    model = ClassifierCohort(base, adapter=adapter, name="minilm", prove=False)
    start = model.init(0)
    sums = solved(model, start, [learn.between(0, 300)], pad=pad)
    ridge = scaled(model, start, sums, [learn.between(300, 380)], pad)
    loss = {name: loss_of(model, tree, [judge], pad) for name, tree in (("random", start), ("ridge", ridge))}
    assert loss["ridge"] < loss["random"] - 0.1, loss


def test_a_class_that_nobody_has_can_still_be_found() -> None:
    rows, shared = blobs(), MLP.init(0)
    two = [replace(r, labels=np.where(r.labels == 2, 1, r.labels)) for r in rows]
    start = head_start(MLP, Shared.of_flat(shared), solved(MLP, shared, two, rule=Lda(0.1, bits=16)))
    bias_K = start.trainable["layer1.bias"]
    assert float(bias_K[2]) == pytest.approx(float(bias_K[:2].min()) - 3, abs=1e-5)
