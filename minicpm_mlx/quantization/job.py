"""The work of quantizing: layer by layer, each kept on the disk as it is done.

A job that was interrupted finds what it had done and goes on; memory holds a layer, not a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import WeightsError
from ..files.atomic import write_whole
from ..model.config_sections import Quantization
from ..model.transformer import Block
from ..weights import safetensors
from ..weights.checkpoint import Checkpoint
from ..weights.lazy_tensor import LazyTensor
from ..weights.load import parameters
from . import awq, dwq, sensitivity
from .bit_allocation import (
    Costs,
    Plan,
    allocate,
    sizes,
    stated,
    uniform,
)
from .layerwise import (
    LayerRun,
    Pieces,
    dense,
    products,
)
from .recipe import Recipe
from .rounding import SCALES, by_gptq, module, round_gptq, round_nearest, to_nearest

FEWER = 3
"""One in so many texts says how sensitive matrices are: their sums need less than rounding does."""

Progress = Callable[[str], object]


class Job:
    """One checkpoint to be made smaller by one recipe, in a folder for what is done."""

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        texts: Sequence[Sequence[int]],
        folder: Path,
        progress: Progress = lambda _: None,
    ):
        self.source, self.recipe, self.texts = source, recipe, texts
        self.folder, self.progress = folder, progress
        self.pieces = Pieces(source)
        self._hessian: LazyTensor | None = None  # of the embedding, as first layer and as head

    def run(self) -> Checkpoint:
        """The smaller checkpoint; its tensors are read from the folder when they are loaded."""
        plan = self.plan()
        layers = self.source.config.num_hidden_layers
        run, xs = None, list[mx.array]()
        if self.recipe.calibrated:
            run, xs = self.pieces.runner(len(self.texts[0])), self.pieces.start(self.texts)
        found: dict[str, LazyTensor] = {}
        for number in range(layers):
            prefix = f"model.layers.{number}."
            inside = {
                path.removeprefix(prefix): how
                for path, how in plan.items()
                if path.startswith(prefix)
            }
            part = self._part(f"layer-{number:04d}", partial(self._layer, number, inside, run, xs))
            found |= {prefix + name: tensor for name, tensor in part.items()}
            if run is not None:
                block = _filled(Block(self.source.config), part, inside)
                xs = [run(block, x) for x in xs]
                mx.eval(xs)
            mx.clear_cache()  # freed buffers of all shapes add up
            self.progress(f"layer {number + 1} of {layers}")
        outside = {path: how for path, how in plan.items() if "layers." not in path}
        found |= self._part("ends", partial(self._ends, outside, xs))
        raw = dict(self.source.raw) | {"quantization": stated(plan), "torch_dtype": "float16"}
        raw.pop("quantization_config", None)  # mlx-lm's second copy
        smaller = Checkpoint(raw=raw, tensors=found)
        if self.recipe.method == "dwq":
            found |= self._part("learned", partial(self._learned, smaller))
        return smaller

    def plan(self) -> Plan:
        """How each matrix is packed."""
        if self.recipe.method != "mixed":
            return uniform(self.source, self.recipe.packing)
        return allocate(self._costs(), sizes(self.source), self.recipe.target)

    def _costs(self) -> Costs:
        found, self._hessian = sensitivity.costs(
            self.pieces,
            self.texts[: max(1, len(self.texts) // FEWER)],
            seed=self.recipe.seed,
            parts=self._part,
            progress=self.progress,
        )
        return found

    def _learned(self, smaller: Checkpoint) -> dict[str, mx.array]:
        found = dwq.learned(
            self.source, smaller, self.texts, seed=self.recipe.seed, progress=self.progress
        )
        return {name: _kept(array) for name, array in found.items()}

    def _part(self, name: str, make: Callable[[], Mapping[str, mx.array]]) -> dict[str, LazyTensor]:
        """Arrays kept in a file of that name; `make` makes them if there is none."""
        path = self.folder / f"{name}.safetensors"
        with suppress(WeightsError):  # not there yet, or cut off by a machine that went down
            return safetensors.read(path)
        arrays = dict(make())
        write_whole(path, lambda part: mx.save_safetensors(str(part), arrays))
        return safetensors.read(path)

    def _layer(
        self, number: int, plan: Plan, run: LayerRun | None, xs: list[mx.array]
    ) -> dict[str, mx.array]:
        block = self.pieces.layer(number)
        if run is None:
            round_nearest(block, plan)
        elif self.recipe.method == "awq":
            awq.rescale(block, plan, run, xs)
            round_nearest(block, plan)
        else:
            round_gptq(block, plan, run, xs)
        return {name: _kept(array) for name, array in parameters(block).items()}

    def _ends(self, plan: Plan, xs: list[mx.array]) -> dict[str, mx.array]:
        """What comes before the first layer and after the last."""
        names = [name for name in self.source.tensors if "layers." not in name]
        found = {name: _kept(self.pieces[name]) for name in names if name.endswith("norm.weight")}
        tied = self.source.config.tie_word_embeddings
        for path in ["model.embed_tokens"] + ["lm_head"] * (not tied):
            weight = self.pieces[f"{path}.weight"]
            if path not in plan:
                found[f"{path}.weight"] = _kept(weight)
                continue
            layer = self._outer(path, weight, plan[path], xs)
            found |= {f"{path}.{name}": array for name, array in parameters(layer).items()}
            self.progress("head" if path == "lm_head" else "embedding")
        return found

    def _outer(
        self, path: str, weight: mx.array, packing: Quantization, xs: list[mx.array]
    ) -> nn.Module:
        """The embedding or the head, packed."""
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = weight
        if self.recipe.method in ("rtn", "awq"):
            return module(layer, to_nearest(weight, packing), packing)
        if path == "model.embed_tokens" and self._hessian is not None:
            hessian = self._hessian.load()
        elif path == "lm_head" or self.source.config.tie_word_embeddings:
            hessian = sum((products(self.pieces.finish(x)) for x in xs), mx.array(0.0))
        else:  # looked up, a row at a time
            hessian = mx.eye(weight.shape[1])
        return module(layer, by_gptq(weight, np.array(hessian), packing), packing)


def _kept(array: mx.array) -> mx.array:
    """As it is written: floats in the format of the scales, so that all of a model's agree."""
    return array.astype(SCALES) if array.dtype == mx.float32 else array


def _filled(block: Block, part: Mapping[str, LazyTensor], plan: Plan) -> Block:
    """`block` as it will be, with packed matrices unpacked."""
    block.load_weights([(name, dense(name, part, plan)) for name in parameters(block)])
    mx.eval(block.parameters())
    return block
