"""Every family, from files that transformers wrote and back to files that it reads, computed here and now."""

import jax
import numpy as np
import pytest

from t5x_like.interop.huggingface.convert import pending
from t5x_like.interop.huggingface.directories import export_directory, import_directory, open_directory
from t5x_like.interop.huggingface.families import FAMILIES as FAMILIES_OF_FILES
from t5x_like.interop.weights import Weights
from t5x_like.models.build import abstract, merge
from t5x_like.models.experts import Routing, load_balancing_loss

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
    encoder = module(**{**GEMMA_2, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48})
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
    "llama": of(
        "LlamaForCausalLM", "Llama", **SMALL, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=LLAMA3
    ),
    "llama_tied": of("LlamaForCausalLM", "Llama", **SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "mixtral": of("MixtralForCausalLM", "Mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4),
    "gemma_2": of("Gemma2ForCausalLM", "Gemma2", **GEMMA_2),
    "gemma_3": of("Gemma3ForCausalLM", "Gemma3Text", **GEMMA_3),
    "gpt_2": of(
        "GPT2LMHeadModel", "GPT2", vocab_size=V, n_positions=60, n_embd=24, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
    "bert": of("BertForMaskedLM", "Bert", **SMALL, max_position_embeddings=60, **NO_DROPOUT),
    "bert_encoder": of("BertModel", "Bert", **SMALL, max_position_embeddings=60, **NO_DROPOUT),
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


def reference(name):
    """A small model whose numbers are moved off their initial values, so that none is without effect."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows, length, lengths):
    ids = np.random.default_rng(length).integers(2, V - 1, (rows, length))
    real = np.arange(length) < np.asarray(lengths)[:, None]
    return np.where(real, ids, 0).astype(np.int32), real


def batch(architecture):
    inputs, inputs_real = tokens(3, 30, [30, 1, 17])
    targets, targets_real = tokens(3, 25, [9, 25, 3])
    if architecture == "encoder_decoder":
        return {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}, inputs_real, targets_real
    return {f"{architecture}_input_tokens": inputs}, inputs_real, inputs_real


def theirs(model, batch, inputs_real):
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
    """(name, the reference, our source, our parameters)."""
    model = reference(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    source = open_directory(directory, scale_logits=True if request.param == "umt5" else None)
    return request.param, model, source, source.params(abstract(source.model).params)


def test_the_same_numbers(case):
    name, model, source, params = case
    config = source.model
    features, inputs_real, real = batch(config.architecture)
    if config.encoder and config.encoder.token_types:
        types = np.random.default_rng(0).integers(0, 2, inputs_real.shape).astype(np.int32)
        features["encoder_token_types"] = types
    packed = in_one_row(features, inputs_real, real)
    expected = theirs(model, features, inputs_real)
    graphdef = abstract(config).graphdef

    def apply(params, batch):
        model = merge(graphdef, params)
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
    """The rows as segments of one, with padding behind them."""
    packed = {}
    for name, rows in features.items():
        side = name.partition("_")[0]
        cells = inputs_real if side == next(iter(features)).partition("_")[0] else real
        packed[name] = np.pad(rows[cells], (0, 3))[None]
        packed[f"{side}_segment_ids"] = np.pad(np.nonzero(cells)[0] + 1, (0, 3))[None].astype(np.int32)
        packed[f"{side}_positions"] = np.pad(np.nonzero(cells)[1], (0, 3))[None].astype(np.int32)
    return packed


def test_the_way_back(case, tmp_path):
    name, model, source, _ = case
    scaled = source.model.scale_logits
    import_directory(source.weights.directory, tmp_path / "ours", scale_logits=scaled, report=lambda line: None)
    export_directory(tmp_path / "ours", tmp_path / "theirs", shard_bytes=20_000, report=lambda line: None)
    assert Weights(tmp_path / "theirs").keys() == source.weights.keys()
    again, info = type(model).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert open_directory(tmp_path / "theirs", scale_logits=scaled).model == source.model


def test_the_same_tokens_greedily(case):
    name, model, source, params = case
    config = source.model
    if config.decoder is None:
        pytest.skip("no decoder")
    steps, rows = 8, 3
    prompt, real = tokens(rows, 12, [12, 12, 12] if config.encoder is None else [12, 1, 7])
    model.generation_config.eos_token_id = None
    start = model.generation_config.decoder_start_token_id or model.generation_config.bos_token_id or 0
    further = {} if config.encoder is None else {"decoder_start_token_id": start}
    expected = model.generate(
        input_ids=torch.tensor(prompt).long(),
        attention_mask=torch.tensor(real).long(),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        **further,
    ).numpy()[:, -steps:]
    graphdef = abstract(config).graphdef

    def decode(params):
        model = merge(graphdef, params)
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


GRADIENTS = ["t5_1_1", "llama", "bert", "t5gemma_2", "mixtral"]


@pytest.mark.parametrize("case", GRADIENTS, indirect=True)
def test_the_same_gradients(case):
    """Of the mean cross-entropy at real positions; read as our parameters, by writing them as a model."""
    name, model, source, params = case
    config = source.model
    features, inputs_real, real = batch(config.architecture)
    targets = np.random.default_rng(1).integers(1, V, real.shape)

    ids = {key: torch.tensor(x).long() for key, x in features.items()}
    further = {"decoder_input_ids": ids["decoder_input_tokens"]} if len(ids) == 2 else {}
    model.zero_grad()
    logits = model(
        input_ids=next(iter(ids.values())), attention_mask=torch.tensor(inputs_real).long(), **further
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[torch.tensor(real)], torch.tensor(targets[real]))
    loss.backward()

    def ours(params):
        log_p = jax.nn.log_softmax(merge(graphdef, params)(features))
        picked = jax.numpy.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jax.numpy.sum(picked * real) / real.sum()

    graphdef = abstract(config).graphdef
    found, grads = jax.jit(jax.value_and_grad(ours))(params)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    by_name = {key: parameter.grad for key, parameter in model.named_parameters()}
    renamed = {key.replace("encoder.text_model.", "encoder."): grad for key, grad in by_name.items()}
    rules = FAMILIES_OF_FILES[source.described.kind].rules
    compared = 0
    for tensor in pending(rules, grads, np.dtype(np.float32)):
        expected = renamed.get(tensor.name)
        if expected is None:
            # transformers keeps Mixtral's experts in one array.
            assert name == "mixtral" and "block_sparse_moe" in tensor.name
            continue
        expected, compared = expected.numpy(), compared + 1
        largest = np.abs(expected).max()
        # What has no effect (a bias of keys) has rounding errors for gradients.
        np.testing.assert_allclose(tensor.make(), expected, rtol=1e-4, atol=1e-4 * largest + 1e-7, err_msg=tensor.name)
    assert compared > 10


def test_the_loss_that_balances_experts_is_that_of_mixtral():
    model = reference("mixtral")
    rows, _ = tokens(3, 20, [20, 20, 20])
    with torch.no_grad():
        out = model(input_ids=torch.tensor(rows).long(), output_router_logits=True)
    probability = [torch.softmax(logits.float(), dim=-1).numpy() for logits in out.router_logits]
    chosen = [np.argsort(-each, axis=-1)[:, :2] for each in probability]
    routing = Routing(
        chosen=np.stack([np.eye(4, dtype=np.float32)[each].sum((0, 1)) for each in chosen]),
        probability=np.stack([each.sum(0) for each in probability]),
        tokens=np.full(2, 60.0, np.float32),
    )
    np.testing.assert_allclose(load_balancing_loss(routing), out.aux_loss.item(), rtol=1e-5)
