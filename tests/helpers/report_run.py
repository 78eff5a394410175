"""Files of a run as `train` and `eval` leave them, with made-up numbers that look like a small UL2 run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from t5x_like.config import ul2
from t5x_like.utils.jsonl import RecordFile

DENOISERS = tuple(objective.name for objective in ul2())
_FLOOR = (2.1, 2.4, 2.9, 3.2, 2.6, 3.3, 2.75)

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\x1b\u202e{{ 7*7 }}"


def _loss(step: float, floor: float) -> float:
    return floor + (8.35 - floor) * math.exp(-((step / 260) ** 0.62))


def config(name: str = "smoke") -> dict:
    stack = {"num_layers": 4, "d_model": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "d_ff": 512}
    spans = [
        {
            "kind": "span_corruption" if objective.kind == "span_corruption" else "prefix_lm",
            "name": objective.name,
            "rate": objective.rate,
            "mode": objective.mode,
            **(
                {
                    "mean_noise_span_length": objective.mean_noise_span_length,
                    "noise_density": objective.noise_density,
                }
                if objective.kind == "span_corruption"
                else {"min_target_fraction": 0.0, "max_target_fraction": 0.5}
            ),
        }
        for objective in ul2()
    ]
    return {
        "schema_version": 2,
        "name": name,
        "model": {"encoder": stack, "decoder": stack, "vocab_size": 4224, "tie_embeddings": False, "dtype": "float32"},
        "data": {
            "corpus": {"files": [], "text_field": "text", "tfds": None, "packages": True},
            "layout": "encoder_decoder",
            "mixture": spans,
            "inputs_length": 256,
            "targets_length": 128,
            "seed": 0,
        },
        "training": {
            "num_train_steps": 2000,
            "global_batch_size": 32,
            "optimizer": {"kind": "adafactor", "decay_rate": 0.8},
            "schedule": {"kind": "rsqrt", "learning_rate": 1.0, "warmup_steps": 300},
            "max_gradient_norm": 1.0,
        },
        "sharding": {"data": 1, "fsdp": -1, "parameter_rules": []},
    }


def write_metrics(run_dir: Path, steps, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    records = RecordFile(run_dir / "metrics.jsonl", restored_step=None)
    for step in steps:
        losses = [_loss(step, floor) + rng.normal(0, 0.09) for floor in _FLOOR]
        tokens = 11_800 * (1 + rng.normal(0, 0.02))
        records.append(
            {
                "step": step,
                "loss": float(np.mean(losses)),
                **{f"loss/{name}": loss for name, loss in zip(DENOISERS, losses, strict=True)},
                "accuracy": 1 / (1 + math.exp(2.9 - 3.1 * (1 - math.exp(-step / 700)))) + rng.normal(0, 0.004),
                "z_loss": 0.004 * math.exp(-step / 500) + abs(rng.normal(0, 0.0004)),
                "learning_rate": 1 / math.sqrt(max(step, 300)),
                "grad_norm": 0.4 + 3.2 * math.exp(-step / 150) + abs(rng.normal(0, 0.12)),
                "tokens_per_second": tokens,
                "step_time_s": 12_288 / tokens,
                "mfu": 0.412 * tokens / 11_800,
                "data_wait_fraction": abs(rng.normal(0.004, 0.002)),
            }
        )
    records.close()


def evaluation(step: int) -> dict:
    return {
        "step": step,
        "objectives": {
            name: {"loss": _loss(step, floor) + 0.07, "accuracy": 0.55 - 0.1 * floor / 3, "tokens": 9000 + 1700 * index}
            for index, (name, floor) in enumerate(zip(DENOISERS, _FLOOR, strict=True))
        },
        "prefix_lm": {"loss_per_token": _loss(step, 2.75), "bits_per_byte": 0.52 * _loss(step, 2.9), "bytes": 61_234},
        "baselines": {
            "unigram_bits_per_byte": 3.41,
            "byte_entropy_bits_per_byte": 4.73,
            "gzip_bits_per_byte": 2.48,
            "lzma_bits_per_byte": 2.29,
        },
    }


SAMPLES = [
    {
        "denoiser": "R_3_0.15",
        "inputs": "[R] Return a list of the words in the string, using sep as the delimiter string.\n\n  sep\n    The "
        "<extra_id_0> used to split the string.\n\n    When set to None (the default value), will split on any "
        "whitespace\n    character (including \\n \\r \\t \\f and spaces) and <extra_id_1> discard\n    empty strings "
        "from the result.\n  maxsplit\n    Maximum number of <extra_id_2>. -1 (the default value) means no limit.</s>",
        "targets": "<extra_id_0> separator<extra_id_1> will<extra_id_2> splits</s>",
        "prediction": "<extra_id_0> string<extra_id_1> will<extra_id_2> splits</s>",
    },
    {
        "denoiser": "X_8_0.5",
        "inputs": "[X] Open the file <extra_id_0> in text, bytes or <extra_id_1> mode. Raises OSError <extra_id_2> "
        "the file could not <extra_id_3>.</s>",
        "targets": "<extra_id_0> pointed to by the path and return a file object<extra_id_1> universal newlines"
        "<extra_id_2> upon failure, that is when<extra_id_3> be opened for whatever reason</s>",
        "prediction": "<extra_id_0> and return a file object, which can be read<extra_id_1> binary<extra_id_2> if"
        "<extra_id_3> be opened for whatever reason</s>",
    },
    {
        "denoiser": "S",
        "inputs": "[S] class Counter(dict)\n |  Dict subclass for counting hashable items.  Sometimes called a bag or "
        "multiset.</s>",
        "targets": "Elements are stored as dictionary keys and their counts are stored as dictionary values.</s>",
        "prediction": "The keys of the dictionary are the elements and the values are the number of times.</s>",
    },
]


def write_run(run_dir: Path, *, name: str = "smoke") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config(name)))
    write_metrics(run_dir, range(10, 2001, 10))
    evaluations = RecordFile(run_dir / "evaluations.jsonl", restored_step=None)
    for step in range(250, 2001, 250):
        evaluations.append(evaluation(step))
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation(2000)))
    (run_dir / "samples.json").write_text(json.dumps(SAMPLES))
    seconds = {"init": 6.1, "compile": 21.4, "data_wait": 3.2, "step": 412.0, "save": 4.4, "eval": 38.5}
    (run_dir / "exit.json").write_text(json.dumps({"code": 0, "reason": "finished", "step": 2000, "seconds": seconds}))
    return run_dir


def hostile_run(run_dir):
    """Write a run in which every string that comes from outside is an attack."""
    write_run(run_dir)
    document = config(HOSTILE)
    document["data"]["mixture"][0]["name"] = HOSTILE
    document["data"]["corpus"][HOSTILE] = [HOSTILE]
    document["data"]["corpus"]["tfds"] = HOSTILE
    (run_dir / "config.json").write_text(json.dumps(document))
    samples = [{name: f"[R] {HOSTILE}<extra_id_0>{HOSTILE}" for name in ("inputs", "targets", "prediction")}]
    samples[0]["denoiser"] = HOSTILE
    (run_dir / "samples.json").write_text(json.dumps(samples))
    (run_dir / "exit.json").write_text(json.dumps({"code": HOSTILE, "reason": HOSTILE}))
    scores = evaluation(2000)
    scores["objectives"][HOSTILE] = scores["objectives"].pop(DENOISERS[0])
    (run_dir / "evaluation.json").write_text(json.dumps(scores))
    records = RecordFile(run_dir / "metrics.jsonl", restored_step=None)
    for step in (1, 2, 3):
        records.append({"step": step, "loss": 1.0, f"loss/{HOSTILE}": 2.0, HOSTILE: 3.0})
    records.close()
    return run_dir
