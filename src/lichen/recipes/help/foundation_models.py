"""Opens the foundation models of a recipe, with disclosure policy and cache.

All answers are kept on disk with where they come from, in the recipe's ``cached`` folder or the cache, so that a
run that is repeated asks nothing twice. They hold what was asked, word for word: their folder is private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.private import FOLDER, make_folders
from lichen.data.chat.chat_template import chat_template_of
from lichen.data.sources.catalog import cache_dir, resolve_model
from lichen.fm.cache import CachedModel
from lichen.fm.disclosure import DisclosurePolicy, Origin
from lichen.fm.encoder import LocalEncoder
from lichen.fm.endpoint import Endpoint
from lichen.fm.filtering.content import ContentFilter, Finder, names_in, private_runs
from lichen.fm.filtering.patterns import patterns_of
from lichen.fm.http import HttpFM
from lichen.fm.interface import Usage
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal, load_encoder
from lichen.recipes.rows.prepare import ClientData
from lichen.recipes.schema.help import EndpointConfig
from lichen.recipes.schema.recipe import Recipe

__all__ = ["FMRegistry", "private_texts"]

Say = Callable[[str], None]


def answers_folder(recipe: Recipe) -> Path:
    """Where answers of foundation models lie: the recipe's own folder, or one in the cache that is private."""
    if recipe.cache_dir:
        return Path(recipe.cache_dir)
    folder = cache_dir() / "answers"
    with suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        make_folders(folder)
        folder.chmod(FOLDER)  # earlier versions left it open
    return folder


def private_texts(clients_data: Sequence[ClientData]) -> Iterator[str]:
    """All that clients' rows say: texts, prompts and conversations."""
    for one in clients_data:
        for record in (*one.train, *one.valid, *one.test):
            yield from (record.prompt, record.text)
            yield from (str(turn.get("content", "")) for turn in record.messages)


@final
@dataclass(slots=True, kw_only=True)
class FMRegistry:
    """Every foundation model of a run, loaded when it is first asked, and what all of them were asked.

    Attributes:
        recipe: Names them.
        say: Called with lines of progress.
        private: The clients' rows, for a filter that looks for runs of their words.
    """

    recipe: Recipe
    say: Say
    private: Callable[[], Iterable[str]] = tuple
    _cached: dict[str, CachedModel] = field(default_factory=dict, init=False)
    _policies: dict[str, DisclosurePolicy] = field(default_factory=dict, init=False)
    _encoders: dict[str, LocalEncoder] = field(default_factory=dict, init=False)
    _filters: dict[str, ContentFilter] = field(default_factory=dict, init=False)

    def writer(
        self, name: str, endpoint: EndpointConfig | None, allow: Sequence[Origin], *, chat: bool
    ) -> DisclosurePolicy:
        """A language model that scores and writes, behind the rule of what it may be shown.

        Args:
            name: Catalog name, folder or hub id.
            endpoint: Asked instead, where there is one.
            allow: Origins it may be shown.
            chat: Prompts are a user's messages.
        """
        model = f"{name if endpoint is None else endpoint.url + endpoint.model}/{chat}"
        content = None if endpoint is None or endpoint.filter is None else self._filter(endpoint)
        if model not in self._cached:
            self._cached[model] = CachedModel(self._load(name, endpoint, chat), answers_folder(self.recipe))
        key = f"{model}/{sorted(allow)}/{id(content)}"
        if key not in self._policies:
            self._policies[key] = DisclosurePolicy(self._cached[model], allow=allow, content=content)
        return self._policies[key]

    def _filter(self, endpoint: EndpointConfig) -> ContentFilter:
        """The content filter before an endpoint; one for all that are alike."""
        plan = endpoint.filter
        assert plan is not None
        key = plan.model_dump_json()
        if key not in self._filters:
            where = f"{self._section(endpoint)}.endpoint.filter"
            finders: list[Finder] = []
            if plan.kinds:
                finders.append(patterns_of(plan.kinds, where=f"{where}.kinds"))
            if plan.names is not None:
                finders.append(names_in(Path(plan.names).expanduser(), where=f"{where}.names"))
            if plan.private_words is not None:
                finders.append(private_runs(self.private(), plan.private_words, where=f"{where}.private_words"))
            self._filters[key] = ContentFilter(finders, action=plan.action, where=f"{where}.action")
        return self._filters[key]

    def _section(self, endpoint: EndpointConfig) -> str:
        section = self.recipe.synthetic
        return "synthetic" if section is not None and section.endpoint == endpoint else "teacher"

    def _load(self, name: str, endpoint: EndpointConfig | None, chat: bool) -> LocalFM | HttpFM:
        if endpoint is not None:
            plain = endpoint.model_dump(exclude={"filter"})
            return HttpFM(Endpoint(**plain, place=f"{self._section(endpoint)}.endpoint"))
        self.say(f"loading {name}")
        section = self.recipe.synthetic
        key, fix = "synthetic.name" if section is not None and section.name == name else "teacher.name", ""
        try:
            path = resolve_model(name)
            fix = "name a language model, or an endpoint"
            model, tokenizer = load_causal(path, device=self.recipe.model.device)
        except LichenError as error:
            raise LichenError(error.what, where=key, fix=fix or error.fix) from None
        template: str | None = None
        if chat and getattr(tokenizer, "chat_template", None):
            # An answer that others learn from, or a text that is kept, holds no thoughts.
            template, notes = chat_template_of(tokenizer)
            for note in notes:
                self.say(f"{name}: {note}")
        return LocalFM(model, tokenizer, name=name, chat=chat, template=template)

    def encoder(self, name: str) -> LocalEncoder:
        """A frozen encoder, for votes and near copies; it runs where the rows are."""
        if name not in self._encoders:
            model, tokenizer = load_encoder(resolve_model(name), device=self.recipe.model.device)
            self._encoders[name] = LocalEncoder(model, tokenizer, name=name, longest=self.recipe.data.max_length)
        return self._encoders[name]

    @property
    def usage(self) -> Usage:
        """What all of them were asked."""
        total = Usage()
        for cached in self._cached.values():
            total = total + cached.usage
        for encoder in self._encoders.values():
            total = total + encoder.usage
        return total

    def summary(self) -> dict[str, float | str | None]:
        """What was asked and what it cost, as numbers of a summary.

        ``fm.asked`` counts texts handed over, whether or not their answers were on disk already; ``fm.bytes.*``
        are those of texts by origin; ``fm.filter.*`` what a content filter found by kind, and ``fm.filter.texts`` how
        many texts it looked through; all others are of the usage.
        """
        usage = self.usage
        out: dict[str, float] = {f"fm.{key}": float(getattr(usage, key)) for key in Usage.__slots__}
        out["fm.asked"] = 0.0
        for policy in self._policies.values():
            for origin, sent in policy.sent.items():
                out["fm.asked"] += sent.texts
                out[f"fm.bytes.{origin}"] = out.get(f"fm.bytes.{origin}", 0.0) + sent.bytes
        for content in self._filters.values():
            for kind, count in {"texts": content.texts, **content.counts}.items():
                out[f"fm.filter.{kind}"] = out.get(f"fm.filter.{kind}", 0.0) + count
        return {key: value for key, value in out.items() if value or key == "fm.asked"}
