"""The .bin reader against files of torch (tests/golden) and against hostile ones written here."""

import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import WeightsError
from minicpm_mlx.weights import pytorch_bin, safetensors
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from support.damage import damaged, memory_grows_by_less_than

GOLDEN = Path(__file__).parents[1] / "golden"


# torch.save's format, in miniature.


class Global(NamedTuple):
    name: str


class Call(NamedTuple):
    function: Global
    args: tuple[Any, ...]


class Persistent(NamedTuple):
    pid: tuple[Any, ...]


def pickled(value: Any) -> bytes:
    """The opcodes of `value`, protocol 2, as torch.save writes them (without the memo)."""
    match value:
        case None | bool() | float():
            return pickle.dumps(value, 2)[2:-1]
        case int():
            short = -(2**31) <= value < 2**31
            return b"J" + struct.pack("<i", value) if short else pickle.dumps(value, 2)[2:-1]
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case Global(name):
            return b"c" + "\n".join([*name.rsplit(".", 1), ""]).encode()
        case Call(function, args):
            return pickled(function) + pickled(args) + b"R"
        case Persistent(pid):
            return pickled(pid) + b"Q"
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case dict():
            return b"}(" + b"".join(pickled(x) for pair in value.items() for x in pair) + b"u"
    raise TypeError(value)


def tensor(
    shape: Any = (2, 2),
    stride: Any = (2, 1),
    offset: Any = 0,
    numel: Any = 4,
    kind: str = "torch.FloatStorage",
    key: Any = "0",
) -> Call:
    storage = Persistent(("storage", Global(kind), key, "cpu", numel))
    hooks = Call(Global("collections.OrderedDict"), ())
    rebuild = Global("torch._utils._rebuild_tensor_v2")
    return Call(rebuild, (storage, offset, shape, stride, False, hooks))


FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def write(
    path: Path,
    state: Any,
    data: bytes = FLOATS,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A .bin of `state` (or of a finished pickle) with one storage, "0"."""
    if not isinstance(state, bytes):
        state = b"\x80\x02" + pickled(state) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", state)
        archive.writestr("model/byteorder", byteorder)
        archive.writestr("model/data/0", data)
        archive.writestr("model/version", b"3\n")
    return path


@pytest.fixture
def bin_path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        pytorch_bin.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()  # one line, no terminal escapes
    return message


# What torch wrote is read.


@pytest.mark.parametrize(
    ("folder", "dtype"),
    [
        ("minicpm_2b_like_bin", mx.bfloat16),
        ("minicpm_2b_like_bin_fp16", mx.float16),
        ("minicpm_2b_like_bin_sharded", mx.bfloat16),
    ],
)
def test_files_of_torch_equal_the_safetensors_bit_for_bit(folder: str, dtype: mx.Dtype) -> None:
    expected = safetensors.read(GOLDEN / "minicpm_2b_like" / "model.safetensors")
    tensors: dict[str, LazyTensor] = {}
    for path in sorted((GOLDEN / folder).glob("*.bin")):
        tensors |= pytorch_bin.read(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        array = tensor.load()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert array.dtype == dtype
        cast = expected[name].load().astype(dtype)
        assert mx.array_equal(array.view(mx.uint16), cast.view(mx.uint16))


def test_views_and_parameters_of_one_storage_are_read() -> None:
    tensors = pytorch_bin.read(GOLDEN / "shared_storage.bin")
    numbers = mx.arange(24, dtype=mx.float32)
    assert mx.array_equal(tensors["a"].load(), numbers[:12].reshape(3, 4))
    assert mx.array_equal(tensors["b"].load(), numbers[12:].reshape(4, 3).T)
    assert mx.array_equal(tensors["c"].load(), numbers[2:5])


@pytest.mark.parametrize(
    ("kind", "form", "dtype", "values"),
    [
        ("Long", "q", mx.int64, [2**40, -1]),
        ("Int", "i", mx.int32, [-(2**31), 7]),
        ("Short", "h", mx.int16, [-5, 300]),
        ("Char", "b", mx.int8, [-128, 127]),
        ("Byte", "B", mx.uint8, [0, 255]),
        ("Bool", "?", mx.bool_, [True, False]),
        ("Half", "e", mx.float16, [0.5, -2.0]),
        ("Float", "f", mx.float32, [0.1, float("inf")]),
    ],
)
def test_every_type_mlx_shares_with_torch_is_read(
    bin_path: Path, kind: str, form: str, dtype: mx.Dtype, values: list[float]
) -> None:
    state = {"x": tensor((2,), (1,), 0, 2, f"torch.{kind}Storage")}
    array = pytorch_bin.read(write(bin_path, state, struct.pack(f"<2{form}", *values)))["x"].load()
    assert array.dtype == dtype
    assert array.tolist() == mx.array(values, dtype).tolist()


def test_scalars_empty_tensors_and_far_strides_are_read(bin_path: Path) -> None:
    state = {"one": tensor((), (), 3), "none": tensor((0, 3), (3, 1), 4), "far": tensor((2,), (3,))}
    tensors = pytorch_bin.read(write(bin_path, state))
    values = {name: x.load().tolist() for name, x in tensors.items()}
    assert values == {"one": 4.0, "none": [], "far": [1.0, 4.0]}
    assert tensors["none"].load().shape == (0, 3)


def test_metadata_of_a_state_dict_is_passed_over(bin_path: Path) -> None:
    made = pickled(Call(Global("collections.OrderedDict"), ()))
    items = b"(" + pickled("w") + pickled(tensor()) + b"u"
    metadata = pickled({"_metadata": {"": {"version": 1}}}) + b"b"
    path = write(bin_path, b"\x80\x02" + made + items + metadata + b".")
    assert pytorch_bin.read(path)["w"].load().tolist() == [[1, 2], [3, 4]]


def test_a_checkpoint_around_a_state_dict_is_opened(bin_path: Path) -> None:
    path = write(bin_path, {"epoch": 3, "loss": 0.5, "state_dict": {"w": tensor()}})
    assert pytorch_bin.read(path).keys() == {"w"}


def test_nothing_is_held_open_or_mapped_after_a_load(bin_path: Path) -> None:
    tensor_read = pytorch_bin.read(write(bin_path, {"w": tensor()}))["w"]
    array = tensor_read.load()
    bin_path.unlink()
    assert array.tolist() == [[1, 2], [3, 4]]
    if sys.platform == "linux":
        assert bin_path.name not in Path("/proc/self/maps").read_text()
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert all(bin_path.name not in str(link.readlink()) for link in links)
    with pytest.raises(WeightsError, match="'w': expected the file unchanged since"):
        tensor_read.load()


def test_a_file_cut_after_opening_is_an_error(bin_path: Path) -> None:
    tensors = pytorch_bin.read(write(bin_path, {"w": tensor()}))
    bin_path.write_bytes(b"PK")
    with pytest.raises(WeightsError, match="unchanged since it was opened"):
        tensors["w"].load()


# Nothing a file names is run.


@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "INST"])
@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "functools.partial", "torch.load"]
)
def test_a_foreign_global_is_named_and_not_run(bin_path: Path, name: str, form: str) -> None:
    mark = bin_path.with_name("ran")
    module, attribute = name.rsplit(".", 1)
    command = pickled(f"touch {mark}" if "system" in name else f"open({str(mark)!r}, 'w')")
    code = {
        "GLOBAL": f"c{module}\n{attribute}\n".encode() + command + b"\x85R",
        "STACK_GLOBAL": pickled(module) + pickled(attribute) + b"\x93" + command + b"\x85R",
        "INST": b"(" + command + f"i{module}\n{attribute}\n".encode(),
    }[form]
    message = refusal(write(bin_path, b"\x80\x02}" + pickled("x") + code + b"s."))
    assert not mark.exists()
    assert (name if form != "INST" else "INST") in message


def test_a_real_pickle_with_a_reduce_method_is_not_run(bin_path: Path) -> None:
    mark = bin_path.with_name("ran")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {mark}",)

    for protocol in range(6):
        refusal(write(bin_path, pickle.dumps({"w": Hostile()}, protocol)))
        assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        Call(Global("torch.FloatStorage"), (4,)),
        Call(Global("torch._utils._rebuild_tensor_v2"), ()),
        Call(Global("torch._utils._rebuild_parameter"), ("w", True, None)),
        Call(Global("collections.OrderedDict"), ((("a", 1),),)),
        Persistent(("module", "x")),
        Persistent(("storage", "torch.FloatStorage", "0", "cpu", 4)),
    ],
)
def test_listed_names_take_no_other_arguments(bin_path: Path, value: Any) -> None:
    refusal(write(bin_path, {"w": value}))


# Memory and the C stack are safe from hostile pickles.


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"}N)" + b"\x85" * 300_000 + b"Ns.", id="deep tuple as a key"),
        pytest.param(b"})" + b"\x85" * 300_000 + b")b.", id="deep tuple as attributes"),
        pytest.param(b")" + b"\x85" * 300_000 + b"X\1\0\0\0x\x93.", id="deep tuple as a module"),
        pytest.param(b")" + b"\x85" * 300_000 + b".", id="deep tuple"),
        pytest.param(b"(" * 300_000 + b".", id="marks"),
        pytest.param(b"Nr\xff\xff\xff\xff.", id="memo index"),
        pytest.param(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", id="huge bytes"),
        pytest.param(b"\x96\xff\xff\xff\xff\xff\xff\xff\x0f.", id="huge bytearray"),
        pytest.param(b"X\xff\xff\xff\xff.", id="huge text"),
        pytest.param(b"\x8b\xff\xff\xff\x7f.", id="huge int"),
        pytest.param(b"I" + b"9" * 100_000 + b"\n.", id="long decimal"),
        pytest.param(b"}", id="no stop"),
        pytest.param(b".", id="empty stack"),
        pytest.param(b"0.", id="pop of nothing"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"}q\0h\0X\1\0\0\0wh\0s.", id="a dict in itself"),
        pytest.param(b"N)R.", id="call of None"),
        pytest.param(b"}X\1\0\0\0w(u.", id="items of text"),
        pytest.param(b"}(X\1\0\0\0wu.", id="a key without a value"),
        pytest.param(b"}(NNu.", id="None as a key"),
        pytest.param(b"h\7.", id="memo never put"),
    ],
)
def test_a_hostile_pickle_is_refused_in_little_memory(bin_path: Path, code: bytes) -> None:
    refusal(write(bin_path, b"\x80\x02" + code))


def test_a_huge_pickle_is_refused_unread(bin_path: Path) -> None:
    assert "data.pkl" in refusal(write(bin_path, b"}" * (5 << 20)))


# Every element of a tensor lies in its storage, and the storage in the file.


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"shape": (2, 3)}, id="more than the storage"),
        pytest.param({"offset": 1}, id="offset past the end"),
        pytest.param({"offset": 5, "shape": (), "stride": ()}, id="scalar past the end"),
        pytest.param({"offset": 5, "shape": (0,), "stride": (1,)}, id="nothing, past the end"),
        pytest.param({"offset": -1}, id="negative offset"),
        pytest.param({"offset": True}, id="bool for an offset"),
        pytest.param({"offset": 0.0}, id="float for an offset"),
        pytest.param({"stride": (-2, 1)}, id="negative stride"),
        pytest.param({"stride": (3, 1)}, id="stride past the end"),
        pytest.param({"stride": (2**62, 2**62)}, id="stride that overflows"),
        pytest.param({"stride": (2,)}, id="fewer strides than sizes"),
        pytest.param({"stride": 1}, id="stride that is no tuple"),
        pytest.param({"shape": "22"}, id="shape that is text"),
        pytest.param({"shape": (-2, -2)}, id="negative sizes"),
        pytest.param({"shape": (2, None)}, id="None for a size"),
        pytest.param({"shape": (2**60, 1), "stride": (0, 0)}, id="expanded beyond memory"),
        pytest.param({"shape": (2**40, 2**40), "stride": (0, 0)}, id="sizes that overflow"),
        pytest.param({"shape": (2**1000, 0)}, id="size beyond a machine word"),
        pytest.param({"shape": (1,) * 65, "stride": (1,) * 65}, id="too many dimensions"),
        pytest.param({"shape": ((2,), 2)}, id="nested sizes"),
        pytest.param({"numel": 5}, id="storage longer than its entry"),
        pytest.param({"numel": 2**60, "shape": (2**60,), "stride": (1,)}, id="storage too huge"),
        pytest.param({"numel": 2**1000}, id="storage beyond a machine word"),
        pytest.param({"numel": None}, id="storage of None"),
        pytest.param({"key": "1"}, id="storage that is not there"),
        pytest.param({"key": "../data.pkl"}, id="another entry as storage"),
        pytest.param({"kind": "torch.DoubleStorage"}, id="float64"),
        pytest.param({"kind": "torch.LongStorage"}, id="wider type than the storage"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused_by_name(
    bin_path: Path, bad: dict[str, Any]
) -> None:
    state = {"fine": tensor(), "layer.weight": tensor(**bad)}
    assert "'layer.weight'" in refusal(write(bin_path, state))


@pytest.mark.parametrize("state", [{"epoch": 1}, {"w": {"deep": tensor()}}, 7, None, tensor()])
def test_anything_but_a_dict_of_tensors_is_refused(bin_path: Path, state: Any) -> None:
    assert "expected a" in refusal(write(bin_path, state))


def test_a_name_from_the_file_cannot_write_to_the_terminal(bin_path: Path) -> None:
    assert len(refusal(write(bin_path, {"\x1b[2J\n" + "w" * 10_000: 1}))) < 1000


# Files that are not such zips.


def test_big_endian_data_and_compressed_entries_are_refused(bin_path: Path) -> None:
    state = {"w": tensor()}
    assert "little-endian" in refusal(write(bin_path, state, byteorder=b"big"))
    assert "uncompressed" in refusal(write(bin_path, state, compression=zipfile.ZIP_DEFLATED))


def test_the_legacy_format_is_named_with_the_way_out(bin_path: Path) -> None:
    bin_path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    message = refusal(bin_path)
    assert "legacy" in message
    assert "safetensors" in message


def test_a_torchscript_program_is_named(bin_path: Path) -> None:
    with zipfile.ZipFile(write(bin_path, {}), "a") as archive:
        archive.writestr("model/constants.pkl", b"")
    assert "TorchScript" in refusal(bin_path)


@pytest.mark.parametrize(("field", "value"), [(24, 2**31), (42, 2**31), (42, 3)])
def test_a_zip_directory_that_points_elsewhere_is_refused(
    bin_path: Path, field: int, value: int
) -> None:
    content = bytearray(write(bin_path, {"w": tensor()}).read_bytes())
    record = content.rindex(b"model/data/0") - 46  # its size is at 24, its place at 42
    struct.pack_into("<I", content, record + field, value)
    bin_path.write_bytes(content)
    refusal(bin_path)


def test_a_zip_without_a_pickle_is_refused(bin_path: Path) -> None:
    with zipfile.ZipFile(bin_path, "w") as archive:
        archive.writestr("readme.txt", b"")
    assert "data.pkl" in refusal(bin_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *[(c, "") for c in (b"", b"<html>404</html>", b"PK\5\6" + bytes(18), b"\0" * 100)],
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ],
)
def test_what_is_no_zip_is_refused(bin_path: Path, content: bytes, message: str) -> None:
    refusal(bin_path.parent)
    refusal(bin_path)  # missing
    bin_path.write_bytes(content)
    assert message in refusal(bin_path)


# Damage, at random.

EXAMPLE = (GOLDEN / "shared_storage.bin").read_bytes()


def tensors_or_a_named_error(path: Path) -> None:
    try:
        tensors = pytorch_bin.read(path)
    except WeightsError:
        return
    for tensor_read in tensors.values():
        array = tensor_read.load()
        assert (array.shape, array.dtype) == (tensor_read.shape, tensor_read.dtype)
        assert array.nbytes <= len(EXAMPLE)
        mx.eval(array)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.bin"


@pytest.mark.parametrize("examples", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_give_tensors_or_a_named_error(fuzzed: Path, examples: int) -> None:
    def check(content: bytes) -> None:
        fuzzed.write_bytes(content)
        tensors_or_a_named_error(fuzzed)

    check(EXAMPLE)
    with memory_grows_by_less_than(64 << 20):
        damaged(EXAMPLE, examples=examples)(check)()


INTS = st.integers(-3, 30) | st.integers() | st.booleans() | st.sampled_from([2**31, 2**60, 2**64])
SIZES = st.lists(INTS, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None, database=None)
@given(shape=SIZES, stride=SIZES, offset=INTS, numel=INTS)
def test_any_sizes_and_strides_stay_inside_the_file(
    fuzzed: Path, shape: Any, stride: Any, offset: int, numel: int
) -> None:
    write(fuzzed, {"w": tensor(shape, stride, offset, numel)})
    tensors_or_a_named_error(fuzzed)


OPCODES = st.sampled_from(
    [bytes([code]) for code in b"()}]N\x88tusRbQ\x93"]
    + [b"\x80\x02"]
    + [b"q\0", b"h\0", b"r\xff\xff\xff\xff", b"K\2", b"\x85", b"\x87", b"0", b"2", b".", b"\x94"]
    + [pickled(x) for x in ("0", "storage", -1, 2**70, tensor(), Global("torch.IntStorage"))]
    + [pickled(Global("os.system")), pickled(Global("collections.OrderedDict"))]
)


@settings(max_examples=400, deadline=None, database=None)
@given(code=st.lists(OPCODES | st.binary(max_size=3), max_size=30).map(b"".join))
def test_a_random_pickle_gives_tensors_or_a_named_error(fuzzed: Path, code: bytes) -> None:
    write(fuzzed, code + b".")
    tensors_or_a_named_error(fuzzed)
