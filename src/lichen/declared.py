"""What a rule, a client method or an engine needs and allows, and how a package of somebody else's adds one.

A recipe's words are members of families: aggregation rules, client methods, engines. Each member is one frozen object
beside its implementation. It says which :class:`Property` it allows and which it needs of the rest of the recipe; from
that follow the refusals of the schema, ``lichen list methods`` and the grid of combinations that the tests walk.

A package adds a member by an entry point of the family's group::

    [project.entry-points."lichen.aggregators"]
    median = "my_package.median:RULE"

It is imported when a recipe names its word, and never before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar, final

from lichen.core.errors import LichenError

__all__ = ["EVERY_ANSWER", "OLD_ANSWERS", "Declared", "Family", "Need", "Paper", "Part", "Property", "misfit"]


@final
class Property(StrEnum):
    """What may hold of a recipe: it holds where every part of the recipe that decides it allows it."""

    LORA_FACTORS = "LoRA factors"
    """The trained tensors are LoRA's factors A and B. Decided by what is trained."""
    EVERY_WEIGHT = "every weight"
    """The whole model is trained. Decided by what is trained."""
    SOFT_PROMPT = "a soft prompt"
    """A soft prompt of a language model is trained. Decided by what is trained, and the task."""
    SMALL_MODEL = "a small model"
    """A small model is trained from scratch. Decided by what is trained."""
    PLAIN_MEAN = "the plain mean"
    """The change is the weighted mean of the messages and nothing else. Decided by the rule."""
    SERVER_STEP = "a server step"
    """The change may be taken for a step, by any server optimizer. Decided by the rule and the client method."""
    MEAN_OF_ONE_LAYOUT = "a mean of one layout"
    """All clients of a round send changes of the same tensors, and their mean is the change, so that another middle may
    stand in its place. Decided by the rule, the client method and some sections."""
    HETEROGENEOUS_RANKS = "unequal ranks"
    """Clients may send adapters of unequal ranks and layers. Decided by the rule."""
    ONE_LAYOUT = "one layout"
    """Every round trains and sends the same tensors. Decided by the rule."""
    SUMS = "sums"
    """The server needs sums only, never a single message. Decided by the rule and by codecs."""
    BOUNDED_SUM = "a sum that one client moves little"
    """The change follows from one sum of the clients' tensors, in which each client counts once. Decided by the rule,
    the client method and some sections."""
    LATE_ANSWERS = "late answers"
    """What was made for older tensors may be folded into a step from newer ones. Decided by the rule, the client method
    and some sections."""
    LOST_ANSWERS = "lost answers"
    """A client's answer may come to nothing, and what the client has kept stays right. Decided by the client method
    and by codecs."""
    GRADIENTS = "a backward pass"
    """Clients train by gradients. Decided by the client method."""
    PLAIN_TRAINING = "plain local training"
    """Clients train by SGD or AdamW and by nothing else. Decided by the client method."""
    CODECS = "codecs"
    """What is sent are tensors that a codec may change a little. Decided by the client method, and by an exchange."""
    EPOCHS = "epochs"
    """A round may be as long as passes over the client's rows. Decided by the client method and some sections."""
    ACCUMULATION = "accumulation"
    """Several batches may make one step. Decided by the client method and some sections."""
    LAYER_TURNS = "layers in turns"
    """Some of the trained tensors may stand still, the same in every round or in turns. Decided by the client method,
    and by memory."""
    PERSONAL_TENSORS = "tensors that stay with their clients"
    """Every client may keep some of what it trains. Decided by the client method."""
    PSEUDO_LABELS = "labels that clients find"
    """A client may choose in each step what it learns from, by the model as it is. Decided by the client method."""
    SHARED_MODEL = "a shared model"
    """All clients train copies of one model. Decided by an exchange."""
    RECIPE_WEIGHTS = "the recipe's weights"
    """How much a client counts is the recipe's to say. Decided by an exchange and by fairness."""
    ALL_ROWS = "everybody's rows"
    """Every process opens the rows of all, and public ones. Decided by the engine."""
    ONE_SERVER = "one server process"
    """One process folds every message. Decided by the engine."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A short citation, such as ``McMahan et al. AISTATS 2017``, and where the paper is."""

    short: str
    url: str

    def __str__(self) -> str:
        return f"{self.short}, {self.url}"


@final
@dataclass(frozen=True, slots=True)
class Need:
    """A property without which a part of a recipe makes no sense, and the sentence that says so.

    Attributes:
        property: What must hold.
        what: Why it does not go; ``{who}`` is the part of the recipe that does not allow it, ``{me}`` the one in need.
        fix: What helps.
        where: The key at fault; empty for the key of the part in need.
    """

    property: Property
    what: str
    fix: str
    where: str = ""


