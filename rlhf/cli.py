"""The ``rlhf`` command.

``rlhf --help`` and mistyped commands answer without loading torch or transformers; a command loads
what it needs when its options are known.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.commands import COMMANDS
from rlhf.terminal import EXIT_USER_ERROR, quiet_libraries, run_for_person


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlhf`` with these arguments (the process's own by default); return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, options = arguments[0], [with_underscores(option) for option in arguments[1:]]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(COMMANDS)}."
        print(f"rlhf: error: there is no command {name!r}.{hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    command = COMMANDS[name]
    try:
        parser = build_parser(name)
        preset = apply_preset(parser, options) if name == "ppo" else None
        args = parser.parse_args(options)
        if name == "ppo" and args.preset != preset:
            parser.error("preset is given on the command line, not in a file")
    except SystemExit as stop:  # --help ends with 0, a wrong option with 2 and a message
        return stop.code if isinstance(stop.code, int) else EXIT_USER_ERROR
    quiet_libraries()
    action = lambda: command.run(parser.instantiate(args))  # noqa: E731
    return run_for_person(action, program=f"rlhf {name}", debug=args.debug)


def overview() -> str:
    """What ``rlhf --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlhf COMMAND [options]",
            "",
            "Reinforcement learning from human feedback, in three stages: demonstrations teach a",
            "model to answer (sft), comparisons teach a second one to score answers (reward), and",
            "PPO trains the first to score higher (ppo).",
            "",
            "commands:",
            *lines,
            "",
            "`rlhf COMMAND --help` explains a command and its options. Options may also stand in a",
            "YAML file given with --config; those on the command line come on top.",
            "`python -m rlhf.demo` shows all of it on a real model in about ten minutes.",
        ]
    )


def build_parser(name: str) -> Any:
    """The argument parser of one command."""
    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the examples as they are."""

    class Parser(jsonargparse.ArgumentParser):  # type: ignore[misc]
        """Says how a name in a YAML file is written, where a dash was the mistake."""

        def error(self, message: str, ex: Exception | None = None) -> Any:
            found = re.search(r"[Oo]ption '([^']*-[^']*)'", message)
            if found:
                message += f" (in a YAML file: {found[1].replace('-', '_')}, with underscores)"
            super().error(message, ex)

    class ConfigFile(jsonargparse.ActionConfigFile):  # type: ignore[misc]
        """Takes an empty file as no settings, and no file that has one twice."""

        def __call__(self, parser: Any, found: Any, value: Any, option: str | None = None) -> None:
            if config_has_settings(parser, value):
                super().__call__(parser, found, value, option)

    command = COMMANDS[name]
    parser = Parser(
        prog=f"rlhf {name}",
        usage=f"rlhf {name} [options]",
        description=command.description,
        epilog=f"examples:\n  {command.examples}\n"
        f"  rlhf {name} ... --print_config > {name}.yaml, then rlhf {name} --config {name}.yaml",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of these options")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_arguments(parser)
    return parser


def config_has_settings(parser: Any, name: str) -> bool:
    """Whether there are settings in a YAML file. What is no such file the parser shall judge."""
    import yaml

    from rlhf.yaml_settings import has_settings

    path = Path(name).expanduser()
    if not path.is_file():
        return True
    try:
        return has_settings(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True
    except ValueError as error:
        parser.error(f"{name}, {error}")
        raise


def apply_preset(parser: Any, options: Sequence[str]) -> str | None:
    """Make the settings of the recipe that ``--preset`` names the parser's defaults."""
    from rlhf.ppo.config.presets import preset_settings

    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--preset")
    preset = finder.parse_known_args(list(options))[0].preset
    if preset is not None:
        try:
            parser.set_defaults(preset_settings(preset))
        except ValueError as error:
            parser.error(str(error))
    return preset


def with_underscores(option: str) -> str:
    """``--learning-rate=1`` as ``--learning_rate=1``: both spellings are understood."""
    if not option.startswith("--"):
        return option
    name, equals, value = option[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


if __name__ == "__main__":
    sys.exit(main())
