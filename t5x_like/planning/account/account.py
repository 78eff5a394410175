"""Account of a model on a machine: all sections."""

from __future__ import annotations

from t5x_like.config import RunConfig
from t5x_like.planning.account import model_sections, serving_sections
from t5x_like.planning.account.figures import Account, Subject
from t5x_like.planning.account.serving_sections import Claim, Draft
from t5x_like.planning.estimate.inference import Inference
from t5x_like.planning.estimate.parameters import model_parts


def account(
    name: str,
    inference: Inference,
    *,
    run: RunConfig | None = None,
    turns: int | None = None,
    draft: Draft | None = None,
    claim: Claim | None = None,
) -> Account:
    """Return the account of a model.

    Args:
      name: Name of the model.
      inference: The model on a machine with known speed and memory (`inference.require_speeds`).
      run: Run that trains the model, for its objectives and its number of tokens; None: common objectives in rows of
        prompt and answer, and the compute-optimal number of tokens.
      turns: Turns of a dialogue; None: no section on dialogues.
      draft: Draft model; None: no section on speculative decoding.
      claim: Row of a benchmark to examine, with the rows of `inference` in flight.
    """
    subject = Subject(inference, model_parts(inference.model), run)
    sections = [
        model_sections.parameters(subject),
        model_sections.forward_pass(subject),
        serving_sections.cache(subject) if subject.generates else None,
        serving_sections.least_time(subject),
        serving_sections.throughput(subject, claim),
        model_sections.objectives(subject),
        model_sections.break_even(subject),
        serving_sections.dialogue(subject, turns) if turns is not None else None,
        serving_sections.speculation(subject, draft) if draft is not None else None,
    ]
    return Account(name, tuple(section for section in sections if section is not None))
