"""What the hosts of a pipeline do, from the recipe: each loads its own piece, and nobody the whole.

Whoever runs the recipe knows the model by its structure alone, in which every weight stands for one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import nn

from lichen.algorithms.hosts.mail import PIPELINE
from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.methods import METHODS
from lichen.clients.pipeline.coded_link import CodedLink
from lichen.clients.pipeline.host import PipelineHost
from lichen.clients.training.optimize import ClientOptimizer
from lichen.core.contracts.client import ClientTask
from lichen.core.seeds import derive
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import resolve_model
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.wrap import wrap
from lichen.models.causal_cohort import CausalCohort
from lichen.models.loading.dtypes import dtype_of
from lichen.models.pieces.carve import carve, spec_within
from lichen.models.pieces.load_piece import load_piece, skeleton
from lichen.models.pieces.partition import check_parts, numbers_of, part_blocks, spans_of
from lichen.models.pieces.piece_cohort import PieceCohort
from lichen.recipes.assemble.model import spec_of
from lichen.recipes.schema.recipe import Recipe
from lichen.transforms.activations import parse_activation_code

__all__ = ["Hosts"]


@final
@dataclass(frozen=True)
class Hosts:
    """The hosts of a recipe; also a node, which does the work of those that it is asked for.

    Args:
        recipe: With a section ``pipeline``.
    """

    recipe: Recipe

    @cached_property
    def structure(self) -> Any:
        """The whole model without its weights: each parameter has a shape, and one number in memory."""
        model = skeleton(self._source, dtype=self.recipe.model.dtype)
        for layer in model.modules():
            for name, x in list(layer.named_parameters(recurse=False)):
                if x.is_meta:
                    hollow = torch.zeros((), dtype=x.dtype).expand(x.shape)
                    layer.register_parameter(name, nn.Parameter(hollow, requires_grad=False))
        model.tie_weights()
        return model

    @property
    def _source(self) -> Any:
        return resolve_model(str(self.recipe.model.name))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Blocks of each host.

        Raises:
            LichenError: if the model has fewer, or the recipe deals out another number.
        """
        section = self.recipe.pipeline
        assert section is not None
        each, before, after, whole = numbers_of(self.structure)
        if section.parts is None:
            return part_blocks(each, before, after, whole, section.hosts)
        check_parts(section.parts, len(each))
        return section.parts

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Each host's share of the model's numbers; more than 1 together where a matrix lies at both ends."""
        each, before, after, whole = numbers_of(self.structure)
        own = [sum(each[start:stop]) for start, stop in spans_of(self.parts)]
        own[0], own[-1] = own[0] + before, own[-1] + after
        return tuple(numbers / whole for numbers in own)

    @property
    def text(self) -> str:
        """Who holds what, in one line."""
        each = zip(self.parts, self.shares, strict=True)
        return "hosts hold " + ", ".join(f"{blocks} blocks ({share:.0%} of the model)" for blocks, share in each)

    @cached_property
    def spec(self) -> Spec:
        """What of the whole model is trained."""
        return spec_of(self.recipe, self.structure)

    @cached_property
    def start(self) -> Shared:
        """What training begins from: the whole's adapter, drawn by names."""
        return Shared(wrap(self.structure, self.spec).init(derive(self.recipe.seed, "init")))

    @property
    def base(self) -> str:
        """Empty: no host has the whole."""
        return ""

    @cached_property
    def names(self) -> tuple[frozenset[str], ...]:
        """Of each host what it trains."""
        found = []
        for start, stop in spans_of(self.parts):
            piece = carve(self.structure, start, stop)
            found.append(frozenset(wrap(piece, spec_within(self.spec, self.structure, piece), bare=True).init(0)))
        return tuple(found)

    @cached_property
    def _loaded(self) -> dict[int, Any]:
        return {}

    def piece(self, stage: int) -> Any:
        """The cohort of a host's piece, loaded when it is first asked for."""
        if stage not in self._loaded:
            section, (start, stop) = self.recipe.model, spans_of(self.parts)[stage]
            model = load_piece(self._source, start, stop, dtype=section.dtype, device=section.device)
            spec, name = spec_within(self.spec, self.structure, model), str(section.name)
            made: PieceCohort | CausalCohort
            if stage == len(self.parts) - 1:
                made = CausalCohort(model, adapter=spec, name=name, reference=True, packed=False)
            else:
                made = PieceCohort(model, adapter=spec, name=name, reference=True)
            self._loaded[stage] = made.checkpointed() if self.recipe.engine.gradient_checkpointing else made
        return self._loaded[stage]

    def work(self) -> PipelineHost:
        """What a host does."""
        recipe, section, opt = self.recipe, self.recipe.pipeline, self.recipe.optimizer
        assert section is not None
        return PipelineHost(
            piece=self.piece,
            stages=section.hosts,
            order=section.schedule,
            optimizer=ClientOptimizer(
                name=METHODS[opt.name].base, lr=opt.lr[0], momentum=opt.momentum, weight_decay=opt.weight_decay
            ),
            link=CodedLink(
                width=int(self.structure.config.hidden_size),
                dtype=dtype_of(recipe.model.dtype),
                code=parse_activation_code(section.code) if section.code else None,
            ),
        )

    def client_tasks(self) -> dict[str, ClientTask]:
        """A host's work."""
        return {PIPELINE: ClientTask(work=self.work(), source=NoBatches())}
