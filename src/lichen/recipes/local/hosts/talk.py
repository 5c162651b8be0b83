"""Talks to a finished run whose model is dealt out to hosts, none of which holds the whole, and says how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.models.loading.load import causal_tokenizer
from lichen.recipes.artifacts.sampling import Sampling, settings_text, write
from lichen.recipes.artifacts.use.talk import Talker
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.local.hosts.chain import Chain, host_processes, resident_bytes
from lichen.recipes.local.hosts.hosted import hosted
from lichen.recipes.local.hosts.run_pieces import RunPieces
from lichen.recipes.stages.folder import last_stage

__all__ = ["talk_over_hosts", "time_over_hosts"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HostPace:
    """How fast hosts wrote.

    Attributes:
        delay: Seconds that a question to a host and its answer were on their way.
        first_seconds: From the question to the first token.
        tokens_per_second: Of those after it; None where there was but one.
    """

    delay: float
    first_seconds: float
    tokens_per_second: float | None


@contextmanager
def talk_over_hosts(
    folder: Path | str, hosts: int, *, say: Callable[[str], None] = lambda _: None, **requested: float | None
) -> Iterator[Talker]:
    """Start hosts with a piece of a finished run's model each; they end with this.

    Args:
        folder: The run's; that of several stages means the last one.
        hosts: How many.
        say: Called with what should be known.
        requested: How it is asked, by the names of :class:`lichen.recipes.artifacts.sampling.Sampling`; None: the
            default.

    Raises:
        LichenError: if the run is not finished, writes nothing, or its model cannot be cut so.
    """
    sampling = Sampling(**{key: value for key, value in requested.items() if value is not None})  # type: ignore[arg-type]
    run, tokenizer = _pieces_of(folder, hosts, say)
    with host_processes(run.folder, hosts) as sites:
        models = [hosted(run.source, Chain(sites, hosts, tuned=tuned)) for tuned in (False, True)]

        def answer(text: str) -> tuple[str, ...]:
            return tuple(write(run.recipe, model, tokenizer, text, sampling) for model in models)

        yield Talker(kind="chat", answer=answer, settings=settings_text(run.recipe, sampling))


def _pieces_of(folder: Path | str, hosts: int, say: Callable[[str], None]) -> tuple[RunPieces, Any]:
    run = RunPieces(last_stage(folder), hosts)
    run.refuse()
    tokenizer = causal_tokenizer(run.source)
    put_template(run.recipe, tokenizer, run=run.folder)
    say(f"{hosts} hosts hold {listed([str(blocks) for blocks in run.parts])} blocks, and none the whole model")
    return run, tokenizer


def time_over_hosts(
    folder: Path | str,
    hosts: int,
    text: str,
    *,
    tokens: int = 32,
    delays: tuple[float, ...] = (0.0,),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[HostPace], list[int]]:
    """Write the likeliest tokens after a text, once to warm up and once for each delay.

    Args:
        folder: The run's.
        hosts: How many.
        text: What is asked.
        tokens: Written, exactly so many.
        delays: Seconds, a way for each.
        say: Called with what should be known.

    Returns:
        How fast, for each delay; and the memory of each host's process in bytes, as the system counts it.

    Raises:
        LichenError: as :func:`talk_over_hosts`, or if a delay or a number is out of range.
    """
    if bad := [delay for delay in delays if not 0 <= delay <= 60]:
        raise LichenError(f"{bad[0]} is no delay", where="--delay", fix="give seconds, from 0 to 60")
    if tokens < 1:
        raise LichenError(f"{tokens} is out of range", where="max_new_tokens", fix="use 1 or more")
    run, tokenizer = _pieces_of(folder, hosts, say)
    with host_processes(run.folder, hosts) as sites:
        paces = []
        for place, delay in enumerate((0.0, *delays)):
            found = _paced(Chain(sites, hosts, tuned=True, delay=delay), tokenizer, run, text, tokens, delay)
            paces += [found] if place else []
        return paces, resident_bytes(sites)


def _paced(chain: Chain, tokenizer: Any, run: RunPieces, text: str, tokens: int, delay: float) -> HostPace:
    from lichen.recipes.artifacts.sampling import ask_ids

    ids, begun = ask_ids(tokenizer, run.recipe.data.form, text), time.perf_counter()
    first = 0.0
    for count in range(tokens):
        ids.append(int(chain(ids).argmax()))
        first = first if count else time.perf_counter() - begun
    rest = time.perf_counter() - begun - first
    rate = (tokens - 1) / rest if tokens > 1 else None
    return HostPace(delay=delay, first_seconds=first, tokens_per_second=rate)
