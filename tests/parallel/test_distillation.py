"""The loss of distillation and its gradient equal the formula of Hinton et al. 2015, on a mesh and in packed rows, with
a teacher that is computed in the step and with one of which the most likely tokens are stored.

The divergence is that of TRL's GKDTrainer with beta = 0 (KL(teacher | student) at the temperature), times T**2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parallel_programs import batch_for, random_like, run_for, start
from jax import Array

from t5x_like.config import DistillationConfig, LoraConfig, RunConfig, ShardingConfig
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.monitoring.metrics import compute
from t5x_like.program import build_program
from t5x_like.utils.type_aliases import PyTree

MESH = ShardingConfig(data=2, fsdp=2, tensor=2)
TEMPERATURE = 2.0


def distilled_run(
    architecture: str, weight: float, *, lora: bool, packed: bool, parts: int, top_k: int | None
) -> RunConfig:
    run = run_for(architecture, MESH, packed=packed, gradient_accumulation_steps=parts, z_loss=0.0)
    stacks = {name: dataclasses.replace(stack, dropout_rate=0.0) for name, stack in run.model.stacks.items()}
    model = dataclasses.replace(run.model, **stacks)
    wider = {name: dataclasses.replace(stack, d_ff=192, num_layers=3) for name, stack in stacks.items()}
    distillation = DistillationConfig(
        teacher="teacher",
        model=dataclasses.replace(model, **wider),
        weight=weight,
        temperature=TEMPERATURE,
        top_k=top_k,
    )
    adapters = LoraConfig(base="base", rank=4, paths=(".*attention/(query|value)/kernel",)) if lora else None
    training = dataclasses.replace(run.training, distillation=distillation, lora=adapters)
    return dataclasses.replace(run, model=model, training=training)


CASES = {
    # Name -> architecture, weight, with adapters, packed, parts of a batch, top_k.
    "encoder_decoder": ("encoder_decoder", 0.7, False, False, 1, None),
    "encoder_decoder packed": ("encoder_decoder", 0.4, False, True, 2, None),
    "encoder_decoder lora": ("encoder_decoder", 0.8, True, False, 2, None),
    "encoder_decoder lora packed": ("encoder_decoder", 0.6, True, True, 1, None),
    "decoder": ("decoder", 0.5, False, False, 1, None),
    "decoder packed": ("decoder", 0.9, False, True, 1, None),
    "decoder lora": ("decoder", 0.2, True, False, 1, None),
    "decoder lora packed": ("decoder", 1.0, True, True, 2, None),
    "prefix_lm packed": ("prefix_lm", 0.3, False, True, 1, None),
    "encoder": ("encoder", 0.5, False, False, 1, None),
    "decoder stored packed": ("decoder", 0.6, False, True, 2, 5),
    "encoder_decoder stored lora": ("encoder_decoder", 0.6, True, False, 1, 30),
}


CHECKED = ("encoder_decoder", "decoder stored packed")


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=pytest.mark.slow) for case in CHECKED),
        *(pytest.param(case, marks=[pytest.mark.slow, pytest.mark.extended]) for case in CASES if case not in CHECKED),
    ],
)
def test_loss_and_gradient_equal_the_published_formula(case: str) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    architecture, weight, lora, packed, parts, top_k = CASES[case]
    run = distilled_run(architecture, weight, lora=lora, packed=packed, parts=parts, top_k=top_k)
    assert run.training.distillation is not None and run.training.distillation.model is not None
    program = build_program(run, jax.devices()[:8])
    batch = batch_for(dataclasses.replace(run, training=dataclasses.replace(run.training, distillation=None)))["main"]
    teacher_model = run.training.distillation.model
    trained, base = random_like(program.abstract_params, 0), random_like(program.abstract_base_params, 1)
    teacher = random_like(abstract_model(teacher_model).params, 2)
    graphdef = abstract_model(teacher_model).graphdef
    stored = {}
    if top_k is not None:
        assert program.abstract_teacher_params is None
        log_probs, ids = jax.lax.top_k(
            jax.nn.log_softmax(jax.jit(lambda: bind_params(graphdef, teacher)(batch))() / TEMPERATURE), top_k
        )
        stored = {"teacher_ids": np.asarray(ids), "teacher_log_probs": np.asarray(log_probs)}
    state = start(program, {"params": trained, "base": base, "teacher": None if top_k else teacher})
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    targets, weights = jnp.asarray(batch[f"{stack}_target_tokens"]), batch[f"{stack}_loss_weights"]

    def expected(params: PyTree) -> tuple[Array, tuple[Array, Array]]:
        whole = params if program.lora is None else program.lora.joined(base, params)
        logits = program.model(whole)(batch)
        teacher_logits = bind_params(graphdef, teacher)(batch)
        p, q = (jax.nn.softmax(x / TEMPERATURE) for x in (teacher_logits, logits))
        if top_k is not None:
            # The other tokens are one outcome.
            order = jnp.argsort(-p, axis=-1)
            p, q = (jnp.take_along_axis(x, order, axis=-1) for x in (p, q))
            p, q = (jnp.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1) for x in (p, q))
        kl = jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        mean = tuple(jnp.sum(x * weights) / weights.sum() for x in (entropy, TEMPERATURE**2 * kl))
        return (1 - weight) * mean[0] + weight * mean[1], mean

    (_, (entropy, divergence)), gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(trained)
    assert divergence > 0.001
    after, metrics = program.train_step(state, program.shard_batch({"main": {**batch, **stored}}))
    assert compute(metrics["loss"]) == pytest.approx(float(entropy), rel=1e-4)
    assert compute(metrics["distillation"]) == pytest.approx(float(divergence), rel=1e-3)
    atol = 1e-5 * max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    moment = after["opt_state"].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.1 * b, rtol=1e-3, atol=atol), moment, gradient)
    if top_k is None:
        jax.tree.map(np.testing.assert_array_equal, after["teacher"], teacher)
    assert "teacher" not in program.checkpointable_state(after)
