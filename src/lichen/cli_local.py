"""What serve and try do with a model that lies here: a GGUF file, or the folder of a run, a whole model or an adapter.

Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say, show

if TYPE_CHECKING:
    from types import FrameType

    from lichen.serving.contract import ServedModel

__all__ = ["serve_model", "time_hosts", "time_model", "try_model"]

_QUESTION = "Tell me a short story about a lighthouse."


def serve_model(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    key_env: str | None = None,
    key_file: Path | None = None,
    base: str | None = None,
    json: bool = False,
) -> None:
    """Serve a model in the OpenAI format until the process is ended.

    Args:
        path: What holds it.
        host: Where to listen.
        port: Where to listen; 0: a free one.
        key_env: The environment's variable with the key.
        key_file: The file with the key.
        base: Of an adapter: the folder of its base.
        json: Print address and name as a line of JSON.

    Raises:
        LichenError: if there is no such model, or nobody can listen there.
    """
    from lichen.serving.guard import LOOPBACK, read_key, require_key
    from lichen.serving.server import ModelServer

    if not 0 <= port < 2**16:
        raise LichenError(f"{port} is no port", where="--port", fix="use a number from 0 to 65535")
    key = read_key(key_env, key_file)
    require_key(host, key)
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as stack:
        model = _open(path, base)
        stack.callback(model.close)
        server = ModelServer(model, host=host, port=port, key=key)
        stack.callback(server.close)
        log(f"{model.name} is loaded ({model.kind}, {model.load_seconds:.1f} s); stop it with Ctrl-C")
        if host not in LOOPBACK:
            log("what is asked and answered crosses the network in the clear: put a proxy with TLS before it")
        if json:
            print_json({"url": server.url, "model": model.name, "kind": model.kind}, line=True)
        else:
            say(server.url)
        threading.Event().wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _open(path: Path, base: str | None) -> ServedModel:
    from lichen.recipes.local.open import open_model

    with redirect_stdout(sys.stderr):
        return open_model(path, base=base)


def try_model(
    path: Path,
    texts: Iterable[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    base: str | None = None,
) -> None:
    """Ask a model each text, as a user's message, or as a text to go on with where it has no chat.

    Args:
        path: What holds it.
        texts: What to ask.
        max_new_tokens: Tokens written at most; 48 if not given.
        temperature: Of the draw; 0 if not given.
        top_p: Share of the probability; 1 if not given.
        seed: Of the draw; 0 if not given.
        base: Of an adapter: the folder of its base.

    Raises:
        LichenError: if there is no such model, or it refuses a text.
    """
    from lichen.recipes.local.question import answer_question, sampled

    settings = sampled(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    model = _open(path, base)
    try:
        for text in texts:
            say(answer_question(model, text, settings))
    finally:
        model.close()


def time_model(path: Path, text: str | None, *, delay: float | None, tokens: int | None, base: str | None) -> None:
    """Print how fast a model loads and answers, in this process and through HTTP with a stated delay.

    Args:
        path: What holds it.
        text: What to ask.
        delay: Seconds that a network would take, beside none; none but that if not given.
        tokens: Tokens written at most; 32 if not given.
        base: Of an adapter: the folder of its base.

    Raises:
        LichenError: if there is no such model, or it refuses the question.
    """
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text, joules_text
    from lichen.serving.measure import measure

    model = _open(path, base)
    delays = (0.0,) if not delay else (0.0, delay)
    try:
        found = measure(model, text or _QUESTION, max_tokens=32 if tokens is None else tokens, delays=delays)
    finally:
        model.close()
    heads = ("first token", "tokens a second", "whole answer", "processor", "energy")
    table = new_table(None, "way", *heads, numbers=heads)
    for pace in found.paces:
        rate = "-" if pace.tokens_per_second is None else f"{pace.tokens_per_second:.1f}"
        energy = "not readable" if pace.joules is None else joules_text(pace.joules)
        first, whole, cpu = 1000 * pace.first_seconds, pace.whole_seconds, pace.cpu_seconds
        table.add_row(pace.way, f"{first:.0f} ms", rate, f"{whole:.2f} s", f"{cpu:.2f} s", energy)
    load, memory = f"{found.load_seconds:.1f} s", bytes_text(found.resident_bytes)
    say(f"{model.name} ({found.kind}): loaded in {load}, {memory} resident, {found.paces[0].tokens} tokens an answer")
    show(table)


def time_hosts(folder: Path, hosts: int, text: str | None, *, delay: float | None, tokens: int | None) -> None:
    """Print how fast hosts that hold a piece of a run's model each write, without and with a stated delay.

    Args:
        folder: A finished run.
        hosts: How many.
        text: What to ask.
        delay: Seconds that a question to a host and its answer would take, beside none; none but that if not given.
        tokens: Tokens written; 32 if not given.

    Raises:
        LichenError: if the run writes nothing, or its model cannot be dealt out.
    """
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text
    from lichen.recipes.local.hosts.talk import time_over_hosts

    delays = (0.0,) if not delay else (0.0, delay)
    with redirect_stdout(sys.stderr):
        paces, memory = time_over_hosts(
            folder, hosts, text or _QUESTION, tokens=32 if tokens is None else tokens, delays=delays, say=log
        )
    heads = ("first token", "tokens a second")
    table = new_table(None, "delay to each host and back", *heads, numbers=heads)
    for pace in paces:
        rate = "-" if pace.tokens_per_second is None else f"{pace.tokens_per_second:.1f}"
        table.add_row(f"{1000 * pace.delay:g} ms", f"{1000 * pace.first_seconds:.0f} ms", rate)
    say(f"{hosts} hosts, resident: {', '.join(map(bytes_text, memory))}")
    show(table)
