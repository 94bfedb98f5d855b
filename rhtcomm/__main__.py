"""`python -m rhtcomm plan`: what the exchange of a bucket will take, and whether to compress."""

import argparse
import sys

from rhtcomm.cost import add_arguments, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rhtcomm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    plan = commands.add_parser(
        "plan",
        help="predict the time of an exchange by the codec's speed on this machine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(plan)
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
