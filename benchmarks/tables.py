"""Prints tables of the pages from the results that are kept; nothing is run.

``python benchmarks/tables.py NAME [WORD ...]``: a function below is a name, its arguments the words. No table needs
torch. What a page says of single runs, such as a difference that its text quotes, is printed here too.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lichen.present.compare import ComparisonRow, Spread
from lichen.present.compare_table import comparison_markdown
from lichen.present.units import bytes_text, seconds_text

RESULTS = Path(__file__).resolve().parent / "results"
SPREADS = ("value", "worst", "base", "constant", "forgotten_before", "forgotten_after",
           "attack_success", "refused", "target_rounds", "target_bytes", "target_seconds")  # fmt: skip


def read(name: str) -> Any:
    """A result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def cells_of(pattern: str, key: str = "config") -> list[dict[str, Any]]:
    """The results of these names, in order.

    Raises:
        ValueError: if they were not made with the same settings, which cannot be averaged.
    """
    found = [read(str(file.relative_to(RESULTS))) for file in sorted(RESULTS.glob(pattern))]
    if any(one[key] != found[0][key] for one in found):
        raise ValueError(f"{pattern}: results of several settings; run again what is old")
    return found


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Mean, and the sample deviation where there are several; empty where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):{form}}" + (f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else "")


