"""All commands, and how they end."""

import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import replica_newton
from replica_newton.checkpoints import CheckpointError
from replica_newton.cli import runs, studies, views  # noqa: F401  # their commands, in the order of the help
from replica_newton.cli.root import app
from replica_newton.cli.shared import INTERRUPTED, USAGE_ERROR
from replica_newton.topology import TopologyError
from replica_newton.training.datasets import DataError
from replica_newton.training.run import RunError


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Second-order training from the differences between data-parallel replicas (Arnold and Wang, 2017)."""
    if show:
        Console().print(replica_newton.__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point: bad input gets one line on standard error and exit status 2."""
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        message = error.format_message()
        if not message:  # no command at all: the help has been shown
            sys.exit(USAGE_ERROR)
        refused: list[Any] = getattr(error.__cause__, "errors", list)()  # of pydantic, which often names the rule alone
        _fail(", got ".join([message, *(one["input"] for one in refused if repr(one["input"]) not in message)]))
    except (RunError, DataError, CheckpointError, TopologyError, OSError) as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"replica-newton: {line}\n")
    sys.exit(USAGE_ERROR)
