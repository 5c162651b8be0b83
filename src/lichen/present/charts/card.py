"""Writes a model card: what the adapter is, its prompt, how other tools load it.

It is a ``README.md`` with the front matter that the Hugging Face hub reads. It says nothing of a single client or
row: numbers of them, and the columns of the summary. Owners are named where they name themselves, in their data cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from lichen.core.visible import visible
from lichen.present.charts.card_terms import compute_text, owners_text, terms_matter, terms_text, whose_text
from lichen.present.column_names import column_title
from lichen.present.units import score_text

__all__ = ["Card", "card_text", "front_matter"]

LLAMA_CPP = "llama.cpp"
_MERGE = "`lichen export RUN --merge` writes one whole model, whose card has the commands."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card is written from.

    Attributes:
        name: Of the run.
        question: What it answers; may be empty.
        writes: A language model, which writes; else it classifies.
        pipeline: What the hub calls its task.
        folder: Name of the folder that the card lies in.
        base: Where the base model is published or lies, as a loader takes it.
        base_id: The base's id on the Hugging Face hub; empty where it has none that is known.
        licence: Of the base; empty where it is not known.
        kind: ``merged``, or PEFT's name of the adapter, such as ``LORA``.
        low_rank: It is low-rank factors and nothing beside, which servers can add.
        rank: The largest rank of a LoRA; 0 for others.
        whole: Modules that the adapter holds whole.
        form: ``data.form`` of a language model.
        prompt: What the model is given before an answer to :attr:`example_prompt`; empty for a classifier.
        start: Number of the start token that stands before it; -1 where the chat template writes it.
        example_prompt: An example of what is asked.
        max_length: Tokens of a row in training.
        classes: Names of the classes in the order of the logits.
        data: The catalog's name of the data; empty for private ones.
        rows: How many rows were read; 0 where that is not known.
        own_words: The tokenizer was learned from the clients' rows.
        nowhere: Why no tool finds the adapter's base, such as that it was cut short; else empty.
        summary: The run's.
        values: What each client contributed, in roster order; none where nobody asked.
        fingerprints: Owners whose secret pairs it was trained on.
        student: The architecture of a small model that was trained from nothing; else empty.
        use: Of a student: the sections that say how it is loaded and asked.
    """

    name: str
    question: str
    writes: bool
    pipeline: str
    folder: str
    base: str
    base_id: str
    licence: str
    kind: str
    low_rank: bool
    rank: int
    whole: tuple[str, ...]
    form: str
    prompt: str
    start: int
    example_prompt: str
    max_length: int
    classes: tuple[str, ...]
    data: str
    rows: int
    own_words: bool
    nowhere: str
    summary: Mapping[str, Any]
    values: tuple[float, ...] = ()
    fingerprints: int = 0
    student: str = ""
    use: str = ""

    @property
    def merged(self) -> bool:
        """Whether it is a whole model."""
        return self.kind == "merged"


