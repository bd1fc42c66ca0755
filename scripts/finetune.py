"""One run: load a pretrained backbone, start a head by a scheme, train it on your data, report.

python scripts/finetune.py                                             EfficientNet-Lite0 on digits, offline, a minute
python scripts/finetune.py model=resnet50 init=he data=imagefolder data.root=photos
python scripts/finetune.py model=bert data=csv data.train=train.tsv freeze=none
python scripts/finetune.py baseline=run_glue/rte                        a published recipe; reproduce.py judges it
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from headinit.command_line import mistakes_reported, run_script


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
@mistakes_reported
def _main(config: DictConfig) -> float | None:
    """The validation score at the best epoch, for a sweeper that searches; None where it is not a number."""
    from hydra.core.hydra_config import HydraConfig

    from headinit.config import settings_from
    from headinit.experiment import run

    record = run(settings_from(config), Path(HydraConfig.get().runtime.output_dir))
    return record.val.get(record.config["trainer"]["monitor"])


def main() -> int:
    return run_script(_expanded)


def _expanded() -> None:
    """`baseline=run_glue/rte` stands for the arguments of that published recipe; the user's own come after them."""
    name = next((item.partition("=")[2] for item in sys.argv[1:] if item.startswith("baseline=")), None)
    if name is not None:
        sys.argv[1:] = _arguments_of(name, [item for item in sys.argv[1:] if not item.startswith("baseline=")])
    _main()


def _arguments_of(name: str, arguments: list[str]) -> list[str]:
    from headinit.errors import ConfigError
    from headinit.reproduction.baselines import arguments_with, find_rows

    rows = find_rows(Path(__file__).resolve().parent.parent / "conf", name)
    if len(rows) != 1:
        raise ConfigError(
            f"baseline={name} has {len(rows)} rows, and this is one run: {', '.join(r.name for r in rows)}."
        )
    if rows[0].kind != "runs":
        raise ConfigError(f"baseline={name} is no training run: python scripts/reproduce.py baseline={name}")
    flags = [item for item in arguments if item.startswith("-") or "=" not in item]
    return [*flags, *arguments_with(rows[0], [item for item in arguments if item not in flags])]


if __name__ == "__main__":
    sys.exit(main())
