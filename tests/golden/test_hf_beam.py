"""Beam search on imported models, compared with transformers: the same hypotheses, order and scores."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.engine import beam_tokens
from t5x_like.interop.huggingface.checkpoint import import_directory
from t5x_like.model_loading import open_model

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
V, BEAMS, NEW = 97, 4, 10
EOS = [1, *range(60, 75)]
"""So many that hypotheses end at every length; each of them is a candidate more per beam."""
PROMPTS = [[5, 9, 33, 7, 2, 41, 17], [8, 90], [12, 40, 41]]


def t5():
    config = transformers.T5Config(
        d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, vocab_size=V, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config)


def llama():
    size = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, vocab_size=V, num_key_value_heads=2, bos_token_id=3)
    )


@pytest.fixture(scope="module", params=[t5, llama], ids=["t5", "llama"])
def pair(request, tmp_path_factory):
    """Build the same model twice; weights are spread so that the next token depends on the text."""
    root = tmp_path_factory.mktemp("beam")
    torch.manual_seed(0)
    reference = request.param().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    reference.save_pretrained(root / "huggingface")
    import_directory(root / "huggingface", root / "imported")
    loaded = open_model(root / "imported", devices=jax.devices()[:1])
    run = dataclasses.replace(loaded.run, model=dataclasses.replace(loaded.model, eos_ids=tuple(EOS)))
    loaded = dataclasses.replace(loaded, run=run)
    return reference, loaded.program, loaded.params()[1]


@pytest.mark.parametrize(
    ("penalty", "early_stopping"), [(1.0, False), (0.0, False), (2.0, "never"), (1.0, True)], ids=str
)
def test_beam_hypotheses_and_scores_equal_transformers(pair, penalty, early_stopping):
    reference, program, params = pair
    search = BeamSearch(BEAMS, penalty, "transformers", early_stopping)
    found = beam_tokens(
        program, params, PROMPTS, search=search, allowed_V=np.ones(V, bool), max_new_tokens=NEW, batch_size=4
    )
    lengths = set()
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        front = [] if program.run.model.encoder is not None else [program.run.model.decoder_start_token_id]
        expected = reference.generate(
            input_ids=torch.tensor([front + prompt]),
            max_new_tokens=NEW,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            length_penalty=penalty,
            early_stopping=early_stopping,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        begin = 1 if not front else len(front + prompt)
        sequences = [row[begin:].tolist() for row in expected.sequences]
        cut = [row[: next((index for index, t in enumerate(row) if t in EOS), len(row))] for row in sequences]
        np.testing.assert_allclose([h.score for h in hypotheses], expected.sequences_scores, rtol=1e-4, atol=1e-4)
        assert [h.tokens for h in hypotheses] == [row[:NEW] for row in cut]
        lengths |= {len(h.tokens) for h in hypotheses}
    assert len(lengths) > 1
