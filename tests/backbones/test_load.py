from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headinit.backbones.catalog import CATALOG
from headinit.backbones.load import build_library_model, load_backbone
from headinit.backbones.weights import bundled_file
from headinit.errors import ConfigError, WeightsError
from tests.backbones.helpers import add_tokenizer, assert_same, bert_config, bert_folder, timm_model, torchvision_model

RESNET18 = "resnet18-f37072fd.pth"


def pictures(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# the bundled models


def test_efficientnet_lite0_is_filled_name_by_name():
    backbone = load_backbone("efficientnet_lite0")
    assert (backbone.weights.source, backbone.weights.verified) == ("bundled", True)
    assert (backbone.weights.missing, backbone.weights.unexpected) == ((), ())
    file = torch.load(bundled_file(CATALOG["efficientnet_lite0"].bundle), weights_only=True)
    state = backbone.model.state_dict()
    assert len(file) == len(state)
    # Norms and convolutions of a block may share shapes, so the pairs are written out for one block of each kind.
    for theirs, ours in {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.4._expand_conv.weight": "blocks.2.1.conv_pw.weight",
        "_blocks.4._bn0.weight": "blocks.2.1.bn1.weight",
        "_blocks.4._bn1.weight": "blocks.2.1.bn2.weight",
        "_blocks.15._bn2.running_mean": "blocks.6.0.bn3.running_mean",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
    }.items():
        torch.testing.assert_close(state[ours], file[theirs], rtol=0, atol=0)
    preset = backbone.preprocessing
    assert (preset.size, preset.resize, preset.interpolation) == ((224, 224), 256, "bicubic")
    assert preset.mean == preset.std == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_efficientnet_lite0_with_its_own_head_knows_ants_from_bees(shared_data):
    """130 of 153 pictures into exactly the right one of 1,000 classes: ant 310, bee 309."""
    backbone = load_backbone("efficientnet_lite0")
    right = total = 0
    for folder, label in (("ants", 310), ("bees", 309)):
        files = sorted((shared_data / "hymenoptera" / "val" / folder).glob("*.jpg"))
        with torch.inference_mode():
            for start in range(0, len(files), 16):
                batch = torch.stack([backbone.preprocessing(f) for f in files[start : start + 16]])
                right += int((backbone.model(batch).argmax(1) == label).sum())
        total += len(files)
    assert (right, total) == (130, 153)


def test_minilm_is_filled_and_gives_transformers_own_features():
    from transformers import BertModel

    backbone = load_backbone("minilm", max_length=16)
    assert (backbone.library, backbone.modality, backbone.weights.source) == ("transformers", "text", "bundled")
    assert backbone.weights.missing == ("classifier.bias", "classifier.weight")
    assert backbone.weights.unexpected == ()
    reference = BertModel.from_pretrained(bundled_file(CATALOG["minilm"].bundle).parent).eval()
    batch = backbone.preprocessing(["a short text", "another one, a little longer than the first"])
    with torch.inference_mode():
        features = backbone.model.bert(**batch).last_hidden_state
        torch.testing.assert_close(features, reference(**batch).last_hidden_state)


# caches, files and folders


def test_torchvision_from_the_cache(caches):
    saved = torchvision_model()
    torch.save(saved.state_dict(), caches.torch_file(RESNET18))
    with pytest.warns(UserWarning, match="is not the published file"):
        backbone = load_backbone("resnet18")
    assert (backbone.weights.source, backbone.weights.verified) == ("cache", False)
    assert backbone.weights.path.endswith(RESNET18)
    assert_same(backbone.model.state_dict(), saved.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(backbone.model(pictures()), saved.eval()(pictures()))
    assert backbone.preprocessing.resize == 256


def test_torchvision_tags_choose_the_file_and_the_preprocessing(caches):
    torch.save(torchvision_model("resnet50").state_dict(), caches.torch_file("resnet50-0676ba61.pth"))
    with pytest.warns(UserWarning, match="published"):
        backbone = load_backbone("torchvision/resnet50.imagenet1k_v1")
    assert backbone.weights.path.endswith("resnet50-0676ba61.pth")
    assert backbone.preprocessing.resize == 256
    assert load_backbone("resnet50", pretrained=False).preprocessing.resize == 232
    with pytest.raises(ConfigError, match="IMAGENET1K_V2"):
        load_backbone("torchvision/resnet50.IMAGENET1K_V9")


@pytest.mark.parametrize("where", ["hub safetensors", "hub bin", "torch"])
def test_timm_from_the_caches(caches, where):
    saved = timm_model("resnet10t" if where != "torch" else "resnet18")
    if where == "torch":
        torch.save(saved.state_dict(), caches.torch_file("resnet18_a1_0-d63eafa0.pth"))
        name = "timm/resnet18"
    else:
        folder = caches.snapshot("timm/resnet10t.c3_in1k")
        if where == "hub safetensors":
            save_file(saved.state_dict(), folder / "model.safetensors")
        else:
            torch.save(saved.state_dict(), folder / "pytorch_model.bin")
        name = "timm/resnet10t"
    if where == "torch":
        with pytest.warns(UserWarning, match="published"):
            backbone = load_backbone(name)
    else:
        backbone = load_backbone(name)
    assert (backbone.weights.source, backbone.weights.missing) == ("cache", ())
    assert_same(backbone.model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("repository", ["google-bert/bert-base-cased", "bert-base-cased"])
def test_transformers_from_the_cache_under_either_name(caches, repository):
    saved = bert_folder(caches.snapshot(repository))
    backbone = load_backbone("hf/bert-base-cased")
    assert backbone.weights.source == "cache"
    assert backbone.weights.missing == ("classifier.bias", "classifier.weight")
    assert_same(backbone.model.bert.state_dict(), saved.state_dict())
    assert backbone.preprocessing.max_length == 40
    assert backbone.preprocessing(["good film"])["input_ids"].tolist() == [[2, 5, 7, 3]]


def test_a_cache_with_a_config_and_no_weights_is_no_cache(caches):
    folder = caches.snapshot("owner/model")
    bert_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be reached"):
        load_backbone("hf/owner/model")


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_folder_as_the_model_or_as_its_weights(tmp_path, as_weights):
    saved = bert_folder(tmp_path)
    backbone = load_backbone("bert", weights=tmp_path) if as_weights else load_backbone(str(tmp_path))
    assert (backbone.weights.source, backbone.weights.path) == ("file", str(tmp_path / "model.safetensors"))
    assert_same(backbone.model.bert.state_dict(), saved.state_dict())
    assert type(backbone.model).__name__ == "BertForSequenceClassification"


def test_a_bare_file_for_a_catalog_model_needs_no_network(tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    saved = DistilBertModel(DistilBertConfig())
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("distilbert", weights=tmp_path / "w.safetensors")
    assert_same(backbone.model.distilbert.state_dict(), saved.state_dict())
    assert backbone.preprocessing(["word"])["input_ids"].tolist() == [[101, 2773, 102]]


def test_another_architecture_in_the_folder_is_refused(tmp_path):
    bert_folder(tmp_path)
    with pytest.raises(WeightsError, match=r"is a distilbert, but .* holds a bert"):
        load_backbone("distilbert", weights=tmp_path)


def test_sharded_weights(tmp_path):
    from transformers import BertModel

    saved = BertModel(bert_config())
    saved.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    add_tokenizer(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert_same(backbone.model.bert.state_dict(), saved.state_dict())
    assert len(backbone.weights.sha256) == 64


def test_a_pickled_transformers_checkpoint(tmp_path):
    saved = bert_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({f"module.{k}": v for k, v in saved.state_dict().items()}, tmp_path / "pytorch_model.bin")
    assert_same(load_backbone(str(tmp_path)).model.bert.state_dict(), saved.state_dict())


def test_the_old_names_of_layer_norms_are_understood(tmp_path):
    """google-bert/bert-base-uncased itself says gamma and beta."""
    saved = bert_folder(tmp_path, "BertForMaskedLM")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    old["bert.embeddings.LayerNorm.gamma"] += 1
    save_file(old, tmp_path / "model.safetensors")
    state = load_backbone(str(tmp_path)).model.state_dict()
    torch.testing.assert_close(state["bert.embeddings.LayerNorm.weight"], torch.full((32,), 2.0), rtol=0, atol=0)
    expected = {f"bert.{name}": value for name, value in saved.bert.state_dict().items()}
    assert_same(state, expected, but=("bert.embeddings.LayerNorm.weight",))


def test_a_timm_folder_goes_to_timm(tmp_path, caches):
    saved = timm_model("resnet10t", num_classes=5)
    pretrained = {"input_size": [3, 96, 96], "crop_pct": 0.75, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    config = {"architecture": "resnet10t", "num_classes": 5, "pretrained_cfg": pretrained}
    for folder in (tmp_path, caches.snapshot("owner/model")):
        (folder / "config.json").write_text(json.dumps(config))
        save_file(saved.state_dict(), folder / "model.safetensors")
    backbone = load_backbone(str(tmp_path))
    assert (backbone.library, backbone.weights.missing) == ("timm", ())
    assert_same(backbone.model.state_dict(), saved.state_dict())
    preset = backbone.preprocessing
    assert (preset.size, preset.resize, preset.mean) == ((96, 96), 128, (0.1, 0.2, 0.3))
    assert load_backbone("hf/owner/model").weights.source == "cache"
    assert build_library_model(backbone.source, 3).fc.out_features == 3


# what weights may leave open


@pytest.mark.parametrize("wrap", ["plain", "ddp", "lightning"])
def test_torchvision_file_with_another_class_count(tmp_path, wrap):
    saved = torchvision_model(num_classes=7)
    prefix = {"plain": "", "ddp": "module.", "lightning": "model."}[wrap]
    torch.save({"state_dict": {prefix + k: v for k, v in saved.state_dict().items()}}, tmp_path / "w.ckpt")
    backbone = load_backbone("resnet18", weights=tmp_path / "w.ckpt")
    assert backbone.weights.source == "file"
    assert backbone.weights.missing == ("fc.bias", "fc.weight")
    assert_same(backbone.model.state_dict(), saved.state_dict(), but=("fc.weight", "fc.bias"))


def test_timm_file_with_another_class_count_and_a_headless_one(tmp_path):
    saved = timm_model("resnet10t", num_classes=7).state_dict()
    save_file(saved, tmp_path / "w.safetensors")
    assert load_backbone("timm/resnet10t", weights=tmp_path / "w.safetensors").weights.missing == (
        "fc.bias",
        "fc.weight",
    )
    save_file({k: v for k, v in saved.items() if not k.startswith("fc.")}, tmp_path / "w.safetensors")
    backbone = load_backbone("timm/resnet10t", weights=tmp_path / "w.safetensors")
    assert backbone.weights.missing == ("fc.bias", "fc.weight")
    assert_same(backbone.model.state_dict(), saved, but=("fc.weight", "fc.bias"))


def test_a_file_of_another_architecture(tmp_path):
    torch.save(torchvision_model("resnet50").state_dict(), tmp_path / "w.pth")
    for name in ("resnet18", "timm/resnet18"):
        with pytest.raises(WeightsError, match=r"does not fit ResNet: .* unexpected \(layer1\.0\.conv3\.weight"):
            load_backbone(name, weights=tmp_path / "w.pth")


def test_a_masked_lm_checkpoint_leaves_the_pooler_open_and_says_so(tmp_path):
    saved = bert_folder(tmp_path, "BertForMaskedLM")
    backbone = load_backbone(str(tmp_path))
    assert backbone.weights.missing == (
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    )
    assert all(name.startswith("cls.") for name in backbone.weights.unexpected)
    assert backbone.weights.unexpected
    assert_same(backbone.model.bert.state_dict(), saved.bert.state_dict())


def test_the_fresh_pooler_depends_on_the_seed_alone(tmp_path):
    bert_folder(tmp_path, "BertForMaskedLM")
    names = ("bert.pooler.dense.weight", "classifier.weight")
    first = load_backbone(str(tmp_path), seed=1).model.state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = load_backbone(str(tmp_path), seed=1).model.state_dict()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    other = load_backbone(str(tmp_path), seed=2).model.state_dict()
    for name in names:
        torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
        assert not torch.equal(first[name], other[name])


def test_a_classifier_checkpoint_keeps_its_head_and_its_class_count(tmp_path):
    saved = bert_folder(tmp_path, "BertForSequenceClassification", num_labels=5)
    backbone = load_backbone(str(tmp_path))
    assert (backbone.weights.missing, backbone.model.config.num_labels) == ((), 5)
    assert_same(backbone.model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_loaded_as_float32(tmp_path, dtype):
    saved = bert_folder(tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    backbone = load_backbone(str(tmp_path))
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert backbone.model.config.dtype == torch.float32
    assert_same(backbone.model.bert.state_dict(), {k: v.float() for k, v in saved.state_dict().items()})
    assert {p.dtype for p in build_library_model(backbone.source, 3).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"intermediate_size": 48},
        {"vocab_size": 9},
    ],
    ids=["a layer too few", "a layer too many", "another width", "another vocabulary"],
)
def test_a_config_that_does_not_match_its_weights(tmp_path, change):
    """transformers only warns, and leaves those layers random."""
    bert_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match="do not belong together"):
        load_backbone(str(tmp_path))


def test_gpt_like_models_get_a_padding_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "good": 1, "film": 2}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=3, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.weights.missing == ("score.weight",)
    assert backbone.model.config.pad_token_id == 0
    assert backbone.preprocessing.max_length == 12
    with torch.inference_mode():
        batch = backbone.preprocessing(["good film good", "good"])
        assert backbone.model(**batch).logits.shape == (2, 2)


def test_vision_transformers_models_and_their_processor(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    saved = ViTModel(config)
    saved.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert (backbone.modality, type(backbone.model).__name__) == ("image", "ViTForImageClassification")
    assert backbone.weights.missing == ("classifier.bias", "classifier.weight")
    picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    # transformers resizes tensors, headinit pictures: the rounding of intermediate pixels differs.
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(backbone.preprocessing(picture), expected, rtol=0, atol=2.1 / 255 / 0.2)
    with pytest.raises(ConfigError, match="cannot take pictures of 48 x 48"):
        load_backbone(str(tmp_path), image_size=48)
    with pytest.raises(ConfigError, match="max_length is for text"):
        load_backbone(str(tmp_path), max_length=48)


# hostile and damaged


def test_code_from_outside_is_refused_and_not_run(tmp_path):
    bert_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.Mine", "AutoModel": "code.Mine"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(WeightsError, match="runs no code from outside"):
        load_backbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_is_left_alone(tmp_path):
    bert_folder(tmp_path)
    add_tokenizer(tmp_path, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]})
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_backbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "nonsense"}, "knows no model type 'nonsense'"),
        ({"model_type": None}, "knows no model type None"),
        ({"model_type": ["bert"]}, "knows no model type"),
        ({"model_type": "whisper"}, "neither a sequence nor an image classifier"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"hidden_size": "many"}, "does not make a bert configuration|Cannot"),
        ({"num_attention_heads": 3}, "Cannot load|does not make"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, change, message):
    bert_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=message):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_configurations(tmp_path, text):
    bert_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"config\.json (is damaged|must hold)"):
        load_backbone(str(tmp_path))


