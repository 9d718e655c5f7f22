"""The command `python -m xsam.data`: checks a data root, converts annotations of a user's own, and
builds sets that have to be built."""

import sys

from xsam.cli import Parser
from xsam.datasets import build, check, convert


def main(arguments: list[str] | None = None) -> int:
    """Runs the sub-command that is named and returns the exit status: 2 at bad input."""
    parser = Parser(
        prog="python -m xsam.data",
        description="Checks the datasets of a data root, converts annotations of your own, and "
        "builds the sets that have to be built.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check.add_command(commands)
    convert.add_commands(commands)
    build.add_commands(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"xsam.data: {error}", file=sys.stderr)
        return 2
