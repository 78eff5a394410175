"""Problems of a model's configuration that concern several fields."""

from __future__ import annotations

from t5x_like.config.bounds import Problems, above, at_least, bound_problems, within, without_repetition
from t5x_like.config.model import ModelConfig, RopeScalingConfig, StackConfig, TaskHeadConfig
from t5x_like.errors import ConfigProblem


def model_problems(model: ModelConfig) -> list[ConfigProblem]:
    """Return all problems of a model, the bounds of its fields included."""
    return without_repetition([*bound_problems(model, "model")], inconsistent_model(model))


def inconsistent_model(model: ModelConfig) -> Problems:
    """Yield the problems of a model that concern several fields."""
    if not model.stacks:
        yield ConfigProblem("model", "neither an encoder nor a decoder", "at least one stack")
    for name, stack in model.stacks.items():
        yield from _stack(f"model.{name}", stack)
    encoder, decoder = model.encoder, model.decoder
    if decoder and decoder.global_block_size:
        found = str(decoder.global_block_size)
        expected = "None: the sums of blocks contain tokens to the right, which a decoder must not see"
        yield ConfigProblem("model.decoder.global_block_size", found, expected)
    for name, one in (("encoder", encoder), ("generator", model.generator)):
        if one and one.global_block_size and (one.positions != "relative_bias" or one.relative_bias_per_layer):
            expected = "None, or positions relative_bias with one table for all layers"
            yield ConfigProblem(f"model.{name}.global_block_size", str(one.global_block_size), expected)
    for field in ("attention_gate", "depth_weights") if encoder and decoder else ():
        if getattr(decoder, field):
            yield ConfigProblem(f"model.decoder.{field}", "True", "False in a decoder beside an encoder")
    if encoder and decoder and encoder.d_model != decoder.d_model:
        yield from _unequal_widths(model, encoder, decoder)
    if encoder and encoder.positions == "relative_bias" and not encoder.relative_bias_bidirectional:
        yield degenerate_buckets("model.encoder", "an encoder attends to")
    for name, stack in model.stacks.items():
        if stack.depth_weights and model.remat == "offload":
            expected = "another policy: the layers read the states of all layers below, which stay on the devices"
            yield ConfigProblem("model.remat", f"'offload' with model.{name}.depth_weights", expected)
    yield from _embedding_width(model)
    yield from _generator(model)
    yield from _task_head(model)
    yield from within("model.unscaled_embedding_token_id", model.unscaled_embedding_token_id, 0, model.vocab_size - 1)
    if model.separate_encoder_embeddings and not (encoder and decoder):
        yield ConfigProblem(
            "model.separate_encoder_embeddings", "True", "False: a model with one stack has one embedding table"
        )
    if model.separate_encoder_embeddings and model.embedding_dim:
        yield ConfigProblem(
            "model.embedding_dim", str(model.embedding_dim), "None: separate tables have the width of their stack"
        )


def _unequal_widths(model: ModelConfig, encoder: StackConfig, decoder: StackConfig) -> Problems:
    where = "model.decoder.d_model"
    found = f"{decoder.d_model} beside model.encoder.d_model {encoder.d_model}"
    if not model.separate_encoder_embeddings:
        yield ConfigProblem(
            where,
            found,
            "equal widths: the stacks share the embedding table",
            "or set model.separate_encoder_embeddings to True",
        )
    if decoder.cross_attention == "merged":
        yield ConfigProblem(
            where, found, "equal widths: merged attention applies one projection to the states of both stacks"
        )


def _embedding_width(model: ModelConfig) -> Problems:
    if not model.stacks or not model.tie_embeddings or model.lm_head_transform or model.task_head:
        return
    read = model.generator or next(reversed(model.stacks.values()))
    if read.d_model != model.lm_head_width:
        where = "model.generator" if model.generator else next(reversed(model.stacks))
        yield ConfigProblem(
            "model.lm_head_transform",
            f"False, with a tied table of {model.lm_head_width} columns for states of width {read.d_model}",
            "True: the transform projects the states to the table's width",
            f"or make {where.removeprefix('model.')} as wide as the table, or set tie_embeddings to False",
        )


