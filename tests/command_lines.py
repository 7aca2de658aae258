"""Parse commands of fastssl without running them."""

import typer

from fastssl.cli import app


def parse(arguments):
    """The values of a command's parameters, from its arguments without `fastssl`. Raises what the command would."""
    command, context, rest = typer.main.get_command(app), None, list(arguments)
    while hasattr(command, "resolve_command") and rest and not rest[0].startswith("-"):
        context = command.context_class(command, context, info_name=command.name)
        _, command, rest = command.resolve_command(context, rest)
    return command.make_context(command.name, rest, context).params
