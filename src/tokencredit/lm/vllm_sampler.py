"""The same sampler on vLLM, for GPU machines: prompts as token ids, prefixes shared by vLLM's own prefix caching, one
seed per request.

vLLM is imported when a sampler is made. Its rollouts are those of its own random numbers: they agree with the
transformers sampler in distribution, not token by token. It reports log-probs of the sampled tokens and no entropy,
which is NaN here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.distribution import Settings, log_probs
from tokencredit.lm.sampling import Progress, Request, Rollout, Trace


class VllmSampler:
    """A `Sampler` on a `vllm.LLM`; `VllmSampler.load` makes one with what it needs.

    llm      was made with enable_prefix_caching=True, max_logprobs=-1 (the whole vocabulary) and
             logprobs_mode="processed_logprobs", so that the log-probs are those of the distribution that sampled
    at_once  requests handed over in one call; vLLM schedules them itself
    """

    def __init__(
        self, llm: Any, *, ends: Sequence[int], vocab: int, settings: Settings | None = None, at_once: int = 4096
    ) -> None:
        self.llm, self.ends, self.vocab, self.settings, self.at_once = (
            llm,
            tuple(ends),
            vocab,
            settings or Settings(),
            at_once,
        )
        self._params = _vllm().SamplingParams

    @classmethod
    def load(cls, model: str, *, ends: Sequence[int], settings: Settings | None = None, **engine: Any) -> VllmSampler:
        """A sampler on a model's path or hub name; `engine` goes to `vllm.LLM`, which is made once for a process: other
        settings share it.
        """
        options = {"enable_prefix_caching": True, "max_logprobs": -1, "logprobs_mode": "processed_logprobs", **engine}
        llm = _engine(model, json.dumps(options, sort_keys=True))
        return cls(llm, ends=ends, vocab=llm.llm_engine.model_config.get_vocab_size(), settings=settings)

    def distributions(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        """log π(· | y<i) [T,V] of each trace. With top-k only k log-probs travel per token, else the whole
        vocabulary.
        """
        number = self.settings.top_k if 0 < self.settings.top_k < self.vocab and self.settings.temperature > 0 else -1
        params = self._params(max_tokens=1, temperature=0.0, prompt_logprobs=number, detokenize=False)
        for trace in traces:
            prompt = {"prompt_token_ids": [*trace.prompt, *trace.completion]}
            found = self.llm.generate([prompt], [params], use_tqdm=False)[0].prompt_logprobs
            logits = torch.full((len(trace.completion), self.vocab), -torch.inf)
            for row, known in zip(logits, found[len(trace.prompt) : len(trace.prompt) + len(trace.completion)]):
                row[torch.tensor(list(known))] = torch.tensor([entry.logprob for entry in known.values()])
            yield log_probs(logits, self.settings)

    def continue_(
        self, traces: Sequence[Trace], requests: Sequence[Request], progress: Progress | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, its rollout). Requests with a common prefix are handed over one after the other, for
        the prefix cache.
        """
        waiting = []
        for index, request in enumerate(requests):
            if request.token in self.ends or request.budget == 0:
                yield index, Rollout((), request.token not in self.ends, (), ())
            else:
                waiting.append(index)
        if progress:
            progress(len(requests) - len(waiting))
        waiting.sort(key=lambda r: (requests[r].trace, requests[r].prefix, r))
        for start in range(0, len(waiting), self.at_once):
            some = waiting[start : start + self.at_once]
            prompts = [{"prompt_token_ids": _prefix(traces[requests[r].trace], requests[r])} for r in some]
            outputs = self.llm.generate(prompts, [self._parameters(requests[r]) for r in some], use_tqdm=False)
            if progress:
                progress(len(some), sum(len(output.outputs[0].token_ids) for output in outputs))
            for index, output in zip(some, outputs):
                yield index, _rollout(output.outputs[0])

    def _parameters(self, request: Request) -> Any:
        s = self.settings
        return self._params(
            n=1,
            max_tokens=request.budget,
            seed=request.seed,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            stop_token_ids=list(self.ends),
            logprobs=0,
            detokenize=False,
        )


def _prefix(trace: Trace, request: Request) -> list[int]:
    return [*trace.prompt, *trace.completion[: request.prefix], *([] if request.token is None else [request.token])]


def _rollout(output: Any) -> Rollout:
    ids = tuple(output.token_ids)
    logprob = tuple(known[token].logprob for token, known in zip(ids, output.logprobs))
    return Rollout(ids, output.finish_reason == "length", logprob, (float("nan"),) * len(ids))


@cache
def _engine(model: str, options: str) -> Any:
    return _vllm().LLM(model=model, **json.loads(options))


def _vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "sampling with vLLM needs it: pip install 'tokencredit[vllm]'; without it, --sampler transformers"
        ) from error
