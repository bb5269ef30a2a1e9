"""From the files of a folder to a model: every form a checkpoint comes in, every break in one."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from minicpm_mlx import device, load_model
from minicpm_mlx.errors import WeightsError
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.transformer import Model
from support.data import GOLDEN

TIED = GOLDEN / "minicpm_2b_like"
UNTIED = GOLDEN / "minicpm_2b_128k_like"
IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
Tensors = dict[str, mx.array]
UP = "model.layers.1.mlp.up_proj.weight"


def tensors_of(folder: Path) -> Tensors:
    return dict(mx.load(str(folder / "model.safetensors")))


def write(folder: Path, tensors: Tensors, source: Path = TIED, **changes: Any) -> Path:
    """A checkpoint of `tensors` with the config of `source`."""
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


def shard(folder: Path, index: Any = True, names: tuple[str, str] | None = None) -> dict[str, str]:
    """Split the one file of `folder` in two; the map from tensor to file, written as the index."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    files = names or ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name] for name in tensors if where[name] == file}
        mx.save_safetensors(str(folder / file), part)
    if index:
        write_index(folder, {"metadata": {}, "weight_map": where})
    return where


def write_index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def logits(folder: Path, **options: Any) -> mx.array:
    return load_model(folder, **options)(IDS).astype(mx.float32)


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max().item())


def nbytes(model: nn.Module) -> int:
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture(scope="module")
def reference() -> mx.array:
    return logits(TIED, dtype="float32")


# ---- every form


@pytest.mark.parametrize(
    ("form", "tolerance"), [("_bin", 0.15), ("_bin_fp16", 0.02), ("_bin_sharded", 0.15)]
)
@pytest.mark.parametrize("fuse", [False, True], ids=["twin", "fused"])
def test_torch_files_hold_the_same_model(
    reference: mx.array, form: str, tolerance: float, fuse: bool
) -> None:
    found = logits(GOLDEN / f"minicpm_2b_like{form}", fuse=fuse, dtype="float32")
    assert 0 < difference(found, reference) < tolerance  # rounded to 16 bits once, by the file


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("_bin", mx.bfloat16), ("_bin_fp16", mx.float16), ("_bin_sharded", mx.bfloat16)],
)
def test_torch_and_safetensors_of_the_same_bits_agree_exactly(
    tmp_path: Path, form: str, dtype: mx.Dtype
) -> None:
    tensors = {name: x.astype(dtype) for name, x in tensors_of(TIED).items()}
    folder = write(tmp_path, tensors)
    assert mx.array_equal(logits(folder), logits(GOLDEN / f"minicpm_2b_like{form}"))


def test_safetensors_are_preferred_to_a_torch_file(tmp_path: Path, reference: mx.array) -> None:
    write(tmp_path, tensors_of(TIED))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert mx.array_equal(logits(tmp_path, dtype="float32"), reference)


def test_a_torch_file_of_another_name_is_read_when_named(tmp_path: Path) -> None:
    source = GOLDEN / "minicpm_2b_like_bin"
    shutil.copy(source / "config.json", tmp_path)
    shutil.copy(source / "pytorch_model.bin", tmp_path / "dpo.bin")
    assert mx.array_equal(logits(tmp_path, weights="dpo.bin"), logits(source))


@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
@pytest.mark.parametrize(
    "names", [None, ("weights.00.safetensors", "weights.01.safetensors")], ids=["hf", "old-mlx-lm"]
)
def test_shards_make_the_same_model(
    tmp_path: Path, reference: mx.array, index: bool, names: tuple[str, str] | None
) -> None:
    shard(write(tmp_path, tensors_of(TIED)), index, names)
    assert mx.array_equal(logits(tmp_path, dtype="float32"), reference)


@pytest.mark.parametrize("fuse", [False, True], ids=["twin", "fused"])
def test_a_tied_head_is_the_embedding_whatever_the_file_repeats(
    tmp_path: Path, reference: mx.array, fuse: bool
) -> None:
    tensors = tensors_of(TIED)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = mx.zeros_like(tensors["model.embed_tokens.weight"])
    model = load_model(write(tmp_path, tensors), dtype="float32", fuse=fuse)
    assert difference(model(IDS), reference) < 1e-3
    assert nbytes(model) == nbytes(load_model(TIED, dtype="float32", fuse=fuse))


