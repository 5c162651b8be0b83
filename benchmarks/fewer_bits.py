"""What a run's model costs in fewer bits: perplexity on the clients' rows and on general text, size, and greedy tokens.

    lichen run chat-demo --out RUN -s federation.rounds=4 -s 'compare.baselines=[base]' \\
        -s compare.retention_text=changelogs
    python benchmarks/fewer_bits.py --run RUN

keeps what it found in ``results/fewer_bits.json``; without ``--run`` it prints the tables from there. llama.cpp runs
the float16 file where its package is installed (the extra ``local``), beside the merged model in transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tables
import torch

from lichen.models.gguf.write import FORMATS, write_gguf
from lichen.recipes.quantize.formats import gguf_formats, int8_format
from lichen.recipes.quantize.gate import judge, score_model
from lichen.recipes.quantize.merged import merged_run
from lichen.recipes.quantize.run import scored_texts

RESULT = Path(__file__).parent / "results" / "fewer_bits.json"
PROMPTS, TOKENS, GATE = 20, 16, 0.01
NAMES = (*FORMATS, "int8")


def save(found: dict[str, Any]) -> None:
    """Keep what is known so far."""
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def greedy(model: Any, file: Path, valid: Any, end: int) -> dict[str, Any]:
    """Tokens that transformers and llama.cpp write after the beginnings of rows, until either ends its answer."""
    import xllamacpp

    about = xllamacpp.CommonParams()
    about.model.path, about.n_ctx, about.n_parallel, about.n_gpu_layers = str(file), 256, 1, 0
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    about.warmup, about.verbosity = False, -1
    server = xllamacpp.Server(about)
    rows = [[int(token) for token in row][:24] for shard in valid for row in shard.input_ids if len(row) >= 24]
    equal = whole = 0
    for ids in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]:
        with torch.no_grad():
            row_1T = torch.tensor([ids])
            mask_1T = torch.ones_like(row_1T)
            plain = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "max_new_tokens": TOKENS}
            expected = model.generate(row_1T, attention_mask=mask_1T, **plain)[0, len(ids) :].tolist()
        wanted = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "top_k": 1, "logprobs": 1}
        answer = server.handle_completions(wanted)
        chosen = [one["id"] for one in (answer["choices"][0]["logprobs"] or {"content": []})["content"]]
        expected, chosen = ([token for token in tokens if token != end] for tokens in (expected, chosen))
        equal += sum(one == other for one, other in zip(chosen, expected, strict=False))
        whole += max(len(expected), len(chosen))
    return {"prompts": PROMPTS, "tokens": whole, "equal": equal}


def measure(run: Path, wanted: list[str]) -> None:
    """Every format, read back and scored; and llama.cpp over the float16 file."""
    _, model, tokenizer = merged_run(run)
    valid, general = scored_texts(run, None)
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"formats": {}}
    with tempfile.TemporaryDirectory() as home:
        if importlib.util.find_spec("xllamacpp") is not None:
            write_gguf(Path(home) / "f16.gguf", model, tokenizer, bits="f16")
            found["greedy"] = greedy(model, Path(home) / "f16.gguf", valid, tokenizer.eos_token_id)
            save(found)
        if not wanted:
            return
        before = score_model(model, valid, general)
        found["merged"] = {"clients": before.clients, "general": before.general, "places": len(before.choices)}
        forms = gguf_formats(model, tokenizer, name="benchmark", bits=None)
        if "int8" in wanted:
            forms += (int8_format(model, tokenizer, lambda _: None),)
        for form in forms:
            if form.name in wanted:
                draft = Path(home) / form.name
                form.write(draft)
                files = [draft] if draft.is_file() else list(draft.glob("*.safetensors"))
                after = score_model(form.read(draft), valid, general)
                found["formats"][form.name] = {
                    "megabytes": sum(file.stat().st_size for file in files) / 1e6,
                    "clients": after.clients,
                    "general": after.general,
                    "agreement": after.agreement(before),
                    "faults": list(judge(before, after, GATE)),
                }
                for file in files:
                    file.unlink()
                save(found)


def formats_table() -> None:
    """A row a format."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    base = found["merged"]
    rows = [["merged, float32", "", f"{base['clients']:.2f}", "", f"{base['general']:.1f}", "", "", ""]]
    for name in (name for name in NAMES if name in found["formats"]):
        one = found["formats"][name]
        rises = [f"{100 * (one[key] / base[key] - 1):+.2f} %" for key in ("clients", "general")]
        numbers = (f"{one['clients']:.2f}", rises[0], f"{one['general']:.1f}", rises[1])
        passes = "no" if one["faults"] else "yes"
        rows.append([name, f"{one['megabytes']:.0f}", *numbers, f"{100 * one['agreement']:.1f} %", passes])
    tables.show("format|MB|clients' rows|rise|general text|rise|same tokens|within 1 %", rows)


def greedy_table() -> None:
    """llama.cpp beside transformers."""
    one = json.loads(RESULT.read_text(encoding="utf-8"))["greedy"]
    share = f"{100 * one['equal'] / one['tokens']:.1f} %"
    tables.show("prompts|greedy tokens|the same in llama.cpp", [[str(one["prompts"]), str(one["tokens"]), share]])


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", choices=("formats", "greedy"))
    parser.add_argument("--run", type=Path, help="a finished run of a language model")
    parser.add_argument("--formats", nargs="*", default=list(NAMES))
    options = parser.parse_args()
    if options.run:
        measure(options.run, options.formats)
    for name, table in {"formats": formats_table, "greedy": greedy_table}.items():
        if options.table in (None, name):
            table()


if __name__ == "__main__":
    main()
