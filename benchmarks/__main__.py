"""The command line: ``python -m benchmarks NAME --help``."""

import contextlib
import io
import sys

import tyro

from benchmarks import readme
from benchmarks.citation import experiment as citation
from benchmarks.comparison import families, fuzz, modes, rules, warm
from benchmarks.harness import UsageError
from benchmarks.hopfield import experiment as hopfield
from benchmarks.hyperopt import experiment as hyperopt
from benchmarks.online import experiment as online
from benchmarks.perturb import experiment as perturb
from benchmarks.unitary import experiment as unitary

# An experiment is one dataclass: its fields are the options, its ``run`` does the work.
COMMANDS = {
    "citation": citation.Citation,
    "families": families.Families,
    "fuzz": fuzz.Fuzz,
    "hopfield": hopfield.Hopfield,
    "hyperopt": hyperopt.Hyperopt,
    "modes": modes.Modes,
    "online": online.Online,
    "perturb": perturb.Perturb,
    "rules": rules.Rules,
    "unitary": unitary.Unitary,
    "warm": warm.Warm,
    "readme": readme.Readme,
}


def parse(arguments: list[str]) -> object:
    """The experiment that the arguments ask for; UsageError in one line if none."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="python -m benchmarks", args=arguments
            )
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        # A frame, drawn in the terminal's own characters, with its title in the first
        # line; the second line says what was wrong.
        lines = [line.strip("│╭╮╰╯─|+- ") for line in complaint.getvalue().splitlines()]
        raise UsageError(next(filter(None, lines[1:]), "bad arguments")) from None


def main(arguments: list[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        parse(arguments).run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
