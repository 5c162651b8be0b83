"""What an exported model costs where it is used: GGUF files of a run beside its merged folder in transformers.

    lichen run chat-demo --out RUN -s federation.rounds=4 -s 'compare.baselines=[base]' \\
        -s compare.retention_text=changelogs
    python benchmarks/offline.py --run RUN

exports the run three times and loads each as another program would, without Lichen, in one process each, all on one
core. They answer in turn, so that a busy neighbour falls on all of them alike. After that the smallest file answers
where there is no network but the loopback. What was found lies in ``results/offline.json``; without ``--run`` the
tables are printed from there. It needs the extra ``local``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import tables

RESULT = Path(__file__).parent / "results" / "offline.json"
QUESTION = "What did you do last weekend, and what would you like to do on the next one?"
TOKENS, ROUNDS, LOADS = 32, 7, 3
PATIENCE = 300.0
"""Seconds in which a model must be loaded, or an answer there."""
NAMES = {"q8_0": "GGUF q8_0", "f16": "GGUF f16", "merged": "transformers, float32"}

ALONE = """
import fcntl, json, os, socket, struct, subprocess, sys, urllib.request
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:  # a namespace begins with its loopback down
    fcntl.ioctl(link, 0x8914, struct.pack("16sh14s", b"lo", 0x1 | 0x40, b""))
from lichen.core.children import bound_environment
command = [sys.executable, "-m", "lichen", "serve", sys.argv[1], "--json"]
with subprocess.Popen(command, stdout=subprocess.PIPE, env=bound_environment()) as process:
    about = json.loads(process.stdout.readline())
    body = {"model": about["model"], "prompt": sys.argv[2] + chr(10), "max_tokens": int(sys.argv[3]), "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(about["url"] + "/completions", json.dumps(body).encode(), headers)
    answer = json.loads(urllib.request.urlopen(request).read())
    process.kill()
links = [name for _, name in socket.if_nameindex()]
print(json.dumps({"links": links, "answer": answer["choices"][0]["text"], **answer["usage"]}))
"""

Ask = Callable[[list[int], Callable[[], None]], None]
"""Writes tokens after a row of tokens, and calls back at each piece."""


def of_file(path: str) -> Ask:
    """A GGUF file in llama.cpp."""
    import xllamacpp

    about = xllamacpp.CommonParams()
    about.model.path, about.n_ctx, about.n_parallel, about.n_gpu_layers = path, 256, 1, 0
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    about.warmup, about.verbosity, about.cache_ram_mib = False, -1, 0
    server = xllamacpp.Server(about)

    def ask(ids: list[int], piece: Callable[[], None]) -> None:
        def heard(_: Any) -> bool:
            piece()
            return False

        wanted = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions({**wanted, "stream": True}, heard)

    return ask


def of_folder(path: str) -> Ask:
    """A merged folder in transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path).eval()

    def ask(ids: list[int], piece: Callable[[], None]) -> None:
        class Pieces(BaseStreamer):
            begun = False

            def put(self, value: Any) -> None:  # the first is the prompt
                if self.begun:
                    piece()
                self.begun = True

            def end(self) -> None:
                pass

        row = torch.tensor([ids])
        plain = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
        model.generate(row, attention_mask=torch.ones_like(row), streamer=Pieces(), **plain)

    return ask


def one(form: str, path: str) -> None:
    """Load, and answer a line of tokens with a line of numbers until there are none."""
    ask = of_folder(path) if form == "merged" else of_file(path)
    import psutil

    print("ready", flush=True)
    for line in sys.stdin:
        sights: list[float] = []
        start, cpu = time.perf_counter(), time.process_time()
        ask(json.loads(line), lambda: sights.append(time.perf_counter() - start))  # noqa: B023
        resident = psutil.Process().memory_info().rss
        numbers = {"first": sights[0], "last": sights[TOKENS - 1], "cpu": time.process_time() - cpu}
        print(json.dumps({**numbers, "resident": resident}), flush=True)


