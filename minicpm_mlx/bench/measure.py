"""What is measured, in llama-bench's terms, and the measuring."""

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

MORE = 16
"""Tokens that a warm first token reads anew."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One measurement: a prompt read, tokens made, or both, by `batch` streams at once."""

    prompt: int = 0
    gen: int = 0
    depth: int = 0
    """Tokens in the cache before, not timed."""
    batch: int = 1
    copy: bool = False
    """Make them by quoting a text, which guesses ahead save passes of."""
    guess: bool = False
    """Guess ahead."""
    first: str | None = None
    """"cold" or "warm": seconds to the first token of a prompt, of which the cache holds nothing
    or all but MORE."""

    @property
    def name(self) -> str:
        made = f"{'copy' if self.copy else 'tg'}{self.gen}"
        parts = [f"pp{self.prompt}" * bool(self.prompt), made * bool(self.gen)]
        name = "+".join(part for part in parts if part)
        if self.first:
            name = f"first token {self.first}, {name}"
        name += " guessing ahead" * self.guess
        name += f" @ d{self.depth}" if self.depth else ""
        return f"{name} x{self.batch}" if self.batch > 1 else name


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """What is measured, and what is known of it."""

    name: str
    model: Any
    load_s: float | None = None
    kv_bits: int | None = None
    bandwidth: float | None = None
    """GB/s of this machine's memory, where it is known."""
    quote: Sequence[int] = ()
    """A prompt that asks to quote a text, where there is a tokenizer."""

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, mx.array]:
        found: Any = tree_flatten(self.model.parameters())
        return dict(found)

    def read(self, batch: int = 1) -> float:
        """Bytes of weights that a pass of one token of each of `batch` streams reads.

        All, but for an embedding that is no head, of which it reads rows, and experts that no token
        is sent to: one token is sent to k of E; more of them, it is assumed, by chance.
        """
        config = self.model.config
        met = 1.0
        if config.num_experts:
            met -= (1 - config.num_experts_per_tok / config.num_experts) ** batch
        arrays = self._arrays().items()
        read = {n: a for n, a in arrays if config.tie_word_embeddings or "embed_tokens" not in n}
        return sum(a.nbytes * (met if _is_stack(a) else 1) for a in read.values())


def _is_stack(array: mx.array) -> bool:
    """Whether it holds the experts of a layer, which are stacked where a token meets but some."""
    return array.ndim == 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row: the work, its repetitions, and what they say of the machine."""

    work: Work
    seconds: list[float]
    peak_memory: int
    """Most bytes MLX held at once while it was measured."""
    bytes_per_token: float | None = None
    """Of weights, keys and values, where tokens are made one by one. With batch > 1 it is what a
    pass reads, which makes a token for each stream."""
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
        """Share of the memory's bandwidth that was used."""
        if self.bytes_per_token is None or self.bandwidth is None:
            return None
        steps = statistics.mean(self.rates) / self.work.batch
        return steps * self.bytes_per_token / (self.bandwidth * GB)

    def row(self) -> dict[str, Any]:
        """Flat, under llama-bench's names where it has one."""
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
    """All combinations, as llama-bench makes them; zeros are left out.

    InvalidArgumentError where nothing is left, or a prompt is too short for a warm first token.
    """
    if first and any(0 < n <= MORE for n in prompts):
        raise InvalidArgumentError(
            f"a warm first token reads the last {MORE} tokens of a prompt anew; expected prompts "
            f"of more, got {', '.join(map(str, prompts))}"
        )
    found: list[Work] = []
    for depth in depths:
        for batch in batches:
            made = [Work(gen=n, depth=depth, batch=batch) for n in gens if n]
            if batch == 1 or not depth:  # streams of a batch begin with their prompts
                made[:0] = [Work(prompt=n, depth=depth, batch=batch) for n in prompts if n]
                made += [Work(prompt=p, gen=g, depth=depth, batch=batch) for p, g in pairs]
            found += made
    if first:
        found += [Work(prompt=n, first=kind) for n in prompts if n for kind in ("cold", "warm")]
    if guess:
        found += [Work(gen=n, copy=True, guess=on) for n in gens if n for on in (False, True)]
    if not found:
        raise InvalidArgumentError(
            "nothing is to be measured; give a length above 0 to read (at a depth, of one stream) "
            "or to make"
        )
    return found


def measure(
    subject: MeasuredModel, todo: Sequence[Work], *, repetitions: int = 5, warmup: bool = True
) -> Iterator[Measurement]:
    """Each work's record as it is done; random tokens, so that only their number matters.

    InvalidArgumentError where memory has no room for the keys and values.
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
        return _batched(model, work)
    session = Session(model.config, subject.kv_bits)
    text = subject.quote if work.copy else _ids(model, work.depth + (work.prompt or 1), 1)
    known = work.depth + (work.prompt - MORE if work.first == "warm" else 0)
    if known:
        for _ in generate(model, text[:known], max_tokens=1, session=session):
            pass
    speculation = Speculation(PromptLookup()) if work.guess else None
    stream = generate(
        model, text, max_tokens=1 + work.gen, session=session, speculation=speculation
    )
    if not work.prompt:  # the first token is that of the prompt
        next(stream)
    mx.synchronize()
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def _batched(model: LanguageModel, work: Work) -> float:
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
    found: list[int] = mx.random.randint(0, model.config.vocab_size, (count,), key=key).tolist()  # type: ignore[assignment]
    return found


def _cache_bytes(subject: MeasuredModel) -> float:
    """Bytes of keys and values a token of context."""
    session = Session(subject.model.config, subject.kv_bits)
    next(session.prefill(subject.model, [1], length=1, chunk=1))
    used = [part for c in session.cache for part in (*c.used(c.keys), *c.used(c.values))]
    return float(sum(part.nbytes for part in used))


def environment(subject: MeasuredModel) -> dict[str, Any]:
    """What all rows have in common."""
    facts = examine()
    names = ("minicpm-mlx", "mlx", "mlx-lm", "python", "system", "chip", "device", "blas", "memory")
    return {
        **{name.replace("-", "_"): facts[name] for name in names},
        "build_commit": commit(),
        "power": power(),
        "thermal": thermal(),
        "model": subject.name,
        "model_size": subject.size,
        "model_n_params": parameter_count(subject.model.config),
        "load_s": subject.load_s and round(subject.load_s, 3),
        "type_kv": f"{subject.kv_bits} bits" if subject.kv_bits else "full",
        "bandwidth": subject.bandwidth,
    }
