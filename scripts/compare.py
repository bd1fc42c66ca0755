"""Compare initialisations, learning rates, seeds, sample sizes and freeze policies, with statistics and a report.

python scripts/compare.py                                                    four schemes on digits, offline
python scripts/compare.py init=[he,zeros,ridge] optim.lr=[1e-3,1e-2] seeds=5
python scripts/compare.py model=minilm data=trec freeze=[all,none]
python scripts/compare.py runs=outputs                                       what finetune.py -m has left there
"""

import re
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from headinit.command_line import mistakes_reported, run_script

# `init` and `freeze` are groups of conf/, and Hydra would merge the files of a list into one.
_LISTS = {"init": "inits", "freeze": "freezes"}


def main() -> int:
    OmegaConf.register_new_resolver("comparison_id", lambda *, _root_: _comparison_id(_root_), replace=True)
    sys.argv[1:] = [_spelt(argument) for argument in sys.argv[1:]]
    return run_script(_main)


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
@mistakes_reported
def _main(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from headinit.analysis.results import unfinished_runs
    from headinit.comparison import compare_runs, compare_settings, plan_from
    from headinit.errors import ConfigError
    from headinit.features.cache import FeatureCache
    from headinit.processes import launched_processes
    from headinit.tracking import check_tracker, record_files, tracking

    overrides = HydraConfig.get().overrides
    folder = Path(HydraConfig.get().runtime.output_dir)
    console = Console()
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    tracker = OmegaConf.to_container(config.tracker)
    check_tracker(tracker)
    if launched_processes() > 1:
        raise ConfigError("compare.py is one process: start it without torchrun; workers=N runs cells side by side.")
    if config.runs is not None:
        unfinished = len(unfinished_runs(config.runs))
        comparison = compare_runs(config.runs, margin=config.margin)
        if unfinished:
            console.print(f"[yellow]{unfinished} runs have begun and not finished: they are left out.[/yellow]")
        if not any(override.startswith("hydra.run.dir=") for override in overrides.hydra):
            with suppress(OSError):
                folder.rmdir()  # made by Hydra; a report is beside the runs
            folder = Path(config.runs)
    else:
        _refuse_options_of_one(overrides.task)
        settings, grid = plan_from(OmegaConf.to_container(plain, resolve=True))
        cache = None if config.cache is None else FeatureCache(config.cache, max_bytes=int(config.cache_gb * 2**30))
        comparison = compare_settings(
            settings,
            grid,
            folder,
            cache=cache,
            views=config.views,
            margin=config.margin,
            workers=config.workers,
            keep_models=config.keep_models,
            progress=config.trainer.progress,
            console=console,
        )
    comparison.save(folder)
    with tracking(tracker, folder, OmegaConf.to_container(plain, resolve=True)):
        record_files([folder / "comparison.json", folder / "report.html"])
    console.print(comparison.rich_table())
    console.print(comparison.conclusion(), highlight=False)
    console.print(f"[bold]report[/bold]  {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _spelt(argument: str) -> str:
    """`init=[he,zeros]` as `inits=[he,zeros]`, and `init=he` as `inits=[he]`; the same for freeze."""
    group, equals, value = argument.partition("=")
    if group not in _LISTS or not equals:
        return argument
    return f"{_LISTS[group]}={value}" if value.startswith("[") else f"{_LISTS[group]}=[{value}]"


def _refuse_options_of_one(overrides: list[str]) -> None:
    """`init.std=1` would say nothing about which of the schemes it is for."""
    from headinit.errors import ConfigError
    from headinit.schemes import modifiers

    for override in overrides:
        found = re.match(r"\+*init\.(\w+)=(.*)", override)
        if found and found.group(1) not in modifiers():
            option, value = found.groups()
            raise ConfigError(
                f"init.{option} is an option of one scheme, and several are compared. Give it with its scheme: "
                f"'init=[he,{{name:SCHEME,{option}:{value}}}]'. Modifiers ({', '.join(modifiers())}) hold for all."
            )


def _comparison_id(config: DictConfig) -> str:
    """The folder of a comparison: the same whatever is compared, so that cells that have finished are found again."""
    from headinit.config import run_id

    shared = OmegaConf.masked_copy(config, [key for key in config if key not in ("hydra", *_COMPARED)])
    for key in ("optim.lr", "optim.weight_decay", "data.per_class", "data.split_seed"):
        OmegaConf.update(shared, key, None)
    name = run_id({**OmegaConf.to_container(shared, resolve=True), "init": {"name": "compare"}})
    return f"compare-{name.replace('-compare-', '-')}"


_COMPARED = (
    *("inits", "init", "freezes", "freeze", "seeds", "seed", "order_seed"),
    *("runs", "margin", "workers", "keep_models", "cache", "cache_gb"),
)


if __name__ == "__main__":
    sys.exit(main())
