"""64 kB of text, read up to 64 times: which objective continues to learn from the same text?"""

import dataclasses
import json
from pathlib import Path

from t5x_like.config import CausalLM, CorpusConfig, MaskedDiffusion, Objective, RunConfig, ul2
from t5x_like.config.layouts import Layout
from t5x_like.data.sources.corpus_reader import read_corpus
from t5x_like.data.sources.document import ReadStats
from t5x_like.studies.byte_model import byte_run, with_half_of_the_layers
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Tier
from t5x_like.utils.atomic_write import write_atomically

UNIQUE, HELD_OUT = 64_000, 200_000
EPOCHS = 64


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: three objectives on the same text, each read 64 times and evaluated on the way."""
    arms: dict[str, tuple[Layout, tuple[Objective, ...]]] = {
        "causal": ("causal_lm", (CausalLM(),)),
        "ul2": ("prefix_lm", ul2()),
        "diffusion": ("prefix_lm", (MaskedDiffusion(),)),
    }
    return Study(
        question="Which objective continues to learn from text that it has read before?",
        description=f"{UNIQUE // 1000} kB of text are read {EPOCHS} times. The curves against raw tokens show where "
        "each objective begins to forget what it does not read. Diffusion has an upper bound.",
        arms=tuple(Arm(name, _run(tier, folder, *arm)) for name, arm in arms.items()),
        seeds=(0, 1, 2),
        budget=Budget("raw_tokens", EPOCHS * UNIQUE),
        predictions=(
            Prediction("causal LM overfits: UL2 ends ahead", "Prabhudesai et al. 2025", "ul2", "causal", high=0.0),
            Prediction(
                "the bound of diffusion ends below causal LM", "Ni et al. 2025", "diffusion", "causal", high=0.0
            ),
        ),
        cannot_show=(
            "What happens with more text or larger models, which overfit sooner.",
            "The exact likelihood of diffusion, which is at most its bound.",
        ),
        write_files=_write,
    )


def _run(tier: Tier, folder: Path, layout: Layout, mixture: tuple[Objective, ...]) -> RunConfig:
    run = byte_run(tier, layout, mixture)
    model = with_half_of_the_layers(run.model)
    evaluation = dataclasses.replace(run.evaluation, every_steps=200)
    corpus = CorpusConfig(files=(str(folder / "train.jsonl"),), validation_files=(str(folder / "validation.jsonl"),))
    data = dataclasses.replace(run.data, corpus=corpus, store_dir=str(folder / "stores"))
    return dataclasses.replace(run, model=model, data=data, evaluation=evaluation)


def _write(folder: Path) -> None:
    """Write the first documents of the embedded corpus to train on, and those after them to hold out."""
    paths = {folder / "train.jsonl": UNIQUE, folder / "validation.jsonl": HELD_OUT}
    if all(path.exists() for path in paths):
        return
    documents = read_corpus(CorpusConfig(packages=False), ReadStats())
    for path, size in paths.items():
        lines: list[str] = []
        while size > 0:
            text = next(documents).text[:size]
            size -= len(text.encode())
            lines.append(json.dumps({"text": text}) + "\n")
        write_atomically(path, "".join(lines))
