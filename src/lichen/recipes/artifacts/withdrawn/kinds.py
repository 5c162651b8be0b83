"""Every kind of file that a run leaves: what it holds of one client, and what becomes of it when that client goes.

This is the one list. A file of no kind here is none that Lichen writes, and a purge refuses it.

=============  =========================================================================================
``act``        what a purge does with the file of the run without the client
=============  =========================================================================================
``same``       its bytes are put in place: no client is in it, or it is a sum without the client
``names``      JSON, in which the client's name becomes another, and entries under it go
``own``        belongs to one client: the withdrawn one's goes
``written``    a writer of its own leaves the client out
``signed``     is made and signed anew
``ours``       stays the old run's, such as its key
``gone``       is not carried over: it is of a run that is going on, or can be made again
=============  =========================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

__all__ = ["KINDS", "client_of", "inside", "kind_of"]

Act = Literal["same", "names", "own", "written", "signed", "ours", "gone"]
"""What becomes of a file."""

Holds = Literal["nothing", "name", "rows", "numbers", "messages", "private state", "sum", "by number"]
"""What a file can hold of a client: nothing; its name; its rows or texts; numbers made from its rows alone; what it
sent; what only it has; a part in a sum of several; only its place in the roster."""

_FAN = 1000
"""Clients of one folder of private state or messages."""

_CLIENT = r"(?P<thousand>\d+)/(?P<rest>\d+)"
_PART = r"(?:\d+-[^/]+|periods/[^/]+|distilled)/"
"""A run within the folder of stages or of a stream."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        pattern: Of its path within the run's folder; groups say whose it is, by number or by folder.
        what: In words.
        holds: What of a client.
        act: What a purge does.
    """

    pattern: re.Pattern[str]
    what: str
    holds: tuple[Holds, ...]
    act: Act


def _kind(pattern: str, what: str, act: Act, *holds: Holds) -> Kind:
    return Kind(pattern=re.compile(pattern), what=what, holds=holds or ("nothing",), act=act)


KINDS: tuple[Kind, ...] = (
    _kind(r"recipe\.yaml", "the recipe: names of clients where a key takes them, paths", "written", "name"),
    _kind(r"roster\.json", "the roster: name, rows and labels of each client", "written", "name", "numbers"),
    _kind(r"cards\.json", "data cards, with the names of owners who were left out", "names", "name"),
    _kind(r"fingerprints\.json", "digests of owners' secret keys, by name", "names", "name", "numbers"),
    _kind(r"classes\.json", "names of the classes of all clients' labels", "same", "sum"),
    _kind(r"trace\.jsonl", "the rounds: who was asked and missing, values by client", "written", "by number", "sum"),
    _kind(r"summary\.json", "the summary, over all clients", "written", "sum"),
    _kind(r"clients\.csv", "rows and scores of each client, by name", "written", "name", "numbers"),
    _kind(r"contributions\.json", "what each client contributed, by name", "written", "name", "numbers"),
    _kind(r"payout\.csv", "what each client was paid, by name", "written", "name", "numbers"),
    _kind(r"influence\.csv", "how training rows begin, and their influence", "gone", "name", "rows", "numbers"),
    _kind(r"(clients|contributions)\.png", "a picture with the clients' names", "written", "name", "numbers"),
    _kind(r"curves\.png", "a picture of the rounds", "written", "sum"),
    _kind(r"periods\.png", "a picture of a stream's models", "same", "sum"),
    _kind(r"record\.jsonl", "the record: who was asked, digests of messages", "signed", "by number", "numbers"),
    _kind(r"(record|manifest)\.json", "the record's signature, or digests of the files", "signed"),
    _kind(r"deletions\.jsonl", "who was withdrawn before, by a salted digest", "signed"),
    _kind(r"withdrawal\.json", "how this run was made from one with the client", "names", "name", "numbers"),
    _kind(r"forgotten\.json", "what forgetting a client cost, and how the others fare", "names", "name", "sum"),
    _kind(r"state/copied\.json", "from where forgetting a client began", "gone", "by number"),
    _kind(r"rebase\.json", "how two bases compare over all clients", "same", "sum"),
    _kind(r"answers\.jsonl", "answers of the model on the old base to public questions", "same", "sum"),
    _kind(r"(pool\.jsonl|dropped\.json)", "rows that a foundation model wrote, from what clients sent", "same", "sum"),
    _kind(r"periods\.json", "every model of a stream on every period", "same", "sum"),
    _kind(r"stages\.(json|md)", "the stages in a table", "same", "sum"),
    _kind(r"adapter/(README\.md|MANIFEST\.json)", "the adapter's card, and its signed list", "signed", "sum"),
    _kind(r"adapter/.+", "the adapter", "same", "sum"),
    _kind(r"model/[^/]+/(?P<number>\d{4,})\.safetensors", "a client's own model", "own", "numbers", "private state"),
    _kind(r"model/(.+/)?config\.json", "about the model: its classes, and clients by name", "names", "name", "sum"),
    _kind(r"model/.+", "the model", "same", "sum"),
    _kind(r"(merged|int8|student(-[a-z0-9]+)?)/.+", "a whole model that was exported", "gone", "sum"),
    _kind(r"model-[a-z0-9_]+\.gguf", "a whole model that was exported in one file", "gone", "sum"),
    _kind(
        r"own/(?P<folder>[^/]+)(/.+|\.gguf)", "a client's own model that was exported", "gone", "name", "numbers", "sum"
    ),
    _kind(
        r"state/sites/\d+/own/(?P<folder>[^/]+)/.+",
        "a client's own model at its site",
        "gone",
        "name",
        "numbers",
        "sum",
    ),
    _kind(r"(state/(.+/)?)?own_values/(.+/)?(?P<number>\d+)\.csv", "a client's own values", "own", "numbers"),
    _kind(r"crash\.txt", "where a fault of Lichen was", "gone"),
    _kind(r"state/lock", "the lock", "gone"),
    _kind(r"state/journal\.jsonl", "which rounds are whole", "gone", "by number", "numbers"),
    _kind(r"state/recipe\.sha256", "the recipe's digest", "gone"),
    _kind(r"state/inputs\.json", "digests of all rows", "written", "sum"),
    _kind(r"state/(.+/)?blocks\.json", "how many clients share a call", "same"),
    _kind(r"state/record\.key", "the key that signs the record", "ours"),
    _kind(r"state/(privacy|canaries)\.key", "what noise or canaries are drawn from", "ours"),
    _kind(r"state/budget\.jsonl", "the privacy that was spent", "ours"),
    _kind(
        r"state/(.+/)?accounts/(?P<number>\d+)\.jsonl", "the privacy that a client's rows have spent", "own", "numbers"
    ),
    _kind(r"state/run\.json", "the federation's run, and sites that were left out", "names", "name"),
    _kind(r"state/announced\.json", "what sites said of their clients", "gone", "name", "numbers"),
    _kind(r"state/final\.safetensors", "the model's tensors", "same", "sum"),
    _kind(r"state/chat_template\.jinja", "the chat template", "same"),
    _kind(r"state/scratch/.+", "the model before the first round, and its tokenizer", "same", "sum"),
    _kind(
        r"state/scores/features/[a-z]+-(?P<number>\d+)\.safetensors",
        "what an encoder made of a client's rows",
        "gone",
        "rows",
        "numbers",
    ),
    _kind(r"state/scores/(sums|head|.+\.repaired)\.safetensors", "sums that were solved, or tensors", "gone", "sum"),
    _kind(r"state/scores/.+\.safetensors", "scores of each client, and answers to rows", "gone", "numbers"),
    _kind(
        rf"state/(.+/)?checkpoints/\d+/.+/{_CLIENT}/-?\d+\.safetensors",
        "a client's private state of an earlier round",
        "gone",
        "private state",
    ),
    _kind(r"state/(.+/)?checkpoints/\d+\.safetensors", "the server's state of an earlier round", "gone", "sum"),
    _kind(rf"state/(.+/)?history/\d+/{_CLIENT}\.safetensors", "a client's message", "own", "messages"),
    _kind(r"state/(.+/)?messages/.+", "messages of a round that is valued", "gone", "messages"),
    _kind(r"state/(.+/)?\.answers/.+", "answers of a site until they are acknowledged", "gone", "messages"),
    _kind(r"state/(.+/)?\.staged\.[^/]+", "a list of what clients have staged", "gone", "by number"),
    _kind(
        rf"state/(.+/)?{_CLIENT}/-?\d+\.safetensors",
        "a client's private state: error feedback, its own model, what it has scored",
        "own",
        "private state",
    ),
    _kind(r"state/.+/previous\.safetensors", "the server's state of the round before", "gone", "sum"),
    _kind(r"state/.+/server\.safetensors", "the server's state: model, moments, best round, links", "same", "sum"),
    _kind(r"state/sites/\d+/(announced|place)\.json", "what a site said of its clients", "names", "name", "numbers"),
    _kind(r"state/sites/\d+/[^/]+", "what a site's process needs to go on", "gone", "private state"),
)
"""The first that fits is a file's kind."""


