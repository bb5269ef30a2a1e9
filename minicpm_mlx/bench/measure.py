"""Measures speed, in llama-bench's terms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..device import available_memory
from ..doctor import examine
from ..engine import Batch, LanguageModel, PromptLookup, Sampling, Session, Speculation, generate
from ..errors import InvalidArgumentError
from ..memory import parameter_count
from .chips import GB
from .machine import commit, power, thermal

PASSAGE = (
    "The old lighthouse keeper climbed the narrow stairs every evening, lit the great lamp, and "
    "watched the ships pass slowly along the rocky coast until the sun came up again. In winter "
    "the storms came in from the west, and the waves broke over the rocks so high that the windows "
    "of the lamp room were white with salt by the morning."
)

WARM_TOKENS = 16
"""Last tokens of the prompt that are read for a warm first token."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One measurement: reads a prompt, generates tokens, or both, in `batch` streams."""

    prompt: int = 0
    gen: int = 0
    depth: int = 0
    """Tokens in the cache before, not timed."""
    batch: int = 1
    copy: bool = False
    """Generate by quoting a text, where speculation saves passes."""
    guess: bool = False
    """Decode speculatively."""
    first: str | None = None
    """"cold" or "warm": seconds to the first token of a prompt, of which the cache holds nothing
    or all but WARM_TOKENS."""

    @property
    def name(self) -> str:
        generated = f"{'copy' if self.copy else 'tg'}{self.gen}"
        parts = (f"pp{self.prompt}" * bool(self.prompt), generated * bool(self.gen))
        name = "+".join(filter(None, parts))
        if self.first:
            name = f"first token {self.first}, {name}"
        name += " guessing ahead" * self.guess
        name += f" @ d{self.depth}" if self.depth else ""
        return f"{name} x{self.batch}" if self.batch > 1 else name


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model to measure, with facts for the rows."""

    name: str
    model: Any
    load_s: float | None = None
    kv_bits: int | None = None
    bandwidth: float | None = None
    """GB/s of this machine's memory, if known."""
    quote: Sequence[int] = ()
    """A prompt that asks to quote a text, if the model has a tokenizer."""

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, mx.array]:
        arrays: Any = tree_flatten(self.model.parameters())
        return dict(arrays)

    def read(self, batch: int = 1) -> float:
        """Bytes of weights read by a pass of one token in each of `batch` streams.

        Excludes an embedding that is not the head too, and experts without a token. A token is
        routed to k of E experts; those of several tokens are assumed to be independent.
        """
        config = self.model.config
        used_experts = 1.0
        if config.num_experts:
            used_experts -= (1 - config.num_experts_per_tok / config.num_experts) ** batch
        arrays = self._arrays().items()
        read = {n: a for n, a in arrays if config.tie_word_embeddings or "embed_tokens" not in n}
        # Arrays of three dimensions hold the stacked experts of a layer.
        return sum(a.nbytes * (used_experts if a.ndim == 3 else 1) for a in read.values())


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row: the work, the seconds of its repetitions, and use of the memory."""

    work: Work
    seconds: list[float]
    peak_memory: int
    """Most bytes that MLX held during the measurement."""
    bytes_per_token: float | None = None
    """Bytes of weights, keys and values read in a decode step, where tokens are generated one by
    one; with batch > 1 a step generates a token for each stream."""
    bandwidth: float | None = None
    test_time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def tokens(self) -> int:
        return (self.work.prompt + self.work.gen) * self.work.batch

    @property
    def rates(self) -> list[float]:
        """Tokens a second, by repetition."""
        return [self.tokens / s for s in self.seconds]

    @property
    def roofline(self) -> float | None:
        """Share of the memory's bandwidth used."""
        if self.bytes_per_token is None or self.bandwidth is None:
            return None
        steps = statistics.mean(self.rates) / self.work.batch
        return steps * self.bytes_per_token / (self.bandwidth * GB)

    def row(self) -> dict[str, Any]:
        """The row as flat fields, with llama-bench's names where it has them."""
        work, seconds, rates = self.work, self.seconds, self.rates
        return {
            "test": work.name,
            "n_prompt": work.prompt,
            "n_gen": work.gen,
            "n_depth": work.depth,
            "n_parallel": work.batch,
            "first_token": work.first,
            "copy": work.copy,
            "guess": work.guess,
            "test_time": self.test_time,
            "avg_ns": round(statistics.mean(seconds) * 1e9),
            "stddev_ns": round(_deviation(seconds) * 1e9),
            "avg_ts": round(statistics.mean(rates), 3),
            "stddev_ts": round(_deviation(rates), 3),
            "samples_ns": [round(s * 1e9) for s in seconds],
            "samples_ts": [round(rate, 3) for rate in rates],
            "peak_memory": self.peak_memory,
            "bytes_per_token": self.bytes_per_token and round(self.bytes_per_token),
            "roofline": self.roofline and round(self.roofline, 4),
        }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def works(
    *,
    prompts: Sequence[int] = (512,),
    gens: Sequence[int] = (128,),
    pairs: Sequence[tuple[int, int]] = (),
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    first: bool = False,
    guess: bool = False,
) -> list[Work]:
    """All combinations, as in llama-bench, without zeros.

    InvalidArgumentError where none is left, or a prompt is too short for a warm first token.
    """
    if first and any(0 < n <= WARM_TOKENS for n in prompts):
        raise InvalidArgumentError(
            f"a warm first token reads the last {WARM_TOKENS} tokens of a prompt again; expected "
            f"prompts of more, got {', '.join(map(str, prompts))}"
        )
    work: list[Work] = []
    for depth in depths:
        for batch in batches:
            decodes = [Work(gen=n, depth=depth, batch=batch) for n in gens if n]
            if batch == 1 or not depth:  # streams of a batch begin with their prompts
                work += [Work(prompt=n, depth=depth, batch=batch) for n in prompts if n]
                decodes += [Work(prompt=p, gen=g, depth=depth, batch=batch) for p, g in pairs]
            work += decodes
    if first:
        work += [Work(prompt=n, first=kind) for n in prompts if n for kind in ("cold", "warm")]
    if guess:
        work += [Work(gen=n, copy=True, guess=on) for n in gens if n for on in (False, True)]
    if not work:
        raise InvalidArgumentError(
            "nothing is to be measured; give a length above 0 to read (at a depth, of one stream) "
            "or to generate"
        )
    return work


