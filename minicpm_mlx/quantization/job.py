"""Quantization of a checkpoint layer by layer; each finished layer is kept on disk.

An interrupted job continues from the layers it finds. Memory holds a layer, not a model.
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
from .bit_allocation import Costs, Plan, allocate, quantization_section, sizes, uniform
from .layerwise import LayerReader, LayerRun, dense, products
from .recipe import Recipe
from .rounding import SCALES, by_gptq, module, round_gptq, round_nearest, to_nearest

FEWER = 3
"""Sensitivities are measured on a third of the texts: their sums need fewer than rounding does."""

Progress = Callable[[str], object]


class Job:
    """Quantizes one checkpoint by one recipe; `folder` keeps finished parts."""

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
        self.reader = LayerReader(source)
        self._hessian: LazyTensor | None = None  # of the embedding, as first layer and as head

    def run(self) -> Checkpoint:
        """The quantized checkpoint; its tensors are read from the folder when loaded."""
        plan = self.plan()
        layers = self.source.config.num_hidden_layers
        run, xs = None, list[mx.array]()
        if self.recipe.calibrated:
            run, xs = self.reader.runner(len(self.texts[0])), self.reader.start(self.texts)
        tensors: dict[str, LazyTensor] = {}
        for number in range(layers):
            prefix = f"model.layers.{number}."
            inside = {
                path.removeprefix(prefix): packing
                for path, packing in plan.items()
                if path.startswith(prefix)
            }
            layer = self._part(f"layer-{number:04d}", partial(self._layer, number, inside, run, xs))
            tensors |= {prefix + name: tensor for name, tensor in layer.items()}
            if run is not None:
                # The next layer is calibrated on the output of the rounded one, as in GPTQ.
                block = _filled(Block(self.source.config), layer, inside)
                xs = [run(block, x) for x in xs]
                mx.eval(xs)
            mx.clear_cache()  # MLX keeps freed buffers, and those of many shapes add up
            self.progress(f"layer {number + 1} of {layers}")
        outside = {path: packing for path, packing in plan.items() if "layers." not in path}
        tensors |= self._part("ends", partial(self._ends, outside, xs))
        quantization = quantization_section(plan)
        raw = self.source.raw | {"quantization": quantization, "torch_dtype": "float16"}
        raw.pop("quantization_config", None)  # mlx-lm's second copy
        smaller = Checkpoint(raw=raw, tensors=tensors)
        if self.recipe.method == "dwq":
            tensors |= self._part("learned", partial(self._learned, smaller))
        return smaller

    def plan(self) -> Plan:
        if self.recipe.method != "mixed":
            return uniform(self.source, self.recipe.packing)
        return allocate(self._costs(), sizes(self.source), self.recipe.target)

    def _costs(self) -> Costs:
        costs, self._hessian = sensitivity.costs(
            self.reader,
            self.texts[: max(1, len(self.texts) // FEWER)],
            seed=self.recipe.seed,
            parts=self._part,
            progress=self.progress,
        )
        return costs

    def _learned(self, smaller: Checkpoint) -> dict[str, mx.array]:
        arrays = dwq.learn_scales(
            self.source, smaller, self.texts, seed=self.recipe.seed, progress=self.progress
        )
        return {name: _as_stored(array) for name, array in arrays.items()}

    def _part(self, name: str, make: Callable[[], Mapping[str, mx.array]]) -> dict[str, LazyTensor]:
        """Arrays of the file `name`; `make` computes them if there is none."""
        path = self.folder / f"{name}.safetensors"
        with suppress(WeightsError):  # missing, or cut off when the machine went down
            return safetensors.read(path)
        arrays = dict(make())
        write_whole(path, lambda part: mx.save_safetensors(str(part), arrays))
        return safetensors.read(path)

    def _layer(
        self, number: int, plan: Plan, run: LayerRun | None, xs: list[mx.array]
    ) -> dict[str, mx.array]:
        block = self.reader.layer(number)
        if run is None:
            round_nearest(block, plan)
        elif self.recipe.method == "awq":
            awq.rescale(block, plan, run, xs)
            round_nearest(block, plan)
        else:
            round_gptq(block, plan, run, xs)
        return {name: _as_stored(array) for name, array in parameters(block).items()}

    def _ends(self, plan: Plan, xs: list[mx.array]) -> dict[str, mx.array]:
        """The parameters outside the layers: embedding, last norm and head."""
        names = [name for name in self.source.tensors if "layers." not in name]
        norms = [name for name in names if name.endswith("norm.weight")]
        arrays = {name: _as_stored(self.reader[name]) for name in norms}
        tied = self.source.config.tie_word_embeddings
        for path in ["model.embed_tokens"] + ["lm_head"] * (not tied):
            weight = self.reader[f"{path}.weight"]
            if path not in plan:
                arrays[f"{path}.weight"] = _as_stored(weight)
                continue
            layer = self._outer(path, weight, plan[path], xs)
            arrays |= {f"{path}.{name}": array for name, array in parameters(layer).items()}
            self.progress("head" if path == "lm_head" else "embedding")
        return arrays

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
            hessian = sum((products(self.reader.finish(x)) for x in xs), mx.array(0.0))
        else:  # an embedding is looked up: inputs are one-hot, and columns do not interact
            hessian = mx.eye(weight.shape[1])
        return module(layer, by_gptq(weight, np.array(hessian), packing), packing)


def _as_stored(array: mx.array) -> mx.array:
    """Floats in the format of the scales, so that all floats of a model agree."""
    return array.astype(SCALES) if array.dtype == mx.float32 else array


def _filled(block: Block, part: Mapping[str, LazyTensor], plan: Plan) -> Block:
    """`block` with the rounded parameters, unpacked."""
    block.load_weights([(name, dense(name, part, plan)) for name in parameters(block)])
    mx.eval(block.parameters())
    return block
