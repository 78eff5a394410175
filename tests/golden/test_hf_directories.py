"""Every family: import of files that transformers wrote, equal outputs, and export to files that it reads."""

import json

import jax
import numpy as np
import pytest

from t5x_like.errors import DataError
from t5x_like.export.huggingface_directory import export_directory
from t5x_like.interop.huggingface import family_matching, special_tokens
from t5x_like.interop.huggingface.checkpoint import import_directory, open_directory
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families import all_families
from t5x_like.interop.huggingface.families.family import Present
from t5x_like.interop.huggingface.state_dict import pending
from t5x_like.interop.weight_files import Weights
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.moe import Routing, load_balancing_loss

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
V = 97
SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": V}
T5_SIZE = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5_SIZE |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "vocab_size": V}
T5_SIZE |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 100.0, "original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 24}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 5}
GEMMA_2 = {**GROUPED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA_3 = {
    **GROUPED,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
DEBERTA = {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
DEBERTA |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 3, "max_position_embeddings": 60, "vocab_size": V}
BART |= {"dropout": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def t5(kind="T5", *, head=False, **changes):
    def make():
        config = getattr(transformers, f"{kind}Config")(**T5_SIZE, **changes)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        if head:
            # transformers 5 has no configuration for a separate head; a file with two tensors makes one like this.
            model.lm_head = torch.nn.Linear(24, V, bias=False)
        return model

    return make


def of(kind: str, config: str, **fields):
    return lambda: getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**fields), **{})


def t5gemma():
    module = transformers.models.t5gemma.configuration_t5gemma.T5GemmaModuleConfig
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "rope_parameters": scaled}
    encoder = module(**(GEMMA_2 | sizes))
    config = transformers.T5GemmaConfig(encoder=encoder, decoder=module(**GEMMA_2), vocab_size=V)
    return transformers.T5GemmaForConditionalGeneration(config)


def t5gemma_2():
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    encoder = {"text_config": GEMMA_3, "vision_config": vision, "eoi_token_index": 90, "image_token_index": 96}
    config = transformers.T5Gemma2Config(
        encoder={**encoder, "mm_tokens_per_image": 4}, decoder=GEMMA_3, eoi_token_index=90, image_token_index=96
    )
    return transformers.T5Gemma2ForConditionalGeneration(config)


