"""What a late answer does to a product of LoRA factors, by its age.

A client that began with (A_v, B_v) sends (ΔA, ΔB). Its own product has changed by

    C = (B_v + ΔB) (A_v + ΔA) - B_v A_v

Added factor by factor to the server's pair of τ steps later, (A', B'), it changes the product by

    D = (B' + ΔB) (A' + ΔA) - B' A' = C + ΔB (A' - A_v) + (B' - B_v) ΔA

and |D - C| / |C|, over all layers together, is what is told, as the median over answers. ``projected`` is the least
that any change of the first order at (A', B') would leave, |(I - P_B') C (I - P_A')| / |C|, with projections on the
columns of B' and the rows of A'. ``averaging`` is what the mean of five fresh answers loses by being one of factors,
over the same kind of norm. Real reviews, MiniLM, rank 8, five of six clients a round. With ffa A stands still, and D
is C. ``python benchmarks/stale_factors.py`` prints the table; the first time it takes minutes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

RESULT = Path(__file__).parent / "results" / "stale_factors.json"
AGES, ROUNDS, FROM = (0, 1, 3, 8), 14, (1, 3, 5)
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def pairs(tree: Any, like: Any) -> Pairs:
    """``(B, A)`` by layer, float64; what a change does not move is 0 there."""
    names = [name for name in like if name.endswith("lora_A")]
    zero = {name: torch.zeros_like(x) for name, x in like.items()}
    both = {**zero, **tree}
    return {n[:-6]: (both[n[:-1] + "B"].double(), both[n].double()) for n in names}


def norm(matrices: Any) -> float:
    """Over all layers together."""
    return float(sum(x.square().sum() for x in matrices)) ** 0.5


def moved(at: Pairs, change: Pairs) -> dict[str, torch.Tensor]:
    """By how much a change of factors moves the products, by layer."""
    return {n: (B + change[n][0]) @ (A + change[n][1]) - B @ A for n, (B, A) in at.items()}


def left(C: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What no change of the first order at (B, A) can give."""
    out = C - B @ (torch.linalg.pinv(B) @ C)
    return out - (out @ torch.linalg.pinv(A)) @ A


def measured(rule: str) -> dict[str, Any]:
    """A trajectory of synchronous rounds, and its answers added later."""
    from lichen.core.seeds import derive
    from lichen.core.store import ClientStore
    from lichen.engines.around import AroundEngine
    from lichen.engines.local import LocalEngine
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.assemble.parts import algorithm_of, client_tasks
    from lichen.recipes.schema.read import read_recipe

    words = [f"federation.aggregate={rule}", "optimizer.lr=0.002", "optimizer.schedule=constant"]
    words += ["optimizer.grid_rounds=null", "data.max_clients=6", "compare.baselines=[]"]
    words += ["data.max_length=32", "federation.batch_size=4"]
    own = open_recipe(read_recipe("reviews-lora", words)).experiment
    algorithm = replace(algorithm_of(own.server, 0.002, 99), valid=None)
    answers: list[tuple[int, Pairs]] = []
    state = algorithm.init(own.start)
    like = own.start.trainable

    def look(reply: Any, job: Any) -> Any:
        message = reply.message
        for place in range(len(message.client_C)):
            answers.append((job.version, pairs({n: x[place] for n, x in message.tensors.items()}, like)))
        return (reply,)

    path = [pairs(state.shared.trainable, like)]
    with tempfile.TemporaryDirectory() as folder:
        engine = AroundEngine(LocalEngine(client_tasks(own), ClientStore(Path(folder)), block_size=1), on_reply=look)
        for _ in range(ROUNDS):
            state, _ = algorithm.round(state, engine, derive(0, "round", state.round))
            path.append(pairs(state.shared.trainable, like))
    rows = []
    for version, change in answers:
        if version not in FROM:
            continue
        C = moved(path[version], change)
        size = norm(C.values())
        for age in AGES:
            later = path[version + age]
            D = moved(later, change)
            error = norm(D[n] - C[n] for n in C) / size
            rest = norm(left(C[n], *later[n]) for n in C) / size
            rows.append({"version": version, "age": age, "error": error, "projected": rest})
    lost = []
    for version in FROM:
        some = [change for at, change in answers if at == version]
        mean = {n: tuple(sum(c[n][i] for c in some) / len(some) for i in (0, 1)) for n in some[0]}
        each = [moved(path[version], change) for change in some]
        exact = {n: sum(one[n] for one in each) / len(some) for n in mean}
        got = moved(path[version], mean)  # type: ignore[arg-type]
        lost.append(norm(got[n] - exact[n] for n in exact) / norm(exact.values()))
    return {"rows": rows, "averaging": lost}


def main() -> None:
    """Measure what is missing, and print the table."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for rule in ("fedit",):
        if rule not in found:
            found[rule] = measured(rule)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print("| rule | averaging | " + " | ".join(f"τ = {age}" for age in AGES) + " | projected, τ = 8 |")
    print("|---|" + "---:|" * (len(AGES) + 2))
    for rule, one in found.items():
        shown = [statistics.median(r["error"] for r in one["rows"] if r["age"] == age) for age in AGES]
        rest = statistics.median(r["projected"] for r in one["rows"] if r["age"] == AGES[-1])
        numbers = [statistics.median(one["averaging"]), *shown, rest]
        print(f"| {rule} | " + " | ".join(f"{100 * x:.1f} %" for x in numbers) + " |")
    for version in FROM if "--all" in sys.argv else ():
        for rule, one in found.items():
            some = [
                (age, [r["error"] for r in one["rows"] if (r["version"], r["age"]) == (version, age)]) for age in AGES
            ]
            print(rule, version, {age: round(statistics.median(x), 3) for age, x in some})


if __name__ == "__main__":
    main()
