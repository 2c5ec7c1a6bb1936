"""Samples continuations of many prefixes of the same traces with transformers: one prefill per trace, rows that come
and go.

A trace is read once; a request copies its prefix's keys and values and, where it names a token, starts with that token.
Rows that have ended are dropped and new ones take their place, so a batch stays full to the end of the list. Every row
draws its own uniforms (see `lm.distribution`): which rows share its batch changes nothing but the rounding of the
logits, of the order of 1e-6. A token can therefore differ between batch sizes only where a uniform falls that close to
the border of two tokens; the same list of requests in the same order with the same `batch` and number of threads is
repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokencredit.lm.distribution import Settings, draw, entropy, log_probs, uniforms
from tokencredit.lm.key_values import Piece, RowCache, check_shareable, prefill
from tokencredit.lm.models import CausalModel
from tokencredit.lm.room import Room
from tokencredit.lm.sampling import Progress, Request, Rollout, Trace

ROWS = 512  # rows per forward pass, at most
CHUNK_CELLS = 1 << 25  # logits held at once while reading traces, at most
TELL = 8  # steps between two reports


class PrefixSampler:
    """A `Sampler` on a transformers model.

    batch            rows per forward pass, at most
    prefill_tokens   tokens of traces, padding included, read in one forward pass and kept as keys and values at a time,
                     at most
    memory           bytes of the process, which may allow fewer of both; see `lm.room`
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        ends: Sequence[int],
        settings: Settings | None = None,
        batch: int = ROWS,
        prefill_tokens: int = 32768,
        memory: int | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is a number of rows, not {batch}")
        check_shareable(model)
        self.model, self.ends, self.settings = model, tuple(ends), settings or Settings()
        self.room = Room.of(model, memory)
        self.batch, self.prefill_tokens = batch, min(prefill_tokens, self.room.prefixes())
        self.device = next(model.parameters()).device
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def distributions(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        """log π(· | y<i) [T,V], float32 on the CPU, for each trace in order."""
        for k, trace in enumerate(traces):
            self._check_context(k, trace, len(trace.completion))
        with _evaluating(self.model):
            at = 0
            while at < len(traces):
                some = self._together(traces[at:])
                at += len(some)
                width = max(len(t.prompt) + len(t.completion) for t in some)
                ids = torch.tensor(
                    [[*t.prompt, *t.completion, *[t.prompt[0]] * width][:width] for t in some], device=self.device
                )
                logits = self.model(input_ids=ids).logits
                for row, t in enumerate(some):
                    first = len(t.prompt) - 1
                    yield log_probs(logits[row, first : first + len(t.completion)], self.settings).float().cpu()

    @torch.no_grad()
    def continue_(
        self, traces: Sequence[Trace], requests: Sequence[Request], progress: Progress | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, its rollout) as they end; `progress` hears while they are written."""
        for request in requests:
            self._check(traces, request)
        order = sorted(range(len(requests)), key=lambda r: requests[r].prefix)
        waiting = []
        for index in order:
            request = requests[index]
            if request.token in self.ends:
                yield index, Rollout((), False, (), ())
            elif request.budget == 0:
                yield index, Rollout((), True, (), ())
            else:
                waiting.append(index)
        told = _Told(progress, len(requests) - len(waiting))
        with _evaluating(self.model):
            yield from self._decode(traces, requests, waiting, told)

    def rows(self, traces: Sequence[Trace], requests: Sequence[Request]) -> int:
        """Rows that are decoded together: what there is room for if each is written to its limit, at most `batch`."""
        longest = max((len(traces[r.trace].prompt) + r.prefix + 1 + r.budget for r in requests), default=1)
        return min(self.batch, self.room.rows(longest))

    def _decode(
        self, traces: Sequence[Trace], requests: Sequence[Request], waiting: Sequence[int], told: _Told
    ) -> Iterator[tuple[int, Rollout]]:
        rows: _Rows | None = None
        most = self.rows(traces, [requests[index] for index in waiting])
        for source, queue in self._sources(traces, requests, waiting):
            while queue:
                room = most - (rows.num_alive if rows else 0)
                rows = _Rows.join(
                    rows,
                    source,
                    [(index, traces[requests[index].trace], requests[index]) for index in queue[:room]],
                    self.device,
                )
                queue = queue[room:]
                while (not queue and rows.worth_stepping(0.5)) or (queue and rows.worth_stepping(0.8)):
                    rows.step(self.model, self.settings, self.ends)
                    told.step(rows)
                yield from told.ended(rows)
        while rows is not None and rows.num_alive:
            rows = _Rows.join(rows, None, [], self.device)
            while rows.worth_stepping(0.7):
                rows.step(self.model, self.settings, self.ends)
                told.step(rows)
            yield from told.ended(rows)

    def _sources(
        self, traces: Sequence[Trace], requests: Sequence[Request], waiting: Sequence[int]
    ) -> Iterator[tuple[Any, list[int]]]:
        """Requests in groups whose traces are read together: ((keys and values per layer, {trace: row}), request
        indices).
        """
        reach: dict[int, int] = {}
        for index in waiting:
            request = requests[index]
            reach[request.trace] = max(reach.get(request.trace, 0), request.prefix)
        of_trace: dict[int, list[int]] = {}
        for index in waiting:
            of_trace.setdefault(requests[index].trace, []).append(index)
        names = sorted(reach, key=lambda k: len(traces[k].prompt) + reach[k])
        while names:
            lengths = [len(traces[k].prompt) + reach[k] for k in names]
            num = max(1, sum(1 for n, length in enumerate(lengths) if (n + 1) * length <= self.prefill_tokens))
            some, names = names[:num], names[num:]
            stored = prefill(self.model, [[*traces[k].prompt, *traces[k].completion[: reach[k]]] for k in some])
            together = [index for k in some for index in of_trace[k]]
            yield (
                (stored, {k: row for row, k in enumerate(some)}),
                sorted(together, key=lambda r: (requests[r].prefix, r)),
            )

    def _together(self, traces: Sequence[Trace]) -> Sequence[Trace]:
        """The first traces that fit one forward pass with all logits."""
        vocab = self.model.config.get_text_config().vocab_size
        width, num = 0, 0
        for t in traces:
            width = max(width, len(t.prompt) + len(t.completion))
            if num and (num + 1) * width * vocab > min(CHUNK_CELLS, self.room.space // 128):
                break
            num += 1
        return traces[:num]

    def _check(self, traces: Sequence[Trace], request: Request) -> None:
        trace = traces[request.trace]
        if not 0 <= request.prefix <= len(trace.completion) or request.budget < 0:
            raise ValueError(
                f"{request} asks for a prefix of a completion of {len(trace.completion)} tokens, and a budget ≥ 0"
            )
        self._check_context(request.trace, trace, request.prefix + (request.token is not None) + request.budget)

    def _check_context(self, k: int, trace: Trace, more: int) -> None:
        if self.context and len(trace.prompt) >= self.context:
            raise ValueError(
                f"prompt {k} has {len(trace.prompt)} tokens, but the context is {self.context}: nothing fits after it"
            )
        if self.context and len(trace.prompt) + more > self.context:
            raise ValueError(
                f"prompt {k} has {len(trace.prompt)} tokens and up to {more} may follow, but the model's context is"
                f" {self.context}: lower max_new_tokens to {self.context - len(trace.prompt)}, or leave it out"
            )


class _Told:
    """Tells of rows as they are written, at most every few steps."""

    def __init__(self, progress: Progress | None, without_model: int) -> None:
        self.progress, self.steps, self.over, self.tokens = progress, 0, 0, 0
        self.rows_told, self.tokens_told = 0.0, 0
        if progress and without_model:
            progress(without_model)

    def step(self, rows: _Rows) -> None:
        """One more token of every row has been written."""
        self.steps += 1
        if self.progress and self.steps % TELL == 0:
            self._tell(rows)

    def ended(self, rows: _Rows) -> Iterator[tuple[int, Rollout]]:
        """The rollouts that have ended since the last call."""
        found = list(rows.take_ended())
        self.over += len(found)
        self.tokens += sum(len(rollout.ids) for _, rollout in found)
        if self.progress:
            self._tell(rows)
        yield from found

    def _tell(self, rows: _Rows) -> None:
        """What is new: of rows that have not been taken yet the share of their limit, or all of it where they ended."""
        left, count = rows.state[3:, ~rows.heard].double()
        ended = ~rows.alive[~rows.heard]
        share = torch.where(ended, torch.ones_like(count), count / (count + left))
        done, tokens = self.over + float(share.sum()), self.tokens + int(count.sum())
        self.progress(done - self.rows_told, tokens - self.tokens_told)
        self.rows_told, self.tokens_told = done, tokens


class _Rows:
    """The rows being decoded: their requests, their caches, and what each has written so far."""

    def __init__(
        self, index: list[int], state: Tensor, cache: RowCache, written: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        # state [5, n] int64: last token, seed, step of its uniforms, tokens it may still write, tokens written
        self.index, self.state, self.cache, self.written = index, state, cache, written
        self.alive = torch.ones(len(index), dtype=torch.bool, device=state.device)
        self.ended, self.heard = torch.zeros_like(self.alive), torch.zeros_like(self.alive)
        self.num_alive = len(index)

    def worth_stepping(self, share: float) -> bool:
        """Are enough of the rows alive?"""
        return self.num_alive > 0 and self.num_alive >= share * len(self.index)

    @classmethod
    def join(
        cls, rows: _Rows | None, source: Any, new: Sequence[tuple[int, Trace, Request]], device: torch.device
    ) -> _Rows:
        """The rows that are still alive, and new ones: in the places of those that have ended, or all in a new
        cache.
        """
        index, state, written, piece = _new_rows(source, new, device) if new else ([], None, None, None)
        if rows is not None and not rows.num_alive:
            rows.cache.drop()
        if rows is None or not rows.num_alive:
            return cls(index, state, RowCache.gather([piece]), written)
        if new and len(new) <= len(rows.index) - rows.num_alive and rows.cache.fits(piece):
            rows._replace(index, state, written, piece)
            return rows
        kept = rows.alive.nonzero()[:, 0]
        index = [rows.index[k] for k in kept.tolist()] + index
        pieces = [rows.cache.piece(kept)] + ([piece] if new else [])
        room = max(w.shape[1] for w in (rows.written[0], *(written or ())[:1]))
        stores = tuple(
            torch.cat([_pad(w[kept], room), *([_pad(written[k], room)] if new else [])])
            for k, w in enumerate(rows.written)
        )
        states = torch.cat([rows.state[:, kept], *([state] if new else [])], 1)
        return cls(index, states, RowCache.gather(pieces, rows.cache), stores)

    def _replace(self, index: list[int], state: Tensor, written: tuple[Tensor, ...], piece: Piece) -> None:
        slots = (~self.alive).nonzero()[: len(index), 0]
        self.cache.replace(slots, piece)
        room = max(self.written[0].shape[1], written[0].shape[1])
        self.written = tuple(_pad(w, room) for w in self.written)
        for store, fresh in zip(self.written, written):
            store[slots] = _pad(fresh, room)
        self.state[:, slots] = state
        for slot, name in zip(slots.tolist(), index):
            self.index[slot] = name
        self.alive[slots], self.ended[slots] = True, False
        self.heard[slots] = False
        self.num_alive += len(index)

    def step(self, model: CausalModel, settings: Settings, ends: tuple[int, ...]) -> None:
        """One more token for every row; rows that have ended write on, and are not heard."""
        token, seed, step, left, count = self.state
        log_p = log_probs(self.cache.forward(model, token, self.alive), settings)
        token = draw(log_p, uniforms(seed, step))
        at = count.clamp_max(self.written[0].shape[1] - 1)[:, None]
        for store, value in zip(
            self.written, (token, log_p.gather(1, token[:, None])[:, 0].float(), entropy(log_p).float())
        ):
            store.scatter_(1, at, torch.where(self.alive, value, store.gather(1, at)[:, 0])[:, None])
        end = torch.zeros_like(self.alive)
        for e in ends:
            end |= token == e
        alive = self.alive.long()
        self.state = torch.stack([token, seed, step + 1, left - alive, count + alive])
        self.ended |= end & self.alive
        self.alive = self.alive & ~end & (self.state[3] > 0)
        self.num_alive = int(self.alive.sum())

    def take_ended(self) -> Iterator[tuple[int, Rollout]]:
        """The rollouts of the rows that have ended since the last call."""
        gone = (~self.alive & ~self.heard).nonzero()[:, 0]
        self.heard[gone] = True
        ids, logprob, ent = (w[gone].tolist() for w in self.written)
        for row, num, ended, *lists in zip(
            gone.tolist(), self.state[4, gone].tolist(), self.ended[gone].tolist(), ids, logprob, ent
        ):
            tokens, lp, h = (tuple(values[:num]) for values in lists)
            yield self.index[row], Rollout(tokens, not ended, lp, h)


def _new_rows(
    source: Any, new: Sequence[tuple[int, Trace, Request]], device: torch.device
) -> tuple[list[int], Tensor, tuple, Piece]:
    """(request indices, state, empty stores, where their prefixes are) of requests that start."""
    stored, row_of = source
    numbers = torch.tensor([_start(trace, request) for _, trace, request in new], device=device).T
    row = torch.tensor([row_of[request.trace] for _, _, request in new], device=device)
    room = int(numbers[4].max())
    stores = tuple(
        torch.zeros(len(new), room, dtype=kind, device=device) for kind in (torch.long, torch.float32, torch.float32)
    )
    state = torch.cat([numbers[1:], torch.zeros_like(row)[None]])
    return [i for i, _, _ in new], state, stores, Piece(stored, row, torch.zeros_like(row), numbers[0])


def _pad(store: Tensor, room: int) -> Tensor:
    return functional.pad(store, (0, room - store.shape[1])) if room > store.shape[1] else store


def _start(trace: Trace, request: Request) -> tuple[int, int, int, int, int]:
    """(tokens in the cache, last token, seed, step, budget) of a new row. One without its own token reads its last
    prefix token again.
    """
    read = len(trace.prompt) + request.prefix
    if request.token is not None:
        return read, request.token, request.seed, request.prefix + 1, request.budget
    last = trace.completion[request.prefix - 1] if request.prefix else trace.prompt[-1]
    return read - 1, last, request.seed, request.prefix, request.budget


class _evaluating:
    """No dropout inside; the model's own mode afterwards. (Not a generator: it may be left in another context than it
    was entered in.)
    """

    def __init__(self, model: CausalModel) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        self.model.train(self.training)
