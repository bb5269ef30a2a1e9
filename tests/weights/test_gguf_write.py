"""GGUF files written: read again they are the same model, and no half of one is ever left."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError, StorageError, WeightsError
from minicpm_mlx.loading import demo as demo_model
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.text.chat_template import BUILTIN, Template
from minicpm_mlx.weights.checkpoint import Checkpoint, read_checkpoint
from minicpm_mlx.weights.gguf import convert_gguf, read_gguf, write_gguf
from minicpm_mlx.weights.gguf.header import GgufFile, read_header
from minicpm_mlx.weights.gguf.modelfile import GO, PROBES
from minicpm_mlx.weights.lazy_ops import dense
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from support.data import GOLDEN, need_shared
from support.gguf_files import Type, add, gguf, quants, with_tokenizer

CASES = [
    "minicpm_2b_like",
    "minicpm_1b_like",
    "minicpm_linear_rope",
    "minicpm_2b_like_llama_format",
    "minicpm4_like",
    "minicpm_2b_like_bin",
    "minicpm3_like",
    "minicpm5_like",
]
REFUSED = {
    "minicpm_moe_like": "a mixture of . experts",
    "minicpm_s_like": "the activation fatrelu",
    "minicpm_2b_128k_like": "dynamic NTK",
    "minicpm4_longctx_like": "longrope that takes the long factors for short texts",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return with_tokenizer(GOLDEN / "minicpm_2b_like", tmp_path / "model")


def through_gguf(folder: Path, tmp_path: Path, kind: str) -> Path:
    """`folder` written as GGUF and converted back."""
    back = tmp_path / f"back-{kind}"
    back.mkdir()
    write_gguf(read_checkpoint(folder), folder, tmp_path / "m.gguf", kind)
    convert_gguf(tmp_path / "m.gguf", back)
    return back


def logits(folder: Path) -> mx.array:
    return mm.load_model(folder, dtype="float32")(mx.array([[1, 300, 17, 42, 256, 3]]))


@pytest.mark.parametrize("case", CASES)
def test_in_float32_a_model_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    folder = with_tokenizer(GOLDEN / case, tmp_path / "model")
    back = through_gguf(folder, tmp_path, "F32")
    assert mx.abs(logits(back) - logits(folder)).max().item() < 1e-5
    before, after = mm.Config.load(folder), mm.Config.load(back)
    for name in ("scale_emb", "scale_depth", "rms_norm_eps", "rope_theta", "head_dim", "mla"):
        assert getattr(after, name) == getattr(before, name), name
    # Of minicpm3 it is a constant in llama.cpp, and the last norm makes up for it.
    assert after.dim_model_base == (256 if before.mla else before.dim_model_base)
    assert after.rotation_threshold == before.rotation_threshold
    assert after.eos_token_ids[0] == before.eos_token_ids[0]
    found, wanted = mm.load_tokenizer(back), mm.load_tokenizer(folder)
    assert found.encode("the end") == wanted.encode("the end")


STEPS = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254, "Q4_1": 1 / 15, "Q4_0": 1 / 8}
"""The largest change of a weight, relative to the largest in its block of 32."""


def changes(before: Checkpoint, after: Checkpoint) -> list[float]:
    """For each matrix that largest change."""
    found = []
    for name, tensor in dense(before).tensors.items():
        wanted = np.array(tensor.load().astype(mx.float32))
        now = np.array(dense(after).tensors[name].load().astype(mx.float32))
        if wanted.ndim == 1:
            assert np.array_equal(now, wanted)
            continue
        change, largest = (np.abs(a).reshape(-1, 32).max(axis=1) for a in (now - wanted, wanted))
        found.append(float((change / np.maximum(largest, 1e-9)).max()))
    return found


@pytest.mark.parametrize("kind", STEPS)
def test_no_weight_changes_by_more_than_half_a_step(model: Path, tmp_path: Path, kind: str) -> None:
    back = read_checkpoint(through_gguf(model, tmp_path, kind))
    found = changes(read_checkpoint(model), back)
    # Twice more a rounding to float16: of the scale, and of what is unpacked here.
    assert 0 < max(found) < STEPS[kind] + (2**-10 if kind.startswith("Q") else 0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str, tmp_path: Path) -> None:
    folder = with_tokenizer(GOLDEN / case, tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match=REFUSED[case]):
        write_gguf(read_checkpoint(folder), folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def packed(whole: Checkpoint, bits: int, group_size: int) -> Checkpoint:
    """`whole` with its matrices in few bits, and bfloat16 scales, as mlx-lm writes them."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in whole.tensors.items():
        parts = {"weight": tensor.load()}
        if len(tensor.shape) == 2:
            matrix = parts["weight"].astype(mx.bfloat16)
            made = mx.quantize(matrix, group_size=group_size, bits=bits)
            parts = dict(zip(("weight", "scales", "biases"), made, strict=True))
        for part, array in parts.items():
            tensors[name.replace("weight", part)] = LazyTensor.of(array)
    raw = whole.raw | {"quantization": {"group_size": group_size, "bits": bits}}
    return Checkpoint(raw=raw, tensors=tensors)


