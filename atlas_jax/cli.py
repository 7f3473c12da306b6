"""What the commands share: flags, `--config FILE`, and one line for an error of the user.

Exit codes: 1 for an error, 2 for words that the command does not take, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from atlas_jax import config as config_lib
from atlas_jax import config_files, masking
from atlas_jax.config import nearest
from atlas_jax.types import DependencyError

_ERROR, _USAGE, _INTERRUPTED = 1, 2, 130
_HELP = ("--help", "-h", "-help", "--helpshort", "--helpfull")
_OPTIONS = ("--options", "-options")
_OVERRIDE = re.compile(r"--?(?:no)?config\.(?P<name>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_BAD_VALUE = re.compile(r"flag --(?P<flag>[\w.]+)=.*", re.DOTALL)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


class UsageError(Exception):
    """Words that the command does not take; no `ValueError`, of which absl rewrites the text."""


class _ConfigReader(flags.ArgumentParser[ConfigDict]):
    """Reads the file of `--config`, and checks the names of the options that change it."""

    def __init__(self, default: str) -> None:
        self.default = default
        self.config = ConfigDict()
        self.overrides: list[re.Match[str]] = []

    def parse(self, argument: str | ConfigDict) -> ConfigDict:
        """Returns the config; every option on the command line exists in it."""
        if isinstance(argument, ConfigDict):
            return argument
        try:
            self.config = config_files.load(argument).lock()
        except ValueError as error:
            raise UsageError(str(error)) from error
        for match in self.overrides:
            self._check(match["name"], match["value"] or "")
        self._check_given_once([match["name"] for match in self.overrides])
        return self.config

    def flag_type(self) -> str:
        """Returns what absl's help calls the value."""
        return "config file"

    def _check_given_once(self, names: Sequence[str]) -> None:
        """Checks that no option is given under its former name and its present one."""
        former = config_lib.former_names(self.config)
        for name in names:
            if former.get(name) in names:
                raise UsageError(f"{name} and {former[name]} are two names of one option; give one")

    def _check(self, name: str, value: str) -> None:
        group: Any = self.config
        for part in name.split("."):
            if not isinstance(group, ConfigDict) or part not in group:
                raise UsageError(f"unknown option {name}{_nearest_option(name, self.config)}")
            group = group[part]
        if isinstance(group, ConfigDict) and not value.startswith("{"):
            some = ", ".join(f"{name}.{option}" for option in list(group)[:3])
            swap = f"; to take configs/{name}/{value}.py, write --config FILE.py:{name}={value}"
            raise UsageError(
                f"{name}={value}: {name} is a group of options ({some}, …); set one of these"
                f"{swap if name in ('model', 'data') else ''}"
            )


def define_config(default: str = "") -> flags.FlagHolder[ConfigDict]:
    """Defines `--config FILE.py[:ARGUMENT]` and `--config.OPTION=VALUE`; call it at most once.

    Args:
        default: the file that is read where the command line names none.
    """
    holder = config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARGUMENT].")
    flags.FLAGS["config"].parser = _ConfigReader(default)
    return holder


def needed(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """Returns what `--config` names.

    Raises:
        UsageError: if it names nothing.
    """
    if holder.value is None:
        raise UsageError("--config FILE.py is needed, such as configs/run/teacher_sft.py")
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
            words = _with_config(words, reader)
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
        raise UsageError(
            f"{words[0]!r} is not expected here; options are written --config.NAME=VALUE, and "
            "CONFIG.py:model=NAME,data=NAME has no blanks"
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
        self.exit(_USAGE, f"error: {message}; --help tells the arguments\n")


def tool(command: Callable[[], None]) -> None:
    """Runs a tool that parses its own arguments; its errors are lines."""
    _guard(command)


def _guard(command: Callable[[], None]) -> None:
    masking.mask_logs()
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


def _with_config(words: list[str], reader: _ConfigReader) -> list[str]:
    """Returns the words with the default file where none is named; notes what changes it."""
    expanded = flags.FLAGS.read_flags_from_files(words, force_gnu=False)
    matches = map(_OVERRIDE.fullmatch, expanded)
    reader.overrides = [match for match in matches if match]
    if any(re.fullmatch(r"--?config(=.*)?", word, re.DOTALL) for word in expanded):
        return words
    if reader.default:
        return [f"--config={reader.default}", *words]
    if reader.overrides:
        raise UsageError(
            f"{reader.overrides[0][0]} changes a config; name it with --config FILE.py"
        )
    return words


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the options of a config, those of groups as `group.name`."""
    names: list[str] = []
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        names += _names(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def _nearest_option(name: str, config: ConfigDict) -> str:
    """Returns the option that is meant, also where its group is missing or another one."""
    options = _names(config)
    same = [option for option in options if option.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean {same[0]!r}?" if same else nearest(name, options)


def _unknown_flag(name: str, options: Sequence[str]) -> str:
    if name in options or name in {option.split(".")[0] for option in options}:
        return f"unknown flag --{name}; write --config.{name}=…"
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
    return "\n".join((doc, "", "flags:", *lines, ""))
