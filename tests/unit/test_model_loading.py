"""Opening of models: the kinds of directories, references to steps, tokenizers, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_like.api import load
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.cli.main import main
from t5x_like.config import ModelConfig
from t5x_like.data.tokenizers.loading import load_directory_tokenizer
from t5x_like.data.tokenizers.tokenizer import have_same_pieces
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece
from t5x_like.errors import EXIT_OK, EXIT_USAGE, ConfigError, DataError, SafetyError
from t5x_like.export.huggingface_directory import export_directory
from t5x_like.model_loading import checkpoint_digest, model_kind, open_model
from t5x_like.models import presets
from t5x_like.models.factory import init_params

PIECES = 400


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an imported T5 of one layer with its SentencePiece model."""
    folder = tmp_path_factory.mktemp("loading") / "imported"
    t5 = presets.t5_1_1("small", vocab_size=PIECES)
    assert t5.encoder is not None and t5.decoder is not None
    small = {"num_layers": 1, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 48}
    encoder, decoder = (dataclasses.replace(stack, **small) for stack in (t5.encoder, t5.decoder))
    config = dataclasses.replace(t5, encoder=encoder, decoder=decoder)
    folder.mkdir()
    params = jax.jit(lambda: init_params(config, jax.random.key(1)))()
    model_dir.save(folder, config, None, {"params": params})
    (folder / HUGGINGFACE_DIR).mkdir()
    pieces = train_sentencepiece([Path(__file__).read_text()], PIECES)
    (folder / HUGGINGFACE_DIR / "spiece.model").write_bytes(pieces)
    return folder


@pytest.fixture(scope="module")
def huggingface(imported: Path) -> Path:
    """Write the same model as a Hugging Face directory, with the same tokenizer."""
    out = imported.parent / "huggingface"
    export_directory(imported, out, report=lambda line: None)
    (out / "spiece.model").write_bytes((imported / HUGGINGFACE_DIR / "spiece.model").read_bytes())
    return out


@pytest.mark.parametrize(
    ("text", "path", "steps"),
    [("runs/a", "runs/a", ()), ("runs/a:3", "runs/a", (3,)), ("a:b:3,40", "a:b", (3, 40)), ("a:", "a:", ())],
)
def test_reference_names_directory_and_steps(text: str, path: str, steps: tuple[int, ...]) -> None:
    assert CheckpointRef.parse(text) == CheckpointRef(Path(path), steps)


def test_directory_whose_name_ends_like_a_step_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run:7").mkdir()
    assert CheckpointRef.parse(f"{tmp_path}/run:7") == CheckpointRef(tmp_path / "run:7")
    with pytest.raises(ConfigError, match="found 2 steps, expected one step"):
        _ = CheckpointRef(tmp_path, (1, 2)).step


def test_imported_and_huggingface_directories_hold_the_same_model(imported: Path, huggingface: Path) -> None:
    assert (model_kind(imported), model_kind(huggingface)) == ("imported", "huggingface")
    first, second = open_model(imported), open_model(f"{huggingface}")
    assert first.trained_on is None and not first.has_heldout_data and first.steps() == second.steps() == [0]
    assert first.model.encoder == second.model.encoder
    assert have_same_pieces(first.tokenizer, second.tokenizer)
    leaves = zip(jax.tree.leaves(first.params()[1]), jax.tree.leaves(second.params()[1]), strict=True)
    for one, other in leaves:
        np.testing.assert_array_equal(one, other)


def test_commands_give_the_same_results_for_both_directories(
    imported: Path, huggingface: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one small text"}\n{"text": "another"}\n')
    answers, vectors = [], []
    for folder in (imported, huggingface):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "one small", "--max-new-tokens", "4"]) == EXIT_OK
        answers.append(capsys.readouterr().out)
        output = tmp_path / f"{folder.name}.npy"
        assert (
            main(["embed", str(folder), "--input", str(tmp_path / "texts.jsonl"), "--output", str(output)]) == EXIT_OK
        )
        vectors.append(np.load(output))
    assert answers[0] == answers[1]
    assert vectors[0].shape == (2, 32)
    np.testing.assert_array_equal(*vectors)
    for command in (
        ["generate", f"{huggingface}:3", "--prompt", "a"],
        ["generate", f"{imported}:1,2", "--prompt", "a"],
    ):
        try:
            code = main(command)
        except SystemExit as stop:
            code = int(str(stop.code))
        assert code == EXIT_USAGE


def test_loss_of_a_long_text_needs_a_length_where_that_of_training_is_not_known(
    imported: Path, huggingface: Path
) -> None:
    text = "one small text and another " * 20
    models = [load(folder) for folder in (imported, huggingface)]
    for model in models:
        assert len(model.tokenizer.encode(text)) > 128
        with pytest.raises(ConfigError, match="found None, and a text of .* a text is longer than 128"):
            model.loss([text])


def test_missing_steps_and_models_are_refused(imported: Path, huggingface: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        open_model(f"{imported}:7").params()
    with pytest.raises(ConfigError, match="a Hugging Face directory holds one model"):
        open_model(f"{huggingface}:7").params()
    with pytest.raises(ConfigError, match="no such directory"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no checkpoints in it"):
        open_model(tmp_path)


def test_digest_depends_on_the_checkpoint_only(imported: Path, huggingface: Path) -> None:
    assert len(checkpoint_digest(imported, 0)) == len(checkpoint_digest(huggingface, 0)) == 32
    assert open_model(imported).digest(0) == checkpoint_digest(imported, 0)
    with pytest.raises(SafetyError, match="expected a checkpoint's checksums"):
        checkpoint_digest(imported, 5)


def test_tokenizer_of_a_directory_is_found_under_every_name(imported: Path, tmp_path: Path) -> None:
    model = open_model(imported).model
    pieces = (imported / HUGGINGFACE_DIR / "spiece.model").read_bytes()
    with pytest.raises(DataError, match="expected the model's tokenizer"):
        load_directory_tokenizer(tmp_path, model)
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    tokenizer = load_directory_tokenizer(tmp_path, model)
    assert tokenizer.decode(tokenizer.encode("one small text")) == "one small text"
    assert tokenizer.encode_with_special_tokens(["one small text"], 4)[0][-1] == 1
    with pytest.raises(DataError, match="expected at most 300"):
        load_directory_tokenizer(tmp_path, dataclasses.replace(model, vocab_size=300))


def test_sentencepiece_model_with_other_ids_than_the_model_is_not_taken(imported: Path, tmp_path: Path) -> None:
    model = open_model(imported).model
    (tmp_path / "spiece.model").write_bytes((imported / HUGGINGFACE_DIR / "spiece.model").read_bytes())
    other: ModelConfig = dataclasses.replace(model, eos_ids=(2,))
    with pytest.raises(DataError, match="a SentencePiece model whose end-of-sequence id is 1, expected the model's, 2"):
        load_directory_tokenizer(tmp_path, other)


def test_importing_the_package_imports_no_jax() -> None:
    code = "import sys, t5x_like; assert 'jax' not in sys.modules and 'tensorflow' not in sys.modules; t5x_like.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = __import__("t5x_like").lode
