"""Parts that the commands share: flags, `--config NAME`, and one line for an error of the user.

Exit codes: 1 for an error, 2 for words that the command does not take, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import errno
import logging as python_logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict

from atlas_jax import config as config_lib
from atlas_jax import config_files, masking, migration, overrides, saved_config
from atlas_jax.config import nearest
from atlas_jax.types import DependencyError

_ERROR = 1
_USAGE = 2
_INTERRUPTED = 130
_HELP = ("--help", "-h", "-help", "--helpshort", "--helpfull")
_OPTIONS = ("--options", "-options")
_BAD_VALUE = re.compile(r"flag --(?P<flag>[\w.]+)=.*", re.DOTALL)
_CONFIG_HELP = (
    "Config: a shipped recipe such as teacher_sft, a FILE.py or a PACKAGE.MODULE; "
    ":model=NAME,data=NAME after it swaps parts."
)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


class UsageError(Exception):
    """Words that the command does not take; no `ValueError`, of which absl rewrites the text."""


class _ConfigReader(flags.ArgumentParser[ConfigDict]):
    """Holds the config that the words of a command line describe."""

    def __init__(self, default: str) -> None:
        self.default = default
        self.config = ConfigDict()
        self.notes: list[str] = []

    def parse(self, argument: str | ConfigDict) -> ConfigDict:
        """Returns the config, which is read before the flags are."""
        return self.config

    def flag_type(self) -> str:
        """Returns what absl's help calls the value."""
        return "config file"

    def read(self, words: list[str]) -> list[str]:
        """Reads the config and what the words change in it; returns the words that are left.

        Raises:
            UsageError: for a config or an option that cannot be used.
        """
        words = flags.FLAGS.read_flags_from_files(words, force_gnu=False)
        reference = _reference(words) or self.default
        first = next(filter(overrides.PATTERN.fullmatch, words), None)
        if not reference and first:
            raise UsageError(f"{first} changes a config; name it with --config NAME")
        if not reference:
            return words
        try:
            saved = saved_config.load(reference) if reference.endswith(".json") else None
            self.config = (saved.config if saved else config_files.load(reference)).lock()
            options, words = overrides.separate(words, self.config)
            self.notes = overrides.apply(self.config, options)
            if saved:
                saved.check(option.name for option in options)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return [f"--config={reference}", *words]


def _reference(words: Sequence[str]) -> str:
    """Returns the value of `--config`; "" if there is none."""
    found = re.findall(r"^--?config[=\n](.*)$", "\n".join(words), re.MULTILINE)
    return found[-1] if found else ""


def define_config(default: str = "") -> flags.FlagHolder[ConfigDict]:
    """Defines `--config NAME[:ARGUMENT]` and `--config.OPTION=VALUE`; call it at most once.

    Args:
        default: the config that is read where the command line names none.
    """
    return flags.DEFINE(_ConfigReader(default), "config", None, _CONFIG_HELP)


