"""Measures a served model: seconds until it is loaded, until the first token, and a token; memory and energy.

The same question is asked in this process and through HTTP at an address of this machine, where each answer waits a
stated delay in place of a network's. The likeliest tokens are taken, so that all answers are the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import psutil

from lichen.core.errors import LichenError
from lichen.serving.client import stream_chat
from lichen.serving.contract import ApiError, Completion, Message, ServedModel
from lichen.serving.energy import joules_between, read_counters
from lichen.serving.server import ModelServer

__all__ = ["Measured", "Pace", "measure"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast answers came one way.

    Attributes:
        way: ``in process``, or ``HTTP`` and the delay.
        first_seconds: From the question to the first piece of text; median.
        tokens_per_second: Of the tokens after the first one; median. None where an answer had but one.
        whole_seconds: From the question to the end; median.
        tokens: Written in each answer.
        cpu_seconds: Processor time of one answer, of this process and the model's own; a neighbour does not change it.
        joules: Of the processors, for one answer; None where they cannot be read.
    """

    way: str
    first_seconds: float
    tokens_per_second: float | None
    whole_seconds: float
    tokens: int
    cpu_seconds: float
    joules: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model's numbers.

    Attributes:
        kind: What computes it.
        load_seconds: What loading took.
        resident_bytes: Memory of this process and the model's own, after the answers.
        paces: One for each way.
        answer: The text.
    """

    kind: str
    load_seconds: float
    resident_bytes: int
    paces: tuple[Pace, ...]
    answer: str


def measure(
    model: ServedModel,
    question: str,
    *,
    max_tokens: int = 32,
    repeats: int = 3,
    delays: Sequence[float] = (0.0,),
) -> Measured:
    """Ask the same question over and over, each way.

    Args:
        model: The model.
        question: A user's message; a text to go on with, where the model has no chat.
        max_tokens: Tokens written at most.
        repeats: Answers that are timed; one more before them is not.
        delays: Seconds that a network would take, a way through HTTP for each.

    Raises:
        LichenError: if the model refuses the question, or a delay is out of range.
    """
    for delay in delays:
        if not 0 <= delay <= 60:
            raise LichenError(f"{delay} is no delay", where="--delay", fix="give seconds, from 0 to 60")
    request = Completion(messages=(Message(role="user", content=question),), max_tokens=max_tokens, temperature=0.0)
    try:
        answer = _text(model, request)
    except ApiError as error:
        if error.param != "messages":
            raise LichenError(error.message, where="the question", fix="ask a shorter one") from None
        request = Completion(prompt=question, max_tokens=max_tokens, temperature=0.0)
        answer = _text(model, request)
    pids = (None, *model.processes())
    paces = [_timed("in process", partial(_in_process, model, request), repeats, pids)]
    for delay in delays:
        server = ModelServer(model, delay=delay)
        way = f"HTTP, {1000 * delay:g} ms"
        try:
            paces.append(_timed(way, partial(_through, server.url, model.name, request), repeats, pids))
        finally:
            server.close()
    resident = sum(psutil.Process(pid).memory_info().rss for pid in pids)
    return Measured(
        kind=model.kind,
        load_seconds=model.load_seconds,
        resident_bytes=int(resident),
        paces=tuple(paces),
        answer=answer,
    )


def _text(model: ServedModel, request: Completion) -> str:
    return "".join(piece.text for piece in model.complete(request))


_Sight = tuple[float, bool, int]
"""Seconds since the question, whether text came, tokens written where they are known."""


def _in_process(model: ServedModel, request: Completion) -> Iterator[_Sight]:
    start = time.perf_counter()
    for piece in model.complete(request):
        yield time.perf_counter() - start, bool(piece.text), piece.tokens_out


def _through(url: str, name: str, request: Completion) -> Iterator[_Sight]:
    body: dict[str, Any] = {"model": name, "max_tokens": request.max_tokens, "temperature": 0.0, "seed": 0}
    if request.messages:
        body["messages"] = [{"role": one.role, "content": one.content} for one in request.messages]
    else:
        body["prompt"] = request.prompt
    for seconds, event in stream_chat(url, body):
        text = any(one.get("text") or one.get("delta", {}).get("content") for one in event["choices"])
        yield seconds, text, int((event.get("usage") or {}).get("completion_tokens", 0))


def _cpu_seconds(pids: Sequence[int | None]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(one.user + one.system for one in times))


def _timed(way: str, ask: Callable[[], Iterator[_Sight]], repeats: int, pids: Sequence[int | None]) -> Pace:
    firsts, wholes, rates, tokens = [], [], [], 0
    list(ask())
    before, cpu = read_counters(), _cpu_seconds(pids)
    for _ in range(repeats):
        sights = list(ask())
        whole = sights[-1][0]
        first = next((seconds for seconds, text, _ in sights if text), whole)
        tokens = max(count for _, _, count in sights)
        firsts.append(first)
        wholes.append(whole)
        if tokens > 1 and whole > first:
            rates.append((tokens - 1) / (whole - first))
    joules, cpu = joules_between(before, read_counters()), _cpu_seconds(pids) - cpu
    return Pace(
        way=way,
        first_seconds=statistics.median(firsts),
        tokens_per_second=statistics.median(rates) if rates else None,
        whole_seconds=statistics.median(wholes),
        tokens=tokens,
        cpu_seconds=cpu / repeats,
        joules=None if joules is None else joules / repeats,
    )