def show(heads: str, rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Print a table whose first columns are words and whose others are numbers; heads are parted by bars."""
    cells = heads.split("|")
    print(f"| {' | '.join(head.strip() for head in cells)} |")
    print("|" + "---|" * words + "---:|" * (len(cells) - words))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def compared(folder: str) -> None:
    """The table of a finished ``lichen compare``."""
    rows = []
    for row in read(f"{folder}/compare.json")["rows"]:
        wide = {name: Spread(**row[name]) for name in SPREADS if row.get(name)}
        rows.append(ComparisonRow(**{**row, **wide, "seeds": tuple(row["seeds"]), "faults": tuple(row["faults"])}))
    print(comparison_markdown(rows).partition("\n\n")[0])


TOO_BIG = (
    ("LoRA, the model whole (FedIT)", "FedIT"),
    ("base in 8 bits", "base-int8"),
    ("base in 4 bits", "base-nf4"),
    ("a group of layers in turn", "layer-wise"),
    ("no way back through the model (MeZO)", "MeZO"),
    ("a soft prompt found by asking (FedBPT)", "FedBPT"),
)
"""Ways of adapting a model that is too big for its clients, and what ``adapt-chat`` calls them."""


def too_big() -> None:
    """What ways for clients that are short of memory or of access cost and gave on ``adapt-chat``."""
    found = {row["method"]: row for row in read("adapt-chat/compare.json")["rows"]}
    rows = []
    for title, name in TOO_BIG:
        row = found[name]
        before, after = (spread(row[key]["values"], ".1f") for key in ("base", "value"))
        memory, up, down = (bytes_text(row[key]) for key in ("memory", "client_up", "client_down"))
        rows.append([title, memory, up, down, before, after])
    show("way | client memory | up | down | perplexity before | after", rows)


TOO_BIG_APART = (
    ("LoRA, the model whole (FedIT)", "FedIT"),
    ("split after two blocks, last one at the client", "v1"),
    ("the same in int8", "int8"),
    ("split after one block", "cut-1"),
    ("split, one copy of the middle in turns", "v2"),
)
"""What ``split-chat`` calls ways of holding a part of a model."""


def too_big_apart() -> None:
    """What ways of holding a part of a model cost and gave, on the rows of ``split-chat`` and ``offsite-chat``."""
    found = {row["method"]: row for row in read("split-chat/compare.json")["rows"]}
    rows = []
    for title, name in TOO_BIG_APART:
        row = found[name]
        before, after = (spread(row[key]["values"], ".1f") for key in ("base", "value"))
        sent = (bytes_text(row[key]) for key in ("memory", "client_up", "client_down"))
        rows.append([title, *sent, before, after])
    for name, one in sorted(read("offsite-chat/offsite.json")["cells"].items()):
        means = [cell["means"] for cell in one.values()]
        before, after = (spread([mean[key] for mean in means], ".1f") for key in ("base", "plugged"))
        middle, how = name.split("-")
        rows.append([f"offsite, ends of two, {middle} of 26 between ({how})", "", "", "", before, after])
    show("way | client memory | up | down | perplexity before | after", rows)


def adapt_again() -> None:
    """Methods of ``adapt-chat`` that have all three seeds on the rows that a recipe chooses today."""
    rows = []
    for folder in sorted((RESULTS / "adapt-chat-again").iterdir()):
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("seed-*/summary.json"))]
        if len(runs) == 3:
            before, after = ([run["columns"][one]["mean"] for run in runs] for one in ("base", "federated"))
            rows.append(
                (
                    statistics.mean(after),
                    [
                        folder.name.rpartition("-")[0],
                        *(f"{x:.1f}" for x in after),
                        spread(before, ".1f"),
                        spread(after, ".1f"),
                    ],
                )
            )
    show("method | seed 0 | seed 1 | seed 2 | perplexity before | after", [row for _, row in sorted(rows)])


def buffered_lora() -> None:
    """What rules that may be buffered lose by it, over as many seeds as there are."""
    rows = []
    for row in read("buffered-lora/compare.json")["rows"]:
        if row["value"]:
            each = ", ".join(f"{value:.3f}" for value in row["value"]["values"])
            worst = spread(row["worst"]["values"])
            rows.append([row["method"], str(len(row["seeds"])), each, spread(row["value"]["values"]), worst])
    show("method | seeds | macro-F1, each seed | mean | worst decile", rows)


def gkt() -> None:
    """FedGKT beside its neighbours, digits evenly and unevenly spread."""
    found = [one["values"] for one in cells_of("research/gkt-s*.json", "part")]
    names = [name.removeprefix("even: ") for name in found[0] if name.startswith("even: ")]
    rows = [[name, *(spread([one[f"{word}: {name}"] for one in found]) for word in ("even", "skew"))] for name in names]
    show("accuracy | even | skew", rows)


def pate() -> None:
    """PATE beside its neighbours."""
    found = [one["values"] for one in cells_of("research/pate-s*.json", "part")]
    rows = []
    for name in ("votes without noise", "PATE, epsilon 8", "PATE, epsilon 1"):
        right, student = (
            spread([one[f"{word}{name}"] for one in found]) for word in ("right answers, ", "student of ")
        )
        rows.append([name, f"{found[0].get(f'noise in votes, {name}', 0.0):.1f}", right, student])
    for name, key in (("the true labels", "student of the true labels"), ("a client's own model",) * 2):
        rows.append([name, "", "", spread([one[key] for one in found])])
    show("labels of | noise, in votes | winners that are right | macro F1 of the student", rows)


def seeds(folder: str, *methods: str) -> None:
    """Each seed's score of some methods, and what their own bare model has."""
    found = {row["method"]: row for row in read(f"{folder}/compare.json")["rows"]}

    def each(some: dict[str, Any]) -> str:
        return ", ".join(f"{value:.1f}" for value in some["values"])

    rows = [[name, f"{len(found[name]['seeds'])}", each(found[name]["base"]), each(found[name]["value"])]
            for name in methods]  # fmt: skip
    show("method | seeds | bare model, each seed | reached, each seed", rows)


def summaries(folder: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The summaries of a comparison's row, in the order of its seeds; folders of former recipes are passed over."""
    for place in sorted((RESULTS / folder).glob(f"{row['method']}-????????")):
        files = [place / f"seed-{seed}" / "summary.json" for seed in row["seeds"]]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if [one["columns"]["federated"]["mean"] for one in found] == row["value"]["values"]:
            return found
    raise FileNotFoundError(f"{folder}: no summaries of {row['method']}")


def encoders(folder: str = "adapt-reviews") -> None:
    """Each way of training an encoder beside the majority class: the mean over clients, and all test rows together.

    A share is a method's gain over the majority class by LoRA's, on the same seeds.
    """
    told = read(f"{folder}/compare.json")
    kept = {row["method"]: summaries(folder, row) for row in told["rows"] if row["seeds"]}
    parts = ("mean over clients", "federated.macro_f1", "federated.accuracy")

    def scores(runs: Sequence[dict[str, Any]], column: str) -> list[list[float]]:
        own = [{**run["columns"], **run["extra_columns"]}[column]["mean"] for run in runs]
        return [own, *([run["extra"][key.replace("federated", column)] for run in runs] for key in parts[1:])]

    rows = []
    for name, runs in {"*the majority class*": kept["LoRA"], **kept}.items():
        column = "federated" if name in kept else "majority"
        own, least = scores(runs, column), scores(runs, "majority")
        first = scores(kept["LoRA"][: len(runs)], "federated")
        gains = zip(own, least, first, strict=True)
        means = [[statistics.mean(values) for values in some] for some in gains]
        shares = [f"{100 * (mine - no) / (best - no):.0f} %" for mine, no, best in means]
        same = sum(mine == no for mine, no in zip(zip(*own, strict=True), zip(*least, strict=True), strict=True))
        cells = [cell for pair in zip((spread(x, ".4f") for x in own), shares, strict=True) for cell in pair]
        rows.append([name, *cells, f"{same} of {len(runs)}"])
    show(f"method | {told['metric']}, mean over clients | share | macro F1, all rows | share | accuracy, all rows | "
         "share | seeds with the majority class's scores", rows)  # fmt: skip


WIRES = {
    "bf16": "bf16 both ways",
    "topk-int4": "up `topk:8/264 int4~`, down `topk:7/32 int4~`",
    "topk-sign": "up `topk:8/176 sign`, down `sign`",
    "rank2-sign": "up `sign/64`, down `int4~`, rank 2",
}


def wires() -> None:
    """What a wire costs and loses, on average over the seeds."""
    found = {row["method"]: row for row in read("wire-chat/compare.json")["rows"]}
    plain = found["bf16"]
    rows = []
    for method, words in WIRES.items():
        row = found[method]
        ways = [
            (f"{row['client_up']:,.0f}", f"1/{plain['client_up'] / row['client_up']:.2f}"),
            (f"{row['client_down']:,.0f}", f"1/{plain['client_down'] / row['client_down']:.2f}"),
        ]
        each = [_lost(row, plain, place) for place in range(len(row["seeds"]))]
        lost = "" if row is plain else f"{statistics.mean(each):.1f} %"
        rows.append([words, f"{statistics.mean(row['value']['values']):.2f}", *ways[0], *ways[1], lost])
    show("wire | perplexity | up a message | against bf16 | down a client and round | against bf16 | "
         "share of the gain lost", rows)  # fmt: skip


def wire_seeds() -> None:
    """Each wire on each seed, and the share of the gain that it loses there."""
    found = {row["method"]: row for row in read("wire-chat/compare.json")["rows"]}
    plain = found["bf16"]
    rows = []
    for place, seed in enumerate(plain["seeds"]):
        values = [plain["base"]["values"][place], plain["value"]["values"][place]]
        lossy = [found[method] for method in WIRES if method != "bf16"]
        lost = [f"{row['value']['values'][place]:.2f} ({_lost(row, plain, place):.1f} %)" for row in lossy]
        rows.append([f"{seed}", f"{values[0]:.1f}", f"{values[1]:.2f}", *lost])
    show("seed | bare | bf16 | topk-int4 | topk-sign | rank2-sign", rows)


def _lost(row: dict[str, Any], plain: dict[str, Any], place: int) -> float:
    """Percent of bf16's gain over the bare model that a wire loses."""
    bare, full, own = (x["values"][place] for x in (plain["base"], plain["value"], row["value"]))
    return float(100 * (own - full) / (bare - full))


def kseed() -> None:
    """FedKSeed on a whole encoder, before and after."""
    cells = cells_of("kseed-?.json", "settings")
    if not cells:
        print("Not run.")
        return
    keys = ("loss", "accuracy", "macro_f1")

    def pair(tests: Sequence[dict[str, dict[str, float]]]) -> list[str]:
        ends = [[statistics.mean(test[end][key] for test in tests) for end in ("start", "end")] for key in keys]
        return [f"{start:.4f} → {end:.4f}" for start, end in ends]

    rows = [[f"{x['seed']}", f"{x['test']['rows']:,.0f}", *pair([x["test"]])] for x in cells]
    show("seed | rows | test loss, start → end | accuracy | macro F1",
         [*rows, ["mean", "", *pair([x["test"] for x in cells])]])  # fmt: skip


def black_box() -> None:
    """A model that can only be asked: test scores over the seeds that are there."""
    ways = {
        "no prompt": ("empty", lambda one: one["test"]),
        "the best of five hand-written prompts on validation rows": ("hand", lambda one: one["test"]),
        "the soft prompt FedBPT begins with": ("soft", lambda one: one["begin"]["test"]),
        "FedBPT": ("soft", lambda one: one["test"]),
        "words searched over HTTP, log-probabilities alone": ("words", lambda one: one["test"]),
    }
    rows = []
    for name, (column, scores) in ways.items():
        found = [scores(read(file.name)) for file in sorted(RESULTS.glob(f"black_box-{column}-?.json"))]
        if found:
            rows.append([name, *(spread([one[key] for one in found], form) for key, form in
                                 (("accuracy", ".3f"), ("loss", ".4f"))), f"{len(found)}"])  # fmt: skip
    show("way | accuracy | loss | seeds", rows)


def evolution() -> None:
    """Distances of written texts to real rows, over seeds."""
    found = read("evolution.json")
    rows = []
    for run in dict.fromkeys(row["run"] for row in found):
        some = [row for row in found if row["run"] == run]
        means = [spread([row[key] for row in some]) for key in ("to_voters", "to_others", "macro_f1")]
        rows.append([run.partition("@")[0], f"{len(some)}", *means])
    show("texts | seeds | to the rows that vote | to rows nobody votes with | macro F1 of the student", rows)


def collapse() -> None:
    """Perplexity of real turns by generation, over seeds."""
    cells = cells_of("collapse-s*.json")
    count = cells[0]["config"]["generations"] + 1
    rows = []
    for way in ("replace", "accumulate"):
        each = [[one[way][k]["perplexity"] for one in cells] for k in range(count)]
        rows.append([way, *(spread(values, ".1f") for values in each)])
    show("generation | " + " | ".join(map(str, range(count))), rows)


MUTUAL = {
    "fedmkt": "FedMKT, whole small models, each shop its own",
    "unheard": "the same steps, nobody told anything",
    "cotune": "FedCoLLM, the small model's adapter",
    "reading": "an averaged adapter reads the public texts at the server, nobody told anything",
    "fedavg": "averaging alone",
    "alone": "everybody alone",
}


def mutual() -> None:
    """Two language models that teach each other: perplexities over seeds, then each seed's own rows."""
    rows, all_of = list[list[str]](), dict[str, Any]()
    for way, words in MUTUAL.items():
        found = cells_of(f"mutual-{way}-s*.json")
        if not found:
            continue
        all_of |= found[0]
        large = [one["large_after"] for one in found if "large_after" in one]
        up, down = (sum(r[key] for r in found[0]["rounds"]) / 1e6 for key in ("up", "down"))
        means = [spread([one[key] for one in found], ".2f") for key in ("after", "common")]
        rows.append([f"{way}: {words}", *means, spread(large, ".2f") if large else "-", f"{up:.1f} MB, {down:.1f} MB",
                     ", ".join(f"{one['after']:.2f}" for one in found)])  # fmt: skip
    if "carried" in all_of:
        before, large_before = (f"{all_of[key]:.2f}" for key in ("before", "large_before"))
        rows.insert(0, ["before", before, before, large_before, "-", "-"])
    show("way | own rows | everybody's rows | SmolLM2 | bytes up, down | each seed, own rows", rows)
    if "carried" in all_of:
        up, down = (100 * all_of["carried"][key] for key in ("up", "down"))
        print(f"\n{down:.0f} % of the small model's places get an answer of SmolLM2's, {up:.0f} % the other way.")


def buffered() -> None:
    """Time, steps and bytes until the target, for rounds that wait and rounds that do not."""
    names = {
        "synchronous": "synchronous, all thirty",
        "deadline": "synchronous, deadline of 5 minutes",
        "buffered-10": "FedBuff, a step after 10 answers",
        "buffered-5": "FedBuff, a step after 5 answers",
    }
    steps = {"synchronous": 30, "deadline": 30, "buffered-10": 10, "buffered-5": 5}
    rows = []
    for row in read("buffered/compare.json")["rows"]:
        took = row["target_seconds"]
        rates = [f"{one['extra']['lr.federated']:g}" for one in summaries("buffered", row)]
        rows.append([
            names[row["method"]], f"{seconds_text(took['mean'])} ± {seconds_text(took['std'])}",
            spread(row["target_rounds"]["values"], ".1f"),
            f"{steps[row['method']] * row['target_rounds']['mean']:.0f}", f"{row['target_bytes']['mean'] / 1e6:.1f} MB",
            spread(row["value"]["values"]), ", ".join(rates),
        ])  # fmt: skip
    show("method | virtual time to 88 % | steps to it | trainings to it | bytes to it, with validation | "
         "accuracy at the end | rates chosen", rows)  # fmt: skip


KNOWN = ("FedAvg", "FedProx", "SCAFFOLD", "FedDyn", "FedDyn-0.01", "FedNova", "FedAdam", "MOON")
"""Methods of ``known-digits``."""


def known() -> None:
    """The methods that a table is expected to have, by how unequal the clients are."""
    found = {row["method"]: row for row in read("known-digits/compare.json")["rows"]}
    rows = []
    for name in KNOWN:
        cells = [name]
        for level in ("skewed", "uneven"):
            row = found[f"{name}@{level}"]
            cells.append(spread(row["value"]["values"]) if row["value"] else "")
            cells.append(spread(row["target_rounds"]["values"], ".1f") if row["target_rounds"] else "never")
        cells.append(bytes_text(found[f"{name}@skewed"]["client_up"]))
        rows.append(cells)
    show("method | skewed | rounds | uneven | rounds | up", rows)


def drift() -> None:
    """Skewed digits: accuracy, and rounds to the target."""
    found = {row["method"]: row for row in read("digits-drift/compare.json")["rows"]}
    rows = []
    for name in dict.fromkeys(method.partition("@")[0] for method in found):
        both = [found[f"{name}@{level}"] for level in ("all", "three")]
        when = []
        for row in both:
            few = "" if row["reached"] == len(row["seeds"]) else f" ({row['reached']} of {len(row['seeds'])} seeds)"
            when.append(f"{row['target_rounds']['mean']:.3g}{few}" if row["reached"] else "never")
        rows.append([name, *(spread(row["value"]["values"]) for row in both), *when])
    show("method | all ten come | three of ten come | rounds, all ten | rounds, three", rows)


def liars() -> None:
    """Four liars among twenty: accuracy by rule and attack."""
    found = {row["method"]: row for row in read("digits-liars/compare.json")["rows"]}
    levels = list(dict.fromkeys(name.partition("@")[2] for name in found))
    rows = [
        [
            f"`{name}`",
            *(
                spread([100 * value for value in found[f"{name}@{level}"]["value"]["values"]], ".1f")
                for level in levels
            ),
        ]
        for name in dict.fromkeys(name.partition("@")[0] for name in found)
    ]
    show(" | ".join(["rule", *(level.replace("-", ", ") for level in levels)]), rows)


def hidden() -> None:
    """Three hundred clients with four digits each, each hidden at three budgets: accuracy, and what noise that took."""
    found = {row["method"]: row for row in read("digits-private/compare.json")["rows"]}
    spent = read("digits-private/privacy.json")
    rows = [
        [
            name,
            f"{spent[name]['sigma']:.3f}",
            "-" if spent[name]["epsilon"] is None else f"{spent[name]['epsilon']:.3f}",
            f"{spent[name]['noise']:.3f}",
            spread([100 * value for value in row["value"]["values"]], ".1f"),
        ]
        for name, row in found.items()
    ]
    show("| σ | ε | noise in a round's change | accuracy", rows)


def private_rules() -> None:
    """Rules of LoRA that tune an encoder, each review hidden: noise in a step, macro F1, and test loss."""
    found = {row["method"]: row for row in read("reviews-private/compare.json")["rows"]}
    spent = read("reviews-private/privacy.json")
    rows = [
        [
            name.replace("@", ", "),
            f"{spent[name]['numbers']:,}",
            f"{spent[name]['sigma']:.3f}",
            f"{spent[name]['noise']:.2f}",
            spread(row["value"]["values"]),
            f"{spent[name]['loss']:.3f}",
        ]
        for name, row in found.items()
    ]
    show("rule, promise | numbers | σ | noise in a step | macro F1 | test loss", rows)


def owners() -> None:
    """Two liars among ten owners of an encoder: macro F1 by rule and attack, and how well a back door works."""
    found = {row["method"]: row for row in read("reviews-liars/compare.json")["rows"]}
    rows = [
        [
            f"`{name}`",
            *(spread(found[f"{name}@{level}"]["value"]["values"]) for level in ("none", "flip", "backdoor")),
            spread(found[f"{name}@backdoor"]["attack_success"]["values"]),
        ]
        for name in dict.fromkeys(name.partition("@")[0] for name in found)
    ]
    show("rule | none | flip | back door | its success", rows)


def semi() -> None:
    """What unlabelled digits add to a few labels."""
    found = read("semi.json")
    show(" | ".join(found[0]), [[spread([one[name] for one in found]) for name in found[0]]], words=0)


TABLES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        compared,
        too_big,
        too_big_apart,
        buffered_lora,
        adapt_again,
        gkt,
        pate,
        seeds,
        encoders,
        wires,
        wire_seeds,
        kseed,
        black_box,
        evolution,
        collapse,
        mutual,
        buffered,
        drift,
        known,
        liars,
        hidden,
        private_rules,
        owners,
        semi,
    )
}


if __name__ == "__main__":
    TABLES[sys.argv[1]](*sys.argv[2:])
