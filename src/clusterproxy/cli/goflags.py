"""Command lines as Go's pflag reads them, and as cobra puts them to use.

Manifests and operators' habits are written for the Go programs, so every spelling that those take
is taken here, with the same words for the same mistakes. Two things are wider: underscores in a
name stand for hyphens in every flag, not in klog's alone, and single-dash ``-test.`` arguments are
mistakes like any other. Source: ``flag.go`` of github.com/spf13/pflag v1.0.10 (``parseArgs``,
``parseLongArg``, ``parseSingleShortArg``, ``FlagUsagesWrapped``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote

from .govalues import BOOL, DURATION, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    _Put = Callable[["Flag", str], None]


@attrs.frozen(kw_only=True)
class Flag:
    """One flag: ``field`` is the place of its value in the config, empty where there is none."""

    name: str
    kind: Kind[Any]
    default: Any
    usage: str
    field: str = ""
    shorthand: str = ""
    hidden: bool = False
    deprecated: str = ""
    """What pflag says when the flag is used, if it is deprecated; such flags are hidden."""
    no_effect: bool = False
    """Taken for the sake of the Go programs' command lines, without a meaning here."""
    alias_of: str = ""
    """The flag that this is another name of."""

    @property
    def shown(self) -> bool:
        """Whether the usage text lists the flag."""
        return not (self.hidden or self.deprecated)

    @property
    def default_text(self) -> str:
        """The default as a command line would have it, empty if it is the zero of its kind."""
        return self.kind.show_default(self.default)


def flag_of(
    config: type[attrs.AttrsInstance],
    name: str,
    kind: Kind[Any],
    usage: str,
    *,
    field: str = "",
    default: object = None,
    no_effect: bool = False,
) -> Flag:
    """Make the flag of a field of *config*: of the same name, with the same default."""
    field = field or name.replace("-", "_") + ("_s" if kind is DURATION else "")
    if default is None:
        default = attrs.fields_dict(config)[field].default
    return Flag(
        name=name, kind=kind, default=default, usage=usage, field=field, no_effect=no_effect
    )


HELP: Final = Flag(name="help", shorthand="h", kind=BOOL, default=False, usage="help for this")


@attrs.frozen(kw_only=True)
class Parsed:
    """What a command line says."""

    values: Mapping[str, Any]
    """Every flag's value by its name, defaults included."""
    given: frozenset[str]
    """The names of the flags that were on the command line."""
    arguments: tuple[str, ...]
    """What was neither a flag nor the value of one: the programs ignore it, as cobra does."""

    def fields(self, flags: FlagSet) -> dict[str, Any]:
        """Return the values by the names of the config's fields."""
        return {flag.field: self.values[flag.name] for flag in flags if flag.field}


class FlagSet:
    """The flags of one program; with *single_dash* ``-name`` is taken as ``--name``, too."""

    def __init__(
        self, program: str, summary: str, flags: Iterable[Flag], *, single_dash: bool = False
    ) -> None:
        self.program = program
        # Go's own flag package knows no groups of letters: one dash is as good as two.
        self._single_dash = single_dash
        self._summary = summary
        help_flag = attrs.evolve(HELP, usage=f"help for {program}")
        self._flags = {flag.name: flag for flag in (*flags, help_flag)}
        self._shorthands = {flag.shorthand: flag for flag in self if flag.shorthand}

    def __iter__(self) -> Iterator[Flag]:
        """Go through the flags in the order of their names."""
        return iter(sorted(self._flags.values(), key=lambda flag: flag.name))

    def __getitem__(self, name: str) -> Flag:
        return self._flags[name]

    def parse(self, args: Sequence[str]) -> Parsed:
        """Read a command line without the program's name.

        Raises:
            ConfigError: for the first thing that pflag would refuse, in its words.
        """
        values = {flag.name: flag.default for flag in self if not flag.alias_of}
        given: set[str] = set()
        arguments: list[str] = []
        rest = list(reversed(args))

        def put(flag: Flag, text: str) -> None:
            try:
                value = flag.kind.parse(text)
            except ValueError as exc:
                name = f"-{flag.shorthand}, --{flag.name}" if flag.shorthand else f"--{flag.name}"
                raise ConfigError(
                    flag.name, f"invalid argument {quote(text)} for {quote(name)} flag: {exc}"
                ) from exc
            target = flag.alias_of or flag.name
            # The first use of a list replaces the default, further ones add to it.
            extend = flag.kind.repeated and target in given
            values[target] = (*values[target], *value) if extend else value
            given.update({target, flag.name})

        while rest:
            arg = rest.pop()
            if arg == "--":
                arguments += reversed(rest)
                break
            if arg.startswith("--"):
                self._long(arg, rest, put)
            elif arg.startswith("-") and arg != "-":
                if self._single_dash and arg[1:] not in self._shorthands:
                    self._long(f"-{arg}", rest, put)
                else:
                    self._short(arg[1:], rest, put)
            else:
                arguments.append(arg)
        return Parsed(values=values, given=frozenset(given), arguments=tuple(arguments))

    def _long(self, arg: str, rest: list[str], put: _Put) -> None:
        name, equals, text = arg[2:].partition("=")
        if not name or name.startswith("-"):
            raise ConfigError(arg, f"bad flag syntax: {arg}")
        flag = self._flags.get(name.replace("_", "-"))
        if flag is None:
            raise ConfigError(name, f"unknown flag: --{name}")
        if equals:
            put(flag, text)
        elif flag.kind.bare is not None:
            put(flag, flag.kind.bare)
        elif rest:
            put(flag, rest.pop())
        else:
            raise ConfigError(flag.name, f"flag needs an argument: --{name}")

    def _short(self, letters: str, rest: list[str], put: _Put) -> None:
        while letters:
            letter, more = letters[0], letters[1:]
            flag = self._shorthands.get(letter)
            if flag is None:
                raise ConfigError(letter, f"unknown shorthand flag: '{letter}' in -{letters}")
            if len(more) > 1 and more.startswith("="):
                put(flag, more[1:])
                return
            if flag.kind.bare is not None:
                put(flag, flag.kind.bare)
                letters = more
                continue
            if more:
                put(flag, more)
            elif rest:
                put(flag, rest.pop())
            else:
                raise ConfigError(flag.name, f"flag needs an argument: '{letter}' in -{letters}")
            return

    def usage(self) -> str:
        """Return cobra's usage text, with a line end at its end."""
        rows: list[tuple[str, str]] = []
        for flag in self:
            if not flag.shown:
                continue
            head = f"  -{flag.shorthand}, " if flag.shorthand else "      "
            head += f"--{flag.name}"
            if flag.kind.name:
                head += f" {flag.kind.name}"
            default = flag.default_text
            rows.append((head, flag.usage + (f" (default {default})" if default else "")))
        width = max(len(head) for head, _ in rows)
        lines = "".join(f"{head:<{width}}   {usage}\n" for head, usage in rows)
        return f"Usage:\n  {self.program} [flags]\n\nFlags:\n{lines}"

    def help(self) -> str:
        """Return what ``--help`` prints."""
        return f"{self._summary}\n\n{self.usage()}"
