"""Pretrained backbones by name: built by their own library, filled from weights whose origin is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headinit.backbones import preprocessing as prepare
from headinit.backbones.catalog import Bundle, CatalogEntry, find_entry, hub_repositories
from headinit.backbones.state_dicts import (
    align_prefix,
    classifier_paths,
    compare_names,
    describe_mismatch,
    fill,
    read_state_dict,
    rename_lite0,
    require_finite,
)
from headinit.backbones.weights import (
    FoundWeights,
    Origin,
    WeightsReport,
    bundled_folder,
    digest_of,
    find_config,
    find_weights,
    hub_cache,
    weights_in,
)
from headinit.data.images import ImagePreprocessing
from headinit.data.text import TextPreprocessing
from headinit.errors import ConfigError, HeadInitError, WeightsError, unknown_name
from headinit.seeding import derived_seed, global_generators_kept

__all__ = ["Backbone", "WeightsReport", "build_library_model", "load_backbone"]

# Settings of a config.json that would fetch or run something, or that belong to the moment of saving.
_DROPPED_SETTINGS = ("_name_or_path", "name_or_path", "auto_map", "custom_pipelines", "transformers_weights")
# What a classifier's parameters may be called in models whose base model is the whole model.
_HEAD_WORDS = {
    "classifier",
    "pre_classifier",
    "cls_classifier",
    "distillation_classifier",
    "classification_head",
    "score",
    "head",
    "heads",
    "logits_proj",
    "pooler",
    "fc_norm",
}


_TOKEN_ADVICE = "Choose a model for text, such as model=minilm, bert or roberta."


@dataclass(frozen=True)
class Backbone:
    """A pretrained model as its library builds it, and what is needed to feed and to rebuild it.

    Attributes:
        model: the library's own class, in evaluation mode, float32, with the head that the weights have or else the
            library's fresh one.
        name: what was asked for.
        library: ``"torchvision"``, ``"timm"`` or ``"transformers"``.
        modality: ``"image"`` or ``"text"``.
        preprocessing: how inputs are prepared; None if the tokenizer or image processor is out of reach (see
            `require_preprocessing`).
        weights: which weights these are and what they left open.
        source: plain values that rebuild the architecture without weights (`build_library_model`).
        preprocessing_problem: why `preprocessing` is None.
    """

    model: nn.Module
    name: str
    library: str
    modality: str
    preprocessing: ImagePreprocessing | TextPreprocessing | None
    weights: WeightsReport
    source: Mapping[str, Any]
    preprocessing_problem: str | None = None

    def require_preprocessing(self) -> ImagePreprocessing | TextPreprocessing:
        """The preprocessing, where it cannot be done without.

        Raises:
            WeightsError: it is out of reach; says why and what to do.
        """
        if self.preprocessing is None:
            raise WeightsError(f"The model {self.name!r} comes without preprocessing. {self.preprocessing_problem}")
        return self.preprocessing


@dataclass(frozen=True)
class _Request:
    """The user's options of one load."""

    weights: str | os.PathLike | None
    pretrained: bool
    image_size: int | None
    max_length: int | None
    seed: int
    task: str = "single_label"

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Libraries draw fresh parameters from the global generators: seeded here, and put back."""
        with global_generators_kept(derived_seed(self.seed, "backbone")):
            yield


def load_backbone(
    name: str,
    *,
    library: str = "auto",
    weights: str | os.PathLike | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    task: str = "single_label",
) -> Backbone:
    """Build a model by name and fill it with pretrained weights.

    The weights are the user's file or folder if one is named; else those of an installed package (checked against a
    pinned SHA-256); else those in the libraries' caches (``TORCH_HOME``, ``HF_HOME``); else they are downloaded. All
    names in them must be used, the classifier's excepted. No code in them is run.

    Args:
        name: a name of the catalog (``"resnet50"``, ``"bert"``), ``"torchvision/NAME"``, ``"timm/NAME"``,
            ``"hf/REPOSITORY"``, or a transformers folder.
        library: ``"auto"``, or the library whose own name `name` is.
        weights: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or a folder that holds one.
        pretrained: False gives random weights, the same for the same seed; the report's source is ``"random"``.
        image_size: another side of the (square) pictures, where the architecture takes it.
        max_length: pieces of text per example.
        seed: of whatever the weights leave open.
        task: ``"token"`` gives a model with logits for every piece of text (of transformers, for text alone); all other
            tasks a model with logits for every example.

    Raises:
        ConfigError: unknown name, a model for pictures where tokens are to be classified, or an option that does not
            suit the model.
        WeightsError: weights are missing, damaged, or do not fit; or there is no network and none was found.

    Example:
        >>> backbone = load_backbone("torchvision/squeezenet1_1", pretrained=False)
        >>> type(backbone.model).__name__, backbone.weights.source, backbone.preprocessing.size
        ('SqueezeNet', 'random', (224, 224))
    """
    entry = find_entry(name, library)
    if not pretrained and weights is not None:
        raise ConfigError(
            f"pretrained=False asks for random weights and weights={str(weights)!r} for a file: drop one."
        )
    if weights is not None and not str(weights).strip():
        raise ConfigError("weights is empty. Name a file or a folder, or leave it null.")
    _require_positive("image_size", image_size)
    _require_positive("max_length", max_length)
    request = _Request(weights, pretrained, image_size, max_length, seed, task)
    if task == "token" and entry.library != "transformers":
        raise ConfigError(f"The model {name!r} reads pictures, and tokens are parts of text. {_TOKEN_ADVICE}")
    if entry.library == "torchvision":
        backbone = _load_torchvision(entry, request)
    elif entry.library == "timm":
        backbone = _load_timm(entry, request)
    else:
        backbone = _load_transformers(entry, request)
    if image_size is not None:
        # One forward pass tells whether the architecture takes pictures of another size.
        with _size_refused(entry, image_size), torch.inference_mode():
            backbone.model(torch.zeros(1, 3, image_size, image_size))
    return backbone


def build_library_model(source: Mapping[str, Any], num_classes: int, *, seed: int = 0) -> nn.Module:
    """The same architecture, freshly built by its own library for this many classes.

    This is what the library would have started from, its head included: each has its own distribution.

    Args:
        source: `Backbone.source`, also after a round trip through JSON.
        num_classes: number of logits K.
        seed: decides every parameter; the global generators are left as they were.

    Raises:
        ConfigError: the source is not one that `load_backbone` made.

    Example:
        >>> source = {"library": "torchvision", "name": "squeezenet1_1"}
        >>> build_library_model(source, 7).classifier[1].out_channels
        7
    """
    library, options = source.get("library"), dict(source.get("options") or {})
    with global_generators_kept(derived_seed(seed, "library model")):
        if library == "torchvision":
            return _build_torchvision(source["name"], {**options, "num_classes": num_classes})
        if library == "timm":
            return _build_timm(source["name"], {**options, "num_classes": num_classes})
        if library == "transformers":
            config = config_of({**source["config"], "id2label": None, "label2id": None}, source.get("name", "it"))
            config.num_labels = num_classes
            task = source.get("task", "single_label")
            return _model_class(config, source.get("name", "it"), task)[0]._from_config(config).eval()
    raise unknown_name("library", library, ("torchvision", "timm", "transformers"))


def _require_positive(option: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{option} must be a whole number above 0 (or null), found {value!r}.")


def _no_text_option(entry: CatalogEntry, request: _Request) -> None:
    if request.max_length is not None:
        raise ConfigError(f"max_length is for text; the model {entry.name!r} takes pictures. Set it to null.")


def _report(found: FoundWeights | None, missing: tuple[str, ...] = (), unexpected: Any = ()) -> WeightsReport:
    if found is None:
        return WeightsReport("random")
    return WeightsReport(
        found.source, str(found.path), found.sha256, missing, tuple(sorted(unexpected)), found.verified
    )


@contextmanager
def _size_refused(entry: CatalogEntry, image_size: int | None) -> Iterator[None]:
    """Say so where building, or running, fails for the size of the pictures that the user asked for."""
    try:
        yield
    except Exception as error:  # each architecture has its own way to refuse
        if image_size is None or isinstance(error, HeadInitError):
            raise
        raise ConfigError(
            f"The model {entry.name!r} cannot take pictures of {image_size} x {image_size} pixels: {error} "
            "Leave image_size=null, or choose a size that suits its patches and windows."
        ) from error


# torchvision


def _load_torchvision(entry: CatalogEntry, request: _Request) -> Backbone:
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    _no_text_option(entry, request)
    name, _, tag = entry.library_name.partition(".")
    published, others = _torchvision_weights(name, tag)
    found, state = None, None
    if request.pretrained:
        url = published.url if published is not None else None
        origin = Origin(_asked(entry), url=url, other_names=others)
        found = find_weights(origin, weights=request.weights, bundle=entry.bundle)
        state = read_state_dict(found.path)
    options = _torchvision_options(name, published, request.image_size, state)
    with request.seeded(), _size_refused(entry, request.image_size):
        model = _build_torchvision(name, options)
    missing: tuple[str, ...] = ()
    unexpected: list[str] = []
    if state is not None and found is not None:
        state = align_prefix(state, model.state_dict())
        if name == "googlenet":  # its auxiliary heads are dropped, as torchvision does once weights are loaded
            unexpected = [key for key in state if key.startswith(("aux1.", "aux2."))]
            state = {key: value for key, value in state.items() if key not in unexpected}
        if isinstance(model, VisionTransformer) and "encoder.pos_embedding" in state:
            state = dict(interpolate_embeddings(model.image_size, model.patch_size, state))  # type: ignore[arg-type]
        missing = fill(model, state, classifier_paths(model, 1000), found.path)
    return Backbone(
        model=model.eval(),
        name=entry.name,
        library="torchvision",
        modality="image",
        preprocessing=prepare.torchvision_preprocessing(
            published.transforms() if published is not None else None, request.image_size
        ),
        weights=_report(found, missing, unexpected),
        source={"library": "torchvision", "name": name, "image_size": request.image_size, "options": options},
    )


def _torchvision_weights(name: str, tag: str) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The weights of a builder: those of the tag, else torchvision's default; and how to ask for the others."""
    from torchvision.models import get_model_weights

    enum = get_model_weights(name)
    members = list(enum)
    if not members:
        return None, ()
    if tag and tag.upper() not in enum.__members__:
        raise unknown_name(f"weights of torchvision/{name}", tag, enum.__members__)
    chosen = enum[tag.upper()] if tag else enum["DEFAULT"] if "DEFAULT" in enum.__members__ else members[0]
    others = tuple((Path(m.url).name, f"torchvision/{name}.{m.name}") for m in members if m is not chosen)
    return chosen, others


