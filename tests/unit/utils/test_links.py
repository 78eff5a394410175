"""An export of a model from others contains no file from elsewhere on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.checkpoints import model_dir
from t5x_like.cli.main import main
from t5x_like.data.tokenizers.published import load_published
from t5x_like.errors import EXIT_REFUSED, SafetyError
from t5x_like.utils.links import require_links_inside


def test_links_inside_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
    for folder in (snapshot / "1_Pooling", blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/abc")
    (snapshot / "tokenizer.json").symlink_to("config.json")
    require_links_inside(snapshot)
    linked = tmp_path / "by another name"
    linked.symlink_to(snapshot)
    require_links_inside(linked)
    (snapshot / "refs").symlink_to("../../refs")
    with pytest.raises(SafetyError, match="refs: found a symbolic link"):
        require_links_inside(snapshot)


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "../../blobs/abc", "..", "inner/../../secret"])
def test_link_out_of_a_cloned_repository_is_refused(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("secret")
    clone = tmp_path / "clone"
    (clone / "inner").mkdir(parents=True)
    (clone / "config.json").write_text('{"model_type": "t5"}')
    (clone / "chat_template.jinja").symlink_to(target)
    out = tmp_path / "out"
    assert main(["convert", "--from", "hf", str(clone), str(out)]) == EXIT_REFUSED
    assert "chat_template.jinja" in capsys.readouterr().err and not out.exists()
    (tmp_path / "imported").mkdir()
    clone.rename(tmp_path / "imported" / model_dir.HUGGINGFACE_DIR)
    with pytest.raises(SafetyError, match="symbolic link"):
        model_dir.read_model(tmp_path / "imported")


def test_tokenizer_with_a_link_out_of_its_directory_is_refused(tmp_path: Path) -> None:
    """Its chat template would be copied into stores, runs and exports."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    assert load_published(folder, 0).decode([5]) == "a"
    (folder / "chat_template.jinja").symlink_to("../secret")
    for path in (folder, folder / "vocab.txt"):
        with pytest.raises(SafetyError, match="chat_template.jinja: found a symbolic link to"):
            load_published(path, 0)