def test_rotary_frequencies_in_a_file_are_passed_over(tmp_path: Path, reference: mx.array) -> None:
    tensors = tensors_of(TIED)
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = mx.zeros((16,))
    assert mx.array_equal(logits(write(tmp_path, tensors), dtype="float32"), reference)


@pytest.mark.parametrize("dtype", device.DTYPES)
@pytest.mark.parametrize("fuse", [False, True], ids=["twin", "fused"])
def test_a_dtype_asked_for_is_that_of_every_parameter(dtype: str, fuse: bool) -> None:
    for case in (TIED, GOLDEN / "minicpm_2b_like_bin_fp16"):
        parameters: Any = tree_flatten(load_model(case, dtype=dtype, fuse=fuse).parameters())
        assert {str(array.dtype) for _, array in parameters} == {f"mlx.core.{dtype}"}


# ---- quantized by mlx-lm


def mlx_lm_folder(
    folder: Path,
    source: Path,
    predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None,
    *,
    head: bool = False,
    say_mode: bool = True,
    **packing: Any,
) -> Path:
    """What mlx-lm's convert writes for `source`; `head`: its MiniCPM has a second embedding."""
    raw = json.loads((source / "config.json").read_text())
    model = Model(Config.from_dict(raw))
    model.load_weights(list(tensors_of(source).items()))
    if head:
        model.lm_head = nn.Linear(*reversed(model.model.embed_tokens.weight.shape), bias=False)
        model.lm_head.weight = model.model.embed_tokens.weight
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"} | packing
    packing = dict(quantization)
    if not say_mode:
        del quantization["mode"]

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        how = predicate(path, module) if predicate else True
        if how is not True:
            quantization[path] = how
        return how

    nn.quantize(model, **packing, class_predicate=choose)
    parameters: Any = tree_flatten(model.parameters())
    return write(
        folder, dict(parameters), source, quantization=quantization, quantization_config=packing
    )


def dequantized_reference(folder: Path, config: Config) -> Model:
    """The model of a folder's dequantized weights, made without the loader."""
    tensors, model = tensors_of(folder), Model(config)
    special, dense = dict(config.layer_quantization), {}
    for name in [name for name in tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        how = special.get(module, config.quantization)
        assert how is not None
        dense[f"{module}.weight"] = mx.dequantize(
            tensors.pop(f"{module}.weight"),
            tensors.pop(name),
            tensors.pop(f"{module}.biases", None),
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
        )
    expected: Any = tree_flatten(model.parameters())
    tensors |= dense
    model.load_weights([(name, tensors[name]) for name, _ in expected])
    return model


def mixed(path: str, module: nn.Module) -> bool | dict[str, Any]:
    if path.endswith(("v_proj", "embed_tokens")):
        return {"group_size": 32, "bits": 8}
    return not path.endswith("layers.1.mlp.down_proj")


QUANTIZED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-mode": {"say_mode": False, "bits": 8, "group_size": 32},
    "head-twice": {"head": True},
    "by-layer": {"predicate": mixed, "head": True},
    "mxfp4": {"mode": "mxfp4", "group_size": 32},
    "mxfp4-by-layer": {"predicate": mixed, "mode": "mxfp4", "group_size": 32},
}


@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize(
    ("packed", "fuse"),
    [(True, False), (True, True), (False, True)],
    ids=["plain", "fused", "unpacked"],
)
def test_a_folder_of_mlx_lm_computes_with_its_dequantized_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    packed: bool,
    fuse: bool,
) -> None:
    folder = mlx_lm_folder(tmp_path, TIED, **options)
    if packed:  # as on a GPU, or with little memory
        monkeypatch.setattr(device, "unpack_to", lambda dtype, parameters: None)
    model = load_model(folder, dtype="float32", fuse=fuse)
    names = {name for name, _ in tree_flatten(model.parameters())}  # type: ignore[str-unpack]
    assert any(name.endswith("scales") for name in names) == packed
    assert difference(model(IDS), dequantized_reference(folder, Config.load(folder))(IDS)) < 1e-3