def _torchvision_options(
    name: str, published: Any, image_size: int | None, state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What torchvision's builder sets when it loads weights itself."""
    if name.startswith("vit_"):
        smallest = published.meta["min_size"][0] if published is not None else 224
        return {"image_size": image_size or smallest}
    if name == "googlenet":
        return {"transform_input": True, "aux_logits": False}
    if name == "inception_v3":
        has_auxiliary = state is None or any(".AuxLogits." in f".{key}" for key in state)
        return {"transform_input": True, "aux_logits": has_auxiliary}
    return {}


def _build_torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model

    if name in ("googlenet", "inception_v3"):  # their default only differs by a warning
        options = {"init_weights": True, **options}
    return get_model(name, weights=None, **options)


# timm


def _load_timm(entry: CatalogEntry, request: _Request, published: dict[str, Any] | None = None) -> Backbone:
    """Build by timm; `published` replaces the registry's pretrained configuration (that of a timm folder)."""
    from timm.data import resolve_model_data_config

    _no_text_option(entry, request)
    name = entry.library_name
    settings = published if published is not None else _timm_settings(name)
    options: dict[str, Any] = {}
    if request.image_size is not None and settings.get("fixed_input_size"):
        options["img_size"] = request.image_size
    if published is not None:
        options["num_classes"] = settings.get("num_classes", 1000)
    if settings.get("num_classes") == 0:
        options["num_classes"] = 2  # weights without a head: a fresh one, so that there is something to replace
    with request.seeded(), _size_refused(entry, request.image_size):
        model = _build_timm(name, options)
    found: FoundWeights | None = None
    missing: tuple[str, ...] = ()
    if request.pretrained:
        found = find_weights(_timm_origin(entry, settings), weights=request.weights, bundle=entry.bundle)
        model, missing = _fill_timm(entry, model, found, options, settings)
    preset = resolve_model_data_config(model, pretrained_cfg=dict(settings))
    return Backbone(
        model=model.eval(),
        name=entry.name,
        library="timm",
        modality="image",
        preprocessing=prepare.timm_preprocessing(preset, request.image_size),
        weights=_report(found, missing),
        source={
            "library": "timm",
            "name": name,
            "image_size": request.image_size,
            "options": {key: value for key, value in options.items() if key != "num_classes"},
        },
    )


def _timm_settings(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of a name, or of a name with a tag; empty if it publishes no weights."""
    import timm

    architecture, _, tag = name.partition(".")
    if tag and name not in timm.list_pretrained(f"{architecture}.*"):
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise unknown_name(f"weights of timm/{architecture}", tag, known)
    settings = timm.get_pretrained_cfg(name)
    return settings.to_dict() if settings is not None else {}


def _timm_origin(entry: CatalogEntry, settings: Mapping[str, Any]) -> Origin:
    repository = (settings.get("hf_hub_id") or "").partition("@")[0]
    file = settings.get("hf_hub_filename")
    url = settings.get("url") or None
    return Origin(
        asked=_asked(entry),
        repositories=(repository,) if repository else (),
        hub_files=(file,) if file else ("model.safetensors", "pytorch_model.bin"),
        url=url if url and not url.endswith(".npz") else None,  # the few NumPy archives are on the hub as well
    )


def _fill_timm(
    entry: CatalogEntry, model: nn.Module, found: FoundWeights, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Fill by name; where names or position embeddings differ, by timm's own conversion of older formats."""
    import timm

    state = align_prefix(read_state_dict(found.path), model.state_dict())
    if entry.library_name.startswith("tf_efficientnet_lite0"):
        state = rename_lite0(state)
    declared = settings.get("classifier") or ()
    declared = (declared,) if isinstance(declared, str) else tuple(declared)
    classifiers = classifier_paths(model, getattr(model, "num_classes", None), declared)
    prefixes = tuple(f"{path}." for path in classifiers)
    if all(key.startswith(prefixes) for keys in compare_names(model, state) for key in keys):
        return model, fill(model, state, classifiers, found.path)
    require_finite(state, found.path)
    try:
        converted = timm.create_model(
            entry.library_name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}, **options
        )
    except Exception as error:  # the conversions fail with whatever they stumble over
        raise WeightsError(describe_mismatch(model, state, found.path)) from error
    vars(converted)["pretrained_cfg"].pop("state_dict", None)  # or the model would keep a second copy
    return converted, ()


def _build_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


# transformers


def _load_transformers(entry: CatalogEntry, request: _Request) -> Backbone:
    found = _find_transformers_weights(entry, request) if request.pretrained else None
    folder = _configuration_folder(entry, request, found)
    settings = _read_settings(folder / "config.json") if folder is not None else dict(entry.config)
    if "model_type" not in settings and "architecture" in settings and folder is not None:
        return _load_timm_folder(entry, request, found, settings)
    expected = entry.config.get("model_type")
    if expected is not None and settings.get("model_type") != expected:
        raise WeightsError(
            f"The model {entry.name!r} is a {expected}, but {folder} holds a {settings.get('model_type')}: "
            f"name the folder itself as the model (model.name={folder})."
        )
    config = config_of(settings, entry.name)
    model_class, modality = _model_class(config, entry.name, request.task)
    with request.seeded(), quiet_transformers():
        if found is None:
            model, report = model_class._from_config(config), _report(None)
        else:
            model, report = _fill_transformers(model_class, config, found)
    preprocessing, problem = _transformers_preprocessing(entry, request, folder, model, modality)
    return Backbone(
        model=model.eval(),
        name=entry.name,
        library="transformers",
        modality=modality,
        preprocessing=preprocessing,
        weights=report,
        source={
            "library": "transformers",
            "name": entry.library_name,
            "image_size": request.image_size,
            "config": _plain_settings(model.config),
            **({"task": "token"} if request.task == "token" else {}),
        },
        preprocessing_problem=problem,
    )


def _load_timm_folder(
    entry: CatalogEntry, request: _Request, found: FoundWeights | None, settings: Mapping[str, Any]
) -> Backbone:
    """A repository or folder in timm's own layout: its config.json names a timm architecture."""
    if request.task == "token":
        raise ConfigError(f"The model {entry.name!r} reads pictures, and tokens are parts of text. {_TOKEN_ADVICE}")
    published = {**settings, **dict(settings.get("pretrained_cfg") or {})}
    architecture = find_entry(f"timm/{settings['architecture']}").library_name
    timm_entry = CatalogEntry(entry.name, "timm", architecture)
    weights = found.path if found is not None else None
    timm_request = _Request(weights, request.pretrained, request.image_size, request.max_length, request.seed)
    backbone = _load_timm(timm_entry, timm_request, published)
    if found is None:
        return backbone
    report = _report(found, backbone.weights.missing, backbone.weights.unexpected)
    return Backbone(**{**vars(backbone), "weights": report})


def _find_transformers_weights(entry: CatalogEntry, request: _Request) -> FoundWeights:
    if entry.folder is not None and request.weights is None:
        path = weights_in(entry.folder)
        return FoundWeights("file", path, digest_of(path))
    return find_weights(_transformers_origin(entry), weights=request.weights, bundle=entry.bundle)


def _transformers_origin(entry: CatalogEntry) -> Origin:
    repositories = hub_repositories(entry.library_name) if entry.folder is None else ()
    return Origin(_asked(entry), repositories=repositories, whole_folder=True)


def _configuration_folder(entry: CatalogEntry, request: _Request, found: FoundWeights | None) -> Path | None:
    """The folder whose config.json describes the model; None where the catalog describes it."""
    candidates = [found.path.parent] if found is not None else []
    if request.weights is not None and Path(request.weights).is_dir():
        candidates.append(Path(request.weights))
    if entry.folder is not None:
        candidates.append(entry.folder)
    if entry.bundle is not None and (bundled := _bundled_model_folder(entry.bundle)) is not None:
        candidates.append(bundled)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    return find_config(_transformers_origin(entry), download=not entry.config)


def _bundled_model_folder(bundle: Bundle) -> Path | None:
    folder = bundled_folder(bundle)
    return (folder / bundle.weights).parent if folder is not None else None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"The configuration {path} is damaged ({error}).") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"The configuration {path} must hold a JSON object, found {type(settings).__name__}.")
    return settings


