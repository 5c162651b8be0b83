"""Several aggregators for one message, each for the tensors whose names it is given.

As ``optax.multi_transform`` joins optimizers, :func:`by_name` joins rules. SCAFFOLD averages weights over the
clients of the round by their examples, and control variates over all N of the roster, each alike::

    by_name({"control.": Mean("uniform", divisor=N), "": Mean("examples")})

Both rules change trainable tensors; :mod:`lichen.server.heterogeneity.scaffold` goes around the first mean and
replaces frozen ones.

References:
    Matteo Hessel, David Budden, Fabio Viola, Mihaela Rosca, Eren Sezener and Tom Hennigan. "Optax:
    composable gradient transformation and optimisation, in JAX!" 2020. https://github.com/google-deepmind/optax
    Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich and Ananda
    Theertha Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning." ICML 2020.
    https://arxiv.org/abs/1910.06378

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.server import Aggregator, Needs
from lichen.core.errors import LichenError
from lichen.core.message import Message, is_lifted
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["by_name"]

_Totals = Mapping[str, Any]
"""By pattern; only of rules that a tensor came for."""


def by_name(rules: Mapping[str, Aggregator]) -> Aggregator:
    """One aggregator out of several: a tensor goes to the first rule whose pattern its name begins or ends with.

    A rule sees messages with its own tensors alone, and is asked for a change only if it got any of a client
    that counts. The shared tensors it sees whole, as a patch does not bear the names of what is sent.
    The metrics of the rule for ``""``, which matches every name, keep their names; those of others come
    under the pattern, such as ``control.clients``.

    Args:
        rules: By pattern, the first match first.

    Raises:
        LichenError: if there is no rule. The aggregator refuses a tensor that no pattern matches, and
            rules that write the same tensor.
    """
    if not rules:
        raise LichenError("no rule", where="aggregator.by_name", fix='give one, such as {"": Mean()}')
    return _ByName(dict(rules))


@final
@dataclass(frozen=True, slots=True)
class _ByName:
    rules: Mapping[str, Aggregator]

    @property
    def needs(self) -> Needs:
        """A sum, where every rule needs no more."""
        return "sum" if all(rule.needs == "sum" for rule in self.rules.values()) else "single"

    @property
    def one_version(self) -> bool:
        """Where one of the rules takes no old messages."""
        return any(rule.one_version for rule in self.rules.values())

    def zero(self) -> _Totals:
        """Nothing folded in."""
        return {}

    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """Each rule's lifted tensors, under the rule's place: lifting may rename them."""
        tensors: Tree = {}
        parts = self._parts(message)
        for place, pattern in enumerate(self.rules):
            if pattern in parts:
                mine = self.rules[pattern].lift(parts[pattern], discount_C).tensors
                tensors = trees.join(f"{place}/", mine, tensors)
        return replace(message, tensors=tensors, weight_C=torch.full_like(message.weight_C, torch.nan))

    def add(self, total: _Totals, message: Message, discount_C: Tensor | None = None) -> _Totals:
        """Fold every client of the message in, rule by rule; raises as the rules, or where no pattern matches."""
        new = dict(total)
        for pattern, part in self._parts(message).items():
            rule = self.rules[pattern]
            new[pattern] = rule.add(new.get(pattern, rule.zero()), part, discount_C)
        return new

    def _parts(self, message: Message) -> dict[str, Message]:
        """The message by rule, as far as there are tensors."""
        tensors: dict[str, Tree] = {}
        if is_lifted(message):
            for place, pattern in enumerate(self.rules):
                mine, _ = trees.split(message.tensors, f"{place}/")
                if mine:
                    tensors[pattern] = mine
        else:
            for name, x in message.tensors.items():
                tensors.setdefault(self._pattern(name), {})[name] = x
        return {pattern: replace(message, tensors=mine) for pattern, mine in tensors.items()}

    def _pattern(self, name: str) -> str:
        for pattern in self.rules:
            if name.startswith(pattern) or name.endswith(pattern):
                return pattern
        raise LichenError(
            f"no rule matches the tensor {name!r}: there are {list(self.rules)}",
            where="aggregator.by_name",
            fix='give a rule for it, or one for all others under ""',
        )

    def clients(self, total: _Totals) -> int:
        """Clients folded into the rule that got most."""
        return max((self.rules[pattern].clients(one) for pattern, one in total.items()), default=0)

    def merge(self, a: _Totals, b: _Totals) -> _Totals:
        """Both together, rule by rule; raises as the rules."""
        both = {pattern: self.rules[pattern].merge(a[pattern], b[pattern]) for pattern in a.keys() & b.keys()}
        return {**a, **b, **both}

    def close(self, total: _Totals, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)`` of all rules together.

        Raises:
            LichenError: if nothing was folded in, two rules write one tensor, or as the rules.
        """
        change = Shared()
        metrics: dict[str, float] = {}
        closed = [pattern for pattern in self.rules if pattern in total and self.rules[pattern].clients(total[pattern])]
        if not closed:
            raise LichenError("no client contributed", where="aggregator.by_name", fix="invite more clients")
        for pattern in closed:
            written, closed_metrics = self.rules[pattern].close(total[pattern], shared)
            twice = sorted(written.flat().keys() & change.flat().keys())
            if twice:
                raise LichenError(
                    f"two rules write {twice[0]!r}",
                    where="aggregator.by_name",
                    fix="put what writes all tensors, such as AllowEmpty, around by_name",
                )
            change |= written
            under = f"{pattern.strip('.')}." if pattern else ""
            metrics |= {under + name: value for name, value in closed_metrics.items()}
        return change, metrics

    def dump(self, total: _Totals) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        tensors: Tree = {}
        headers: dict[str, Any] = {}
        for place, pattern in enumerate(self.rules):
            if pattern in total:
                mine, headers[pattern] = self.rules[pattern].dump(total[pattern])
                tensors = trees.join(f"{place}/", mine, tensors)
        return tensors, {"rules": headers}

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> _Totals:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if these are not a total of these rules.
        """
        headers = header.get("rules")
        if not isinstance(headers, Mapping) or not headers.keys() <= self.rules.keys():
            raise LichenError("these are not a total of these rules", where="aggregator.by_name", fix="send it again")
        return {
            pattern: self.rules[pattern].load(trees.split(tensors, f"{place}/")[0], headers[pattern])
            for place, pattern in enumerate(self.rules)
            if pattern in headers
        }
