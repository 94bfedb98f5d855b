"""Tools of rhtcomm on the command line."""

import argparse
import importlib
import sys

# A command's module has `add_arguments(parser)` and `run(arguments)`, whose result is the exit
# status (None: 0). Only the module of the command that was asked for is imported.
COMMANDS = {
    "bench": ("rhtcomm.bench.command", "measure exchanges on these ranks, and say what to do"),
    "plan": ("rhtcomm.planning.command", "predict exchanges, and say whether compression pays"),
    "doctor": ("rhtcomm.doctor", "find what is wrong on this machine, or among a launcher's ranks"),
    "report": ("rhtcomm.report", "draw the plots of a run, from its telemetry file"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rhtcomm", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name in sys.argv[1:2]:
            tool = importlib.import_module(module)
            tool.add_arguments(command)
            command.set_defaults(run=tool.run)
    arguments = parser.parse_args()
    try:
        status = arguments.run(arguments)
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
