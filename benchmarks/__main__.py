"""The command line: ``python -m benchmarks NAME --help``."""

import sys

import tyro

from benchmarks.citation.experiment import Citation
from benchmarks.claims import Claims
from benchmarks.comparison.before_after import BeforeAfter
from benchmarks.comparison.collection.experiment import Collection
from benchmarks.comparison.families import Families
from benchmarks.comparison.fuzz.experiment import Fuzz
from benchmarks.comparison.modes import Modes
from benchmarks.comparison.rules import Rules
from benchmarks.comparison.warm import Warm
from benchmarks.harness.experiment import Experiment, attempt
from benchmarks.harness.options import require
from benchmarks.hopfield.experiment import Hopfield
from benchmarks.hyperopt.experiment import Hyperopt
from benchmarks.modern.experiment import Modern
from benchmarks.online.copying import OnlineCopying
from benchmarks.online.digits import OnlineDigits
from benchmarks.online.experiment import Online
from benchmarks.perturb.experiment import Perturb
from benchmarks.perturb.unrolls import PerturbUnrolls
from benchmarks.readme import Readme
from benchmarks.rooms.before_after import RoomsBeforeAfter
from benchmarks.rooms.fuzz import FuzzRooms
from benchmarks.scaling.experiment import Scaling
from benchmarks.scaling.kills import Kills
from benchmarks.unitary.experiment import Unitary

# To add an experiment, write it in one file and add one row here.
EXPERIMENTS: tuple[type[Experiment], ...] = (
    Citation,
    Collection,
    Families,
    Fuzz,
    FuzzRooms,
    Hopfield,
    Hyperopt,
    Kills,
    Modern,
    Modes,
    Online,
    OnlineCopying,
    OnlineDigits,
    Perturb,
    PerturbUnrolls,
    Rules,
    Scaling,
    Unitary,
    Warm,
    BeforeAfter,
    RoomsBeforeAfter,
    Claims,
    Readme,
)
COMMANDS = {experiment.name: experiment for experiment in EXPERIMENTS}
PROGRAM = "python -m benchmarks"


def overview() -> str:
    """A line for each experiment, and how to get help."""
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name.ljust(width)}  {(made.__doc__ or '').splitlines()[0]}"
        for name, made in COMMANDS.items()
    ]
    usage = f"usage: {PROGRAM} NAME [options]; {PROGRAM} NAME --help lists the options"
    return "\n".join([usage, "", *lines])


def parse(arguments: list[str]) -> Experiment:
    """The experiment that the arguments ask for; tyro says what it cannot read.

    Raises:
      UsageError: for a name that is not known.
      SystemExit: after a message of tyro's, with 2, or after help, with 0.
    """
    if arguments and not arguments[0].startswith("-"):
        known = f"experiments are {', '.join(COMMANDS)}"
        require(arguments[0] in COMMANDS, f"unknown {arguments[0]!r}; {known}")
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROGRAM, args=arguments)


def main(arguments: list[str]) -> int:
    """Runs one command and returns the exit code."""
    if not arguments:
        print(overview())
        return 0
    return attempt(lambda: parse(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
