"""Collective operations of the ranks of a launch; the only module that uses `mx.distributed`.

A process reads its rank and the number of ranks from the environment, which `minicpm-mlx launch`,
`mlx.launch` or mpirun sets. In a process alone, every function returns its argument and touches no
network. All ranks must call the same functions in the same order: each call waits for the last
rank. When a rank ends, the others raise an error within about a second (MLX 0.32); a rank that is
stuck is waited for.
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
from .processes import GRACE

if TYPE_CHECKING:
    import mlx.core as mx

Tree = TypeVar("Tree")

VARIABLES = {
    "MLX_HOSTFILE": "ring",
    "MLX_JACCL_COORDINATOR": "jaccl",
    "NCCL_HOST_IP": "nccl",
    "OMPI_COMM_WORLD_SIZE": "mpi",
}
"""Variables that launchers set, each with the backend that it stands for."""

LAUNCHED = "MINICPM_MLX_LAUNCHED"
"""Variable that our launcher sets for every rank."""

HASH = 32  # bytes of a SHA-256


def size() -> int:
    """The number of ranks; 1 in a process alone. Does not connect."""
    backend = _backend()
    if backend is None:
        return 1
    try:
        if backend == "ring":
            return _count_hosts("MLX_HOSTFILE")
        if backend == "jaccl":
            return _count_hosts("MLX_IBV_DEVICES")
        return int(os.environ["MLX_WORLD_SIZE" if backend == "nccl" else "OMPI_COMM_WORLD_SIZE"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DistributedError(
            f"launched for the {backend} backend, but without its hosts ({error}); "
            "start with minicpm-mlx launch"
        ) from None


def rank() -> int:
    """The rank of this process, from 0. Does not connect."""
    if size() == 1:
        return 0
    name = "OMPI_COMM_WORLD_RANK" if _backend() == "mpi" else "MLX_RANK"
    value = os.environ.get(name, "")
    if not value.isdecimal() or int(value) >= size():
        raise DistributedError(
            f"{name} must be a rank from 0 to {size() - 1}, got {value!r}; "
            "start with minicpm-mlx launch"
        )
    return int(value)


def group() -> mx.distributed.Group | None:
    """The group of all ranks, connected; None in a process alone.

    The first call waits until every rank has made it. DistributedError if they cannot connect.
    """
    return None if size() == 1 else _connected()


def barrier() -> None:
    """Wait until every rank has called this."""
    import mlx.core as mx

    sum_of(mx.zeros(1))


def sum_of(tree: Tree) -> Tree:
    """Sum each array of a tree (of dicts and lists) over the ranks, which have equal trees.

    Keeps shapes and dtypes. The result is evaluated, so that the loss of a rank is raised here:
    DistributedError.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    ranks = group()
    if ranks is None:
        return tree
    with _named_loss():
        total: Tree = tree_map(lambda x: mx.distributed.all_sum(x, group=ranks), tree)
        mx.eval(total)
    return total


def of_rank_0(x: mx.array) -> mx.array:
    """The array of rank 0, lazily; `x` has the same shape and dtype on all ranks."""
    import mlx.core as mx

    ranks = group()
    if ranks is None:
        return x
    return mx.distributed.all_sum(x if rank() == 0 else x * 0, group=ranks)


def least(value: int) -> int:
    """The smallest value of any rank."""
    import mlx.core as mx
    import numpy as np

    ranks = group()
    if ranks is None:
        return value
    with _named_loss():
        halves = mx.array([value >> 31, value & (2**31 - 1)], mx.int32)
        gathered = np.array(mx.distributed.all_gather(halves, group=ranks)).reshape(-1, 2)
    return min((int(high) << 31) + int(low) for high, low in gathered)


def same_everywhere(value: str | bytes, what: str) -> None:
    """Raise DistributedError on every rank unless `value` is the same on all of them.

    `what` names the value in the message: "training data". Compares SHA-256 hashes.
    """
    import mlx.core as mx
    import numpy as np

    ranks = group()
    if ranks is None:
        return
    digest = hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()
    with _named_loss():
        gathered = mx.distributed.all_gather(mx.array(list(digest), mx.uint8), group=ranks)
        hashes = np.array(gathered).reshape(-1, HASH)  # (ranks, HASH)
    differing = [str(index) for index, row in enumerate(hashes) if (row != hashes[0]).any()]
    if differing:
        raise DistributedError(
            f"expected the same {what} on every rank, got another on rank {', '.join(differing)} "
            "than on rank 0; give all of them the same"
        )


def broadcast(data: bytes) -> bytes:
    """The bytes of rank 0; `data` of other ranks is ignored. For small data."""
    import mlx.core as mx
    import numpy as np

    if size() == 1:
        return data
    own = data if rank() == 0 else b""
    count = int(np.array(sum_of(mx.array(len(own), mx.int32))))
    if count == 0:
        return b""
    # The others add zeros, so that the sum is the data of rank 0.
    return bytes(np.array(sum_of(mx.array(np.frombuffer(own or bytes(count), np.uint8)))))


def _backend() -> str | None:
    return next((VARIABLES[name] for name in VARIABLES if name in os.environ), None)


def _count_hosts(variable: str) -> int:
    """Length of the JSON list in the file of a variable; mlx.launch writes an empty one for 1."""
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
def _named_loss() -> Iterator[None]:
    """Replaces MLX's error for a lost connection by DistributedError."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from None


def lost(error: RuntimeError) -> DistributedError:
    """The error for a lost connection, of which `error` is MLX's.

    In a launch it returns only after the launcher has had time to end this rank.
    """
    if LAUNCHED in os.environ:
        # The launcher ends this rank first: the error of the other is the cause.
        time.sleep(2 * GRACE)
    return DistributedError(
        f"rank {rank()} lost the others ({error}); see the error of another rank"
    )
