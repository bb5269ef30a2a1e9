"""What the processes of one launch compute together; the only module that asks MLX for it.

A process finds whether it was launched, and with how many others, in the environment that
`minicpm-mlx launch` (or MLX's own `mlx.launch`, or mpirun) sets. Alone, every function here gives
back what it was given and touches no network. All ranks must call the same functions in the same
order: each is a meeting, at which the first to come waits for the last. A rank that has ended is an
error in the others within about a second (of MLX 0.32); one that is only stuck is waited for.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import DistributedError

if TYPE_CHECKING:
    import mlx.core as mx

Tree = TypeVar("Tree")

VARIABLES = {
    "MLX_HOSTFILE": "ring",
    "MLX_JACCL_COORDINATOR": "jaccl",
    "NCCL_HOST_IP": "nccl",
    "OMPI_COMM_WORLD_SIZE": "mpi",
}
"""Variables by which a launcher tells its processes what to talk by, and that backend's name."""

LAUNCHED = "MINICPM_MLX_LAUNCHED"
"""Variable that our launcher sets for every rank."""

HASH = 32  # bytes of a SHA-256


def size() -> int:
    """How many processes work together; 1 where this one is alone. Initialises nothing."""
    backend = _backend()
    if backend is None:
        return 1
    try:
        if backend == "ring":
            return _listed("MLX_HOSTFILE")
        if backend == "jaccl":
            return _listed("MLX_IBV_DEVICES")
        return int(os.environ["MLX_WORLD_SIZE" if backend == "nccl" else "OMPI_COMM_WORLD_SIZE"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DistributedError(
            f"launched for the {backend} backend, but without its hosts ({error}); "
            "start with minicpm-mlx launch"
        ) from None


def rank() -> int:
    """Which of them this one is, from 0. Initialises nothing."""
    if size() == 1:
        return 0
    name = "OMPI_COMM_WORLD_RANK" if _backend() == "mpi" else "MLX_RANK"
    given = os.environ.get(name, "")
    if not given.isdecimal() or int(given) >= size():
        raise DistributedError(
            f"{name} must be a rank from 0 to {size() - 1}, got {given!r}; "
            "start with minicpm-mlx launch"
        )
    return int(given)


def group() -> mx.distributed.Group | None:
    """The processes that work together, connected; None where this one is alone.

    The first call waits until every rank has made it. DistributedError where they cannot connect.
    """
    return None if size() == 1 else _connected()


def barrier() -> None:
    """Return once every rank has called this."""
    import mlx.core as mx

    sum_of(mx.zeros(1))


def sum_of(tree: Tree) -> Tree:
    """The sum over ranks of each array in a tree (of dicts and lists) that all have alike.

    Shapes and dtypes are kept. The result is computed, not lazy, so that the loss of a rank shows
    here: DistributedError.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    together = group()
    if together is None:
        return tree
    with _met():
        found: Tree = tree_map(lambda x: mx.distributed.all_sum(x, group=together), tree)
        mx.eval(found)
    return found


def of_rank_0(x: mx.array) -> mx.array:
    """The array that rank 0 has, computed when it is used; all have one of its shape and dtype."""
    import mlx.core as mx

    together = group()
    if together is None:
        return x
    return mx.distributed.all_sum(x if rank() == 0 else x * 0, group=together)


def least(value: int) -> int:
    """The smallest of the ranks' numbers."""
    import mlx.core as mx
    import numpy as np

    together = group()
    if together is None:
        return value
    with _met():
        words = mx.array([value >> 31, value & (2**31 - 1)], mx.int32)
        gathered = np.array(mx.distributed.all_gather(words, group=together)).reshape(-1, 2)
    return min((int(high) << 31) + int(low) for high, low in gathered)


def same_everywhere(value: str | bytes, what: str) -> None:
    """DistributedError, on every rank alike, unless `value` is the same on all of them.

    `what` names it in the message: "training data". Only a hash of it travels.
    """
    import mlx.core as mx
    import numpy as np

    together = group()
    if together is None:
        return
    found = hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()
    with _met():
        gathered = mx.distributed.all_gather(mx.array(list(found), mx.uint8), group=together)
        hashes = np.array(gathered).reshape(-1, HASH)  # (ranks, HASH)
    others = [str(index) for index, row in enumerate(hashes) if (row != hashes[0]).any()]
    if others:
        raise DistributedError(
            f"expected the same {what} on every rank, got another on rank {', '.join(others)} "
            "than on rank 0; give all of them the same"
        )


def broadcast(data: bytes) -> bytes:
    """The bytes that rank 0 gave; what the others gave is ignored. For what is small."""
    import mlx.core as mx
    import numpy as np

    if size() == 1:
        return data
    own = data if rank() == 0 else b""
    count = int(np.array(sum_of(mx.array(len(own), mx.int32))))
    if count == 0:
        return b""
    # The others add zeros, so that the sum is what rank 0 gave.
    return bytes(np.array(sum_of(mx.array(np.frombuffer(own or bytes(count), np.uint8)))))


def _backend() -> str | None:
    return next((VARIABLES[name] for name in VARIABLES if name in os.environ), None)


def _listed(variable: str) -> int:
    """Entries of the JSON list in the file that a variable names; one process has an empty file."""
    text = Path(os.environ[variable]).read_text(encoding="utf-8").strip()
    return len(json.loads(text)) if text else 1


@cache
def _connected() -> mx.distributed.Group:
    import mlx.core as mx

    backend = _backend() or "any"
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        hint = ""
        if "bind socket" in str(error):
            hint = "; its port is in use: give launch another --starting-port"
        raise DistributedError(
            f"rank {rank()} could not connect by the {backend} backend ({error}){hint}"
        ) from None


@contextmanager
def _met() -> Iterator[None]:
    """Names the error by which MLX says that a rank has gone."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from None


def lost(error: RuntimeError) -> DistributedError:
    """The error for a rank that has gone, in the words of `error`, after a while."""
    if LAUNCHED in os.environ:
        time.sleep(2)  # our launcher ends this rank: what the other said is the cause
    return DistributedError(f"rank {rank()} lost the others ({error}); see what another rank said")