def config_of(settings: Mapping[str, Any], name: str) -> Any:
    """A transformers configuration from plain settings: float32, no code, nothing fetched."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING.keys():  # noqa: SIM118 (a lazy mapping: `in` alone misses registered names)
        if settings.get("auto_map"):
            raise WeightsError(
                f"The model {name!r} needs Python code of its own ({kind!r}, see auto_map in its config.json). "
                "headinit runs no code from outside. Build it yourself and pass the module to headinit.attach_head."
            )
        raise WeightsError(
            f"transformers {transformers.__version__} knows no model type {kind!r} (config.json of {name!r}). Is it "
            "a model for another library, or for a newer version?"
        )
    if settings.get("quantization_config"):
        raise WeightsError(f"The model {name!r} is quantised; headinit trains float32 weights. Name the original.")
    try:
        config = CONFIG_MAPPING[kind].from_dict(_without_effects(settings))
    except Exception as error:  # every configuration class checks in its own way
        raise WeightsError(f"The config.json of {name!r} does not make a {kind} configuration: {error}") from error
    config.dtype = torch.float32
    return config


def _without_effects(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that choose an implementation (it may be fetched and run) or that name a place."""
    kept = {}
    for key, value in settings.items():
        if key in _DROPPED_SETTINGS or key.strip("_").endswith(("_implementation", "_implementation_internal")):
            continue
        if value is None and key in ("id2label", "label2id"):
            continue
        kept[key] = _without_effects(value) if isinstance(value, Mapping) else value
    return kept


