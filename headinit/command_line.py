"""What every script shares: one message and exit code 2 for a mistake, a traceback only when asked for."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from headinit.config import run_id
from headinit.errors import HeadInitError, unknown_name

# An environment variable, so that the processes of a launcher know it too.
_DEBUG = "HEADINIT_DEBUG"


def mistakes_reported(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """For a Hydra task: report a mistake of the user's here, before Hydra adds lines of its own on the failed job."""

    @functools.wraps(task)
    def wrapped(config: DictConfig) -> None:
        try:
            task(config)
        except HeadInitError as error:
            if _debugging():
                raise
            _remove_empty_run_folder()
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def _remove_empty_run_folder() -> None:
    """Hydra makes the run's folder before the run has looked at its input."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir).resolve()
    with suppress(OSError):  # not empty: something worth keeping is there
        for made in (folder, folder.parent):
            if not Path.cwd().is_relative_to(made):
                made.rmdir()


def run_script(main: Callable[[], Any]) -> int:
    """Run a Hydra main function as a script.

    Args:
        main: the function that `hydra.main` decorated.

    Returns:
        The exit code: 0, or 2 after a mistake of the user's, whose message went to standard error. With ``--debug`` on
        the command line or ``HYDRA_FULL_ERROR=1`` in the environment the exception is raised instead.
    """
    if "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1":
        os.environ[_DEBUG] = "1"
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    with suppress(ValueError):  # already registered by an earlier call in this process
        OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they are reported here
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this one stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if _debugging():
            raise
        message = _message(error)
        if message is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        return 2
    return 0


def _debugging() -> bool:
    return os.environ.get(_DEBUG) == "1"


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is headinit's own fault and deserves its traceback."""
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException

    if isinstance(error, HeadInitError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return str(unknown_name(group, name, error.options))
    if isinstance(error, ConfigCompositionException):
        return _unknown_key(str(error)) or str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error).splitlines()[0]
    return None


def _unknown_key(message: str) -> str | None:
    """For an override of a key that is not there: the near keys of the same group."""
    found = re.search(r"Could not override '([^']+)'", message)
    if found is None:
        return None
    from hydra import compose, initialize_config_dir

    key = found.group(1)
    script = Path(sys.argv[0]).resolve()
    configurations = script.parent.parent / "conf"
    parent, _, last = key.rpartition(".")
    chosen = [argument for argument in sys.argv[1:] if re.fullmatch(r"[a-z]+=[A-Za-z0-9_]+", argument)]
    groups = [argument for argument in chosen if (configurations / argument.partition("=")[0]).is_dir()]
    with suppress(Exception), initialize_config_dir(str(configurations), version_base="1.3"):
        node = compose(config_name=script.stem, overrides=groups)
        siblings = OmegaConf.select(node, parent) if parent else node
        return str(unknown_name(f"setting of {parent}" if parent else "setting", last, list(siblings)))
    return None
