"""Parses the flags of all commands: --name=value or --name value, and --config.KEY=VALUE.

Nothing here takes long to import, and commands import JAX only after they have parsed their flags,
so that --help is printed at once.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from kd_jax import config, keys


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is its module's docstring; a mistake prints one line and exits
    with status 1."""

    def __init__(self, verb: str, description: str, has_config: bool = False) -> None:
        """`has_config`: with --config, and flags for each of its keys."""
        super().__init__(
            prog=f"kd-jax {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._has_config = has_config
        if not has_config:
            return
        self.add_argument(
            "--config",
            metavar="FILE",
            help="the experiment: a file, or a name that `kd-jax configs` lists; FILE:smoke for a "
            "tiny one",
        )
        self.add_argument(
            "--config.KEY",
            dest="changes",
            metavar="VALUE",
            help="another value of a key of the config; `kd-jax keys` lists them",
        )

    def add_processes(self) -> None:
        """Adds the flags of a run of several processes (kd_jax/train/distributed.py)."""
        group = self.add_argument_group("a run of several processes (launch/, docs/scaling.md)")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
        group.add_argument("--process_id", type=int, metavar="N", help="this one, from 0")
        group.add_argument("--process_count", type=int, metavar="N", help="how many there are")
        group.add_argument(
            "--start_timeout",
            type=positive,
            default=300,
            metavar="SECONDS",
            help="that all processes have to find each other (default 300)",
        )

    def add_files(self, given: str, text: str = "the text", empty: str = "") -> None:
        """Adds the flags of a command in which a model reads a file of texts and writes another
        one. `given` says what --input is, `text` what stands in the column --text, and `empty` what
        a row without text may get."""
        self.add_argument("--input", required=True, metavar="FILE", help=given)
        self.add_argument("--output", required=True, metavar="FILE", help="where to write to")
        self.add_argument("--text", help=f'column of {text} (default "text")')
        self.add_argument(
            "--delimiter", help="what separates the columns of a .csv or .tsv (default comma, tab)"
        )
        if empty:
            self.add_argument(
                "--keep_empty",
                action="store_true",
                help=f"give rows without text {empty} (default: name the first one and stop, since "
                "the column or the file is mostly at fault)",
            )
        self.add_argument("--revision", help="of the hub id: branch, tag or commit")
        self.add_argument("--batch_size", type=positive, help="rows of a batch (default 32)")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the arguments, by default the program's; `changes` has the keys of the config to
        set, as `keys.change` takes them. Exits with status 0 after --help, with status 1 and one
        line at a mistake."""
        argv = list(sys.argv[1:] if argv is None else argv)
        changes: list[keys.Change] = []
        if self._has_config:
            argv, changes = keys.taken(argv)
        args, rest = self.parse_known_args(argv)
        if self._has_config and args.config is None:
            print(self.description, file=sys.stderr)
            files = [each for each in rest if re.fullmatch(r"[^-].*\.py(:\S*)?", each)]
            hint = f"; did you mean --config={files[0]}?" if files else ""
            self.error(f"--config=FILE is missing{hint}")
        if rest:
            self.error(self._unknown(rest[0]))
        # A flag is empty where a shell variable is not set; only a prompt may be so on purpose.
        given = {name: value for name, value in vars(args).items() if not name.endswith("prompt")}
        if empty := [name for name, value in given.items() if value == ""]:
            self.error(f"--{empty[0]} is empty; give it a value, or leave it out")
        if self._has_config:
            args.changes = changes
        return args

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends the program with status 1."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)

    def _unknown(self, given: str) -> str:
        """Makes the message for an unknown flag, with the flags that may be meant."""
        name = given.lstrip("-").partition("=")[0]
        flags = [each.lstrip("-") for each in self._option_string_actions]
        if not given.startswith("-"):
            meant = name in flags or name.startswith("config.")
            hint = f"did you mean --{given}?" if meant else "flags begin with --"
            return f"{given!r} is no flag; {hint}"
        close = difflib.get_close_matches(name, flags, n=1)
        if self._has_config and not close:
            close = [f"config.{key}" for key in keys.like(name, config.names())]
        hint = f" (did you mean {' or '.join(f'--{each}' for each in close)}?)" if close else ""
        return f"unknown flag --{name}{hint}; --help lists them"


def positive(text: str) -> int:
    """Converts a flag's text to a whole number above 0."""
    number = int(text) if re.fullmatch(r"\d+", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number