def front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads of a card."""
    if card.student:
        about: dict[str, Any] = {"library_name": "pytorch", **terms_matter("", card.summary)}
        if card.student != "image-mlp":  # its rows may be pictures or any other numbers
            about["pipeline_tag"] = "image-classification" if card.student == "image-cnn" else card.pipeline
        return about | {"tags": ["lichen", "federated-learning", card.student]}
    kind = "finetune" if card.merged else "adapter"
    found: dict[str, Any] = {"library_name": "transformers" if card.merged else "peft"}
    if card.base_id:
        found["base_model"] = card.base_id
        found["base_model_relation"] = kind
    found |= terms_matter(card.licence, card.summary)
    found["pipeline_tag"] = card.pipeline
    found["tags"] = ["lichen", "federated-learning", *([] if card.merged else [card.kind.lower().replace("_", "-")])]
    return found


def card_text(card: Card) -> str:
    """The whole card, as Markdown."""
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front_matter(card).items())
    parts = [f"---\n{head}\n---\n", f"# {_cell(card.name)}\n", _what(card), _data(card), owners_text(card.summary)]
    parts += [_scores(card), whose_text(card.summary, card.values, card.fingerprints)]
    parts += [compute_text(card.summary), card.use or _question(card)]
    if not card.student:
        parts += [_nowhere(card)] if card.nowhere else [_transformers(card), _servers(card)]
    parts += [terms_text(card.licence, card.summary)]
    return "\n".join(part for part in parts if part)


def _what(card: Card) -> str:
    base = f"`{card.base}`"
    if "/" in card.base_id:
        base = f"[{card.base_id}](https://huggingface.co/{card.base_id})"
        if card.base != card.base_id:
            base += f" (trained on the catalog's `{card.base}`, whose weights may be of another precision)"
    if card.student:
        what = f"A small model of kind `{card.student}`, trained from nothing."
    elif card.merged:
        what = f"A {'language model' if card.writes else 'classifier'}: {base} with what was learned merged in."
    else:
        rank_note = f", rank {card.rank} at most" if card.rank else ""
        whole = f" It holds these modules whole: {', '.join(f'`{name}`' for name in card.whole)}." if card.whole else ""
        what = f"A PEFT adapter ({card.kind}{rank_note}) for {base}.{whole}"
    attack, warning = card.summary.get("attack"), ""
    if attack is not None:
        lied = f"{attack['liars']} of {int(card.summary['clients']):,} clients lied, {attack['kind']}"
        warning = f"**Attacked on purpose, for research: {lied}. Not for use.**\n\n"
    question = f"{visible(card.question)}\n\n" if card.question else ""
    return f"{warning}{question}{what} It was trained by federated learning with Lichen.\n"


def _data(card: Card) -> str:
    data = f"the catalog's data `{card.data}`" if card.data else "rows that stayed with their owners"
    read = f", out of {card.rows:,} that were read" if card.rows else ""
    words = " Its tokenizer was learned from them: its vocabulary holds their words." if card.own_words else ""
    count, privacy = int(card.summary["clients"]), card.summary.get("privacy")
    noise = "" if privacy is None else f" Noise in training gives {privacy['statement']}."
    return f"## What it was trained on\n\nThe rows of {count:,} clients{read}: {data}.{words}{noise}\n"


def _scores(card: Card) -> str:
    summary = card.summary
    better = "higher" if summary["higher_is_better"] else "lower"
    lines = [
        "## Results\n",
        f"On test rows, `{summary['metric']}` ({better} is better), over the clients:\n",
        "| | Mean | Worst tenth |",
        "|---|---|---|",
    ]
    for name, score in {**summary["columns"], **summary["extra_columns"]}.items():
        if score is not None:
            tail, title = score.get("worst_decile"), _cell(column_title(name))
            lines.append(f"| {title} | {score_text(score['mean'])} | {'-' if tail is None else score_text(tail)} |")
    lines.append("\nThis is the row `federated`; the others are what it was held against.")
    share, joules = summary.get("share_gaining"), summary.get("energy_joules")
    if share is not None:
        over = summary["gaining_over"]
        clients = summary["gains"].get("federated", {}).get(over, {}).get("clients", summary["clients"])
        lines.append(f"{round(share * clients)} of {clients} clients score better than in `{over}`; the others do not.")
    lines += _safety(summary)
    if joules:
        lines.append(
            f"The whole run, with what it was held against, took {joules / 3.6e6:.3g} kWh of processor and memory."
        )
    return "\n".join(lines) + "\n"


def _safety(summary: Mapping[str, Any]) -> list[str]:
    """How many unsafe requests are refused, and what the server's repair has changed."""
    extra, out = summary.get("extra", {}), list[str]()
    rates = {when: extra.get(f"refused.{when}") for when in ("base", "federated", "repaired")}
    shown = {when: f"{100 * rate:.0f} % {_WHEN[when]}" for when, rate in rates.items() if isinstance(rate, float)}
    metric = summary["metric"]
    before, after = (extra.get(f"{metric}.{when}") for when in ("unrepaired", "repaired"))
    if before is not None and after is not None:
        what = f"`{metric}` was {score_text(before)} before and {score_text(after)} after"
        out.append(f"After the rounds it was tuned by the server on public safe pairs: {what}.")
    if shown:
        listed = ", ".join(shown.values())
        out.append(f"Unsafe requests refused, by words in the answers, which is no proof of safety: {listed}.")
    return out


_WHEN = {"base": "by the base", "federated": "after the rounds", "repaired": "after the repair"}


def _cell(text: str) -> str:
    return visible(text).replace("\n", " ").replace("|", "\\|")


