"""A local transformers model behind the interface; no gradient is taken.

A causal language model scores, writes and embeds texts; a sequence classifier scores the names of its
classes. Both take a soft prompt as an offset from the embeddings of a starting text
(:class:`lichen.fm.interface.SoftModel`). Rows go through the model by length, so that little is padding.

Of an instruct model (``chat=True``) every prompt is what a user says: it is put into the tokenizer's chat
template, and what is scored or written is the assistant's turn, whose text has no leading space. A text's
vector is the mean of the last hidden states over its tokens, scaled to length one.

References:
    Tianxiang Sun, Yunfan Shao, Hong Qian, Xuanjing Huang and Xipeng Qiu. "Black-Box Tuning for
    Language-Model-as-a-Service." ICML 2022. https://arxiv.org/abs/2201.03514
    Niklas Muennighoff. "SGPT: GPT Sentence Embeddings for Semantic Search." 2022.
    https://arxiv.org/abs/2202.08904 (vectors of a causal model; its means are weighted by position)

Legend: N rows, B rows of a call, T tokens, S kept positions, V vocabulary, K words, P soft positions, H width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.decoding import decode
from lichen.fm.interface import Usage, answer_by_score, check_generation
from lichen.fm.parsing import cut_at
from lichen.fm.tokenization import Texts, by_length, check_length
from lichen.models.loading.load import base_digest, frozen_eval
from lichen.models.renamed import takes_logits_to_keep

__all__ = ["LocalFM"]


@final
class LocalFM:
    """A frozen model and its tokenizer, asked by text or by soft prompt.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`, or ``load_classifier``.
        tokenizer: Its tokenizer, a fast one.
        name: How it is called; the model's own name if empty.
        classes: A classifier's class names, in order; none for a language model.
        positions: P of the soft prompt; 0 for none.
        start: Text whose embeddings the soft prompt starts from, over and over until it is filled.
        batch: Rows in one call of the model.
        chat: Prompts are messages of a user, for ``score``, ``answer`` and ``generate`` alike.
        template: With ``chat``: a chat template in place of the tokenizer's own.

    Raises:
        LichenError: if the model is not frozen, the tokenizer gives no offsets or has no chat template where
            one is needed, or a soft prompt has no start.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        classes: Sequence[str] = (),
        positions: int = 0,
        start: str = "",
        batch: int = 32,
        chat: bool = False,
        template: str | None = None,
    ) -> None:
        frozen_eval(model)
        self._texts = Texts(tokenizer, chat=chat, template=template)
        if classes and model.config.num_labels != len(classes):
            raise LichenError(
                f"{len(classes)} names for {model.config.num_labels} classes", where="classes", fix="name each"
            )
        if chat and classes:
            raise LichenError("a classifier has no chat", where="classes", fix="leave out chat or classes")
        self.name = name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
        self.base = base_digest(model)
        self.classes = tuple(classes)
        self.positions, self.batch, self.chat = positions, batch, chat
        self._template_digest = "" if template is None else "/" + hashlib.sha256(template.encode()).hexdigest()[:16]
        self._model = model
        self._usage = Usage()
        self._takes_logits_to_keep = takes_logits_to_keep(model)
        table_VH = model.get_input_embeddings().weight
        self.width = int(table_VH.shape[1])
        ids = self.tokens(start)
        if positions and not ids:
            raise LichenError("a soft prompt starts from no text", where="start", fix="give a starting text")
        self._spread = float(table_VH.detach().float().std()) if positions else 0.0
        times = -(-positions // max(len(ids), 1))
        self._start_P = torch.tensor((ids * times)[:positions], dtype=torch.int64)

    @property
    def usage(self) -> Usage:
        """What it was asked so far."""
        return self._usage

    @property
    def source(self) -> str:
        """The digest of the weights, and whether prompts are put into a template, and which if not the model's own."""
        return f"sha256:{self.base}" + ("/chat" + self._template_digest if self.chat else "")

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without special ones."""
        return self._texts.tokens(text)

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        """``(N, K)`` float64 log-probabilities; see :meth:`lichen.fm.interface.FoundationModel.score`.

        Raises:
            LichenError: if the numbers of texts do not fit, nothing stands before a continuation, or a
                continuation is no class of a classifier.
        """
        widths = {len(some) for some in continuations}
        if len(prompts) != len(continuations) or len(widths) > 1:
            raise LichenError("prompts and continuations do not pair up", where="score", fix="give K texts a prompt")
        if not prompts:
            return torch.zeros(0, 0, dtype=torch.float64)
        if self.classes:
            rows = [self._texts.whole(prompt) for prompt in prompts]
            parts = [self._classified(rows[at : at + self.batch], None) for at in range(0, len(rows), self.batch)]
            class_NK = torch.tensor([[self._class(text) for text in some] for some in continuations])
            return torch.cat(parts).double().gather(1, class_NK)
        pairs = zip(prompts, continuations, strict=True)
        spans = [self._texts.span(prompt, text) for prompt, some in pairs for text in some]
        firsts = spans[:: max(len(continuations[0]), 1)] if continuations else []
        if firsts and all(at == len(ids) - 1 for ids, at in spans):
            begins = [ids[:at] for ids, at in firsts for _ in continuations[0]]
            if begins == [ids[:at] for ids, at in spans]:  # one call tells of all that may come next
                last_NK = torch.tensor([ids[-1] for ids, _ in spans]).view(len(prompts), -1)
                order = by_length([ids[:at] for ids, at in firsts])
                logp_NK = self._next([firsts[n][0][: firsts[n][1]] for n in order], last_NK[order], None)
                return torch.empty_like(logp_NK).index_copy_(0, torch.tensor(order), logp_NK).double()
        order = by_length([ids for ids, _ in spans])
        labels = [[-100] * spans[n][1] + spans[n][0][spans[n][1] :] for n in order]
        totals = dict(zip(order, self._labelled([spans[n][0] for n in order], labels, None), strict=True))
        return -torch.tensor([totals[n][0] for n in range(len(spans))], dtype=torch.float64).view(len(prompts), -1)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        """``(N, K)`` float64 probabilities; see :func:`lichen.fm.interface.answer_by_score`.

        Raises:
            LichenError: as :meth:`score` does, or if there is nothing to choose between.
        """
        return answer_by_score(self, prompts, choices)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """N texts; see :meth:`lichen.fm.interface.Generator.generate` and :func:`lichen.fm.decoding.decode`.

        A row's text depends on its prompt and seed, and on the other rows only through rounding. It ends
        at the model's end token, which is left out.

        Raises:
            LichenError: if a setting is out of range, a prompt is empty or too long, or the model is a classifier.
        """
        check_generation(prompts, seeds, max_new_tokens, temperature, top_p)
        if self.classes:
            raise LichenError("a classifier writes no text", where="model", fix="use a causal language model")
        rows = [self._texts.prompt_ids(prompt) for prompt in prompts]
        check_length(rows, max_new_tokens, self._model.config)
        ends = self._texts.ends(self._model)
        texts = [""] * len(rows)

        def stopped(row: int, ids: Sequence[int], logits_V: Tensor) -> bool:
            del row, logits_V
            text = self._texts.decode(ids)
            return any(stop_text in text for stop_text in stop)

        order = by_length(rows)
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            written, calls = decode(
                self._model,
                [rows[n] for n in some],
                seeds=[seeds[n] for n in some],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                ends=ends,
                watch=stopped if stop else None,
            )
            for n, ids in zip(some, written, strict=True):
                texts[n] = cut_at(self._texts.decode(ids), stop)
            tokens_in, tokens_out = sum(len(rows[n]) for n in some), sum(len(ids) for ids in written)
            self._usage += Usage(calls=calls, tokens_in=tokens_in, tokens_out=tokens_out)
        return texts

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, H)`` float32 of length one; tokens that the tokenizer adds by itself are read, not averaged.

        Raises:
            LichenError: if a text is empty or too long.
        """
        rows = [self._texts.whole(text) for text in texts]
        own = [self.tokens(text) for text in texts]
        check_length(own, 0, self._model.config)
        check_length(rows, 0, self._model.config)
        out_NH = torch.zeros(len(rows), self.width)
        order = by_length(rows)
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            with torch.inference_mode():
                embeds_BTH, mask_BT, _ = self._embed([rows[n] for n in some], None)
                hidden_BTH = self._model.base_model(inputs_embeds=embeds_BTH, attention_mask=mask_BT).last_hidden_state
                for n, hidden_TH in zip(some, hidden_BTH.float().cpu(), strict=True):
                    mean_H = hidden_TH[self._texts.lead : self._texts.lead + len(own[n])].mean(0)
                    out_NH[n] = mean_H / mean_H.norm().clamp(min=1e-12)
            self._usage += Usage(calls=1, tokens_in=int(mask_BT.sum()))
        return out_NH

    def choose(self, rows: Sequence[Sequence[int]], words: Sequence[str], *, offset_PH: Tensor | None = None) -> Tensor:
        """``(N, K)`` float32 log-probabilities; see :meth:`lichen.fm.interface.SoftModel.choose`.

        Raises:
            LichenError: if a word is no single token, or no class of a classifier.
        """
        number = self._class if self.classes else self._token
        choice_NK = torch.tensor([[number(word) for word in words]] * len(rows)).view(len(rows), len(words))
        if not self.classes:
            return self._next(rows, choice_NK, offset_PH)
        starts = range(0, len(rows), self.batch)
        parts = [self._classified(rows[at : at + self.batch], offset_PH) for at in starts]
        return torch.cat(parts).gather(1, choice_NK) if parts else torch.zeros(0, len(words))

    def follow(
        self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, offset_PH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(loss, count)`` of the labelled tokens; see :meth:`lichen.fm.interface.SoftModel.follow`.

        Raises:
            LichenError: if the model is a classifier.
        """
        if self.classes:
            raise LichenError("a classifier writes no text", where="model", fix="use a causal language model")
        loss, count = 0.0, 0
        for x, n in self._labelled(rows, labels, offset_PH):
            loss, count = loss + x, count + n
        return torch.tensor(loss, dtype=torch.float64), torch.tensor(count)

    def _next(self, rows: Sequence[Sequence[int]], tokens_NK: Tensor, offset_PH: Tensor | None) -> Tensor:
        """``(N, K)`` float32: log-probability that each of these tokens comes next."""
        parts = []
        for at in range(0, len(rows), self.batch):
            some = rows[at : at + self.batch]
            ends = [len(row) - 1 for row in some]
            logp_BSV, slot_of = self._run(some, sorted(set(ends)), offset_PH, out=len(some))
            logp_BV = logp_BSV[torch.arange(len(some)), [slot_of[end] for end in ends]]
            parts.append(logp_BV.gather(1, tokens_NK[at : at + self.batch]))
        return torch.cat(parts) if parts else torch.zeros(tokens_NK.shape)

    def _labelled(
        self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], offset_PH: Tensor | None
    ) -> Iterator[tuple[float, int]]:
        """Each row's summed loss and labelled tokens; the first token of a row without prompt has no loss."""
        first = 0 if offset_PH is not None and not self._texts.lead else 1
        for at in range(0, len(rows), self.batch):
            some, their = rows[at : at + self.batch], labels[at : at + self.batch]
            labelled_positions = [[t for t, label in enumerate(row) if label >= 0 and t >= first] for row in their]
            positions = sorted({t - 1 for row in labelled_positions for t in row})
            if not positions:
                yield from ((0.0, 0) for _ in some)
                continue
            logp_BSV, slot_of = self._run(some, positions, offset_PH, out=sum(len(row) for row in labelled_positions))
            for b, indices in enumerate(labelled_positions):
                picked = logp_BSV[b, [slot_of[t - 1] for t in indices], [their[b][t] for t in indices]]
                yield -float(picked.double().sum()), len(indices)

    def _run(
        self, rows: Sequence[Sequence[int]], positions: Sequence[int], offset_PH: Tensor | None, *, out: int
    ) -> tuple[Tensor, dict[int, int]]:
        """``(B, S, V)`` float32 log-probabilities after these places of the text (-1: before it); where each lies."""
        with torch.inference_mode():
            embeds_BTH, mask_BT, shift = self._embed(rows, offset_PH)
            # The soft prompt's end is what the first word of the text is predicted from.
            retained_S = torch.tensor(
                [q + shift if q + 1 >= self._texts.lead else q for q in positions], device=mask_BT.device
            )
            more = {"logits_to_keep": retained_S} if self._takes_logits_to_keep else {}
            logits_BSV = self._model(inputs_embeds=embeds_BTH, attention_mask=mask_BT, use_cache=False, **more).logits
            if not self._takes_logits_to_keep:
                logits_BSV = logits_BSV[:, retained_S]
            logp_BSV = torch.log_softmax(logits_BSV.float(), -1).cpu()
        self._usage += Usage(calls=1, tokens_in=int(mask_BT.sum()), tokens_out=out)
        return logp_BSV.clone(), {t: s for s, t in enumerate(positions)}

    def _classified(self, rows: Sequence[Sequence[int]], offset_PH: Tensor | None) -> Tensor:
        """``(B, K)`` float32; rows of equal length go together, because causal classifiers would read the padding."""
        logp_BK = torch.zeros(len(rows), len(self.classes))
        for length in sorted({len(row) for row in rows}):
            indices = [b for b, row in enumerate(rows) if len(row) == length]
            with torch.inference_mode():
                embeds_BTH, mask_BT, _ = self._embed([rows[b] for b in indices], offset_PH)
                logits_BK = self._model(inputs_embeds=embeds_BTH, attention_mask=mask_BT).logits
                some_BK = torch.log_softmax(logits_BK.float(), -1).cpu()
            logp_BK[indices] = some_BK.clone()
            self._usage += Usage(calls=1, tokens_in=int(mask_BT.sum()), tokens_out=len(indices))
        return logp_BK

    def _embed(self, rows: Sequence[Sequence[int]], offset_PH: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Embeddings padded on the right, the mask, and by how much the soft prompt has moved the text."""
        device = self._model.get_input_embeddings().weight.device
        wide = max(len(row) for row in rows)
        pad = self._texts.pad
        ids_BT = torch.tensor([[*row, *[pad] * (wide - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in rows], device=device)
        embed = self._model.get_input_embeddings()
        embeds_BTH = embed(ids_BT)
        if offset_PH is None:
            return embeds_BTH, mask_BT, 0
        if offset_PH.shape != (self.positions, self.width):
            raise LichenError(
                f"a soft prompt of shape {tuple(offset_PH.shape)}, not {(self.positions, self.width)}",
                where="soft prompt",
                fix="make it of the face's positions and width",
            )
        soft_PH = embed(self._start_P.to(device)) + (offset_PH.to(device) * self._spread).to(embeds_BTH.dtype)
        soft_BPH = soft_PH.expand(len(rows), -1, -1)
        lead = self._texts.lead
        embeds_BTH = torch.cat([embeds_BTH[:, :lead], soft_BPH, embeds_BTH[:, lead:]], 1)
        return embeds_BTH, torch.cat([mask_BT.new_ones(len(rows), self.positions), mask_BT], 1), self.positions

    def _class(self, word: str) -> int:
        if word.strip() not in self.classes:
            raise LichenError(f"no class {word!r}", where="words", fix=f"known: {', '.join(self.classes)}")
        return self.classes.index(word.strip())

    def _token(self, word: str) -> int:
        ids = self.tokens(word)
        if len(ids) != 1:
            raise LichenError(
                f"{word!r} is {len(ids)} tokens of {self.name}", where="words", fix="use words of one token each"
            )
        return ids[0]