def measure(
    subject: MeasuredModel, todo: Sequence[Work], *, repetitions: int = 5, warmup: bool = True
) -> Iterator[Measurement]:
    """Measures each item of work, on random tokens; yields the rows as they are done.

    InvalidArgumentError where the keys and values do not fit in memory.
    """
    per_context = _cache_bytes(subject)
    longest = max((w.depth + w.prompt + w.gen) * w.batch for w in todo)
    if (needed := longest * per_context) > (free := available_memory()):
        raise InvalidArgumentError(
            f"not enough memory: {longest} tokens of context take {needed / GB:.1f} GB of cache, "
            f"{free / GB:.1f} GB free; give smaller depths, lengths or batches"
        )
    for work in todo:
        if warmup:
            _seconds(subject, work)
        mx.reset_peak_memory()
        seconds = [_seconds(subject, work) for _ in range(repetitions)]
        per_token = None
        if work.gen and not work.prompt and not work.copy:
            depth = work.depth + work.gen / 2
            per_token = subject.read(work.batch) + per_context * depth * work.batch
        yield Measurement(
            work=work,
            seconds=seconds,
            peak_memory=mx.get_peak_memory(),
            bytes_per_token=per_token,
            bandwidth=subject.bandwidth,
        )


def _seconds(subject: MeasuredModel, work: Work) -> float:
    model = subject.model
    if work.batch > 1:
        return _batch_seconds(model, work)
    session = Session(model.config, subject.kv_bits)
    text = subject.quote if work.copy else _ids(model, work.depth + (work.prompt or 1), 1)
    cached = work.depth + (work.prompt - WARM_TOKENS if work.first == "warm" else 0)
    if cached:
        for _ in generate(model, text[:cached], max_tokens=1, session=session):
            pass
    speculation = Speculation(PromptLookup()) if work.guess else None
    stream = generate(
        model, text, max_tokens=1 + work.gen, session=session, speculation=speculation
    )
    if not work.prompt:  # the first token belongs to the prompt
        next(stream)
    mx.synchronize()
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def _batch_seconds(model: LanguageModel, work: Work) -> float:
    batch = Batch(model, width=work.batch)
    for number in range(work.batch):
        ids = _ids(model, work.depth + (work.prompt or 1), number)
        batch.add(ids, max_tokens=1 + work.gen, sampling=Sampling())
    try:
        tokens = batch.tokens()
        if not work.prompt:
            next(tokens)
        start = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - start
    finally:
        batch.close()


def _ids(model: LanguageModel, count: int, seed: int) -> list[int]:
    if not count:
        return []
    key = mx.random.key(seed)
    ids = mx.random.randint(0, model.config.vocab_size, (count,), key=key)
    return ids.tolist()  # type: ignore[return-value]


def _cache_bytes(subject: MeasuredModel) -> float:
    """Bytes of keys and values for a token of context."""
    session = Session(subject.model.config, subject.kv_bits)
    next(session.prefill(subject.model, [1], length=1, chunk=1))
    arrays = [a for c in session.cache for a in (*c.used(c.keys), *c.used(c.values))]
    return float(sum(array.nbytes for array in arrays))


def environment(subject: MeasuredModel) -> dict[str, Any]:
    """Facts that all rows share."""
    facts = examine()
    names = ("minicpm-mlx", "mlx", "mlx-lm", "python", "system", "chip", "device", "blas")
    return {
        **{name.replace("-", "_"): facts[name] for name in (*names, "memory_bytes")},
        "build_commit": commit(),
        "power": power(),
        "thermal": thermal(),
        "model": subject.name,
        "model_size": subject.size,
        "model_n_params": parameter_count(subject.model.config),
        "load_s": subject.load_s and round(subject.load_s, 3),
        "type_kv": f"{subject.kv_bits} bits" if subject.kv_bits else "full",
        "bytes_per_second": subject.bandwidth and subject.bandwidth * GB,
    }
