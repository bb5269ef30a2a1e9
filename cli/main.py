"""The `minicpm-mlx` command: one line for an error, exit 1; usage 2; Ctrl-C 130."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from minicpm_mlx import __version__
from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import InvalidArgumentError, MiniCPMError

from .bench import bench
from .chat.command import chat
from .connect import connect
from .doctor import doctor
from .eval.command import app as evaluate
from .eval.perplexity import ppl
from .generate import generate
from .launch import launch
from .models.convert import convert
from .models.export_adapter import export_adapter
from .models.fuse import fuse
from .models.manage import list_models, pull, remove, show
from .models.quantize import quantize
from .options import may_download
from .serve import serve
from .sessions import app as sessions
from .streams import not_text
from .train.command import lora
from .web import web

app = typer.Typer(
    name="minicpm-mlx",
    help="MiniCPM on Apple silicon, with MLX. 在苹果芯片上运行 MiniCPM。",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (chat, generate, pull):
    app.command()(may_download(command))
app.command("list")(list_models)
app.command("show")(show)
app.command("rm")(remove)
for command in (serve, web, bench, quantize, convert, ppl, fuse, export_adapter, lora):
    app.command()(may_download(command))
app.command("dpo", help="Fine-tune on preferences: `lora` that refuses other data.")(
    may_download(lora)
)
app.command()(connect)
app.command()(doctor)
app.add_typer(evaluate, name="eval")
app.add_typer(sessions, name="sessions")
app.command(context_settings={"allow_interspersed_args": False})(launch)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        _open_streams()
        _check_arguments()
        status = app(standalone_mode=False)
    except MiniCPMError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("out of memory; try a smaller model, or close other programs", 1)
    except RuntimeError as error:
        if "connection to a peer" in str(error):
            _fail(str(collectives.lost(error)), 1)
        if "can't start new thread" not in str(error):
            raise
        _fail("out of memory; try a smaller model, or close other programs", 1)
    except UnicodeEncodeError as error:
        _fail(f"{error.encoding} cannot encode the output; set PYTHONIOENCODING=utf-8", 1)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except Exception as error:
        # A usage error of click. Anything else is a bug, whose traceback is shown.
        if not hasattr(error, "exit_code"):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(error.exit_code)
    else:
        if status == 130:  # newer versions of typer return a Ctrl-C
            _interrupted(newline=True)
        sys.exit(status if isinstance(status, int) else 0)


def as_rank() -> None:
    """Run the command line as one rank of a launch: only rank 0 reads input and prints results."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if collectives.rank():
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
    try:
        main()
    except SystemExit as ended:
        if ended.code and "OMPI_COMM_WORLD_SIZE" in os.environ:
            # MPI's own end is a meeting: it would wait for ranks that do not know of the failure.
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        raise


def _end_with(launcher: int) -> None:
    """End this process when its parent, the launcher, has ended, even killed."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # it may save its work
    os._exit(1)


def _open_streams() -> None:
    """Lets a command run with standard input or error closed; standard output must be open."""
    for number in range(3):  # else the next file opened gets the number; MLX refuses 0
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # print(file=None) would write errors to standard output
        sys.stderr = Path(os.devnull).open("w", errors="replace")  # noqa: SIM115
    if sys.stdout is None:
        raise InvalidArgumentError("standard output is closed; expected somewhere to print to")


def _check_arguments() -> None:
    """Refuses bytes that are no text; Python decodes them to surrogates that cannot be encoded."""
    for before, argument in pairwise(sys.argv):
        try:
            os.fsencode(argument).decode(sys.getfilesystemencoding())
        except UnicodeDecodeError as error:
            option = argument if argument.startswith("-") else before
            name = option.partition("=")[0] if option.startswith("-") else "an argument"
            raise InvalidArgumentError(not_text(name, error)) from None


def _interrupted(*, newline: bool = False) -> NoReturn:
    if collectives.LAUNCHED in os.environ:
        sys.exit(130)  # the launcher prints the message
    if newline:
        print(file=sys.stderr)
    _fail("interrupted", 130)


def _fail(message: str, status: int) -> NoReturn:
    print("minicpm-mlx: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
