"""Label new pictures or sentences with a saved model.

python scripts/predict.py model=outputs/RUN input=photo.jpg                  one picture
python scripts/predict.py model=outputs/RUN input=photos output=labels.csv   a folder, and those below it
python scripts/predict.py model=outputs/RUN input="A sentence."              or a file: .txt .csv .tsv .jsonl .conll
python scripts/predict.py model=[outputs/A,outputs/B] input=photos           the mean of several runs' weights (a soup)
"""

import re
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, ListConfig

from headinit.command_line import run_script
from headinit.errors import DataError, HeadInitError

# What people write is no Hydra grammar: these values are taken as they are. `model` is also a group of conf/.
_VERBATIM = {"model": "model.folder", "input": "input", "output": "output", "text": "text", "text_pair": "text_pair"}


_mistakes: list[HeadInitError] = []


def main() -> int:
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    return run_script(_run)


def _run() -> None:
    _task()
    for mistake in _mistakes:
        raise mistake


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
def _task(config: DictConfig) -> None:
    try:
        _label(config)
    except HeadInitError as error:  # raised again outside: Hydra would add lines of its own about a failed job
        _mistakes.append(error)


def _label(config: DictConfig) -> None:
    from rich.console import Console

    from headinit import prediction

    prediction.check_settings(config.batch_size, config.top_k, config.threshold, config.show)
    output = prediction.check_output(config.output, config.input)
    folder = config.model.folder
    several = isinstance(folder, ListConfig) and len(folder) > 0
    model = prediction.load_soup(list(folder)) if several else prediction.load_for_prediction(folder)
    modality = prediction.preprocessing_of(model).modality
    inputs = prediction.find_inputs(config.input, modality, config.text, config.text_pair)
    found = prediction.label_inputs(
        model, inputs, batch_size=config.batch_size, top_k=config.top_k, threshold=config.threshold
    )
    console = Console()
    if found.rows:
        console.print(prediction.prediction_table(found, config.show))
    if len(found.rows) > config.show:
        console.print(f"... and {len(found.rows) - config.show} more: output=FILE.csv writes them all.")
    if inputs.left_out:
        console.print(f"Left out {inputs.left_out} files that are not pictures by their suffix.")
    if output is not None:
        prediction.write_predictions(found, output)
        console.print(f"{len(found.rows)} rows in {prediction.printable(str(output))}", markup=False, soft_wrap=True)
    for name, reason in found.failures:
        print(f"Cannot label {prediction.printable(name)}: {prediction.printable(reason)}", file=sys.stderr)
    if found.failures:
        total = len(found.rows) + len(found.failures)
        raise DataError(f"{len(found.failures)} of {total} inputs could not be labelled; the others are done.")


def _quoted(argument: str) -> str:
    """`input=It's good, really!` as Hydra wants it: quoted, and without interpolation."""
    key, equals, value = argument.partition("=")
    if key not in _VERBATIM or not equals or value in ("", "null"):
        return argument
    if key == "model" and re.fullmatch(r"\[.*\]", value) and not Path(value).exists():
        return f"{_VERBATIM[key]}={value}"
    inside = re.fullmatch(r"""(['"])(.*)\1""", value, re.DOTALL)
    if inside and inside.group(1) not in inside.group(2):  # quoted by hand, as other scripts need it
        value = inside.group(2)
    value = value.replace("${", "\\${")
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # Hydra halves the backslashes before a quotation mark
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"{_VERBATIM[key]}='{value}'"


if __name__ == "__main__":
    sys.exit(main())
