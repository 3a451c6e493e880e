"""Fine-tune a text-to-image diffusion model on preference pairs; started by `deepspeed`, torchrun, srun, or alone.

deepspeed --hostfile hostfiles/a100x16 ds_dpo/train.py --config sdxl_pickapic
python ds_dpo/train.py --dry_run --world_size 16
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # started by its path: that put ds_dpo/ itself first, where the package cannot be found and names could clash
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_dpo.config.asset_paths import is_local
from ds_dpo.config.command_text import commands_as_started
from ds_dpo.config.load import LoadedConfig, config_to_yaml, load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import RankEnvironment, export_environment, local_rank_in, read_environment
from ds_dpo.engine.settings import ResolvedDeepSpeed, ranks_text, resolve_deepspeed
from ds_dpo.errors import ConfigError, StopAskedError, run_program
from ds_dpo.planning.description import describe
from ds_dpo.process.quiet import quiet_libraries
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.usable import require_usable
from ds_dpo.supervision.rank import Supervision
from ds_dpo.supervision.run_lock import RunLock, handed_in


@commands_as_started()
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says, or print the resolved configuration. Raises DsDpoError for the user."""
    quiet_libraries()
    loaded = _load(sys.argv[1:] if argv is None else argv)
    if loaded.dry_run:
        print_resolved(loaded)
        return
    with Supervision(loaded.config, os.environ) as supervision:
        place = read_environment(os.environ)
        export_environment(place)  # before any error: under plain srun nothing else says which rank may print it
        log = RunLog(speaks=place.rank == 0)
        supervision.note = log.note
        resolved = resolve_deepspeed(loaded.config, world_size=place.world_size)
        log.line(f"starting run {loaded.config.output_dir} on {ranks_text(place.world_size)}: importing PyTorch")
        _shout_of_faults(place, log)
        for line in loaded.remarks:
            log.line(line)
        with _lock(loaded.config, supervision, log) as lock:
            with log.ended_by():
                is_done = _train(loaded, resolved, place, supervision, log, lock)
            supervision.record_end(is_done=is_done)
            # torch and DeepSpeed take ten seconds to import; a mistyped option is an error before that
            from ds_dpo.distributed.collectives import barrier

            barrier()  # the launcher must know the end before the first rank exits


def _shout_of_faults(place: RankEnvironment, log: RunLog) -> None:
    """Say on each rank that has it that DS_DPO_FAULT is set: it may be left on one host alone."""
    from ds_dpo.process import fault_points  # which refuses a variable that it cannot read

    for line in fault_points.warnings():
        log.line(line)
        if place.rank != 0:
            print(f"rank {place.rank} on {platform.node()}: {line}", file=sys.stderr, flush=True)


def _lock(config: RunConfig, supervision: Supervision, log: RunLog) -> RunLock:
    """Return the lock of the run folder, which rank 0 takes before anything is written."""
    folder, handed = Path(config.output_dir), handed_in(os.environ)
    return RunLock(folder, handed=handed, on_lost=supervision.leave_displaced, say=log.line)


def _train(
    loaded: LoadedConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    supervision: Supervision,
    log: RunLog,
    lock: RunLock,
) -> bool:
    """Import what trains, let the ranks meet, and train; returns whether the run is done."""
    from ds_dpo.launch.meeting import meeting

    config = loaded.config

    def first() -> None:
        require_usable(Path(config.output_dir))
        lock.take()

    try:
        with meeting(config, place, os.environ, stop=supervision.stop, say=log.line, first=first):
            log.line("importing DeepSpeed, diffusers and transformers")
            from ds_dpo.training.assembly import train

            return train(config, resolved, place, supervision, log=log, resume=loaded.resume)
    except StopAskedError as asked:
        if place.rank == 0:
            supervision.stop.clear_file()
        log.line(str(asked))
        return False


def _load(argv: Sequence[str]) -> LoadedConfig:
    """Read the configuration. An error is printed once per host, because hosts may have different files."""
    try:
        return load_config(argv)
    except ConfigError as error:
        error.same_on_all_ranks = False
        error.is_said_elsewhere = local_rank_in(os.environ) != 0
        raise


def print_resolved(loaded: LoadedConfig) -> None:
    """Print both complete configurations, and what they mean in words; nothing is loaded or written.

    Raises ConfigError, and DataError if a local data set lacks a split.
    """
    import json

    world_size = loaded.world_size or read_environment(os.environ).world_size
    resolved = resolve_deepspeed(loaded.config, world_size=world_size)
    print("# run configuration")
    print(config_to_yaml(loaded.config))
    print("# DeepSpeed settings")
    print(json.dumps(resolved.settings, indent=2))
    print("\n# in words")
    print("\n".join([*describe(loaded.config, resolved), *loaded.remarks]))
    if any(map(is_local, (loaded.config.data.dataset, loaded.config.held_out.dataset))):
        # it takes seconds to import
        from ds_dpo.data.reading.held_out_data import require_local_splits

        require_local_splits(loaded.config)


if __name__ == "__main__":
    run_program(main, fails_at_once=True)
