"""A model in a process of its own, started with settings to be measured.

The parent writes a JSON list a line, [work, number], and reads one JSON value for each. The process
ends when its input does. Run as `python -m minicpm_mlx.bench.contender MODEL`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from .. import device
from ..errors import MiniCPMError
from ..loading.tuning import OWN_KERNELS, VARIABLE, Tuning

CONTEXT = 128
"""Tokens in the cache before those that are timed."""
PROMPT = 2048
"""Tokens read to time a prompt's chunks."""


class ContenderError(Exception):
    """The process did not start, or did not answer in time."""


class Contender:
    """The parent's end; a context manager that ends the process."""

    def __init__(self, model: str, tuning: Tuning, seconds: float = 120):
        """Start it; ContenderError unless the model is loaded within so many seconds."""
        env = dict(os.environ) | {VARIABLE: json.dumps(tuning.changed())}
        if not device.buffers_given:
            for name in device.BUFFER_VARIABLES:  # set by the parent, for itself
                env.pop(name, None)
        if not tuning.own_kernels:
            env[OWN_KERNELS] = "0"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minicpm_mlx.bench.contender", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends it
        )
        try:
            self.facts: dict[str, Any] = self._read(seconds)
        except BaseException:
            self.close()
            raise

    def measure(self, work: str, number: int, seconds: float = 60) -> Any:
        """Seconds for `decode` or `rows` of `number` tokens, or a prompt read in such chunks."""
        if self.process.poll() is not None:
            raise ContenderError("its process has ended")
        with suppress(OSError):  # it ends just now, which the reading says
            assert self.process.stdin
            self.process.stdin.write(f"{json.dumps([work, number])}\n".encode())
            self.process.stdin.flush()
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        assert self.process.stdout
        data, deadline = b"", time.monotonic() + seconds
        while not data.endswith(b"\n"):
            wait = max(deadline - time.monotonic(), 0)
            if not select.select([self.process.stdout], [], [], wait)[0]:
                raise ContenderError(f"no answer in {seconds:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ContenderError(self._last_words())
            data += piece
        return json.loads(data)

    def _last_words(self) -> str:
        assert self.process.stderr
        lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended with status {self.process.wait()}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):  # a pipe that broke with words unsent
                assert stream
                stream.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Workbench:
    """The process's end: a loaded model and the works it can time."""

    def __init__(self, model: Any):
        self.model = model
        self.cache: Any = None
        self.tokens = self._decode()
        next(self.tokens)

    def facts(self) -> dict[str, Any]:
        """The facts that the candidates depend on."""
        import mlx.core as mx

        from ..memory import prefill_chunk
        from ..model.kernels import own
        from ..model.layout import WIDE, can_regroup, can_widen

        fused, metal = self.model, device.on_metal()
        return {
            "wide": [wide for wide in WIDE if metal and can_widen(fused, wide)],
            "groups": [size for size in (64, 32) if metal and can_regroup(fused, size)],
            "own_kernels": getattr(fused.norm.add_norm, "func", None) is not own.add_norm_reference,
            "chunk": prefill_chunk(fused.config, PROMPT),
            "bytes": mx.get_active_memory(),
            "longest": fused.config.context_length,
        }

    def decode(self, tokens: int) -> float:
        """Seconds of so many decode steps, one after the other; the first one is not timed."""
        next(self.tokens)
        start = time.perf_counter()
        for _ in range(tokens):
            next(self.tokens)
        return time.perf_counter() - start

    def _decode(self) -> Iterator[int]:
        from ..engine import generate

        room = self.model.config.context_length - CONTEXT
        while True:
            yield from generate(self.model, [1] * CONTEXT, max_tokens=min(room, 1024))

    def prefill(self, chunk: int) -> float:
        from ..engine import generate

        length = min(PROMPT, self.model.config.context_length - 1)
        start = time.perf_counter()
        next(generate(self.model, [1] * length, max_tokens=1, chunk=chunk))
        return time.perf_counter() - start

    def rows(self, count: int) -> float:
        """Seconds of a pass that reads `count` tokens after CONTEXT others."""
        import mlx.core as mx

        from ..engine import Session

        if self.cache is None:
            self.cache = Session(self.model.config).cache
            mx.eval(self.model.hidden(mx.array([[1] * CONTEXT]), self.cache))
        ids = mx.array([[1] * count])
        mx.eval(ids)
        start = time.perf_counter()
        mx.eval(self.model.logits(self.model.hidden(ids, self.cache)))
        seconds = time.perf_counter() - start
        for layer in self.cache:
            layer.trim(count)
        return seconds


def load_subject(name: str) -> Any:
    """The model of a shape, folder or name, with the environment's settings."""
    from ..loading.load import load
    from .shapes import SHAPES, tuned_model

    if name not in SHAPES:
        return load(name, progress=False).model
    device.select()
    return tuned_model(name)


def main() -> None:
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing else is printed among the answers
    try:
        bench = Workbench(load_subject(sys.argv[1]))
        works = {"decode": bench.decode, "prefill": bench.prefill, "rows": bench.rows}
        print(json.dumps(bench.facts()), file=answers, flush=True)
        for line in sys.stdin:
            work, number = json.loads(line)
            print(json.dumps(works[work](number)), file=answers, flush=True)
    except MiniCPMError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