def _plain_settings(config: Any) -> dict[str, Any]:
    settings = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in _without_effects(settings).items() if key != "transformers_version"}


def _model_class(config: Any, name: str, task: str = "single_label") -> tuple[Any, str]:
    """The classifier that transformers has for a configuration, and what it classifies."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )

    kinds = {"text": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "image": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
    if task == "token":
        kinds = {"text": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING}
    declared = tuple(config.architectures or ())
    found: list[tuple[Any, str]] = []
    for modality, mapping in kinds.items():
        if type(config) in mapping:
            classes = mapping[type(config)]
            classes = classes if isinstance(classes, tuple) else (classes,)
            found += [(cls, modality) for cls in classes]
    if not found and task == "token":
        raise ConfigError(
            f"transformers has no token classifier for the model type {config.model_type!r} ({name!r}). {_TOKEN_ADVICE}"
        )
    if not found:
        raise WeightsError(
            f"transformers has neither a sequence nor an image classifier for the model type {config.model_type!r} "
            f"({name!r})."
        )
    return next((pair for pair in found if pair[0].__name__ in declared), found[0])


def _fill_transformers(model_class: Any, config: Any, found: FoundWeights) -> tuple[Any, WeightsReport]:
    """Let transformers convert and place a state dict, then hold it to what may stay open."""
    state = read_state_dict(found.path)
    require_finite(state, found.path)
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # conversions fail with whatever they stumble over
        raise WeightsError(f"Cannot load {found.path} as {model_class.__name__}: {error}") from error
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    missing = {key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")}
    wrong = [key for key in sorted(missing | mismatched) if not _may_stay_open(model, key)]
    wrong += [key for key in sorted(info["unexpected_keys"]) if not _may_be_left_over(model, key)]
    if wrong:
        raise WeightsError(
            f"The weights {found.path} do not fit {model_class.__name__}: {len(wrong)} names inside the backbone are "
            f"missing, unexpected or of another shape ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}). "
            "Its config.json and its weights do not belong together."
        )
    return model, _report(found, tuple(sorted(missing | mismatched)), info["unexpected_keys"])


def _may_stay_open(model: Any, key: str) -> bool:
    """Whether a parameter may lack weights: the head, and a pooler, which a masked-LM checkpoint has not."""
    words = key.split(".")
    prefix = model.base_model_prefix
    if prefix and hasattr(model, prefix) and words[0] != prefix:
        return True
    return "pooler" in words if hasattr(model, prefix) else bool(_HEAD_WORDS & set(words))


def _may_be_left_over(model: Any, key: str) -> bool:
    """Whether weights may stay unused: another task's head, outside the backbone; and its pooler."""
    words = key.split(".")
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None) if prefix else None
    if base is None or "pooler" in words or "position_ids" in words:
        return True
    inside = words[0] == prefix or words[0] in dict(base.named_children())
    return not inside


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load report of transformers: what they say is checked here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _transformers_preprocessing(
    entry: CatalogEntry, request: _Request, folder: Path | None, model: Any, modality: str
) -> tuple[ImagePreprocessing | TextPreprocessing | None, str | None]:
    """The tokenizer or image processor beside the model, or why there is none."""
    if modality == "image":
        _no_text_option(entry, request)
    elif request.image_size is not None:
        raise ConfigError(f"image_size is for pictures; the model {entry.name!r} takes text. Set it to null.")
    folders = [folder, entry.folder]
    shared = entry.tokenizer_bundle
    if shared is not None and model.config.vocab_size == _shared_vocabulary_size(entry):
        folders.append(_bundled_model_folder(shared))
    place = hub_cache() / ("models--" + entry.library_name.replace("/", "--")) / "snapshots" / "main"
    problem = f"It is not in the local cache ({place})."
    for known in dict.fromkeys(p for p in folders if p is not None):
        try:
            if modality == "image":
                return prepare.processor_preprocessing(known, request.image_size), None
            tokenizer = prepare.read_tokenizer(known)
        except WeightsError as error:
            problem = str(error)
            continue
        return prepare.text_preprocessing(tokenizer, model, request.max_length), None
    if modality == "text" and getattr(model.config, "pad_token_id", None) is None:
        end = getattr(model.config, "eos_token_id", None)
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    what = "the image processor's" if modality == "image" else "the tokenizer's"
    return None, f"{problem} Put {what} files there, or into the folder that model.weights names."


def _shared_vocabulary_size(entry: CatalogEntry) -> int:
    """The vocabulary of the catalog's own architecture, the only one that a borrowed tokenizer is right for."""
    return config_of(entry.config, entry.name).vocab_size


def _asked(entry: CatalogEntry) -> str:
    own = f"{entry.library}/{entry.library_name}" if entry.library != "transformers" else entry.library_name
    return repr(entry.name) if entry.name == own else f"{entry.name!r} ({own})"