FAMILIES = {
    "minicpm": "minicpm_2b_like",
    "minicpm3": "minicpm3_like",
    "llama": "minicpm5_like",  # whose heads are not hidden_size / heads wide
}
MIXED = [Type.F16, Type.Q8_0, Type.Q4_0, Type.Q5_1, Type.BF16, Type.Q4_1, Type.F32, Type.Q5_0]


def as_numbers(file: GgufFile) -> dict[str, np.ndarray]:
    """The weights in a file, as the `gguf` package unpacks them."""
    return {
        name: quants.dequantize(np.array(tensor.raw), Type[tensor.kind]).reshape(tensor.shape)
        for name, tensor in file.tensors.items()
    }


def quantized(source: GgufFile, path: Path, kinds: Iterator[Type]) -> Path:
    """A file with each matrix in the next of `kinds`, rounded by the `gguf` package."""
    writer = gguf.GGUFWriter(path, source.metadata["general.architecture"])
    for key, value in source.metadata.items():
        if key != "general.architecture":
            add(writer, key, value)
    for name, array in as_numbers(source).items():
        kind = next(kinds) if array.ndim == 2 else Type.F32
        if array.shape[-1] % 32 and kind not in (Type.F32, Type.BF16):
            kind = Type.F16
        writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def in_float32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each architecture, with a template and two end tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    model = with_tokenizer(GOLDEN / FAMILIES[request.param], folder / "model")
    raw = json.loads((model / "config.json").read_text()) | {"eos_token_id": [2, 0]}
    (model / "config.json").write_text(json.dumps(raw))
    (model / "chat_template.jinja").write_text("{{ bos_token }}你好{{ messages | tojson }}")
    write_gguf(read_checkpoint(model), model, folder / "m.gguf", "F32")
    return folder / "m.gguf"


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "mixed"])
def test_a_file_is_run_as_the_package_unpacks_it_and_written_byte_for_byte(
    in_float32: Path, kind: str, tmp_path: Path
) -> None:
    kinds = itertools.cycle(MIXED if kind == "mixed" else [Type[kind]])
    first = read_header(quantized(read_header(in_float32), tmp_path / "a.gguf", kinds))
    unpacked = quantized(first, tmp_path / "u.gguf", itertools.repeat(Type.F32))
    folders = tmp_path / "a", tmp_path / "u"
    for folder, path in zip(folders, (first.path, unpacked), strict=True):
        folder.mkdir()
        convert_gguf(path, folder)
    found, wanted = map(logits, folders)
    assert mx.abs(found - wanted).max().item() < 1e-3
    before, after = mm.load_tokenizer(in_float32.parent / "model"), mm.load_tokenizer(folders[0])
    assert before.template
    assert after.template
    assert after.template.source == before.template.source
    for name in ("bos_id", "adds_bos", "eos_ids", "special_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    assert set(before.eos_ids) == {0, 2}
    if kind == "mixed":
        return
    write_gguf(read_checkpoint(folders[0]), folders[0], tmp_path / "b.gguf", kind)
    second = read_header(tmp_path / "b.gguf")
    assert second.metadata.keys() == first.metadata.keys()
    changed = {k for k, v in first.metadata.items() if second.metadata[k] != v}
    assert changed <= {"general.file_type"}
    for name, tensor in first.tensors.items():
        assert second.tensors[name].kind == tensor.kind, name
        assert np.array_equal(second.tensors[name].raw, tensor.raw), name


def test_four_bits_of_mlx_keep_their_codes(model: Path, tmp_path: Path) -> None:
    four = packed(read_checkpoint(model), 4, 32)
    written = write_gguf(four, model, tmp_path / "m.gguf", "Q4_1")
    assert set(written.kinds) == {"Q4_1", "F32"}
    assert written.scale_error < 2**-11  # bfloat16 but for the smallest is float16 as well
    theirs = read_gguf(tmp_path / "m.gguf").tensors
    for name, tensor in four.tensors.items():
        if tensor.dtype == mx.uint32:
            assert mx.array_equal(theirs[name].load(), tensor.load())


def test_the_demo_s_own_source_comes_back_byte_for_byte(demo_folder: Path, tmp_path: Path) -> None:
    source = demo_model.source(resolve("demo"))
    written = write_gguf(read_gguf(source), demo_folder, tmp_path / "d.gguf", "Q4_1")
    assert (written.kept, written.scale_error) == (211, 0)
    before, after = read_header(source).tensors, read_header(tmp_path / "d.gguf").tensors
    assert before.keys() == after.keys()
    assert not [n for n, t in before.items() if not np.array_equal(t.raw, after[n].raw)]


@pytest.mark.slow
def test_the_demo_keeps_its_codes_and_says_how_far_its_scales_moved(
    demo_folder: Path, tmp_path: Path
) -> None:
    """muP's constants were divided out of them; the quotients are no longer float16's."""
    written = write_gguf(read_checkpoint(demo_folder), demo_folder, tmp_path / "d.gguf", "Q4_1")
    assert written.kinds == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert read_header(tmp_path / "d.gguf").tensors["token_embd.weight"].kind == "Q8_0"
    assert written.kept == 211
    assert 0 < written.scale_error < 2**-11


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32), (3, 32)])
def test_other_packings_are_unpacked_and_rounded(
    bits: int, group_size: int, model: Path, tmp_path: Path
) -> None:
    other = packed(read_checkpoint(model), bits, group_size)
    written = write_gguf(other, model, tmp_path / "m.gguf", "Q8_0")
    assert written.kept == 0
    found = changes(other, read_gguf(tmp_path / "m.gguf"))
    assert 0 < max(found) < STEPS["Q8_0"] + 2**-8  # `dense` rounds to bfloat16 here