def inside(name: str) -> str:
    """A file's path within its own run, where that is a stage or a period of the folder.

    >>> inside("2-chat/state/lock"), inside("periods/2026-01/trace.jsonl"), inside("adapter/README.md")
    ('state/lock', 'trace.jsonl', 'adapter/README.md')
    """
    found = re.match(_PART, name)
    return name[found.end() :] if found else name


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its path within the folder; None where Lichen writes no such file.

    >>> kind_of("roster.json").what
    'the roster: name, rows and labels of each client'
    """
    return _found(name)[0]


def client_of(name: str) -> int | None:
    """The number of the client that a file belongs to; None where it is nobody's alone.

    >>> client_of("state/federated/lr=0.1/history/3/1234/567.safetensors")
    1234567
    """
    groups = _found(name)[1]
    if number := groups.get("number"):
        return int(number)
    thousand, rest = groups.get("thousand"), groups.get("rest")
    return _FAN * int(thousand) + int(rest) if thousand and rest else None


def _found(name: str) -> tuple[Kind | None, Mapping[str, str | None]]:
    """The first kind that fits, and what of the path says whose the file is."""
    path = inside(name)
    for kind in KINDS:
        if match := kind.pattern.fullmatch(path):
            return kind, match.groupdict()
    return None, {}
