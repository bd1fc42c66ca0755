"""What every script shares: one message and exit code 2 for a mistake, a traceback only when asked for."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from headinit.config import run_id
from headinit.errors import HeadInitError, unknown_name
from headinit.processes import launched_processes, leave_processes

_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
# An environment variable, so that the processes of a launcher know it too.
_DEBUG = "HEADINIT_DEBUG"
# What the files of conf/hydra/ build on, and the extra that brings it.
_PLUGINS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


def mistakes_reported(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """For a Hydra task: report a mistake of the user's here, before Hydra adds lines of its own on the failed job."""

    @functools.wraps(task)
    def wrapped(config: DictConfig) -> Any:
        try:
            _take_share_of_cores()
            return task(config)
        except HeadInitError as error:
            if _debugging():
                raise
            _remove_empty_run_folder()
            who = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            print(f"Error{who}: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def _take_share_of_cores() -> None:
    """In a sweep whose jobs run side by side: as many threads as each has cores, or they wait for each other's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    share = cores_of_job(HydraConfig.get().launcher)
    if share is None:
        return
    import torch

    torch.set_num_threads(min(share, torch.get_num_threads()))


def cores_of_job(launcher: Mapping[str, Any]) -> int | None:
    """How many cores one job of a launcher has; None if its jobs run one after another.

    Args:
        launcher: Hydra's settings of it: `n_jobs` of joblib (-1 for one a core), `cpus_per_task` of submitit, or
            `ray.remote.num_cpus`.

    Example:
        >>> cores_of_job({"n_jobs": 10_000}), cores_of_job({"cpus_per_task": 3}), cores_of_job({})
        (1, 3, None)
    """
    own = launcher.get("cpus_per_task") or ((launcher.get("ray") or {}).get("remote") or {}).get("num_cpus")
    if own is not None:
        return max(1, int(own))
    jobs = launcher.get("n_jobs")
    if jobs is None:
        return None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // (jobs if jobs > 0 else max(1, cores + 1 + jobs)))


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
    # conf/hydra/launcher/ray.yaml has the name of the plugin's own settings on purpose: it is what a user types.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/ray' is validated against ConfigStore")
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
    finally:
        leave_processes()
    return 0


def _run_folder(config: DictConfig) -> str:
    """The name of a run's folder; several processes take more batches in a step, which makes it another run."""
    processes = launched_processes()
    return run_id(config) if processes == 1 else f"{run_id(config)}-{processes}_processes"


# When this is imported, and not when a script begins: the processes of a launcher import it and run no script.
OmegaConf.register_new_resolver("run_id", lambda *, _root_: _run_folder(_root_), replace=True)


def _debugging() -> bool:
    return os.environ.get(_DEBUG) == "1"


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is headinit's own fault and deserves its traceback."""
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException

    if isinstance(error, HeadInitError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
        return f"{error}. Make room, or choose a folder that can be written with hydra.run.dir=FOLDER."
    if isinstance(error, MissingConfigException) and (plugin := _missing_plugin(str(error.missing_cfg_file))):
        return plugin
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return str(unknown_name(group, name, error.options))
    if isinstance(error, RuntimeError) and "Unknown plugin class" in str(error) and "hydra_ray_launcher" in str(error):
        return _missing_plugin("hydra/launcher/ray")
    if isinstance(error, ConfigCompositionException):
        return _unknown_key(str(error)) or str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error).splitlines()[0]
    return None


def _missing_plugin(asked: str) -> str | None:
    """For a launcher or sweeper that builds on a package which is not here."""
    extra = _PLUGINS.get(asked)
    if extra is None:
        return None
    return f"{asked} comes with a package that is not installed here. Install it with pip install 'headinit[{extra}]'."


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