def _fenced(text: str, language: str = "text") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}\n"


def _question(card: Card) -> str:
    if not card.writes:
        names = "\n".join(f"| {place} | {_cell(column_title(name))} |" for place, name in enumerate(card.classes))
        return (
            f"## What it is asked\n\nA text by itself, cut after {card.max_length} tokens.\n\n"
            f"| Logit | Class |\n|---|---|\n{names}\n"
        )
    how = {
        "chat": "the tokenizer's chat template, its system message included",
        "messages": "the tokenizer's chat template, its system message included",
        "transcript": "the start token, the prompt and a line break",
    }.get(card.form, "the start token and the text")
    return (
        f"## How it is asked\n\nBy {how}; rows in training were of {card.max_length} tokens at most. "
        f"To `{card.example_prompt}` the model is given exactly\n\n{_fenced(card.prompt)}"
    )


def _nowhere(card: Card) -> str:
    return f"## In other tools\n\nThe base was {card.nowhere}, and lies nowhere for other tools to load. {_MERGE}\n"


def _transformers(card: Card) -> str:
    tools = "transformers" if card.merged else "transformers and PEFT"
    return f"## In {tools}\n\n{_fenced(_code(card).rstrip(), 'python')}"


def _code(card: Card) -> str:
    chat = card.writes
    auto = "CausalLM" if chat else "SequenceClassification"
    maker = f"AutoModelFor{auto}" if card.merged else f"AutoPeftModelFor{auto}"
    more = f", num_labels={len(card.classes)}" if not chat and not card.merged else ""
    lines = ["import torch"]
    if card.merged:
        lines += [f"from transformers import {maker}, AutoTokenizer"]
    else:
        lines += [f"from peft import {maker}", "from transformers import AutoTokenizer"]
    lines += [
        "",
        f"folder = {card.folder!r}  # the folder of this card",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {maker}.from_pretrained(folder{more}).eval()",
    ]
    if not chat:
        lines += [
            f"classes = {list(card.classes)!r}",
            f'row = tokenizer("some text", truncation=True, max_length={card.max_length}, return_tensors="pt")',
            "with torch.no_grad():",
            "    print(classes[model(**row).logits[0].argmax()])",
        ]
        return "\n".join(lines)
    if card.start < 0:
        lines += [
            f'turns = [{{"role": "user", "content": {card.example_prompt!r}}}]',
            "prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
            'row = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]',
        ]
    else:
        words = card.example_prompt + ("\n" if card.form == "transcript" else "")
        lines += [
            f'words = tokenizer({words!r}, add_special_tokens=False)["input_ids"]',
            f"row = torch.tensor([[{card.start}, *words]])  # the start token and the prompt",
        ]
    lines += [
        "with torch.no_grad():",
        "    out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=48)",
        "print(tokenizer.decode(out[0, row.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _servers(card: Card) -> str:
    base, folder = card.base_id if "/" in card.base_id else card.base, card.folder
    if not card.writes:
        if not card.merged:
            return f"## In servers\n\nvLLM takes no adapter with a head: {_MERGE}\n"
        command = _fenced(f"vllm serve {folder} --runner pooling", "sh")
        return f"## In vLLM\n\n{command}\nllama.cpp serves no classifiers.\n"
    if card.merged:
        return f"## In vLLM\n\n{_fenced(f'vllm serve {folder}', 'sh')}\n## In {LLAMA_CPP}\n\n" + _fenced(
            f"python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf\nllama-cli -m {folder}.gguf", "sh"
        )
    if not card.low_rank or card.whole:
        return f"## In servers\n\nvLLM and llama.cpp take LoRA without other modules only. {_MERGE}\n"
    ranks = next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512, card.rank) if rank >= card.rank)
    convert = f"python convert_lora_to_gguf.py --base {base} {folder} --outfile {folder}.gguf"
    return (
        "## In vLLM\n\n"
        + _fenced(f"vllm serve {base} --enable-lora --max-lora-rank {ranks} --lora-modules tuned={folder}", "sh")
        + f"\n## In {LLAMA_CPP}\n\n"
        + _fenced(f"python convert_hf_to_gguf.py {base} --outfile base.gguf\n{convert}", "sh")
        + "\n"
        + _fenced(f"llama-cli -m base.gguf --lora {folder}.gguf", "sh")
    )
