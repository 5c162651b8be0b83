"""The works of a split model's clients, and the engine that answers them.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.splitting.asking import Form
from lichen.clients.splitting.ends import Cut
from lichen.clients.splitting.one_by_one import OneByOne
from lichen.clients.splitting.split_evaluate import SplitEvaluate
from lichen.clients.splitting.split_parts import SplitParts
from lichen.clients.splitting.split_train import SplitTrain
from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientWork, Dialogue, Source
from lichen.core.contracts.engine import Engine
from lichen.core.store import ClientStore
from lichen.data.batches.shards import EVAL_ROWS
from lichen.engines.splitting.middle import Middle
from lichen.engines.splitting.split_engine import SplitEngine
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.transforms.activations import parse_activation_code

__all__ = ["apart", "split_work", "splitting"]


def _form(server: ServerSide, rows: int, *, numbered: int = 0) -> Form:
    """What crosses; as changes where rows are numbered and the recipe wants it."""
    split, data, config = server.split, server.recipe.data, server.recipe.split
    assert split is not None
    assert config is not None
    code = parse_activation_code(config.code)
    code = replace(code, change=code.change and numbered > 0)
    dtype = next(iter(split.middles.values())).wrapped.model.dtype
    return Form(
        group=server.model.group,
        rows=rows,
        most=data.max_length,
        width=split.width,
        dtype=dtype,
        code=code if code.chain.codecs else None,
        noise=config.noise,
        numbered=numbered,
    )


def split_work(server: ServerSide, work: ClientWork | Dialogue, part: str = "train") -> ClientWork | Dialogue:
    """A training or an evaluation across the cuts, where the recipe has some; else the work itself.

    Args:
        server: The server's side.
        work: What a client that holds the whole model does.
        part: Rows of the roster that it does it on.
    """
    config, split = server.recipe.split, server.split
    if config is None or split is None:
        return work
    fed, rows_N = server.recipe.federation, server.roster.rows(part)
    if isinstance(work, Evaluate):
        batches = max((-(-rows // EVAL_ROWS) for rows in rows_N), default=0)
        return SplitEvaluate(evaluate=work, ends=split.ends_of, form=_form(server, EVAL_ROWS), batches=batches)
    if not isinstance(work, Train):
        return work
    passes = max((-(-rows // fed.batch_size) for rows in rows_N), default=0)
    steps = fed.fixed_steps if fed.local_epochs is None else fed.local_epochs * passes
    clip = next((step.max_norm for step in work.gradient_steps if isinstance(step, Clip)), None)
    if not config.local_head:
        work = replace(work, gradient_steps=tuple(step for step in work.gradient_steps if not isinstance(step, Clip)))
    return SplitTrain(
        train=work,
        ends=split.ends_of,
        form=_form(server, fed.batch_size, numbered=max(rows_N, default=0)),
        steps=steps,
        local_head=config.local_head,
        clip=None if config.local_head else clip,
    )


def apart(work: ClientWork | Dialogue, source: Source) -> Source:
    """The batches of a work: one client at a time where it crosses a cut."""
    return OneByOne(source) if isinstance(work, SplitTrain | SplitEvaluate) else source


def splitting(
    server: ServerSide,
    engine: Engine,
    works: Mapping[str, ClientWork | Dialogue],
    clients: ClientStore | None = None,
) -> Engine:
    """The engine, with the server's half of a split model around it where there is one.

    Args:
        server: The server's side.
        engine: Carries jobs.
        works: What clients can be asked.
        clients: Their private state; what the server remembers of their rows lies beside it.
    """
    split = server.split
    if server.recipe.split is None or split is None:
        return engine
    crossing = {name: work for name, work in works.items() if isinstance(work, SplitTrain | SplitEvaluate)}
    made = dict[tuple[str, Cut], Middle]()
    middles = partial(_middle, split, crossing, made)
    store = None if clients is None else ClientStore(clients.folder.parent / "server", listed=True)
    return SplitEngine(engine, crossing, middles, split.cut_of, kind=server.recipe.split.kind, store=store)


def _middle(
    split: SplitParts,
    works: Mapping[str, SplitTrain | SplitEvaluate],
    made: dict[tuple[str, Cut], Middle],
    name: str,
    cut: Cut,
) -> Middle:
    """What answers a work's clients of a cut; made once."""
    if (name, cut) not in made:
        work = works[name]
        train = work.train if isinstance(work, SplitTrain) else Train(work.evaluate.model)
        clip = work.clip if isinstance(work, SplitTrain) else None
        made[name, cut] = Middle(piece=split.middles[cut], train=train, form=work.form, clip=clip)
    return made[name, cut]
