"""Merges an adapter into a checkpoint's weights, and checks that the change survives rounding.

With weights of few bits, a change smaller than a step of their grid can vanish, and the rounding of
all other weights can drown it. So the merged model is compared, on a text, with the base that has
the adapter on top of it, and it is written only if it is clearly nearer to that than the base is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import printable
from ..engine import LanguageModel
from ..engine.scoring.perplexity import score
from ..errors import InvalidArgumentError, WeightsError
from ..files.atomic import check_writable, make_whole
from ..lm.lm import LM
from ..loading.adapters import fit_adapter
from ..loading.load import load
from ..loading.store import folder_of
from ..model.adapters import Adapter, LoRADelta, locate_deltas
from ..model.config_sections import Quantization
from ..model.packing import unpack
from ..model.transformer import Model
from ..model_cards import resolve
from ..quantization.repack import repack
from ..weights import load_model
from ..weights.adapters import read_adapter
from ..weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..weights.companion_files import copy_companion_files
from ..weights.lazy_ops import dense_dtype, packed_parts, unpacked
from ..weights.lazy_tensor import LazyTensor, dtype_name
from ..weights.llama_format import fold_logits

LOST = 0.5
"""Share of the adapter's own divergence above which the merged model's counts as a loss. At 1 the
base without the adapter would be as near; half leaves a margin for the choice of text."""

NEGLIGIBLE = 1e-5
"""Divergence, in nats a token, that 16-bit arithmetic causes by itself."""

LENGTH = 512
"""Most tokens of a text that are compared; their logits are held in memory."""

TALK = (
    "What is the capital of France, and what is it known for?",
    "The capital of France is Paris. It is known for the Eiffel Tower, the Louvre and its cafés.",
    "Write a Python function that adds two numbers.",
    "def add(a, b):\n    return a + b",
    "山东省最高的山是哪座山？它比黄山高还是矮？",
    "山东省最高的山是泰山，主峰海拔1532.7米。黄山主峰海拔1864.8米，所以泰山比黄山矮。",
)
"""The conversation to check on by default: questions, each with its answer."""


@dataclass(frozen=True, kw_only=True)
class MergeCheck:
    """How much of an adapter's change is in the merged weights."""

    tokens: int
    """Predicted tokens."""
    kl: float
    """Mean divergence of the merged model from the base with the adapter on, in nats a token."""
    kl_base: float
    """Divergence of the base without the adapter: the size of the adapter's change."""

    @property
    def lost(self) -> bool:
        """Whether the change was lost; also where the divergence is NaN."""
        return not self.kl <= max(LOST * self.kl_base, NEGLIGIBLE)

    @property
    def unknown(self) -> bool:
        """Whether the adapter changes too little to tell how much of it survived."""
        return self.kl_base < NEGLIGIBLE


