"""The commands around a run: list, fetch, try, report.

Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Literal

from lichen.cli_local import time_hosts, time_model, try_model
from lichen.core.errors import LichenError
from lichen.shell import crash_in, log, print_json, say, show

__all__ = ["fetch_command", "list_command", "report_command", "try_command"]


def list_command(what: Literal["methods"] | None = None, /, *, json: bool = False) -> None:
    """Show the models, data, recipes and comparisons that have a name; or every method.

    Parameters
    ----------
    what
        `methods`: every method with its paper, what it needs of a recipe, and which keys it refuses.
    json
        With methods: print them as JSON, and nothing else, on standard output.
    """
    if what == "methods":
        return _list_methods(json)
    if json:
        raise LichenError("only methods are listed as JSON", where="--json", fix="lichen list methods --json")
    from lichen.data.sources.catalog import CATALOG
    from lichen.data.sources.datasets import declared_datasets
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text
    from lichen.recipes.comparison import card_of, comparisons
    from lichen.recipes.schema.read import gallery, read_recipe, staged_gallery
    from lichen.recipes.stages.read import Staged, read_page

    for kind in ("model", "data"):
        heads = [kind, "what", "licence", "size", *(["clients"] if kind == "data" else [])]
        table = new_table(None, *heads, numbers=["size"])
        for name, entry in CATALOG.items():
            if entry.kind == kind:
                size = bytes_text(entry.size_bytes) if entry.size_bytes else "-"
                table.add_row(
                    name, entry.summary, entry.licence, size, *([entry.clients or "-"] if kind == "data" else [])
                )
        if kind == "data":
            for name, point in declared_datasets().items():
                table.add_row(name, f"of another package: {point.value}", "-", "-", "-")
        show(table)
    table = new_table(None, "recipe", "task", "model", "data", "question")
    for name in gallery():
        recipe = read_recipe(name)
        student = recipe.model.student
        several = ", ".join(dict.fromkeys(one.kind for one in recipe.model.students))
        model = recipe.model.name or (student.kind if student is not None else several or "-")
        table.add_row(name, recipe.task, model, recipe.data.name, recipe.question)
    if table.row_count:
        show(table)
    table = new_table(None, "stages", "one after another", "data", "question")
    for name in staged_gallery():
        staged = read_page(name)
        assert isinstance(staged, Staged)
        data = dict.fromkeys(stage.recipe.data.name for stage in staged.stages)
        table.add_row(name, ", ".join(stage.name for stage in staged.stages), ", ".join(data), staged.question)
    if table.row_count:
        show(table)
    table = new_table(None, "comparison", "methods", "seeds", "question", numbers=["methods", "seeds"])
    for name in comparisons():
        methods, seeds, question = card_of(name)
        table.add_row(name, str(methods), str(seeds), question)
    if table.row_count:
        show(table)


def _list_methods(json: bool) -> None:
    from lichen.recipes.schema.methods import every_method

    entries = every_method()
    if json:
        print_json([entry.as_dict() for entry in entries])
        return
    from lichen.present.table import new_table

    for kind in dict.fromkeys(entry.kind for entry in entries):
        table = new_table(None, kind, "what", "paper", "needs", "refuses")
        for entry in entries:
            if entry.kind == kind:
                columns = (entry.papers, entry.needs, entry.refused)
                table.add_row(entry.name, entry.summary, *("; ".join(words) or "-" for words in columns))
        show(table)


def fetch_command(name: str, /) -> None:
    """Download a model or data set of `lichen list` into the cache, checked against its digest, or mend what is there.

    Parameters
    ----------
    name
        Its name in `lichen list`.
    """
    from lichen.data.sources.fetch import fetch_entry as fetch_one

    say(str(fetch_one(name, say=log, mend=True)))


def try_command(
    folder: Path,
    /,
    *texts: str,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    time: bool = False,
    delay: float | None = None,
    model: str | None = None,
    proxy: str | None = None,
    hosts: int | None = None,
) -> None:
    """Ask the bare model and the run's own the same thing; or a GGUF file, a whole model's folder, or an adapter's.

    Parameters
    ----------
    folder
        A finished run, a GGUF file, or the folder of a whole model or an adapter.
    texts
        What to ask; without any, lines are read until the input ends.
    max_new_tokens
        Tokens written at most; 48 by default.
    temperature
        Of the draw; 0, the default, takes the likeliest token.
    top_p
        Share of the probability that is drawn from; 1 by default.
    repetition_penalty
        For tokens that stand there already; 1.2 by default, 1 for none.
    seed
        Of the draw; 0 by default.
    time
        Ask one thing over and over, and print how fast the answers come: in this process, and through HTTP.
    delay
        With --time: seconds that a network would take, measured beside none.
    model
        Of an adapter: the folder of the model that it was trained on.
    proxy
        A larger model with the run's tokenizer (catalog name, folder, hub id, or a file that describes an endpoint): it
        answers by itself, and with what the run changed in the small model's logits added to its own.
    hosts
        So many processes answer a run's question together: each loads its own blocks of the model, and none the whole.
        With --time: how fast they write, with --delay for a question to each host and its answer.
    """
    from lichen.recipes.local.open import form_of

    penalty = repetition_penalty
    is_run = not folder.exists() or form_of(folder) == "run"
    if proxy is not None and (time or not is_run):
        what = "is not timed" if time else "needs the model before it was tuned, and after: a run's folder"
        raise LichenError(what, where="--proxy", fix="leave it out")
    if hosts is not None and (proxy is not None or not is_run):
        what = "the large model is not dealt out" if proxy is not None else "pieces are those of a run's model"
        raise LichenError(what, where="--hosts", fix="leave it out")
    if time:
        sampling = {"--temperature": temperature, "--top-p": top_p, "--seed": seed, "--repetition-penalty": penalty}
        unused = [key for key, value in sampling.items() if value is not None]
        if unused or len(texts) > 1:
            what = "the likeliest tokens of one answer are timed"
            raise LichenError(what, where=(unused or ["--time"])[0], fix="leave it out, and ask one thing")
        with crash_in(folder):
            if hosts is not None:
                return time_hosts(folder, hosts, texts[0] if texts else None, delay=delay, tokens=max_new_tokens)
            time_model(folder, texts[0] if texts else None, delay=delay, tokens=max_new_tokens, base=model)
        return
    if delay is not None:
        raise LichenError("is measured with --time alone", where="--delay", fix="add --time")
    if not is_run:
        if penalty is not None:
            raise LichenError("is for runs", where="--repetition-penalty", fix="leave it out")
        with crash_in(folder):
            try_model(
                folder,
                texts or _lines(),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                base=model,
            )
        return
    if model is not None:
        raise LichenError("is for an adapter's folder", where="--model", fix="leave it out")
    with ExitStack() as stack:
        with crash_in(folder), redirect_stdout(sys.stderr):
            from lichen.recipes import run as run_module

            ask = run_module.talk
            if proxy is not None:
                from lichen.recipes.local.proxy_talk import talk_by_proxy

                ask = partial(talk_by_proxy, proxy=proxy, say=log)
            elif hosts is not None:
                from lichen.recipes.local.hosts.talk import talk_over_hosts

                ask = lambda run, **more: stack.enter_context(talk_over_hosts(run, hosts, say=log, **more))  # noqa: E731
            talker = ask(
                folder,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
        width = max(map(len, talker.names)) + 1
        if talker.settings:
            log(f"asked: {talker.settings}")
        for text in texts or _lines():
            with crash_in(folder), redirect_stdout(sys.stderr):
                answers = talker.answer(text)
            lines = (f"{name + ':':{width}} {one}\n" for name, one in zip(talker.names, answers, strict=True))
            say("".join(lines))


def _lines() -> Iterable[str]:
    """What is typed or piped in, line by line, without empty lines."""
    if sys.stdin.isatty():
        log("type a text and press Enter; Ctrl-D ends")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def report_command(*folders: Path, clients: bool = False, json: bool = False) -> None:
    """Print the results of finished runs, side by side if there are several.

    Parameters
    ----------
    folders
        Their folders; that of several stages means the last one, below a line for each.
    clients
        Print every client's results, in full names, a table for each run.
    json
        Print their summaries as a JSON list instead; with --clients, each with its clients.
    """
    from lichen.present.clients import clients_table, read_clients
    from lichen.present.report import compare_table, summary_table
    from lichen.present.summary import read_summary
    from lichen.recipes.stages.folder import last_stage, staged_of

    if not folders:
        raise LichenError("no folder", where="lichen report", fix="name the folders of finished runs")
    runs = [last_stage(folder) for folder in folders]
    summaries = [read_summary(folder) for folder in runs]
    rows = [read_clients(folder if folder.is_dir() else folder.parent) for folder in runs] if clients else []
    if json:
        whole = zip(summaries, rows, strict=True)
        print_json([{**summary, "clients": mine} for summary, mine in whole] if clients else summaries)
    elif clients:
        for summary, mine in zip(summaries, rows, strict=True):
            show(clients_table(mine, summary))
    elif len(summaries) == 1:
        if (staged := staged_of(folders[0])) is not None:
            from lichen.recipes.stages.tables import rows_of, stages_table

            show(stages_table(rows_of(staged, folders[0])))
        show(summary_table(summaries[0]))
    else:
        show(compare_table(summaries, folders=[str(folder) for folder in folders]))