def started(form: str, path: Path, core: int) -> tuple[subprocess.Popen[str], float]:
    """A process that has loaded, and the seconds until it had."""
    from lichen.core.children import bound_command, bound_environment

    command = bound_command(["taskset", "-c", str(core), sys.executable, __file__, "--one", form, str(path)])
    environment = bound_environment({**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    begun = time.perf_counter()
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    while line_of(process).strip() != "ready":
        pass
    return process, time.perf_counter() - begun


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a process writes; one that does not write in time is ended, and writes none."""
    assert process.stdout is not None
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        process.kill()
        raise RuntimeError(f"no line within {PATIENCE} seconds, or its end: {process.args}")
    return line


def answered(process: subprocess.Popen[str], ids: list[int]) -> dict[str, float]:
    """The numbers of one answer."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(ids) + "\n")
    process.stdin.flush()
    found: dict[str, float] = json.loads(line_of(process))
    return found


def measure(run: Path) -> None:
    """Export, load and ask, in turn."""
    import lichen
    from lichen.recipes.artifacts.sampling import ask_ids
    from lichen.recipes.quantize.merged import merged_run

    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as home:
        paths = {"merged": lichen.export(run, merge=True, out=Path(home) / "merged")}
        for bits in ("q8_0", "f16"):
            paths[bits] = lichen.export(run, gguf=True, bits=bits, out=Path(home) / f"{bits}.gguf")  # type: ignore[arg-type]
        recipe, _, tokenizer = merged_run(run)
        ids = ask_ids(tokenizer, recipe.data.form, QUESTION)
        loads: dict[str, list[float]] = {name: [] for name in NAMES}
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
        children: dict[str, subprocess.Popen[str]] = {}
        try:
            for _ in range(LOADS):
                for name in NAMES:
                    if name in children:
                        children.pop(name).kill()
                    children[name], seconds = started(name, paths[name], core)
                    loads[name].append(seconds)
            for _ in range(ROUNDS + 1):  # the first answer is not counted
                for name, child in children.items():
                    answers[name].append(answered(child, ids))
        finally:
            for child in children.values():
                child.kill()
        models = {}
        for name in NAMES:
            counted = answers[name][1:]
            middle = {key: statistics.median(one[key] for one in counted) for key in ("first", "cpu", "resident")}
            rate = statistics.median((TOKENS - 1) / (one["last"] - one["first"]) for one in counted)
            disk = sum(file.stat().st_size for file in weights(paths[name]))
            models[name] = {"disk": disk, "load": statistics.median(loads[name]), "rate": rate, **middle}
        about = {"date": date.today().isoformat(), "prompt": len(ids), "tokens": TOKENS, "rounds": ROUNDS}
        found = {**about, "load_average": os.getloadavg()[0], "models": models, "alone": alone(paths["q8_0"])}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def weights(path: Path) -> list[Path]:
    """The file, or those of a folder that hold weights."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def alone(file: Path) -> dict[str, Any]:
    """What a file answers through ``lichen serve`` in a network of its own, which has the loopback and nothing else."""
    from lichen.core.children import bound_command, bound_environment

    words = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", ALONE, str(file), QUESTION, "24"]
    more: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE, "check": True}
    done = subprocess.run(bound_command(words), env=bound_environment(), **more)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["links"] == ["lo"]
    return {"question": QUESTION, **found}


def models_table() -> None:
    """A row a form."""
    rows = []
    for name, one in json.loads(RESULT.read_text(encoding="utf-8"))["models"].items():
        sizes = (f"{one['disk'] / 1e6:.0f}", f"{one['load']:.1f} s", f"{1000 * one['first']:.0f} ms")
        rows.append(
            [NAMES[name], *sizes, f"{one['rate']:.1f}", f"{one['cpu']:.2f} s", f"{one['resident'] / 1e6:.0f} MB"]
        )
    tables.show("model|MB|loaded in|first token|tokens a second|processor time|resident", rows)


def alone_table() -> None:
    """The question and the answer."""
    one = json.loads(RESULT.read_text(encoding="utf-8"))["alone"]
    text = " ".join(one["answer"].split()).replace("|", "\\|")
    tables.show("asked|answered by the q8_0 file|tokens", [[one["question"], text, str(one["completion_tokens"])]])


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", choices=("models", "alone"))
    parser.add_argument("--run", type=Path, help="a finished run of a language model")
    parser.add_argument("--one", nargs=2, help="used by itself: a form and a path")
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    if options.run:
        measure(options.run)
    for name, table in {"models": models_table, "alone": alone_table}.items():
        if options.table in (None, name):
            table()


if __name__ == "__main__":
    main()
