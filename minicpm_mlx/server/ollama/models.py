"""Names, sizes and settings of the models, in Ollama's form."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from ...lm.fingerprint import fingerprint
from ...memory import parameter_count
from ...weights.load import parameters
from ..reply_stream import ServedModel
from ..service import Service

_NEVER = "9999-12-31T23:59:59Z"
"""The expiry of a model that stays in memory."""


def timestamp(seconds: float) -> str:
    """A Unix time in Ollama's form."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _tagged_name(served: ServedModel) -> str:
    """A name with a tag, which Ollama's clients expect."""
    return served.name if ":" in served.name else f"{served.name}:latest"


class OllamaModels:
    """Describes the models of a service."""

    def __init__(self, service: Service):
        self.service = service

    def tags(self) -> list[dict[str, Any]]:
        """For /api/tags."""
        return [self._entry(served) for served in self.service.models]

    def ps(self) -> list[dict[str, Any]]:
        """For /api/ps: all are in memory, and stay there."""
        memory = {
            "expires_at": _NEVER,
            "size_vram": self._size,
            "context_length": self.service.context_length,
        }
        return [self._entry(served) | memory for served in self.service.models]

    def show(self, served: ServedModel) -> dict[str, Any]:
        """For /api/show."""
        template = self.service.lm.tokenizer.template
        return {
            "license": self.service.lm.card.licence,
            "modelfile": self._modelfile(served),
            "parameters": "\n".join(f"{name:<30} {value}" for name, value in self._settings()),
            "template": template.source if template else "{{ prompt }}",
            "details": self._details,
            "model_info": self._info,
            "capabilities": self._capabilities(),
            "modified_at": timestamp(self.service.created),
        }

    def _capabilities(self) -> list[str]:
        tokenizer = self.service.lm.tokenizer
        return [
            "completion",
            *["tools"] * tokenizer.takes_tools,
            *["thinking"] * (tokenizer.thinking is not None),
        ]

    def _entry(self, served: ServedModel) -> dict[str, Any]:
        return {
            "name": _tagged_name(served),
            "model": _tagged_name(served),
            "modified_at": timestamp(self.service.created),
            "size": self._size,
            "digest": hashlib.sha256(f"{self._identity} {served.name}".encode()).hexdigest(),
            "details": self._details,
        }

    @cached_property
    def _identity(self) -> str:
        return fingerprint(self.service.lm)

    @cached_property
    def _size(self) -> int:
        """Bytes of the weights in memory."""
        return sum(array.nbytes for array in parameters(self.service.lm.model).values())

    @property
    def _family(self) -> str:
        return "llama" if self.service.lm.config.scale_depth is None else "minicpm"

    @cached_property
    def _details(self) -> dict[str, Any]:
        count = parameter_count(self.service.lm.config)
        return {
            "parent_model": "",
            "format": "mlx",
            "family": self._family,
            "families": [self._family],
            "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M",
            "quantization_level": self._quantization_level(),
        }

    def _quantization_level(self) -> str:
        if packing := self.service.lm.config.quantization:
            return f"Q{packing.bits}"
        sizes = {array.dtype.size for array in parameters(self.service.lm.model).values()}
        return f"F{8 * max(sizes)}"

    @cached_property
    def _info(self) -> dict[str, Any]:
        config, family = self.service.lm.config, self._family
        return {
            "general.architecture": family,
            "general.basename": self.service.models[0].name,
            "general.parameter_count": parameter_count(config),
            f"{family}.context_length": self.service.context_length,
            f"{family}.embedding_length": config.hidden_size,
            f"{family}.block_count": config.num_hidden_layers,
            f"{family}.feed_forward_length": config.intermediate_size,
            f"{family}.attention.head_count": config.num_attention_heads,
            f"{family}.attention.head_count_kv": config.num_key_value_heads,
            f"{family}.rope.freq_base": config.rope_theta,
            f"{family}.vocab_size": config.vocab_size,
        }

    def _settings(self) -> list[tuple[str, str]]:
        """The model's default sampling and stop strings, with Ollama's names."""
        sampling = self.service.lm.sampling
        settings = [
            ("temperature", str(sampling.temperature)),
            ("top_p", str(sampling.top_p)),
            ("top_k", str(sampling.top_k)),
            ("min_p", str(sampling.min_p)),
            ("repeat_penalty", str(sampling.repetition_penalty)),
        ]
        template = self.service.lm.tokenizer.template
        stops = template.stop_strings if template else ()
        return [*settings, *(("stop", json.dumps(stop, ensure_ascii=False)) for stop in stops)]

    def _modelfile(self, served: ServedModel) -> str:
        lines = [f"FROM {self.service.models[0].name}"]
        lines += [f"ADAPTER {served.adapter}"] if served.adapter else []
        return "\n".join(lines + [f"PARAMETER {name} {value}" for name, value in self._settings()])
