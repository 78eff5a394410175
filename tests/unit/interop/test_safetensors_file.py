"""The safetensors format: written files are read back, and invalid files are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.errors import DataError
from t5x_like.interop.safetensors_file import INDEX, SINGLE, Pending, TensorFile, write, write_sharded
from t5x_like.interop.weight_files import Weights


def pending(name, array):
    return Pending(name, array.dtype, array.shape, lambda: array)


ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4).astype(ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
}


def written(directory, **arrays):
    write(directory / SINGLE, [pending(name, array) for name, array in (arrays or ARRAYS).items()], {"format": "pt"})
    return directory / SINGLE


def test_written_tensors_are_read_back(tmp_path):
    file = TensorFile(written(tmp_path))
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert file.read(name).dtype == array.dtype
        np.testing.assert_array_equal(file.read(name), array)


def test_safetensors_library_and_this_package_read_each_others_files(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    read = library.load_file(written(tmp_path))
    library.save_file({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}, tmp_path / "other")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        np.testing.assert_array_equal(TensorFile(tmp_path / "other").read(name), array)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 200))
def test_truncated_file_is_refused(tmp_path_factory, cut):
    directory = tmp_path_factory.mktemp("cut")
    whole = written(directory).read_bytes()
    (directory / SINGLE).write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(DataError, match=SINGLE):
        TensorFile(directory / SINGLE)


def with_header(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG = {
    "not valid JSON": b"{",
    "expected an object": [1],
    "occurs twice": b'{"x": 1, "x": 2}',
    "has the type 'F8_E4M3', which is not supported": {"x": {**F32, "dtype": "F8_E4M3"}},
    "is described as": {"x": {**F32, "dtype": 3}},
    "described as": {"x": {**F32, "shape": [-2]}},
    "expected dtype, shape": {"x": {**F32, "data_offsets": [0, 2**70]}},
    "shape and offsets": {"x": 3},
    "its shape": {"x": {**F32, "shape": [3]}},
    "begins at byte": {"x": {**F32, "data_offsets": [8, 16]}},
    "without gap or overlap": {"x": F32, "y": F32},
    "truncated": {"x": {**F32, "shape": [4], "data_offsets": [0, 16]}},
    "where the last tensor ends": {"x": {**F32, "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_header_is_refused(tmp_path, message):
    with pytest.raises(DataError, match=message):
        TensorFile(with_header(tmp_path / "file", WRONG[message]))


def test_oversized_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="with a header of"):
        TensorFile(path)
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(DataError, match="100000000 at most"):
        TensorFile(path)


def test_sharded_files_have_a_complete_index(tmp_path):
    write_sharded(tmp_path, [pending(name, array) for name, array in ARRAYS.items()], max_bytes=40)
    weights = Weights(tmp_path)
    assert weights.keys() == ARRAYS.keys() and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(weights.read(name), array)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", 3, None]
)
def test_index_with_unsafe_file_names_is_refused(tmp_path, name):
    written(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": name}}))
    with pytest.raises(DataError, match=INDEX):
        Weights(tmp_path)


def test_index_that_does_not_match_its_files_is_refused(tmp_path):
    written(tmp_path)
    listed = dict.fromkeys(ARRAYS, SINGLE)
    for mapping, message in (
        ({**listed, "more": SINGLE}, "'more' is not in"),
        ({name: SINGLE for name in listed if name != "b"}, "holds 'b'"),
        ({**listed, "b": "other.safetensors"}, "other.safetensors"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": mapping}))
        with pytest.raises(DataError, match=message):
            Weights(tmp_path)
    for text in ("[]", "{", '{"weight_map": [1]}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(DataError, match=INDEX):
            Weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "neither model.safetensors"),
        ("flax_model.msgpack", "found flax_model.msgpack, weights of Flax, which are not read"),
        ("tf_model.h5", "found tf_model.h5, weights of TensorFlow"),
        ("adapter_model.safetensors", "adapters without their base model"),
        ("model.fp16.safetensors", "rename it to model.safetensors"),
    ],
)
def test_directory_without_readable_tensors_is_refused(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        Weights(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin"])
def test_git_lfs_pointer_is_recognized(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(DataError, match="found a Git LFS pointer"):
        Weights(tmp_path)
