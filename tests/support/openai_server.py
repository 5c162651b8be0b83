"""A small endpoint in the OpenAI format, on this machine: a tiny model's real logits, texts and vectors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from lichen.fm.local import LocalFM


class Told:
    """What the endpoint saw: bodies, keys, and how many calls it made fail."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failed = 0


@contextmanager
def answering(model: Any, tokenizer: Any, *, fail: float = 0.0, stall: float = 0.0) -> Iterator[tuple[str, Told]]:
    """Serve ``(url, told)``; a share ``fail`` of the calls ends in a 500, 503, cut body or silence of ``stall`` s."""
    told, draw, lock = Told(), np.random.default_rng(0), threading.Lock()
    plain, chat = LocalFM(model, tokenizer), LocalFM(model, tokenizer, chat=True)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                told.bodies.append(body)
                told.keys.append(self.headers.get("Authorization"))
                bad, how = draw.random() < fail, int(draw.integers(4))
                told.failed += bad
            if bad and how == 0 and stall:
                time.sleep(stall)
                return  # hangs up without a word
            if bad and how < 3:
                self.send_error(503 if how == 1 else 500)
                return
            if self.path == "/v1/moved/completions":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/v1/completions")
                self.end_headers()
                return
            if body["model"] != "tiny":
                self.send_error(404)
                return
            with lock:
                if "input" in body:
                    whole = embedded(plain, body)
                elif "logprobs" in body:
                    whole = answer(model, tokenizer, body)
                else:
                    whole = written(chat if "messages" in body else plain, body)
            data = json.dumps(whole).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if bad else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(model: Any, tokenizer: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The plain way, one text at a time: what HttpFM and LocalFM are held against."""
    text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    names = tokenizer.convert_ids_to_tokens(range(logp_TV.shape[1]))
    if body.get("echo"):
        offsets = encoded["offset_mapping"]
        told: dict[str, Any] = {
            "tokens": [text[a:z] for a, z in offsets],
            "text_offset": [a for a, _ in offsets],
            "token_logprobs": [None] + [float(logp_TV[t - 1, ids[0, t]]) for t in range(1, ids.shape[1])],
        }
        # The one token that is written comes after the echo, as with the real ones.
        told = {k: [*v, x] for (k, v), x in zip(told.items(), ("zzz", len(text), -1.0), strict=True)}
    else:
        top = body.get("top_logprobs", body["logprobs"])
        best = logp_TV[-1].topk(top)
        listed = [(" " + names[i], float(x)) for x, i in zip(best.values, best.indices.tolist(), strict=True)]
        told = {"tokens": [listed[0][0]], "top_logprobs": [dict(listed)]}
        if "messages" in body:
            told = {"content": [{"token": "", "top_logprobs": [{"token": t, "logprob": x} for t, x in listed]}]}
    return {
        "choices": [{"index": 0, "text": "", "logprobs": told}],
        "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": 1},
    }


def written(face: LocalFM, body: dict[str, Any]) -> dict[str, Any]:
    """A text, in the older form of the format or the newer one."""
    asked = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    settings = {"temperature": body["temperature"], "top_p": body["top_p"], "stop": body.get("stop", ())}
    (text,) = face.generate([asked], seeds=[body["seed"]], max_new_tokens=body["max_tokens"], **settings)
    choice = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    return {"choices": [{"index": 0, **choice}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def embedded(face: LocalFM, body: dict[str, Any]) -> dict[str, Any]:
    """Vectors, not of length one, the last text first."""
    rows = [{"index": n, "embedding": (3 * x).tolist()} for n, x in enumerate(face.embed(body["input"]))]
    return {"data": rows[::-1], "usage": {"prompt_tokens": len(rows)}}