def fuse_adapter(
    source: str | Path,
    folder: str | Path,
    adapter: str | Path,
    *,
    text: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> MergeCheck:
    """Write to `folder`, which must not exist, `source` with `adapter` in its weights.

    `source` is what `load` takes, in the bits it has there; `text` (by default a few sentences in
    English and Chinese) is what the change is checked on. `dequantize` writes the changed matrices
    dense. Without `force`, InvalidArgumentError where the change did not survive; also raises what
    `load` and `use_adapter` raise, and StorageError where `folder` cannot be written.

        fuse_adapter("minicpm-2b-dpo", "tuned", "adapters")
    """
    target = Path(folder)
    if target.exists():
        raise InvalidArgumentError(f"{target} exists; give a folder that does not")
    check_writable(target, "give another folder")
    card = resolve(str(source))
    changes = read_adapter(Path(adapter).expanduser())
    origin = folder_of(card)
    base = read_checkpoint(origin, card.file if card.repo else None)
    changes = fit_adapter(changes, base.config, card)
    fused = fold_logits(merged(base, changes, dequantize=dequantize))
    progress("the adapter on the base")
    ids, truth, kl_base = _expected(source, adapter, text, fuse=not base.config.num_experts)
    checks: list[MergeCheck] = []

    def make(partial_folder: Path) -> None:
        progress("merging")
        write_checkpoint(fused, partial_folder, progress=progress)
        for_mlx_lm = "quantization" in fused.raw  # nothing else reads packed folders
        copy_companion_files(origin, partial_folder, card, for_mlx_lm=for_mlx_lm)
        progress("checking")
        model = load_model(partial_folder, fuse=not base.config.num_experts)
        kl = score(model, ids, context=len(ids), reference=truth).kl
        checks.append(MergeCheck(tokens=len(ids) - 1, kl=_known(kl), kl_base=kl_base))
        if checks[0].lost and not force:
            raise InvalidArgumentError(_refusal(target, checks[0], base, dequantize))

    make_whole(target, make, "give another folder")
    return checks[0]


def merged(checkpoint: Checkpoint, adapter: Adapter, *, dequantize: bool = False) -> Checkpoint:
    """`checkpoint` with `adapter` in its weights; each matrix is computed in float32 when loaded.

    A matrix keeps its float type or its bits. With `dequantize`, packed matrices that change become
    dense, in the float type of their scales; mlx-lm, like this library, takes a matrix without
    scales for dense. WeightsError if the adapter does not fit.
    """
    config = checkpoint.config
    locate_deltas(Model(config), adapter)  # MLX makes none of its weights
    packings = checkpoint.packings
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        delta = adapter.deltas.get(module)
        if delta is None or part == "bias":
            tensors[name] = tensor
        elif part == "weight":
            parts = packed_parts(checkpoint.tensors, module)
            change = DeltaMerge(delta, f"{adapter.folder}: {printable(module)}")
            changed = _matrix(parts, packings.get(module), change, dequantize)
            tensors |= {f"{module}.{part}": tensor for part, tensor in changed.items()}
    return Checkpoint(raw=_raw(checkpoint, tensors), tensors=tensors)


@dataclass(frozen=True)
class DeltaMerge:
    """Merges an adapter's delta into one matrix."""

    delta: LoRADelta
    name: str
    """Adapter and module, for messages."""

    def __call__(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """The changed matrix (out, in), in float32; WeightsError if `dtype` cannot hold it."""
        delta = self.delta
        whole = weight.astype(mx.float32) + (delta.a @ delta.b).T
        if delta.magnitude is not None:
            whole = whole * (delta.magnitude / mx.linalg.norm(whole, axis=1))[:, None]
        if not mx.isfinite(whole.astype(dtype)).all().item():
            raise WeightsError(
                f"{self.name}: merged, its numbers are infinite or NaN; expected an adapter whose "
                f"change fits {dtype_name(dtype)}"
            )
        return whole


def _matrix(
    parts: Mapping[str, LazyTensor],
    packing: Quantization | None,
    change: DeltaMerge,
    dequantize: bool,
) -> dict[str, LazyTensor]:
    """The changed matrix's tensors by part, computed when they are loaded."""
    weight = parts["weight"]
    if packing is None:
        return {"weight": _dense(weight.shape, weight.dtype, weight.load, change)}
    dtype = dense_dtype(parts)
    if dequantize:
        dense = unpacked(parts, packing)
        return {"weight": _dense(dense.shape, dtype, dense.load, change)}

    def repacked() -> dict[str, mx.array]:
        old = {part: tensor.load() for part, tensor in parts.items()}
        return repack(change(unpack(old, packing), dtype), old, packing)

    joint = JointTensors(repacked)
    return {
        part: LazyTensor(tensor.shape, tensor.dtype, partial(joint.take, part))
        for part, tensor in parts.items()
    }


def _dense(
    shape: tuple[int, ...], dtype: mx.Dtype, load: Callable[[], mx.array], change: DeltaMerge
) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: change(load(), dtype).astype(dtype))


class JointTensors:
    """Tensors computed together and taken one by one; none is kept once taken."""

    def __init__(self, compute: Callable[[], dict[str, mx.array]]):
        self._compute = compute
        self._left: dict[str, mx.array] = {}

    def take(self, part: str) -> mx.array:
        if part not in self._left:
            self._left = self._compute()
        return self._left.pop(part)


def _raw(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """config.json without the packings of matrices that have become dense."""
    raw = dict(checkpoint.raw)
    packings = raw.get("quantization")
    if packings is None:
        return raw
    raw.pop("quantization_config", None)  # mlx-lm's second copy
    raw["quantization"] = {
        key: value
        for key, value in packings.items()
        if f"{key}.scales" not in checkpoint.tensors or f"{key}.scales" in tensors
    }
    if not any(name.endswith(".scales") for name in tensors):
        del raw["quantization"]
    return raw


class RecordedLogits:
    """Stands in for a model that has read one text: returns the logits it computed then."""

    adapter: str | None = None

    def __init__(self, model: LanguageModel, ids: Sequence[int]):
        self.config = model.config
        self._logits = model.logits(model.hidden(mx.array([ids])))
        mx.eval(self._logits)

    def hidden(
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array:
        return self._logits

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden


def _expected(
    source: str | Path, adapter: str | Path, text: str | None, *, fuse: bool
) -> tuple[list[int], RecordedLogits, float]:
    """The ids to check on, the logits of the base with the adapter, and the divergence without it.

    The base is out of memory afterwards, so that the merged model can be loaded.
    """
    lm = load(source, fuse=fuse, adapter=adapter, progress=False)
    ids = _ids(lm, text)
    truth = RecordedLogits(lm.model, ids)
    lm.use_adapter(None)
    kl = score(lm.model, ids, context=len(ids), reference=truth).kl
    del lm
    gc.collect()
    mx.clear_cache()
    return ids, truth, _known(kl)


def _ids(lm: LM, text: str | None) -> list[int]:
    if text is not None:
        ids = lm.tokenizer.encode(text)
    elif lm.tokenizer.template is None:
        ids = lm.tokenizer.encode("\n".join(TALK))
    else:
        roles = ("user", "assistant") * (len(TALK) // 2)
        messages = [{"role": r, "content": c} for r, c in zip(roles, TALK, strict=True)]
        ids = lm.tokenizer.chat_ids(messages, add_generation_prompt=False)
    if len(ids) < 2:
        raise InvalidArgumentError(f"expected a text of two tokens or more, got {len(ids)}")
    return ids[: min(LENGTH, lm.context_length)]


def _known(kl: float | None) -> float:
    assert kl is not None, "score() was given a reference"
    return kl


def _refusal(target: Path, check: MergeCheck, base: Checkpoint, dequantize: bool) -> str:
    packed = base.config.quantization is not None and not dequantize
    ways = "--dequantize (dequantize=True) writes the changed matrices dense, " if packed else ""
    return (
        f"{target}: not written, for the adapter's change was lost in rounding: the merged model "
        f"is {check.kl:.6f} nats a token from the base with the adapter on it, and the base "
        f"without it {check.kl_base:.6f}; expected at most {LOST:.0%} of that. {ways}--force "
        "(force=True) writes it all the same; or merge into a base of more bits"
    )
