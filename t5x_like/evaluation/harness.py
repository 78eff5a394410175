"""lm-evaluation-harness drives our models: `t5x-like harness RUN --tasks ...`, or lm-eval's own command line with
`--model t5x_like`, which

    python -m t5x_like.evaluation.harness run --model t5x_like --model_args path=RUN --tasks ...

knows. Needs the extra `harness`; neither torch nor transformers is imported.

Answers are kept as they come (RUN/harness/), so that an evaluation that was killed goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from t5x_like.config import ConfigError, Problem
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.scoring import score_tokens
from t5x_like.evaluation.asked import parse
from t5x_like.evaluation.opened import RUN, fingerprint, open_model
from t5x_like.evaluation.rows import Answers
from t5x_like.evaluation.text_model import Pair, allowed, text_model

NAME = "t5x_like"
FOLDER = "harness"
_AT_ONCE = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model(NAME)
class T5xLikeLM(LM):
    """A run, what `convert --from` wrote, or a Hugging Face directory, as lm-eval's `LM`.

    Args, as of `--model_args`:
      path: DIR or DIR:STEP.
      step: In place of the newest.
      mode: R, S or X; by default S if it was trained.
      max_length: Tokens of context; by default the training's.
      cache: File of answers, or "no"; by default one in the run's folder `harness`, by checkpoint and settings.
      batch_size, max_batch_size, device: Taken since lm-eval passes them, and not read: batches are as many tokens as
        fit, the mesh is the run's.
    """

    def __init__(
        self,
        path: str,
        step: int | None = None,
        mode: str | None = None,
        max_length: int | None = None,
        cache: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        del batch_size, max_batch_size, device
        reference = parse(str(path))
        if len(reference.steps) > 1:
            raise ConfigError([Problem("path", str(path), "one step")])
        self._opened = open_model(reference.path)
        self._text = text_model(self._opened, mode=mode, max_length=max_length)
        self._step, self._params = self._opened.load(step if step is not None else next(iter(reference.steps), None))
        self._allowed_V = allowed(self._opened, self._text)
        account = {
            "checkpoint": fingerprint(self._opened.path, self._step),
            "step": self._step,
            "form": dataclasses.asdict(self._text.form),
            "lengths": [self._text.inputs_length, self._text.targets_length],
        }
        self._answers = Answers(self._cache_path(cache, account), account)

    @property
    def path(self) -> Path:
        """Of the model."""
        return self._opened.path

    @property
    def tokenizer_name(self) -> str:
        return self._text.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results: which checkpoint, read how."""
        return {"checkpoint": str(self._opened.path), "step": self._step, **dataclasses.asdict(self._text.form)}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context; see `text_model.TextModel.pair`."""
        del disable_tqdm
        pairs = [self._text.pair(*request.args) for request in requests]
        found = self._answers.complete(
            [_key("loglikelihood", request.args) for request in requests],
            lambda places: self._scores([pairs[place] for place in places]),
            at_once=_AT_ONCE,
            lengths=[len(inputs) + len(targets) for inputs, targets in pairs],
        )
        answers = [(float(score), bool(greedy)) for score, greedy in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text: each of its tokens once, after as much of the text as the model reads."""
        del disable_tqdm
        windows = [
            (place, pair) for place, request in enumerate(requests) for pair in self._text.rolling(*request.args)
        ]
        found = self._answers.complete(
            [_key("window", pair) for _, pair in windows],
            lambda places: self._scores([windows[place][1] for place in places]),
            at_once=_AT_ONCE,
            lengths=[len(inputs) + len(targets) for _, (inputs, targets) in windows],
        )
        sums = [0.0] * len(requests)
        for (place, _), (score, _) in zip(windows, found, strict=True):
            sums[place] += score
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where the task's `generation_kwargs` say do_sample; cut at the first of `until`."""
        del disable_tqdm
        found: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        for settings, places in by_settings.items():
            said = self._continue([requests[place].args[0] for place in places], json.loads(settings))
            for place, text in zip(places, said, strict=True):
                found[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return found

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        scores = score_tokens(self._opened.program, self._params, pairs, bidirectional=self._text.form.bidirectional)
        return [self._text.log_likelihood(score) for score in scores]

    def _continue(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = next((int(settings[name]) for name in _LENGTH_NAMES if name in settings), self._text.targets_length)
        sampling = _sampling(settings)
        prompts = [self._text.prompt(context, limit) for context in contexts]
        keys, rows, seen = [], [], dict[str, int]()
        for context in contexts:
            key = _key("generate_until", [context, dict(settings), limit])
            # The same request again is another draw, if there are draws.
            number = seen[key] = seen.get(key, -1) + 1
            keys.append(key if sampling.greedy else f"{key}#{number}")
            rows.append((int(key[:7], 16) + number) % 2**31)

        def say(places: Sequence[int]) -> list[str]:
            tokens = generate_tokens(
                self._opened.program,
                self._params,
                [prompts[place] for place in places],
                allowed_V=self._allowed_V,
                max_new_tokens=limit,
                bidirectional=self._text.form.bidirectional,
                sampling=sampling,
                seed=int(settings.get("seed", 0)),
                rows=[rows[place] for place in places],
            )
            return [_cut(self._text.text(some), stops) for some in tokens]

        found = self._answers.complete(keys, say, at_once=_AT_ONCE // 4, lengths=[len(prompt) for prompt in prompts])
        return [str(text) for text in found]

    def _cache_path(self, cache: str | None, account: Mapping[str, Any]) -> Path | None:
        if cache is not None:
            return None if cache == "no" else Path(cache)
        if self._opened.kind != RUN:
            return None
        digest = hashlib.sha256(json.dumps(account, sort_keys=True).encode()).hexdigest()[:12]
        return self._opened.path / FOLDER / f"{self._step}-{digest}.jsonl"


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


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def _key(kind: str, arguments: Any) -> str:
    return hashlib.sha256(json.dumps([kind, arguments]).encode()).hexdigest()[:32]


def main() -> None:
    """lm-eval's own command line, which from here knows the model `t5x_like`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Registered under its own name, once: `__main__` is another module of the same file.
    from t5x_like.evaluation import harness

    harness.main()