def test_a_quantized_tied_embedding_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda dtype, parameters: None)
    model = load_model(mlx_lm_folder(tmp_path, TIED, head=True), dtype="float32")
    tensors = tensors_of(tmp_path)
    head = sum(array.nbytes for name, array in tensors.items() if name.startswith("lm_head."))
    assert head == 512 * (128 // 2 + 2 * 2 * 4)  # 4 bits a weight, two float32 a group of 64
    assert nbytes(model) == sum(array.nbytes for array in tensors.values()) - head


def test_an_untied_quantized_head_is_kept(tmp_path: Path) -> None:
    folder = mlx_lm_folder(tmp_path, UNTIED)
    expected = dequantized_reference(folder, Config.load(folder))(IDS)
    assert difference(logits(folder, dtype="float32"), expected) < 1e-3


def test_quantized_weights_without_their_description_are_refused(tmp_path: Path) -> None:
    mlx_lm_folder(tmp_path, TIED)
    shutil.copy(TIED / "config.json", tmp_path)
    assert "no `quantization`" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("weight", lambda x: x.astype(mx.float32), "float32; expected uint32"),
        ("scales", lambda x: x.astype(mx.int32), "int32; expected a float type"),
        ("biases", lambda x: x.astype(mx.uint32), "uint32; expected a float type"),
        ("scales", lambda x: x[:, :1], "(192, 1); the config calls for (192, 2)"),
        ("weight", lambda x: x[:, :8], "(192, 8); the config calls for (192, 16)"),
        ("biases", None, "is missing; the config calls for (192, 2)"),
        ("weight", None, "is missing; the config calls for (192, 16)"),
    ],
)
def test_a_broken_packed_tensor_is_named(
    tmp_path: Path, name: str, wrong: Callable[[mx.array], mx.array] | None, expected: str
) -> None:
    tensors = tensors_of(mlx_lm_folder(tmp_path, TIED))
    name = UP.replace("weight", name)
    array = tensors.pop(name)
    if wrong is not None:
        tensors[name] = wrong(array)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    message = refusal(tmp_path)
    assert name in message
    assert expected in message


@pytest.mark.parametrize(
    "name", ["model.norm.scales", "model.layers.9.mlp.up_proj.scales", "scales", ".scales"]
)
def test_scales_of_nothing_packed_are_refused(tmp_path: Path, name: str) -> None:
    tensors = tensors_of(mlx_lm_folder(tmp_path, TIED))
    tensors[name] = mx.zeros((1,))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    assert f"{name} is not part of this architecture" in refusal(tmp_path)


def test_packed_rows_of_no_whole_number_of_groups_are_refused(tmp_path: Path) -> None:
    folder = mlx_lm_folder(tmp_path, TIED)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 160
    (folder / "config.json").write_text(json.dumps(config))
    assert "mlp" in refusal(folder)


# ---- broken


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (None, f"{UP} is missing; the config calls for (192, 128)"),
        (mx.zeros((191, 128)), f"{UP} has shape (191, 128); the config calls for (192, 128)"),
        (mx.zeros((192, 128, 1)), f"{UP} has shape (192, 128, 1)"),
        (mx.zeros((192, 128), mx.int32), f"{UP} is int32; expected a float type"),
        (mx.zeros((192, 128), mx.uint8), f"{UP} is uint8; expected a float type"),
    ],
    ids=["missing", "shape", "dims", "int32", "uint8"],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, wrong: mx.array | None, expected: str
) -> None:
    tensors = tensors_of(TIED)
    del tensors[UP]
    if wrong is not None:
        tensors[UP] = wrong
    assert expected in refusal(write(tmp_path, tensors))