def test_the_library_s_own_reader_finds_what_was_written(model: Path, tmp_path: Path) -> None:
    write_gguf(read_checkpoint(model), model, tmp_path / "m.gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    ours = read_header(tmp_path / "m.gguf")
    assert {k: v for k, v in found.items() if not k.startswith("GGUF.")} == ours.metadata
    for tensor in reader.tensors:
        assert np.array_equal(
            tensor.data.view(np.uint8).reshape(-1), ours.tensors[tensor.name].raw.reshape(-1)
        )
        assert tuple(tensor.shape[::-1]) == ours.tensors[tensor.name].shape
    assert found["general.architecture"] == "minicpm"
    assert "<用户>" in found["tokenizer.chat_template"]
    assert found["minicpm.embedding_scale"] == 12
    assert found["general.file_type"] == 7
    assert found["general.quantization_version"] == 2


def test_numbers_beyond_float16_and_unknown_kinds_are_refused(model: Path, tmp_path: Path) -> None:
    whole = read_checkpoint(model)
    name = "model.layers.0.mlp.up_proj.weight"
    large = whole.tensors[name]
    huge = type(large)(large.shape, large.dtype, lambda: large.load() * 1e9)
    changed = Checkpoint(raw=whole.raw, tensors=dict(whole.tensors) | {name: huge})
    for kind in ("F16", "Q8_0"):
        with pytest.raises(WeightsError, match=f"{name} has numbers that {kind} cannot hold"):
            write_gguf(changed, model, tmp_path / "m.gguf", kind)
        assert not list(tmp_path.glob("*m.gguf*"))
    write_gguf(changed, model, tmp_path / "m.gguf", "BF16")
    with pytest.raises(InvalidArgumentError, match=r"kind must be one of F32, .*, got 'Q4_K'"):
        write_gguf(changed, model, tmp_path / "m.gguf", "Q4_K")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "io")])
