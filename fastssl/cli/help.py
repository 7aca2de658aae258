"""How help is shown: short types of options, and examples at the end, where the prompt is."""

from typing import Annotated, Any

from rich.markup import escape
from typer import Option
from typer.core import TyperCommand, TyperGroup

from fastssl.common.errors import UserError

# Panels of the options of several commands.
WEIGHTS_PANEL = "Weights from elsewhere, in place of runs"
SLURM_PANEL = "With --executor slurm"

# Options of both commands that submit jobs.
Cpus = Annotated[int, Option(min=1, metavar="N", help="Cores per job.", rich_help_panel=SLURM_PANEL)]
TimeLimit = Annotated[
    str, Option(metavar="TIME", help="Time until a job is requeued, as minutes or HH:MM.", rich_help_panel=SLURM_PANEL)
]
Partition = Annotated[
    str | None, Option(metavar="NAME", help="Partition.", show_default="the cluster's", rich_help_panel=SLURM_PANEL)
]


class Command(TyperCommand):
    """A command of `fastssl`. The lines after "Examples:" in its docstring stand at the end of its help."""

    # Any: typer does not export the types of its base class's arguments.
    def __init__(self, name: str | None, *, help: str | None = None, epilog: str | None = None, **settings: Any):
        description, heading, examples = (help or "").partition("Examples:")
        if heading:
            epilog = heading + escape(examples.rstrip())
        super().__init__(name, help=description.rstrip(), epilog=epilog, **settings)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_switches(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("executor") == "local":
            _refuse_slurm_options(self.params, ctx)
        return super().invoke(ctx)


class Group(TyperGroup):
    """A group of commands, such as `fastssl eval`."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_switches(super().get_params(ctx))


def _refuse_slurm_options(params: list[Any], ctx: Any) -> None:
    for param in params:
        is_given = ctx.get_parameter_source(param.name).name == "COMMANDLINE"
        if is_given and getattr(param, "rich_help_panel", None) == SLURM_PANEL:
            raise UserError(
                f"{param.opts[0]} is of --executor slurm", hint=f"add --executor slurm, or leave out {param.opts[0]}"
            )


def _without_types_of_switches(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # typer would show <bool>, as if a value could follow
    return params
