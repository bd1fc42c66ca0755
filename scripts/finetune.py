"""One run: load a pretrained backbone, start a head by a scheme, train it on your data, report.

python scripts/finetune.py                                             EfficientNet-Lite0 on digits, offline, a minute
python scripts/finetune.py model=resnet50 init=he data=imagefolder data.root=photos
python scripts/finetune.py model=bert data=csv data.train=train.tsv freeze=none
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from headinit.command_line import mistakes_reported, run_script


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
@mistakes_reported
def main(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from headinit.config import settings_from
    from headinit.experiment import run

    run(settings_from(config), Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    sys.exit(run_script(main))