def _generator(model: ModelConfig) -> Problems:
    """Yield the problems of ELECTRA's generator beside its discriminator, which is the model's encoder."""
    generator, where = model.generator, "model.generator"
    if generator is None:
        return
    if model.decoder or not model.encoder:
        yield ConfigProblem(
            where, "a generator in a model with a decoder", "an encoder alone, which detects replaced tokens"
        )
        return
    yield from _stack(where, generator)
    for name, stack in (("encoder", model.encoder), ("generator", generator)):
        if stack.experts:
            yield ConfigProblem(
                f"model.{name}.experts", f"{stack.experts.num_experts}", "no experts in a model with a generator"
            )
    learned = "learned" in (generator.positions, model.encoder.positions)
    for name in ("positions", "max_positions") if learned else ():
        if getattr(generator, name) != getattr(model.encoder, name):
            found = f"{getattr(generator, name)} beside {getattr(model.encoder, name)} of model.encoder"
            yield ConfigProblem(
                f"{where}.{name}", found, "the same value: generator and encoder share embeddings and learned positions"
            )
    if generator.positions == "relative_bias" and not generator.relative_bias_bidirectional:
        yield degenerate_buckets(where, "a generator attends to")


def _task_head(model: ModelConfig) -> Problems:
    """Yield the problems of a head for texts in place of the language-model head."""
    head, where = model.task_head, "model.task_head"
    if head is None:
        return
    if model.encoder and model.decoder:
        yield ConfigProblem(
            where, "a head in a model with encoder and decoder", "one stack: remove the encoder or the decoder"
        )
    if model.generator:
        yield ConfigProblem(where, "a head beside a generator", "one of the two")
    classes = head.kind in ("classification", "token_classification")
    if classes and len(head.labels) < 2:
        yield ConfigProblem(f"{where}.labels", f"{len(head.labels)} labels", "two or more")
    elif not classes and head.labels:
        yield ConfigProblem(f"{where}.labels", f"labels for {head.kind}", "none: labels are for classification")
    if len(set(head.labels)) < len(head.labels):
        yield ConfigProblem(f"{where}.labels", "a label twice", "each label once")
    yield from _matryoshka(model, head)


def _matryoshka(model: ModelConfig, head: TaskHeadConfig) -> Problems:
    """Yield the problems of the prefixes of an embedding that are trained."""
    field, dimensions = "model.task_head.matryoshka_dimensions", head.matryoshka_dimensions
    width = next(reversed(model.stacks.values())).d_model
    if dimensions and head.kind != "embedding":
        yield ConfigProblem(field, f"prefixes of the output of {head.kind}", "none, or kind embedding")
    if any(size >= width for size in dimensions) or len(set(dimensions)) < len(dimensions):
        yield ConfigProblem(field, ", ".join(map(str, dimensions)), f"different numbers below the width, {width}")
    if head.matryoshka_weights and len(head.matryoshka_weights) != len(dimensions):
        found = f"{len(head.matryoshka_weights)} weights for {len(dimensions)} dimensions"
        yield ConfigProblem("model.task_head.matryoshka_weights", found, "one for each, or none")


