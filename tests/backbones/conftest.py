"""Empty caches and no network, whatever the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Caches:
    torch_home: Path
    hf_home: Path

    def torch_file(self, name: str) -> Path:
        path = self.torch_home / "hub" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def snapshot(self, repository: str, commit: str = "a" * 40) -> Path:
        """The folder of a repository in the layout of the hub's cache."""
        root = self.hf_home / "hub" / ("models--" + repository.replace("/", "--"))
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(commit)
        folder = root / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch) -> Caches:
    root = tmp_path_factory.mktemp("caches")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    # A proxy that refuses: the same answer with and without a network, at once.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Caches(root / "torch", root / "hf")