FAMILIES = {
    "t5_1_0": t5(feed_forward_proj="relu"),
    "t5_1_1": t5(head=True, feed_forward_proj="gated-gelu", scale_decoder_outputs=False),
    "ul2": t5(head=True, feed_forward_proj="gated-silu", scale_decoder_outputs=False),
    "mt5": t5("MT5"),
    "umt5": t5("UMT5", head=True),
    "longt5": of(
        "LongT5ForConditionalGeneration", "LongT5", **T5_SIZE, feed_forward_proj="gated-gelu", local_radius=5
    ),
    "longt5_global": of(
        "LongT5ForConditionalGeneration", "LongT5", **T5_SIZE, feed_forward_proj="gated-gelu", local_radius=5,
        encoder_attention_type="transient-global", global_block_size=4,
    ),
    "switch": of(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformers", **(T5_SIZE | {"num_layers": 4}),
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=3, expert_capacity=4,
    ),
    "switch_in_all_layers": of(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformers", **(T5_SIZE | {"num_layers": 2}),
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=3, expert_capacity=99,
    ),
    "t5_encoder": of("T5EncoderModel", "T5", **T5_SIZE, feed_forward_proj="gated-gelu"),
    "umt5_encoder": of("UMT5EncoderModel", "UMT5", **T5_SIZE),
    "llama": of(
        "LlamaForCausalLM", "Llama", **SMALL, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=LLAMA3
    ),
    "llama_tied": of("LlamaForCausalLM", "Llama", **SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": of("MistralForCausalLM", "Mistral", **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=7),
    "qwen_2": of(
        "Qwen2ForCausalLM", "Qwen2", **{**SMALL, "num_hidden_layers": 3}, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=7, max_window_layers=1, rope_parameters=YARN,
    ),
    "qwen_2_tied": of("Qwen2ForCausalLM", "Qwen2", **SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen_3": of("Qwen3ForCausalLM", "Qwen3", **SMALL, num_key_value_heads=2, head_dim=8),
    "gemma_1": of("GemmaForCausalLM", "Gemma", **SMALL, num_key_value_heads=1, head_dim=8),
    "mixtral": of("MixtralForCausalLM", "Mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4),
    "gemma_2": of("Gemma2ForCausalLM", "Gemma2", **GEMMA_2),
    "gemma_2_scaled": of("Gemma2ForCausalLM", "Gemma2", **GEMMA_2, rope_parameters=LLAMA3),
    "gemma_3": of("Gemma3ForCausalLM", "Gemma3Text", **GEMMA_3),
    "gpt_2": of(
        "GPT2LMHeadModel", "GPT2", vocab_size=V, n_positions=60, n_embd=24, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
    "bert": of("BertForMaskedLM", "Bert", **SMALL, max_position_embeddings=60, **NO_DROPOUT),
    "bert_encoder": of("BertModel", "Bert", **SMALL, max_position_embeddings=60, **NO_DROPOUT),
    "roberta": of(
        "RobertaForMaskedLM", "Roberta", **SMALL, max_position_embeddings=60, type_vocab_size=1, **NO_DROPOUT
    ),
    "roberta_encoder": of(
        "RobertaModel", "Roberta", **SMALL, max_position_embeddings=60, type_vocab_size=1, **NO_DROPOUT
    ),
    "xlm_roberta": of(
        "XLMRobertaForMaskedLM", "XLMRoberta", **SMALL, max_position_embeddings=60, type_vocab_size=1, **NO_DROPOUT
    ),
    "electra_generator": of(
        "ElectraForMaskedLM", "Electra", **SMALL, embedding_size=16, max_position_embeddings=60, **NO_DROPOUT
    ),
    "electra_narrow_encoder": of(
        "ElectraModel", "Electra", **SMALL, embedding_size=16, max_position_embeddings=60, **NO_DROPOUT
    ),
    "electra_encoder": of(
        "ElectraModel", "Electra", **SMALL, embedding_size=24, max_position_embeddings=60, **NO_DROPOUT
    ),
    "eurobert": of("EuroBertForMaskedLM", "EuroBert", **SMALL, num_key_value_heads=2, pad_token_id=0),
    "modernbert_decoder": of(
        "ModernBertDecoderForCausalLM", "ModernBertDecoder", **{**SMALL, "num_hidden_layers": 4}, local_attention=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
    ),
    "bart": of("BartForConditionalGeneration", "Bart", **BART),
    "mbart": of("MBartForConditionalGeneration", "MBart", **BART, scale_embedding=True, decoder_start_token_id=3),
    "modernbert": of(
        "ModernBertForMaskedLM", "ModernBert", **{**SMALL, "num_hidden_layers": 4}, local_attention=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
    ),
    "deberta_v3": of(
        "DebertaV2ForMaskedLM", "DebertaV2", **SMALL, **DEBERTA, **NO_DROPOUT, max_position_embeddings=24
    ),
    "deberta_v3_encoder": of(
        "DebertaV2Model", "DebertaV2", **SMALL, **DEBERTA, **NO_DROPOUT, max_position_embeddings=24
    ),
    "t5gemma": t5gemma,
    "t5gemma_2": t5gemma_2,
}  # fmt: skip

ENCODERS = ("bert", "bert_encoder", "modernbert", "deberta_v3", "deberta_v3_encoder", "roberta", "roberta_encoder")
ENCODERS += ("t5_encoder", "umt5_encoder")
ENCODERS += ("xlm_roberta", "electra_generator", "electra_encoder", "electra_narrow_encoder", "eurobert")
"""Families without a decoder."""


def reference(name):
    """Build a small model whose weights are moved off their initial values, so that each has an effect."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows, length, lengths, pad=0):
    ids = np.random.default_rng(length).integers(2, V - 1, (rows, length))
    real = np.arange(length) < np.asarray(lengths)[:, None]
    return np.where(real, ids, pad).astype(np.int32), real


def batch(architecture, pad=0):
    inputs, inputs_real = tokens(3, 30, [30, 1, 17], pad)
    targets, targets_real = tokens(3, 25, [9, 25, 3], pad)
    if architecture == "encoder_decoder":
        return {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}, inputs_real, targets_real
    return {f"{architecture}_input_tokens": inputs}, inputs_real, inputs_real


def reference_outputs(model, batch, inputs_real):
    ids = {name: torch.tensor(x).long() for name, x in batch.items() if name.endswith("tokens")}
    first = ids.get("encoder_input_tokens", ids.get("decoder_input_tokens"))
    further = {}
    if len(ids) == 2:
        further["decoder_input_ids"] = ids["decoder_input_tokens"]
    if "encoder_token_types" in batch:
        further["token_type_ids"] = torch.tensor(batch["encoder_token_types"]).long()
    with torch.no_grad():
        out = model(input_ids=first, attention_mask=torch.tensor(inputs_real).long(), **further)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """Return (name, the reference, our source, our parameters)."""
    model = reference(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    source = open_directory(directory, scale_logits=True if request.param == "umt5" else None)
    return request.param, model, source, source.params(abstract_model(source.model).params)


def test_logits_equal_transformers(case):
    name, model, source, params = case
    config = source.model
    features, inputs_real, real = batch(config.architecture, config.pad_token_id or 0)
    if config.encoder and config.encoder.num_token_types:
        types = np.random.default_rng(0).integers(0, config.encoder.num_token_types, inputs_real.shape).astype(np.int32)
        features["encoder_token_types"] = types
    packed = in_one_row(features, inputs_real, real)
    expected = reference_outputs(model, features, inputs_real)
    graphdef = abstract_model(config).graphdef

    def apply(params, batch):
        model = bind_params(graphdef, params)
        if name.endswith("_encoder"):
            return model.encode(
                batch["encoder_input_tokens"],
                segment_ids=batch.get("encoder_segment_ids"),
                positions=batch.get("encoder_positions"),
                token_types=batch.get("encoder_token_types"),
            )
        return model(batch)

    found, found_packed = jax.jit(lambda params: (apply(params, features), apply(params, packed)))(params)
    scale = np.abs(expected[real]).max()
    assert scale > 0.3
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=1e-5, atol=1e-5 * scale)
    of_all = np.asarray(found_packed)[0, : real.sum()]
    np.testing.assert_allclose(of_all, expected[real], rtol=1e-5, atol=1e-5 * scale)


def in_one_row(features, inputs_real, real):
    """Return the rows as segments of one row, followed by padding."""
    packed = {}
    for name, rows in features.items():
        side = name.partition("_")[0]
        valid = inputs_real if side == next(iter(features)).partition("_")[0] else real
        packed[name] = np.pad(rows[valid], (0, 3))[None]
        packed[f"{side}_segment_ids"] = np.pad(np.nonzero(valid)[0] + 1, (0, 3))[None].astype(np.int32)
        packed[f"{side}_positions"] = np.pad(np.nonzero(valid)[1], (0, 3))[None].astype(np.int32)
    return packed


def test_exported_directory_equals_the_original(case, tmp_path):
    name, model, source, _ = case
    scaled = source.model.scale_logits
    import_directory(source.weights.directory, tmp_path / "imported", scale_logits=scaled, report=lambda line: None)
    export_directory(tmp_path / "imported", tmp_path / "exported", shard_bytes=20_000, report=lambda line: None)
    assert Weights(tmp_path / "exported").keys() == source.weights.keys()
    again, info = type(model).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert open_directory(tmp_path / "exported", scale_logits=scaled).model == source.model


@pytest.mark.parametrize("case", [name for name in FAMILIES if name not in ENCODERS], indirect=True)
def test_greedy_tokens_equal_those_of_transformers(case):
    name, model, source, params = case
    config = source.model
    steps, rows = 8, 3
    prompt, real = tokens(rows, 12, [12, 12, 12] if config.encoder is None else [12, 1, 7], config.pad_token_id or 0)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    start = model.generation_config.decoder_start_token_id or model.generation_config.bos_token_id or 0
    further = {} if config.encoder is None else {"decoder_start_token_id": start}
    expected = model.generate(
        input_ids=torch.tensor(prompt).long(),
        attention_mask=torch.tensor(real).long(),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=config.pad_token_id or 0,
        **further,
    ).numpy()[:, -steps:]
    graphdef = abstract_model(config).graphdef

    def decode(params):
        model = bind_params(graphdef, params)
        encoded, valid, first = None, None, prompt
        if config.encoder is not None:
            valid = real.astype(np.int32)
            encoded, first = model.encode(prompt), np.full((rows, 1), start, np.int32)
        cache = model.start_decoding(encoded, valid, rows, first.shape[1] + steps)
        logits, cache = model.prefill(first, jax.numpy.full(rows, first.shape[1]), cache)

        def step(carry, _):
            token, cache = carry
            logits, cache = model.decode(token[:, None], cache)
            return (logits[:, -1].argmax(-1).astype("int32"), cache), token

        return jax.lax.scan(step, (logits.argmax(-1).astype("int32"), cache), length=steps)[1].T

    np.testing.assert_array_equal(np.asarray(jax.jit(decode)(params)), expected)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, "beta_fast": 8},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9, "beta_slow": 2},
    ],
)
def test_rotary_scalings_equal_transformers_in_rows_longer_than_those_of_training(rotary, tmp_path):
    rotary = rotary | {"rope_theta": 100.0}
    fields = {**SMALL, "max_position_embeddings": 16, "rope_parameters": rotary}
    model = of("LlamaForCausalLM", "Llama", **fields)().eval()
    model.save_pretrained(tmp_path)
    source = open_directory(tmp_path)
    assert family_matching.differences(source.model, source.description.family) == {}
    abstract = abstract_model(source.model)
    params = source.params(abstract.params)
    rows, real = tokens(2, 40, [40, 40])
    expected = reference_outputs(model, {"decoder_input_tokens": rows}, real)
    bound = bind_params(abstract.graphdef, params)
    found = bound({"decoder_input_tokens": rows})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # Token by token, past the length of training: cached keys keep the frequencies that they were rotated with.
    cache = bound.start_decoding(None, None, 2, 40)
    _, cache = bound.prefill(rows[:, :14], jax.numpy.full(2, 14), cache)
    past = model(torch.tensor(rows[:, :14]).long(), use_cache=True).past_key_values
    for position in range(14, 24):
        token = rows[:, position : position + 1]
        logits, cache = bound.decode(token, cache)
        with torch.no_grad():
            wanted = model(torch.tensor(token).long(), past_key_values=past, use_cache=True).logits.numpy()
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=str(position))


GRADIENTS = ["t5_1_1", "llama", "bert", "modernbert", "t5gemma", "t5gemma_2", "mixtral", "bart", "qwen_2", "deberta_v3"]
GRADIENTS += ["switch", "longt5_global"]


@pytest.mark.parametrize("case", GRADIENTS, indirect=True)
def test_gradients_equal_transformers(case):
    """Compare the gradients of the mean cross-entropy at real positions, which are read as our parameters."""
    name, model, source, params = case
    config = source.model
    features, inputs_real, real = batch(config.architecture, config.pad_token_id or 0)
    targets = np.random.default_rng(1).integers(1, V, real.shape)

    ids = {key: torch.tensor(x).long() for key, x in features.items()}
    further = {"decoder_input_ids": ids["decoder_input_tokens"]} if len(ids) == 2 else {}
    model.zero_grad()
    logits = model(
        input_ids=next(iter(ids.values())), attention_mask=torch.tensor(inputs_real).long(), **further
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[torch.tensor(real)], torch.tensor(targets[real]))
    loss.backward()

    def mean_cross_entropy(params):
        log_p = jax.nn.log_softmax(bind_params(graphdef, params)(features))
        picked = jax.numpy.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jax.numpy.sum(picked * real) / real.sum()

    graphdef = abstract_model(config).graphdef
    found, grads = jax.jit(jax.value_and_grad(mean_cross_entropy))(params)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    by_name = {key: parameter.grad for key, parameter in model.named_parameters()}
    renamed = {key.replace("encoder.text_model.", "encoder."): grad for key, grad in by_name.items()}
    rules = source.description.family.rules
    compared = 0
    for tensor in pending(rules, grads, np.dtype(np.float32)):
        expected = renamed.get(tensor.name)
        if expected is None and tensor.name in renamed:
            # An expert of Switch that no token was sent to has no gradient there.
            assert name == "switch" and "experts" in tensor.name and not np.any(tensor.make())
            continue
        if expected is None:
            # transformers keeps Mixtral's experts in one array, and BART's bias of the logits without a gradient.
            assert (name == "mixtral" and "block_sparse_moe" in tensor.name) or tensor.name == "final_logits_bias"
            continue
        expected, compared = expected.numpy(), compared + 1
        largest = np.abs(expected).max()
        # What has no effect (a bias of keys) has rounding errors for gradients.
        np.testing.assert_allclose(tensor.make(), expected, rtol=1e-4, atol=1e-4 * largest + 1e-7, err_msg=tensor.name)
    assert compared > 10


HEADS = [
    ("BertForSequenceClassification", "Bert", {}),
    ("BertForTokenClassification", "Bert", {}),
    ("RobertaForSequenceClassification", "Roberta", {"type_vocab_size": 1}),
    ("XLMRobertaForTokenClassification", "XLMRoberta", {"type_vocab_size": 1, "num_labels": 5}),
    ("ElectraForTokenClassification", "Electra", {"embedding_size": 16}),
    ("DebertaV2ForTokenClassification", "DebertaV2", DEBERTA),
    ("BertForSequenceClassification", "Bert", {"num_labels": 1}),
]


@pytest.mark.parametrize(("kind", "config", "fields"), HEADS)
def test_task_heads_equal_transformers_and_return_bitwise(kind, config, fields, tmp_path):
    torch.manual_seed(0)
    model = of(kind, config, **SMALL, max_position_embeddings=60, **NO_DROPOUT, **fields)().eval()
    model.save_pretrained(tmp_path / "hf")
    source = open_directory(tmp_path / "hf")
    features, real, _ = batch("encoder", source.model.pad_token_id)
    expected = reference_outputs(model, features, real)
    abstract = abstract_model(source.model)
    params = source.params(abstract.params)
    scores = jax.jit(lambda params: bind_params(abstract.graphdef, params).scores(features)[0])(params)
    scores = np.asarray(scores).reshape(expected.shape)
    chosen = real if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(scores[chosen], expected[chosen], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    import_directory(tmp_path / "hf", tmp_path / "imported", report=lambda line: None)
    export_directory(tmp_path / "imported", tmp_path / "exported", report=lambda line: None)
    again, info = type(model).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.id2label == model.config.id2label
    for key, before in model.state_dict().items():
        assert torch.equal(before, again.state_dict()[key]), key


def test_fields_of_the_configurations_of_transformers_are_understood():
    for family in all_families():
        if family.written_type == "neobert":
            continue  # Its code is on the hub.
        config = transformers.AutoConfig.for_model(family.written_type).to_dict()
        if family.written_type == "deberta-v2":
            config |= DEBERTA
        fields = Fields(config, "config.json")
        special_tokens.read(fields, family.special_tokens, family.read(fields, Present()))
        assert not fields.not_read(), family.model_type


def test_fields_that_are_not_understood_are_refused_by_name(tmp_path):
    model = reference("llama_tied")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value in (("attention_chunks", 4), ("sliding_window", 8), ("quantization_config", {"bits": 4})):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(DataError, match=f"fields that are not understood .*: {field} "):
            open_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_chunks": None, "num_beams": 4}))
    open_directory(tmp_path)


def test_balancing_loss_equals_mixtral_in_transformers():
    model = reference("mixtral")
    rows, _ = tokens(3, 20, [20, 20, 20])
    with torch.no_grad():
        out = model(input_ids=torch.tensor(rows).long(), output_router_logits=True)
    probability = [torch.softmax(logits.float(), dim=-1).numpy() for logits in out.router_logits]
    chosen = [np.argsort(-each, axis=-1)[:, :2] for each in probability]
    routing = Routing(
        tokens_per_expert=np.stack([np.eye(4, dtype=np.float32)[each].sum((0, 1)) for each in chosen]),
        probability=np.stack([each.sum(0) for each in probability]),
        squared_log_z=np.zeros(2, np.float32),
        tokens=np.full(2, 60.0, np.float32),
    )
    np.testing.assert_allclose(load_balancing_loss(routing), out.aux_loss.item(), rtol=1e-5)