EVERY_ANSWER = Need(
    Property.LOST_ANSWERS,
    "with {who} a client remembers what it has sent, and each answer must count",
    "let each answer count: leave out deadline, least and max_age of federation.schedule",
)
"""What a schedule needs with which an answer may come to nothing."""

OLD_ANSWERS = Need(
    Property.LATE_ANSWERS,
    "{who} cannot fold in what was made for older tensors",
    "use mean, fedit or ffa and adamw, sgd or mezo, with one layout for all, or schedule.kind: synchronous",
)
"""What a schedule needs that takes answers of whatever age."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a recipe, or of an algorithm that is put together in Python.

    Attributes:
        key: The recipe's key that chooses it.
        word: What a sentence calls it.
        needs: What all other parts must allow.
        lacks: What does not hold with it.
    """

    key: str
    word: str
    needs: tuple[Need, ...] = ()
    lacks: frozenset[Property] = frozenset()


def misfit(parts: Sequence[Part], part: Part) -> LichenError | None:
    """Why one of these parts does not go with the others; None where it does.

    >>> one_server = Need(Property.ONE_SERVER, "{me} needs one server", "")
    >>> clock = Part(key="engine.clock", word="a clock", needs=(one_server,))
    >>> ranks = Part(key="engine.name", word="distributed", lacks=frozenset({Property.ONE_SERVER}))
    >>> print(misfit((clock, ranks), clock), misfit((clock, ranks), ranks))
    engine.clock: a clock needs one server None
    """
    for need in part.needs:
        for other in parts:
            if other is not part and need.property in other.lacks:
                what = need.what.format(who=other.word, me=part.word)
                return LichenError(what, where=need.where or part.key, fix=need.fix)
    return None


class Declared(Protocol):
    """A member of a family, as far as refusals and lists are concerned."""

    @property
    def name(self) -> str:
        """The word in a recipe."""
        ...

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        ...

    @property
    def papers(self) -> tuple[Paper, ...]:
        """Where it comes from; none for what has no paper."""
        ...

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the rest of the recipe must allow."""
        ...

    @property
    def allows(self) -> frozenset[Property]:
        """Which of the properties that its family decides hold with it."""
        ...


T = TypeVar("T", bound=Declared)


@final
class Family(Mapping[str, T]):
    """Members by name: those of Lichen, and those of other packages by entry point.

    Iterating goes over Lichen's own; a word that is none of them is looked for among the entry points.

    Args:
        group: The entry points' group, such as ``lichen.aggregators``.
        kind: The class of a member.
        decides: The properties that a member of this family may allow.
        members: Lichen's own.
    """

    def __init__(self, group: str, kind: type[T], *, decides: frozenset[Property], members: Sequence[T]) -> None:
        self.group, self.kind, self.decides = group, kind, decides
        self._members = {member.name: member for member in members}
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> T:
        """The member of this name.

        Raises:
            KeyError: if there is none.
            LichenError: if another package's entry point of this name does not give one.
        """
        if name in self._members:
            return self._members[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def others(self) -> tuple[str, ...]:
        """The words of other packages, in order; nothing is imported."""
        from importlib.metadata import entry_points

        return tuple(sorted({entry.name for entry in entry_points(group=self.group)} - set(self)))

    def _load(self, name: str) -> T:
        from importlib.metadata import entry_points

        found = tuple(entry_points(group=self.group, name=name))
        if not found:
            raise KeyError(name)
        owners = [entry.dist.name if entry.dist is not None else "?" for entry in found]
        where = f"entry point {name} = {found[0].value} of {self.group}, package {' and '.join(owners)}"
        if len({entry.value for entry in found}) > 1:
            raise LichenError("several packages bring this word", where=where, fix="uninstall all but one of them")
        try:
            member = found[0].load()
        except Exception as error:
            message = str(error).splitlines()[0] if str(error) else ""
            what = f"cannot be imported: {type(error).__name__}: {message}"
            raise LichenError(what, where=where, fix="mend or uninstall that package") from error
        if not isinstance(member, self.kind):
            raise LichenError(
                f"is a {type(member).__name__}, not a {self.kind.__name__}",
                where=where,
                fix=f"let it name a lichen {self.kind.__name__}",
            )
        if member.name != name:
            raise LichenError(
                f"calls itself {member.name!r}", where=where, fix="give the entry point and the object one name"
            )
        if strange := member.allows - self.decides:
            words = ", ".join(sorted(strange))
            fix = f"leave it out; its family decides: {', '.join(sorted(self.decides))}"
            raise LichenError(f"allows what is not its to allow: {words}", where=where, fix=fix)
        return member
