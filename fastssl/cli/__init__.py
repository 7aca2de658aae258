"""The command `fastssl`: one file per group of commands. Each command parses, calls one function and prints.

`data.py` builds and inspects .beton files, `train.py` trains, sweeps and profiles, `evaluate.py` holds `fastssl eval`,
`report.py` compares runs, `embed.py` embeds photographs, `export.py` writes a trained model for others, `setup.py`
checks the machine, runs the demo and lists recipes. Commands import what they need when they run: `fastssl --help` is
fast, and `fastssl doctor` runs where torch is missing.
"""

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from fastssl import __version__
from fastssl.cli import data, embed, evaluate, export, report, setup, train
from fastssl.cli.help import Command, Group
from fastssl.cli.usage import UsageError, explain_usage_error
from fastssl.common.errors import EXIT_INTERRUPTED, UserError, in_short, is_out_of_memory
from fastssl.common.terminal import print_error


class Commands(Group):
    """All commands of `fastssl`, with a message after Ctrl-C."""

    # Any: typer does not export the type of its base class's argument.
    def list_commands(self, ctx: Any) -> list[str]:
        """Put eval, which typer lists last as a group, where it is used: before what shows its results."""
        names = [name for name in super().list_commands(ctx) if name != "eval"]
        names.insert(names.index("report"), "eval")
        return names

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Caught here because typer ends without a word.
            print_error("interrupted")
            sys.exit(EXIT_INTERRUPTED)


app = typer.Typer(
    cls=Commands,
    help="Self-supervised image encoders with per-image uncertainty, trained at the speed of your hardware.",
    epilog="`fastssl COMMAND -h` shows the options of a command and examples; --debug shows the traceback of an error.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"fastssl {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options without a command."""


# In the order of use, as in the help.
START, DATA, TRAINING, RESULTS = "Getting started", "Images", "Training", "Trained models"
app.command(cls=Command, rich_help_panel=START)(setup.doctor)
app.command(cls=Command, rich_help_panel=START)(setup.demo)
app.add_typer(setup.recipes, name="recipes", rich_help_panel=START)
app.command(cls=Command, rich_help_panel=DATA)(data.build_beton)
app.command(cls=Command, rich_help_panel=DATA)(data.inspect)
app.command(cls=Command, rich_help_panel=TRAINING)(train.train)
app.command(cls=Command, rich_help_panel=TRAINING)(train.profile)
app.command(cls=Command, rich_help_panel=TRAINING)(train.sweep)
app.add_typer(evaluate.app, name="eval", rich_help_panel=RESULTS)
app.command(cls=Command, rich_help_panel=RESULTS)(report.report)
app.command(cls=Command, rich_help_panel=RESULTS)(embed.embed)
app.command(cls=Command, rich_help_panel=RESULTS)(export.export)


_PYTHONS_SHOW_WARNING = warnings.showwarning

# Turns of the loop in which a thread of OpenMP waits for the others before it gives its core away. By default they are
# 300,000; then training on cores that other processes use too is several times slower (records/cpu-precision.md).
SPIN_COUNT = 10_000


def main() -> NoReturn:
    """Run the command in `sys.argv`. A mistake of the user becomes `error:` and `hint:` on stderr, and exit code 2.

    With `--debug`, anywhere on the command line, the error is raised with its traceback.
    """
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # called with positions only
    if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP reads the environment when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name="fastssl", standalone_mode=False)
    except (UserError, UsageError) as error:
        if debug:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: typer has printed its help
            sys.exit(2)
        _end(error if isinstance(error, UserError) else explain_usage_error(error, sys.argv[1:]))
    except (MemoryError, RuntimeError, OSError) as error:
        if debug or not is_out_of_memory(error):
            raise
        fix = "end other programs, or ask for smaller batches or images"
        _end(UserError(f"there was not enough memory ({in_short(error)})", hint=fix))
    sys.exit(0)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning for the user as one line. Those for developers keep the place in the code."""
    if category is UserWarning:
        print_error(str(message), label="warning")
    else:
        _PYTHONS_SHOW_WARNING(message, category, *place)


def _end(error: UserError) -> NoReturn:
    """Print the error, of which of several processes it is, and end with exit code 2."""
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    print_error(error.message, error.hint, label="error" if rank is None else f"error (rank {rank})")
    sys.exit(2)