def needed(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """Returns what `--config` names.

    Raises:
        UsageError: if it names nothing.
    """
    if holder.value is None:
        raise UsageError(
            "--config is needed: the name of a shipped recipe "
            f"({', '.join(config_files.shipped('run'))}), a FILE.py or a PACKAGE.MODULE"
        )
    reader = flags.FLAGS["config"].parser
    for note in reader.notes if isinstance(reader, _ConfigReader) else ():
        logging.info("%s", note)
    return holder.value


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; ends the process with a line for what the command does not take."""
    if any(word in _HELP for word in argv[1:]):
        sys.stdout.write(_usage())
        sys.exit(0)
    reader = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
    words = argv[1:]
    if reader and words and words[0].partition("=")[0] in _OPTIONS:
        _show_options(" ".join((*words[0].split("=", 1)[1:], *words[1:])))
    try:
        if isinstance(reader, _ConfigReader):
            words = reader.read(words)
        return flags.FLAGS([argv[0], *words])
    except UsageError as error:
        _fail(error, _USAGE)
    except flags.UnrecognizedFlagError as error:
        options = list(config_lib.all_options()) if isinstance(reader, _ConfigReader) else []
        _fail(UsageError(_unknown_flag(error.flagname, options)), _USAGE)
    except flags.IllegalFlagValueError as error:
        _fail(UsageError(_bad_value(str(error), words)), _USAGE)
    except (flags.Error, ValueError, OSError) as error:
        _fail(error, _USAGE)


def _show_options(pattern: str) -> NoReturn:
    """Prints the options whose name contains the pattern, and ends the process."""
    from atlas_jax import option_docs  # needed for nothing else

    try:
        sys.stdout.write(option_docs.plain(pattern))
    except ValueError as error:
        _fail(error, _USAGE)
    sys.exit(0)


def guarded(command: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Returns `command` with errors of the user as the exit message."""

    def run(argv: list[str]) -> None:
        _guard(lambda: command(argv))

    return run


def no_more_words(words: Sequence[str]) -> None:
    """Checks that no word of the command line is left over.

    Raises:
        UsageError: names the first one.
    """
    if words:
        foreign = migration.find(words[0])
        if foreign:
            raise UsageError(f"{words[0]}: {foreign.answer}")
        raise UsageError(
            f"{words[0]!r} is not expected here; options are written --config.NAME=VALUE, and "
            "--config CONFIG:model=NAME,data=NAME has no blanks"
        )


class ToolParser(argparse.ArgumentParser):
    """The arguments of a tool; a mistake in them is one line."""

    def __init__(self, doc: str | None = None, **options: Any) -> None:
        """Makes a parser whose help is the tool's docstring."""
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the tool with a line."""
        unknown = re.fullmatch(r"unrecognized arguments: (-[^ =]+).*", message, re.DOTALL)
        if unknown:
            foreign = migration.find(unknown[1].lstrip("-"))
            hint = (
                f"; {foreign.answer}"
                if foreign
                else nearest(unknown[1], self._option_string_actions)
            )
            message = f"unknown option {unknown[1]}{hint}"
        self.exit(_USAGE, f"error: {message}; --help tells the arguments\n")


def tool(command: Callable[[], None]) -> None:
    """Runs a tool that parses its own arguments; its errors are lines."""
    _guard(command)


def _guard(command: Callable[[], None]) -> None:
    masking.mask_logs()
    # A log on a full disk would get a traceback for each line, around the one error that counts.
    python_logging.raiseExceptions = False
    # Without torch, which nothing here needs, transformers says that it has no models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        command()
    except UsageError as error:
        _fail(error, _USAGE)
    except KeyboardInterrupt as error:
        _fail(error, _INTERRUPTED)
    except (ValueError, OSError, DependencyError) as error:
        _fail(error, _ERROR)


def _fail(error: BaseException, code: int) -> NoReturn:
    if os.environ.get("ATLAS_TRACEBACK"):
        raise error
    logging.flush()
    hint = "" if code != _ERROR else "\n(ATLAS_TRACEBACK=1 shows where)"
    sys.stderr.write(f"error: {masking.hide(_text(error))}{hint}\n")
    sys.exit(code)


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}{'; make room there, or write elsewhere' if full else ''}"


def _unknown_flag(name: str, options: Sequence[str]) -> str:
    if name in options or name in {option.split(".")[0] for option in options}:
        return f"unknown flag --{name}; write --config.{name}=…"
    foreign = migration.find(name)
    if foreign:
        return f"unknown flag --{name}: {foreign.answer}"
    known = [*_own_flags(), *(f"config.{option}" for option in options)]
    return f"unknown flag --{name}{nearest(name, known) or '; --help tells the flags'}"


def _bad_value(text: str, words: Sequence[str]) -> str:
    """Returns a sentence for a value of the wrong type, of which absl's error is `text`."""
    match = _BAD_VALUE.fullmatch(text)
    name = match["flag"] if match else ""
    kind = _KINDS.get(flags.FLAGS[name].flag_type(), "") if name in flags.FLAGS else ""
    if not kind:
        return text
    written = "\n".join(words)
    value = re.search(rf"^--?{re.escape(name)}[=\n](.*)$", written, re.MULTILINE)
    return f"--{name}={value[1] if value else '…'} must be {kind}"


def _own_flags() -> list[str]:
    """Returns the flags of the command, without those that absl brings."""
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    return ["config", *own] if "config" in flags.FLAGS else own


def _usage() -> str:
    """Returns the docstring of the command and its own flags."""
    lines = [f"  --{name:<16} {flags.FLAGS[name].help}" for name in _own_flags()]
    if "config" in flags.FLAGS:
        lines.append("  --options PATTERN  Print the options whose name contains PATTERN, or all.")
    doc = (sys.modules["__main__"].__doc__ or "").strip()
    return "\n".join(
        (doc, "", "flags:", *lines, *(_recipes() if "config" in flags.FLAGS else ()), "")
    )


def _recipes() -> list[str]:
    """Returns lines about the shipped recipes, and about where options are listed."""
    lines = ["", "recipes:"]
    for name in config_files.shipped("run"):
        path = os.path.join(os.path.dirname(__file__), "configs", "run", f"{name}.py")
        with open(path, encoding="utf-8") as file:
            doc = ast.get_docstring(ast.parse(file.read())) or ""
        lines.append(f"  {name:<18} {doc.splitlines()[0]}")
    return [
        *lines,
        "",
        "options: --config.NAME=VALUE. docs/options.md lists them, and --options [PATTERN] prints "
        "them;",
        "docs/migration.md has the names of other trainers.",
    ]