def test_an_interrupted_write_leaves_nothing(
    failure: BaseException, model: Path, tmp_path: Path
) -> None:
    whole = read_checkpoint(model)
    last = list(whole.tensors)[-1]

    def fail() -> mx.array:
        assert (tmp_path / "part-m.gguf").exists()  # others are written by now
        raise failure

    broken = type(whole.tensors[last])(whole.tensors[last].shape, mx.float32, fail)
    changed = Checkpoint(raw=whole.raw, tensors=dict(whole.tensors) | {last: broken})
    (tmp_path / "m.gguf").write_bytes(b"what was there")
    (tmp_path / "part-m.gguf").write_bytes(b"of a process that was killed")
    expected = StorageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_gguf(changed, model, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_a_full_disk_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(StorageError, match=r"m.gguf: cannot be written .*free some space"):
        write_gguf(read_checkpoint(model), model, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*m.gguf*"))


# The Modelfile


def modelfile(folder: Path, tmp_path: Path) -> str:
    written = write_gguf(read_checkpoint(folder), folder, tmp_path / "m.gguf")
    return written.modelfile.read_text(encoding="utf-8")


def test_the_modelfile_of_a_minicpm(model: Path, tmp_path: Path) -> None:
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.02}
    (model / "generation_config.json").write_text(json.dumps(sampling))
    lines = modelfile(model, tmp_path).splitlines()
    assert lines[1] == "FROM ./m.gguf"
    assert lines[2] == (
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}<用户>{{ .Content }}<AI>'
        '{{ else }}{{ .Content }}{{ end }}{{ end }}"""'
    )
    assert lines[3:] == [
        'PARAMETER stop "<用户>"',
        'PARAMETER stop "<AI>"',
        "PARAMETER temperature 0.8",
        "PARAMETER top_p 0.8",
        "PARAMETER repeat_penalty 1.02",
    ]


def test_the_modelfile_of_chatml_and_of_another_template(model: Path, tmp_path: Path) -> None:
    chatml = need_shared("tokenizers", "minicpm4", "tokenizer_config.json")
    template = json.loads(chatml.read_text(encoding="utf-8"))["chat_template"]
    (model / "chat_template.jinja").write_text(template)
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in modelfile(model, tmp_path)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "Modelfile").write_text("FROM mine")  # the user's own, which stays
    written = write_gguf(read_checkpoint(model), model, tmp_path / "m.gguf")
    assert written.modelfile == tmp_path / "m.Modelfile"
    assert 'TEMPLATE "' not in written.modelfile.read_text(encoding="utf-8")
    assert "# No TEMPLATE" in written.modelfile.read_text(encoding="utf-8")
    assert (tmp_path / "Modelfile").read_text() == "FROM mine"


GO_PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var asked struct {
		Template string
		Messages []Message
	}
	json.NewDecoder(os.Stdin).Decode(&asked)
	parsed := template.Must(template.New("").Parse(asked.Template))
	parsed.Execute(os.Stdout, map[string]any{"Messages": asked.Messages})
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
@pytest.mark.parametrize("name", GO)
def test_the_templates_in_go_write_what_ours_do(name: str, tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    program = tmp_path / "program"
    subprocess.run(["go", "build", "-o", program, tmp_path / "main.go"], check=True)
    turns = [("user", "你好"), ("assistant", "A\nB"), ("user", "再见")]
    more = [{"role": role, "content": content} for role, content in turns]
    for messages in [*PROBES, more]:
        said = [{"Role": m["role"], "Content": m["content"]} for m in messages]
        asked = json.dumps({"Template": GO[name], "Messages": said})
        done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
        assert done.stdout == Template(BUILTIN[name]).render(messages)