def test_a_configuration_cannot_choose_an_implementation(tmp_path):
    """Attention kernels can be fetched from the hub by name, and run."""
    bert_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_attn_implementation": "someone/kernels"}))
    assert load_backbone(str(tmp_path)).model.config._attn_implementation == "sdpa"


def test_truncated_weights(tmp_path, caches):
    bert_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone(str(tmp_path))
    torch.save(torchvision_model().state_dict(), caches.torch_file(RESNET18))
    whole = caches.torch_file(RESNET18).read_bytes()
    caches.torch_file(RESNET18).write_bytes(whole[: len(whole) // 3])
    with pytest.warns(UserWarning, match="published"), pytest.raises(WeightsError, match="damaged"):
        load_backbone("resnet18")


def test_weights_that_are_not_finite(tmp_path):
    saved = bert_folder(tmp_path).state_dict()
    saved["embeddings.LayerNorm.bias"][3] = float("nan")
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"embeddings\.LayerNorm\.bias holds 1 values"):
        load_backbone(str(tmp_path))


def test_a_folder_without_a_tokenizer_says_so_when_it_is_needed(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaModel(RobertaConfig(vocab_size=20, max_position_embeddings=20, **sizes)).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.preprocessing is None
    with pytest.raises(WeightsError, match=r"no tokenizer in .* Put the tokenizer's files"):
        backbone.require_preprocessing()


def test_a_borrowed_tokenizer_must_fit_the_vocabulary(tmp_path):
    """bert-base-uncased's vocabulary is at hand, this folder's model has eight pieces of its own."""
    bert_folder(tmp_path)
    for file in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    assert load_backbone("bert", weights=tmp_path).preprocessing is None


def test_roberta_has_two_positions_less_than_its_table(tmp_path):
    from headinit.backbones.preprocessing import position_limit

    model = load_backbone("roberta", pretrained=False).model
    assert (model.config.max_position_embeddings, position_limit(model)) == (514, 512)


# random weights, options, the library's own build


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "minilm"])
def test_random_weights_only_on_request_marked_and_reproducible(name):
    torch.manual_seed(5)
    first = load_backbone(name, pretrained=False, seed=1)
    state = torch.get_rng_state()
    again = load_backbone(name, pretrained=False, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.weights == again.weights
    assert (first.weights.source, first.weights.path, first.weights.missing) == ("random", None, ())
    assert_same(first.model.state_dict(), again.model.state_dict())
    other = load_backbone(name, pretrained=False, seed=2).model.state_dict()
    assert any(not torch.equal(value, other[key]) for key, value in first.model.state_dict().items())
    assert not first.model.training


def test_catalog_architectures_are_the_published_ones():
    sizes = {"bert": 109_483_778, "distilbert": 66_955_010, "roberta": 124_647_170}
    for name, size in sizes.items():
        model = build_library_model(_source_on_meta(name), 2)
        assert sum(p.numel() for p in model.parameters()) == size


def _source_on_meta(name: str) -> dict:
    return {"library": "transformers", "name": name, "config": dict(CATALOG[name].config)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "w.pth", "pretrained": False}, "drop one"),
        ({"weights": ""}, "weights is empty"),
        ({"image_size": 0}, "image_size must be a whole number above 0"),
        ({"image_size": 64.0}, "image_size must be"),
        ({"max_length": 8}, "max_length is for text"),
        ({"library": "keras"}, "Unknown library"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        load_backbone("resnet18", **{"pretrained": "weights" in options, **options})


def test_text_options(tmp_path):
    bert_folder(tmp_path)
    assert load_backbone(str(tmp_path), max_length=7).preprocessing.max_length == 7
    with pytest.raises(ConfigError, match="takes 1 to 40"):
        load_backbone(str(tmp_path), max_length=41)
    with pytest.raises(ConfigError, match="image_size is for pictures"):
        load_backbone(str(tmp_path), image_size=64)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "timm/test_vit", "vit_b_16"])