def test_a_surplus_tensor_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(TIED) | {"model.layers.3.mlp.up_proj.weight": mx.zeros((192, 128))}
    assert "model.layers.3.mlp.up_proj.weight is not part" in refusal(write(tmp_path, tensors))
    tensors |= {"a\nb\x1b[2J": mx.zeros((1,)), "c": mx.zeros((1,))}
    assert "a b?[2J is not part" in (message := refusal(write(tmp_path, tensors)))
    assert "2 more tensors" in message


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    shutil.copy(TIED / "config.json", tmp_path)
    assert "expected model.safetensors or pytorch_model.bin" in refusal(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        *[
            f"{name}.safetensors"
            for name in ("../model", "/etc/model", "sub/model", "a\0", "x" * 5000)
        ],
        *["a\n\x1b[2J.safetensors", "..", "", "config.json", "model.bin"],
        *[7, None, ["model-00001-of-00002.safetensors"]],
    ],
    ids=repr,
)
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    tensors = tensors_of(TIED)
    del tensors[UP]
    where = shard(write(folder, tensors))
    shutil.copy(TIED / "model.safetensors", tmp_path)
    write_index(folder, {"weight_map": where | {UP: file}})
    message = refusal(folder)
    assert "is not the name of" in message or f"{UP} is missing" in message


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 200_000, "\ud800"]
)
def test_a_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    shard(write(tmp_path, tensors_of(TIED)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "expected {" in refusal(tmp_path)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, index: bool) -> None:
    where = shard(write(tmp_path, tensors_of(TIED)), index)
    other = ({*where.values()} - {where[UP]}).pop()
    tensors = dict(mx.load(str(tmp_path / other))) | {UP: mx.zeros((192, 128))}
    mx.save_safetensors(str(tmp_path / other), tensors)
    assert f"{UP} is in another shard as well" in refusal(tmp_path)


def test_a_whole_file_is_read_before_shards(tmp_path: Path, reference: mx.array) -> None:
    """As transformers does, and as what a hub has is chosen."""
    older = {name: array * 2 for name, array in tensors_of(TIED).items()}
    shard(write(tmp_path, older))
    write(tmp_path, tensors_of(TIED))
    assert mx.array_equal(logits(tmp_path, dtype="float32"), reference)


def test_a_whole_bin_is_read_before_its_shards(tmp_path: Path) -> None:
    sharded, whole = (GOLDEN / f"minicpm_2b_like_bin{kind}" for kind in ("_sharded", "_fp16"))
    for path in (*sharded.iterdir(), whole / "pytorch_model.bin"):
        shutil.copy(path, tmp_path)
    assert mx.array_equal(logits(tmp_path), logits(whole))


@pytest.mark.parametrize(
    "where",
    [
        {UP: "model-00001-of-00003.safetensors"},  # of an older set of shards
        {"model.norm.weight": "model-00001-of-00002.safetensors", UP: "gone.safetensors"},
        {"model.rotary_emb.inv_freq": "model-00001-of-00002.safetensors"},
    ],
)
def test_an_index_out_of_date_does_not_matter_where_every_tensor_is_there(
    where: dict[str, str], tmp_path: Path, reference: mx.array
) -> None:
    found = shard(write(tmp_path, tensors_of(TIED)))
    swapped = {name: min(found.values()) for name in found}  # in the other shard than it says
    write_index(tmp_path, {"weight_map": found | swapped | where})
    assert mx.array_equal(logits(tmp_path, dtype="float32"), reference)
    write(tmp_path, tensors_of(TIED))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert mx.array_equal(logits(tmp_path, dtype="float32"), reference)


def test_missing_tensors_and_shards_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(UNTIED)
    del tensors["lm_head.weight"]
    assert "lm_head.weight is missing" in refusal(write(tmp_path, tensors, UNTIED))
    shard(write(tmp_path, tensors_of(TIED)))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in refusal(tmp_path)
    write_index(tmp_path, {"weight_map": {}})
    assert "model-00002-of-00002.safetensors: missing, but numbered so" in refusal(tmp_path)
    write_index(tmp_path, {"weight_map": {UP: "model-00001-of-00002.safetensors"}})
    assert "is missing; the config calls for" in refusal(tmp_path)


# ---- memory


MEASURE = """
    import re, resource, sys
    from pathlib import Path
    from minicpm_mlx import load_model
    from mlx.utils import tree_flatten

    def peak():
        if sys.platform == "darwin":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts the parent's peak into ru_maxrss.
        return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    load_model(Path(sys.argv[1]), dtype=sys.argv[3], fuse=True)
    before = peak()
    model = load_model(Path(sys.argv[2]), dtype=sys.argv[3], fuse=True)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    print(peak() - before, size)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2560, "vocab_size": 32000}
    counts = {"num_attention_heads": 16, "num_hidden_layers": 12}
    config = {"architectures": ["MiniCPMForCausalLM"], **sizes, **counts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected: Any = tree_flatten(Model(Config.from_dict(config)).parameters())
    tensors = {name: mx.zeros(array.shape, mx.bfloat16) for name, array in expected}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(TIED), str(tmp_path), dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, size = map(int, output.split())
    assert size > 300e6
    assert 0.9 * size < grown < 1.35 * size
