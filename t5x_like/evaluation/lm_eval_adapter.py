"""lm-evaluation-harness adapter: the model `t5x_like` for `t5x-like lm-eval`, or for lm-eval's own command line:

    python -m t5x_like.evaluation.lm_eval_adapter run --model t5x_like --model_args path=RUN --tasks ...

It needs the extra for lm-eval; neither torch nor transformers is imported. Results are saved as they are computed
(RUN/lm_eval/), so that a killed evaluation resumes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.stop_strings import cut_at_stop
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.answer_cache import AnswerCache
from t5x_like.evaluation.lm_requests import Pair, allowed_tokens
from t5x_like.evaluation.masked_scores import Scoring, default_scoring, require_scoring
from t5x_like.evaluation.request_scores import format_of_requests, request_scores
from t5x_like.model_loading import open_model
from t5x_like.utils.digests import json_digest

NAME = "t5x_like"
FOLDER = "lm_eval"
_REQUESTS_PER_WRITE = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class T5xLikeLM(LM):
    """Model of this package as lm-eval's `LM`: a run, the result of `convert --from`, or a Hugging Face directory.

    Args (of `--model_args`):
      path: DIR or DIR:STEP.
      step: Step of the checkpoint; by default the newest.
      mode: Mode token R, S or X; by default S if it was trained.
      max_length: Number of tokens of context; by default that of training.
      scoring: Score of texts by a model that predicts masked tokens only: pseudo_likelihood or diffusion_bound; by
        default `masked_scores.default_scoring`.
      cache: File of saved results, or "no"; by default a file in the run's folder `lm_eval`, named by checkpoint and
        settings.
      batch_size, max_batch_size, device: Accepted since lm-eval passes them, and ignored: batches have as many tokens
        as fit in memory, and the mesh is that of the run.
    """

    def __init__(
        self,
        path: str | CheckpointRef,
        step: int | None = None,
        mode: str | None = None,
        max_length: int | None = None,
        cache: str | None = None,
        scoring: Scoring | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        del batch_size, max_batch_size, device
        self._loaded = open_model(path, step)
        self.scoring = scoring or default_scoring(self._loaded)
        require_scoring(self._loaded, self.scoring, "scoring")
        self._format = format_of_requests(self._loaded, self.scoring, mode=mode, max_length=max_length)
        self._step, self._params = self._loaded.params()
        self._allowed_V = allowed_tokens(self._loaded, self._format)
        identity = {
            "checkpoint": self._loaded.digest(self._step),
            "step": self._step,
            "form": dataclasses.asdict(self._format.form),
            "lengths": [self._format.inputs_length, self._format.targets_length],
        }
        if self.scoring != "log_likelihood":
            identity["scoring"] = self.scoring
        self._answers = AnswerCache(self._cache_path(cache, identity), identity)

    @property
    def path(self) -> Path:
        """Directory of the model."""
        return self._loaded.path

    @property
    def tokenizer_name(self) -> str:
        return self._format.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return the checkpoint, the kind of the scores and the prompt format, which lm-eval saves with its results."""
        form = dataclasses.asdict(self._format.form)
        return {"checkpoint": str(self._loaded.path), "step": self._step, "scoring": self.scoring, **form}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood or its substitute `scoring`, is greedy) of each continuation after its context; see
        `RequestFormat.pair`."""
        del disable_tqdm
        pairs = [self._format.pair(*request.args) for request in requests]
        results = self._answers.complete(
            [_key("loglikelihood", request.args) for request in requests],
            lambda positions: self._scores([pairs[position] for position in positions]),
            at_once=_REQUESTS_PER_WRITE,
            lengths=[len(inputs) + len(targets) for inputs, targets in pairs],
        )
        answers = [(float(score), bool(greedy)) for score, greedy in results]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text: each token is scored once, after as much text as the model reads."""
        del disable_tqdm
        windows = [
            (position, pair)
            for position, request in enumerate(requests)
            for pair in self._format.rolling(*request.args)
        ]
        results = self._answers.complete(
            [_key("window", pair) for _, pair in windows],
            lambda positions: self._scores([windows[position][1] for position in positions]),
            at_once=_REQUESTS_PER_WRITE,
            lengths=[len(inputs) + len(targets) for _, (inputs, targets) in windows],
        )
        sums = [0.0] * len(requests)
        for (position, _), (score, _) in zip(windows, results, strict=True):
            sums[position] += score
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, or sampled ones where `generation_kwargs` sets do_sample, cut at `until`."""
        del disable_tqdm
        texts: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(position)
        for settings, positions in by_settings.items():
            continuations = self._continue([requests[position].args[0] for position in positions], json.loads(settings))
            for position, text in zip(positions, continuations, strict=True):
                texts[position] = text
                self.cache_hook.add_partial("generate_until", requests[position].args, text)
        return texts

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return request_scores(self._loaded, self._params, self._format, pairs, self.scoring)

    def _continue(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        if self.scoring != "log_likelihood":
            found = f"{self._loaded.path}, a model that predicts masked tokens only"
            expected = "a model that predicts the next token: this task generates text"
            raise ConfigError([ConfigProblem("--tasks", found, expected, "use tasks that compare likelihoods")])
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        limit = next((int(settings[name]) for name in _LENGTH_NAMES if name in settings), self._format.targets_length)
        sampling = _sampling(settings)
        prompts = [self._format.prompt(context, limit) for context in contexts]
        keys, rows, seen = [], [], dict[str, int]()
        for context in contexts:
            key = _key("generate_until", [context, dict(settings), limit])
            # A repeated request is another draw where tokens are sampled.
            number = seen[key] = seen.get(key, -1) + 1
            keys.append(key if sampling.greedy else f"{key}#{number}")
            rows.append((int(key[:7], 16) + number) % 2**31)

        def generate(positions: Sequence[int]) -> list[str]:
            tokens = generate_tokens(
                self._loaded.program,
                self._params,
                [prompts[position] for position in positions],
                allowed_V=self._allowed_V,
                max_new_tokens=limit,
                bidirectional=self._format.form.bidirectional,
                sampling=sampling,
                seed=int(settings.get("seed", 0)),
                rows=[rows[position] for position in positions],
            )
            return [cut_at_stop(self._format.text(new_tokens), stops)[0] for new_tokens in tokens]

        results = self._answers.complete(
            keys, generate, at_once=_REQUESTS_PER_WRITE // 4, lengths=[len(prompt) for prompt in prompts]
        )
        return [str(text) for text in results]

    def _cache_path(self, cache: str | None, identity: Mapping[str, Any]) -> Path | None:
        if cache is not None:
            return None if cache == "no" else Path(cache)
        if self._loaded.kind != "run":
            return None
        digest = json_digest(identity)[:12]
        return self._loaded.path / FOLDER / f"{self._step}-{digest}.jsonl"


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return Sampling()
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    return Sampling(
        temperature=temperature,
        top_k=None if not top_k else int(top_k),
        top_p=None if top_p is None else float(top_p),
    )


if __name__ != "__main__":
    # Run as a script, this file is two modules, and lm-eval refuses a name that is registered twice.
    register_model(NAME)(T5xLikeLM)


def _key(kind: str, arguments: Any) -> str:
    return json_digest([kind, arguments])[:32]


def main() -> None:
    """Run lm-eval's own command line, with the model `t5x_like` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Imported under its own name, so that the model is registered once: `__main__` is a second module of this file.
    from t5x_like.evaluation import lm_eval_adapter

    lm_eval_adapter.main()