def test_another_image_size(name):
    backbone = load_backbone(name, pretrained=False, image_size=64)
    assert backbone.preprocessing.size == (64, 64)
    with torch.inference_mode():
        assert backbone.model(pictures(64)).shape == (2, 1000)
        rebuilt = build_library_model(json.loads(json.dumps(backbone.source)), 3).eval()
        assert rebuilt(pictures(64)).shape == (2, 3)


def test_position_embeddings_are_resampled_as_the_libraries_do(tmp_path):
    saved = timm_model("test_vit")
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("timm/test_vit", weights=tmp_path / "w.safetensors", image_size=64)
    assert backbone.weights.missing == ()
    import timm

    reference = timm.create_model(
        "test_vit", pretrained=True, img_size=64, pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors")}
    )
    assert backbone.model.pos_embed.shape != saved.pos_embed.shape
    assert_same(backbone.model.state_dict(), reference.state_dict())
    assert not isinstance(backbone.model.pretrained_cfg.get("state_dict"), dict)


def test_an_image_size_that_does_not_suit_the_patches():
    with pytest.raises(ConfigError, match="cannot take pictures of 65 x 65"):
        load_backbone("vit_b_16", pretrained=False, image_size=65)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/inception_v3", "timm/resnet10t"])
def test_the_source_rebuilds_the_architecture_for_another_class_count(name):
    backbone = load_backbone(name, pretrained=False)
    source = json.loads(json.dumps(backbone.source))
    rebuilt = build_library_model(source, 1000)
    assert type(rebuilt) is type(backbone.model)
    shapes = {key: value.shape for key, value in backbone.model.state_dict().items()}
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    assert build_library_model(source, 3).fc.out_features == 3


