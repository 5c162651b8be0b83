"""Count the private words that are left in identifiers, where the field has words of its own.

``python docs/words.py`` prints the table; ``tests/test_words.py`` holds each count, which may only fall. An identifier
is split at underscores and capitals, so that ``told_of`` and ``Told`` both count as ``told``. An entry of several
parts, such as ``or_nothing``, counts where its parts follow one another.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lichen"


@dataclass(frozen=True, slots=True)
class Old:
    """A private word, the field's word for it, and where else it is right.

    Attributes:
        word: The word as it stands in identifiers, in small letters; parts joined by underscores.
        new: What the field says.
        only: Files in which the word has the private meaning; empty: all.
        but: Files in which it has another meaning.
        why: That other meaning.
    """

    word: str
    new: str
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    why: str = ""


WORDS = (
    Old("told", "metrics, response, message, generations, predicted_label"),
    Old("said", "metrics, response, message, predicted_label"),
    Old("heard", "transfer, received"),
    Old("tell", "report", but=("clients/training/fedbpt.py", "present/trace.py"), why="CMA-ES's and files' own method"),
    Old("listen", "distill", but=("federation/door.py",), why="a socket's own method"),
    Old("visit", "train_then_report"),
    Old("spoken", "labelled_tokens"),
    Old("believed", "selected"),
    Old("silent", "null_targets"),
    Old("hear", "distill_step"),
    Old("pupil", "CoTunedModel"),
    Old("offer", "FeatureUpload"),
    Old("offers", "GatherFeatures"),
    Old("ballot", "LabelVote"),
    Old("vote_state", "NearestNeighborState", but=("research/pate/*",), why="PATE's vote is the field's word"),
    Old("at_home", "LocalInit"),
    Old("in_turn", "ConcatSource"),
    Old("began", "initial"),
    Old("begin_of", "initial_shared"),
    Old("begin", "initial", only=("clients/*",), why="where a piece begins"),
    Old(
        "held",
        "acked, frozen, shard_of",
        but=("data/sources/*", "recipes/rows/*", "recipes/withdrawal/*"),
        why="held-out rows",
    ),
    Old("kept", "cached, retained, saved"),
    Old("shelf", "CacheStore"),
    Old("mark", "key", only=("fm/*",), why="a parser's mark; a sign in a text"),
    Old("faces", "foundation_models, FMRegistry"),
    Old("face", "client"),
    Old("asked", "EndpointConfig, QueryCounts, query"),
    Old("flow", "DisclosurePolicy", but=("recipes/schema/*",), why="YAML's flow style"),
    Old("ledger", "Usage"),
    Old("commons", "public_data"),
    Old("links", "DownlinkState"),
    Old("towards", "advance"),
    Old("view_name", "snapshot_name"),
    Old(
        "views",
        "snapshot",
        but=(
            "clients/training/fix*.py",
            "data/batches/*",
            "recipes/help/steps.py",
            "recipes/assemble/*",
            "recipes/tasks/*",
        ),
        why="views of a row",
    ),
    Old("encode_step", "encode_delta"),
    Old("take_step", "apply_delta"),
    Old("steps", "deltas", only=("transforms/downlink*.py", "core/wire/job.py", "core/message.py"), why="SGD steps"),
    Old("sketch", "powersgd"),
    Old("chain_of", "parse_codecs"),
    Old("noise", "directions", only=("core/*", "clients/training/*"), why="noise that protects, or that is sampled"),
    Old("room", "auto_block_size, free memory"),
    Old("rooms", "DeviceTier"),
    Old("station", "ClientTask"),
    Old("stations", "client_tasks"),
    Old("bench", "Experiment"),
    Old("aid", "Auxiliary"),
    Old(
        "opened",
        "LoadedExperiment",
        but=("core/masks/*", "data/chat/*"),
        why="a share that is opened; an answer's opening in a chat template",
    ),
    Old("unequal", "HeterogeneousClients", but=("recipes/schema/federation.py",), why="rates that are not equal"),
    Old("helped", "TaskResult"),
    Old("wrote", "WrittenRows"),
    Old("home", "local_params", but=("data/sources/*", "core/store.py"), why="the user's home and cache folder"),
    Old("phases", "freeze_schedule"),
    Old("still", "frozen", only=("server/*", "recipes/assemble/*", "clients/*"), why="what has not ended"),
    Old("parted", "split_by"),
    Old("beside", "with_"),
    Old("together", "join"),
    Old("taken", "accepted"),
    Old("drawn", "sampled"),
    Old("worth", "min_bytes"),
    Old("fine", "finite", but=("algorithms/semi.py",), why="fine-tuning"),
    Old("few", "scarce", but=("recipes/*",), why="the key on_too_few_rows"),
    Old("side_by_side", "map_clients"),
    Old("gauge", "memory meter", but=("federation/page.py",), why="Prometheus's kind of number"),
    Old(
        "clock",
        "timing",
        but=(
            "algorithms/*",
            "core/*",
            "engines/*",
            "fl/*",
            "recipes/assemble/*",
            "recipes/schema/*",
            "recipes/tasks/*",
        ),
        why="virtual time",
    ),
    Old("expect", "estimate"),
    Old("wanted", "targets, requested"),
    Old("tidy", "clean"),
    Old("says", "Labeler"),
    Old("places", "TokenPositions, positions"),
    Old("taught", "DistilledLM"),
    Old("speaker", "LogitsProvider"),
    Old("seed_steps", "FedKSeed"),
    Old("materialized", "FedKSeed"),
    Old("add_units", "FedKSeed"),
    Old("or_nothing", "AllowEmpty"),
    Old("ascend", "AFL"),
    Old("gain_of", "PerClientGain"),
    Old(
        "cut",
        "Submodel",
        only=("core/contracts/*", "algorithms/*", "server/*", "recipes/assemble/*"),
        but=("recipes/assemble/pieces/*", "recipes/assemble/sides/splitting/*"),
        why="cut short; split learning cuts a model",
    ),
)


def parts(name: str) -> list[str]:
    """The words of an identifier, in small letters.

    >>> parts("_HeldOut_CB")
    ['held', 'out', 'cb']
    """
    return [part.lower() for part in re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).split("_") if part]


def identifiers(path: Path) -> Counter[str]:
    """Every name that a file's code holds, keywords among them."""
    with tokenize.open(path) as file:
        return Counter(token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME)


def counts(root: Path = SOURCE) -> dict[str, Counter[str]]:
    """For each old word, how often it stands in each file; ``cli.py`` and the like count as they stand."""
    found: dict[str, Counter[str]] = {old.word: Counter() for old in WORDS}
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        names = [(f"_{'_'.join(parts(name))}_", times) for name, times in identifiers(path).items()]
        for old in WORDS:
            if any(fnmatch(file, glob) for glob in old.but):
                continue
            if old.only and not any(fnmatch(file, glob) for glob in old.only):
                continue
            times = sum(times for name, times in names if f"_{old.word}_" in name)
            if times:
                found[old.word][file] = times
    return found


def main() -> int:
    found = counts()
    for old in WORDS:
        files = found[old.word]
        where = ", ".join(f"{file} {times}" for file, times in files.most_common(4))
        print(f"{old.word:14} {sum(files.values()):5}  {old.new:56} {where}".rstrip())
    print(f"{'all':14} {sum(sum(files.values()) for files in found.values()):5}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
