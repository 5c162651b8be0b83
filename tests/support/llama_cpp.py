"""A GGUF file run by llama.cpp in this process, where its package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def server_of(file: Path, *, context: int = 64) -> Any:
    """llama.cpp over the file, on one thread; its package must be installed."""
    import xllamacpp

    about = xllamacpp.CommonParams()
    about.model.path = str(file)
    about.n_ctx, about.n_parallel, about.n_gpu_layers = context, 1, 0
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    about.warmup, about.verbosity = False, -1
    return xllamacpp.Server(about)


def greedy(server: Any, prompt: Sequence[int] | str, tokens: int) -> tuple[str, list[int], int]:
    """``(what follows, its tokens, tokens of the prompt)``, the likeliest token each time.

    Tokens that are parts of a letter are missing in the list, and are a replacement letter in the text.
    """
    wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "top_k": 1, "logprobs": 1, "ignore_eos": True}
    answer = server.handle_completions(wanted)
    found = answer["choices"][0]
    chosen = [one["id"] for one in (found["logprobs"] or {"content": []})["content"]]
    return found["text"], chosen, int(answer["usage"]["prompt_tokens"])