def _stack(where: str, stack: StackConfig) -> Problems:
    if stack.num_kv_heads > 0 and stack.num_heads % stack.num_kv_heads:
        yield ConfigProblem(
            f"{where}.num_kv_heads",
            f"{stack.num_kv_heads} for {stack.num_heads} heads",
            "a divisor of num_heads, so that each key and value head serves the same number of queries",
        )
    if stack.positions == "rope" and stack.head_dim % 2:
        yield ConfigProblem(
            f"{where}.head_dim", str(stack.head_dim), "an even number: rotary embeddings rotate pairs of dimensions"
        )
    for field, scaling in (("rope_scaling", stack.rope_scaling), ("local_rope_scaling", stack.local_rope_scaling)):
        if scaling:
            yield from _rope_scaling(f"{where}.{field}", scaling, stack.head_dim)
    if "local" in stack.layer_pattern and stack.sliding_window is None:
        yield ConfigProblem(
            f"{where}.sliding_window",
            "None with local layers",
            "the number of positions to the left and to the right that local layers attend to",
        )
    if stack.depth_weights and stack.norm_placement == "post":
        yield ConfigProblem(f"{where}.depth_weights", "True with post-norm", "a pre-norm stack")
    if stack.experts:
        if stack.norm_placement in ("normformer", "sub"):
            found = f"{stack.norm_placement} with experts"
            yield ConfigProblem(f"{where}.norm_placement", found, "pre, post or both: experts have no norm inside")
        chosen = f"{where}.experts.experts_per_token"
        yield from within(chosen, stack.experts.experts_per_token, 1, max(stack.experts.num_experts, 1))
        if stack.quantization is not None:
            yield ConfigProblem(f"{where}.quantization", stack.quantization, "None in a stack with experts")
        if stack.use_bias or stack.mlp_bias or stack.dropout_rate > 0:
            yield ConfigProblem(f"{where}.experts", "biases or dropout", "experts without biases and dropout")
        if stack.num_layers % stack.experts.layer_period:
            found = f"{stack.experts.layer_period} for {stack.num_layers} layers"
            yield ConfigProblem(f"{where}.experts.layer_period", found, "a divisor of num_layers")
    if stack.cross_attention == "merged" and stack.positions in ("relative_bias", "disentangled"):
        found = f"merged with positions {stack.positions}"
        yield ConfigProblem(
            f"{where}.cross_attention", found, "positions rope: relative positions to the encoder's keys are undefined"
        )
    if not stack.first_layer_attention_norm and stack.norm_placement != "pre":
        yield ConfigProblem(
            f"{where}.first_layer_attention_norm", "False", "True: only a pre-norm stack can omit this norm"
        )
    if stack.positions == "relative_bias":
        yield from _relative_bias(where, stack)
    if stack.positions == "disentangled":
        yield from at_least(f"{where}.relative_bias_buckets", stack.relative_bias_buckets, 4)
        farthest = stack.relative_bias_buckets // 2 + 2
        yield from at_least(f"{where}.relative_bias_max_distance", stack.relative_bias_max_distance, farthest)


def _rope_scaling(where: str, scaling: RopeScalingConfig, head_dim: int) -> Problems:
    if scaling.kind == "dynamic" and head_dim == 2:
        yield ConfigProblem(
            f"{where}.kind", "dynamic with heads of width 2", "heads of width 4 or more, or another kind"
        )
    yield from above(f"{where}.high_frequency_factor", scaling.high_frequency_factor, scaling.low_frequency_factor)


def _relative_bias(where: str, stack: StackConfig) -> Problems:
    """Yield the problems of T5's buckets: half of a direction's buckets for exact distances, the rest logarithmic."""
    directions = 2 if stack.relative_bias_bidirectional else 1
    buckets = stack.relative_bias_buckets
    if buckets < 2 * directions:
        expected = "4 or more for two directions" if directions == 2 else "2 or more"
        yield ConfigProblem(f"{where}.relative_bias_buckets", str(buckets), expected)
        return
    exact = buckets // directions // 2
    if stack.relative_bias_max_distance <= exact:
        yield ConfigProblem(
            f"{where}.relative_bias_max_distance",
            str(stack.relative_bias_max_distance),
            f"more than {exact}, the number of distances with their own bucket among {buckets} buckets",
        )


def degenerate_buckets(where: str, subject: str) -> ConfigProblem:
    """Return the problem of a unidirectional bias; `subject` names what attends to keys to the right."""
    return ConfigProblem(
        f"{where}.relative_bias_bidirectional",
        "False",
        f"True: {subject} keys to the right, which would all share the bucket of distance 0",
    )
