"""`darkroom`: one file a group of commands. Heavy imports wait until a command needs them."""

import typer

from flows.cli.evaluating import evaluate
from flows.cli.exporting import export
from flows.cli.gating import champion, promote
from flows.cli.help import FormCommand
from flows.cli.results import calibrate, diff, reselect, trace, verify
from flows.cli.running import run
from flows.cli.training import train

COMMANDS = (run, reselect, train, promote, diff, trace, verify, calibrate, evaluate, export)
GROUPS = {"champion": champion}

app = typer.Typer(
    name="darkroom",
    help="Prompts in, a filtered, versioned, traceable image dataset out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(cls=FormCommand)(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
