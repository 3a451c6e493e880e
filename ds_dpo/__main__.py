"""The program ds-dpo, also `python -m ds_dpo`: one entry with a subcommand for each program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from ds_dpo.config.command_text import commands_as_started
from ds_dpo.config.fields import did_you_mean
from ds_dpo.config.version import version_text
from ds_dpo.errors import ConfigError, run_program


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program. module: its `main` takes the arguments. leaves_at_once, fails_at_once: see run_program."""

    module: str
    summary: str
    leaves_at_once: bool = False
    fails_at_once: bool = False


COMMANDS = {
    "train": Command(module="ds_dpo.train", summary="Train on preference pairs, on this rank.", fails_at_once=True),
    "launch": Command(module="ds_dpo.commands.launch", summary="Check every host, then train on all of them."),
    "data-stats": Command(module="ds_dpo.commands.data_stats", summary="Describe preference pairs before training."),
    "plan": Command(module="ds_dpo.commands.plan", summary="Say whether a run fits its GPUs, and how fast it is."),
    "cache": Command(module="ds_dpo.commands.cache", summary="Encode pairs, or compute a reference's errors, once."),
    "relabel": Command(module="ds_dpo.commands.relabel", summary="Label pairs by scorers of images, as AI feedback."),
    "make-pairs": Command(module="ds_dpo.commands.make_pairs", summary="Make pairs of a model's own scored images."),
    "rounds": Command(module="ds_dpo.commands.rounds", summary="Draw, score, pair and train, again and again."),
    "consolidate": Command(
        module="ds_dpo.commands.consolidate",
        summary="Turn a run's ZeRO shards into a model that other programs load.",
        leaves_at_once=True,
    ),
    "generate": Command(module="ds_dpo.commands.generate", summary="Draw prompts with several models, side by side."),
    "evaluate": Command(module="ds_dpo.commands.evaluate", summary="Compare models on the same prompts, by scorers."),
    "replay": Command(module="ds_dpo.commands.replay", summary="Repeat one step of a run, to find what is not finite."),
}


def main() -> None:
    """Start the program that the first argument names."""
    arguments = _without_local_rank(sys.argv[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
    elif arguments[0] == "--version":
        print(version_text())
    else:
        name = arguments[0].replace("_", "-")
        if name not in COMMANDS:
            run_program(lambda: _refuse(arguments[0]))
        run_command(name, arguments[1:])


def run_command(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a program until its end, and exit with status 2 for an error of its user. argv: sys.argv's if unset."""
    command = COMMANDS[name]
    arguments = list(sys.argv[1:] if argv is None else argv)

    def start() -> None:
        with commands_as_started():
            import_module(command.module).main(arguments)

    run_program(
        start,
        leaves_at_once=command.leaves_at_once,
        fails_at_once=command.fails_at_once,
    )


def usage() -> str:
    """Return the list of programs."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ds-dpo COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "ds-dpo COMMAND --help lists the options of a command; ds-dpo --version prints the version.",
            "On several GPUs: ds-dpo launch --num_gpus 8 train --config NAME",
        ]
    )


def _refuse(name: str) -> None:
    near = did_you_mean(name, COMMANDS)
    raise ConfigError(f"{name} is not a command{near or '; one of ' + ', '.join(COMMANDS) + ' would fit'}")


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Return arguments with a --local_rank=N, which `deepspeed --module ds_dpo` puts first, behind the command."""
    if argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        return [*argv[1:2], argv[0], *argv[2:]]
    return list(argv)


if __name__ == "__main__":
    main()
