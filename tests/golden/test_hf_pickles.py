"""pytorch_model.bin: read if it holds tensors only, refused otherwise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from t5x_like.errors import DataError
from t5x_like.interop.safetensors_file import Pending, write
from t5x_like.interop.weight_files import Weights

torch = pytest.importorskip("torch", reason="pickles of torch need the hf extra")

pytestmark = pytest.mark.hf


def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(4, 3).T,
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.tensor(2.5, dtype=torch.float16),
        "e": torch.zeros(0, 3),
    }


def same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        found = weights.read(name)
        assert found.shape == weights[name].shape == tuple(tensor.shape)
        assert found.dtype == weights[name].dtype and not found.flags.writeable
        np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_single_pickle_file_is_read(tmp_path, zipped):
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same(Weights(tmp_path), tensors())


def test_sharded_pickles_are_read_and_invalid_indices_refused(tmp_path):
    everything = tensors()
    torch.save({"a": everything["a"]}, tmp_path / "one.bin")
    torch.save({name: everything[name] for name in "bcde"}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    mapping = {"a": "one.bin", **dict.fromkeys("bcde", "two.bin")}
    index.write_text(json.dumps({"weight_map": mapping}))
    same(Weights(tmp_path), everything)
    for name in ("../one.bin", "/etc/passwd", "one.safetensors"):
        index.write_text(json.dumps({"weight_map": mapping | {"a": name}}))
        with pytest.raises(DataError, match="expected a plain name that ends in .bin"):
            Weights(tmp_path)
    index.write_text(json.dumps({"weight_map": mapping | {"a": "two.bin"}}))
    with pytest.raises(DataError, match="'a' is not in two.bin"):
        Weights(tmp_path)


def test_safetensors_take_precedence_over_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    one = np.ones(2, np.float32)
    write(tmp_path / "model.safetensors", [Pending("a", one.dtype, one.shape, lambda: one)], {})
    assert list(Weights(tmp_path)) == ["a"]


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    mark = tmp_path / "mark"
    content = {"a": torch.ones(2), "b": Hostile(mark)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="pytorch_model.bin: refused"):
        Weights(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"a": {"b": torch.ones(1)}}])
def test_pickle_without_a_dictionary_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="expected named tensors"):
        Weights(tmp_path)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="pytorch_model.bin: refused"):
        Weights(tmp_path)


def test_error_without_torch_names_the_packages_to_install(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from t5x_like.interop.weight_files import Weights\n"
        "from t5x_like.errors import DataError\n"
        f"try: Weights(Path({str(tmp_path)!r}))\n"
        "except DataError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "requires torch, which is not installed: pip install 't5x-like[hf]'" in found
