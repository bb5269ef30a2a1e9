"""The safetensors reader: MLX never sees a file that the safetensors library has not passed."""

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import WeightsError
from minicpm_mlx.weights import safetensors
from support.damage import damaged, memory_grows_by_less_than

GOLDEN = Path(__file__).parents[1] / "golden" / "minicpm_2b_like" / "model.safetensors"

INTEGERS = [mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64]
INTEGERS += [mx.uint8, mx.uint16, mx.uint32, mx.uint64]
FLOATS = [mx.float16, mx.bfloat16, mx.float32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header, right or wrong, and of any claimed header length."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        safetensors.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()  # one line, no terminal escapes
    return message


def test_tensors_are_those_mlx_reads() -> None:
    expected = mx.load(str(GOLDEN))
    assert isinstance(expected, dict)
    tensors = safetensors.read(GOLDEN)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        array = tensor.load()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert mx.array_equal(array, expected[name])


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_every_type_survives(path: Path, dtype: mx.Dtype) -> None:
    stored = mx.array([[0, 1, 1]]).astype(dtype)
    mx.save_safetensors(str(path), {"x": stored, "empty": mx.zeros((0, 2), dtype)})
    tensors = safetensors.read(path)
    assert (tensors["x"].shape, tensors["x"].dtype) == ((1, 3), dtype)
    assert mx.array_equal(tensors["x"].load(), stored)
    assert tensors["empty"].load().shape == (0, 2)


def test_a_file_is_read_whatever_its_ending(path: Path) -> None:
    blob = write(path.with_name("0a1b2c"), {"x": entry("I8", [1], 0, 1)}, b"\7")  # as hubs cache
    assert safetensors.read(blob)["x"].load().tolist() == [7]


def test_a_tensor_can_be_loaded_twice(path: Path) -> None:
    tensor = safetensors.read(write(path, {"x": entry("I8", [2], 0, 2)}, b"\1\2"))["x"]
    assert tensor.load().tolist() == tensor.load().tolist() == [1, 2]


def test_memory_is_freed_with_the_last_reference(path: Path) -> None:
    mx.save_safetensors(str(path), {f"x{i}": mx.zeros((256, 1024)) for i in range(8)})  # 1 MiB each
    tensors = safetensors.read(path)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for tensor in tensors.values():
        mx.eval(tensor.load())
    assert mx.get_peak_memory() - before < 3 << 20
    assert mx.get_active_memory() - before < 1 << 20


@pytest.mark.parametrize(
    ("header", "size"),
    [
        pytest.param({"x": entry("F32", [2], 0, 8)}, 7, id="truncated data"),
        pytest.param({"x": entry("F32", [2], 0, 8)}, 9, id="surplus data"),
        pytest.param({"x": entry("F32", [2], 0, 4)}, 4, id="shape larger than the bytes"),
        pytest.param({"x": entry("F32", [1], 4, 8)}, 8, id="hole"),
        pytest.param({"x": entry("F32", [2], 8, 0)}, 8, id="offsets backwards"),
        pytest.param({"x": entry("F32", [-2], 0, 8)}, 8, id="negative size"),
        pytest.param({"x": entry("F32", [2**40, 2**40], 0, 8)}, 8, id="sizes that overflow"),
        pytest.param({"x": entry("F32", [0, 2**40], 0, 0)}, 0, id="size that wraps in MLX"),
        pytest.param(
            {"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, 12, id="overlap"
        ),
        pytest.param({"x": entry("Q9", [2], 0, 8)}, 8, id="unknown type"),
        pytest.param({"x": {"dtype": "F32"}}, 8, id="no shape"),
        pytest.param({"x": None}, 0, id="no entry"),
        pytest.param({"__metadata__": {"format": 1}}, 0, id="metadata that is no text"),
        pytest.param([], 0, id="list for a header"),
        pytest.param(b"", 0, id="no header"),
        pytest.param(b"{nonsense", 0, id="header that is not JSON"),
        pytest.param(b'{"\xff": 1}', 0, id="header that is not UTF-8"),
        pytest.param(b'{"x":' + b"[" * 100_000, 0, id="deep header"),
        pytest.param(
            b'{"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},'
            b'"x":{"dtype":"I8","shape":[1],"data_offsets":[1,2]}}',
            2,
            id="one name twice",
        ),
    ],
)
def test_an_unsound_header_is_refused(path: Path, header: Any, size: int) -> None:
    refusal(write(path, header, bytes(size)))


@pytest.mark.parametrize("length", [0, 3, 10**6, 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(path: Path, length: int) -> None:
    refusal(write(path, {"x": entry("I8", [1], 0, 1)}, b"\0", length))


@pytest.mark.parametrize(
    ("kind", "size"), [("F4", 1), ("F8_E4M3", 2), ("F8_E5M2", 2), ("F64", 16), ("C64", 16)]
)
def test_a_type_mlx_would_misread_is_refused_by_name(path: Path, kind: str, size: int) -> None:
    message = refusal(write(path, {"layer.weight": entry(kind, [2], 0, size)}, bytes(size)))
    assert "'layer.weight'" in message
    assert kind in message


def test_a_name_from_the_file_cannot_write_to_the_terminal(path: Path) -> None:
    refusal(write(path, {"\x1b[2J\n" + "w" * 10_000: entry("F64", [], 0, 8)}, bytes(8)))


@pytest.mark.parametrize("length", [0, 1, 8, 100, 5_000, 1_000_000])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(GOLDEN.read_bytes()[:length])
    assert "download it again" in refusal(path)


def test_a_git_lfs_pointer_is_named(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "git lfs pull" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refusal(tmp_path)
    refusal(tmp_path / "absent.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(path: Path) -> None:
    write(path, {}).chmod(0)
    assert "permission" in refusal(path).lower()


EXAMPLE = {
    "a.weight": entry("F32", [2, 3], 0, 24),
    "b": entry("BF16", [], 24, 26),
    "c": entry("U8", [0, 4], 26, 26),
    "__metadata__": {"format": "pt"},
}
CONTENT = struct.pack("<Q", len(json.dumps(EXAMPLE))) + json.dumps(EXAMPLE).encode() + bytes(26)
BYTES = st.integers(0, 255) | st.sampled_from(b'0123456789,:[]{}"')


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def tensors_or_a_named_error(fuzzed: Path, content: bytes) -> None:
    fuzzed.write_bytes(content)
    try:
        tensors = safetensors.read(fuzzed)
    except WeightsError:
        return
    for tensor in tensors.values():
        array = tensor.load()
        mx.eval(array)
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert array.nbytes <= len(CONTENT)


@pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_give_tensors_or_a_named_error(fuzzed: Path, examples: int) -> None:
    check = partial(tensors_or_a_named_error, fuzzed)
    check(CONTENT)
    with memory_grows_by_less_than(64 << 20):
        damaged(CONTENT, BYTES, examples=examples)(check)()


NUMBERS = st.integers(0, 9) | st.integers() | st.sampled_from([2**31, 2**32, 2**63, 2**64])


@settings(max_examples=300, deadline=None, database=None)
@given(
    shape=st.lists(NUMBERS, max_size=4), offsets=st.tuples(NUMBERS, NUMBERS), size=st.integers(0, 9)
)
def test_any_header_numbers_stay_inside_the_file(
    fuzzed: Path, shape: list[int], offsets: tuple[int, int], size: int
) -> None:
    write(fuzzed, {"x": entry("U8", shape, *offsets)}, bytes(size))
    try:
        tensor = safetensors.read(fuzzed)["x"]
    except WeightsError:
        return
    assert tensor.load().shape == tensor.shape
    assert tensor.load().tolist() == mx.zeros(tensor.shape, mx.uint8).tolist()