def test_the_source_of_a_transformers_model(tmp_path):
    bert_folder(tmp_path, num_labels=5)
    source = json.loads(json.dumps(load_backbone(str(tmp_path)).source))
    assert str(tmp_path) not in json.dumps(source)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = build_library_model(source, 9, seed=4), build_library_model(source, 9, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert (first.config.num_labels, first.classifier.out_features) == (9, 9)
    assert_same(first.state_dict(), again.state_dict())


def test_a_source_that_is_none():
    with pytest.raises(ConfigError, match="Unknown library"):
        build_library_model({"library": "keras"}, 3)


def test_googlenet_is_what_torchvision_makes_of_its_weights(tmp_path):
    saved = torchvision_model("googlenet", init_weights=True, aux_logits=True)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("torchvision/googlenet", weights=tmp_path / "w.pth")
    assert backbone.model.transform_input is True
    assert backbone.model.aux_logits is False
    assert backbone.model.aux1 is None
    assert backbone.weights.missing == ()
    assert all(name.startswith(("aux1.", "aux2.")) for name in backbone.weights.unexpected)
    kept = {k: v for k, v in saved.state_dict().items() if not k.startswith("aux")}
    assert_same(backbone.model.state_dict(), kept)


def test_weights_without_a_head_get_a_fresh_one():
    """DINOv2's are published without a classifier: timm would build an Identity."""
    backbone = load_backbone("timm/vit_small_patch14_dinov2", pretrained=False)
    assert isinstance(backbone.model.get_classifier(), nn.Linear)


def test_transformers_is_left_as_talkative_as_it_was(tmp_path, capfd):
    from transformers.utils import logging

    bert_folder(tmp_path, "BertForMaskedLM")
    capfd.readouterr()
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_backbone(str(tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bar)
    assert capfd.readouterr().err == ""
