"""Small configurations of transformers' models, for the sweep: the defaults with every size cut down.

Sizes go by the names that configurations share (`hidden_size`, `num_hidden_layers`, ...). What an architecture needs
besides is declared in `SPECIAL`, beside its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headinit.heads.locate import is_made_for_a_task

VOCABULARY = 120
LENGTH = 8
WIDTH = 64

_LAYERS = 2
_NAMES = {
    _LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers "
    "num_encoder_layers num_hidden_groups num_blocks",
    WIDTH: "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size intermediate_size ffn_dim d_ff "
    "n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size d_inner",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    16: "head_dim d_kv d_head attention_head_size global_head_dim",
    VOCABULARY: "vocab_size",
}
_SIZES: dict[str, int] = {name: size for size, names in _NAMES.items() for name in names.split()}
_SIZES |= {"num_key_value_heads": 2, "image_size": 64}
_TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
)


# From the smallest to the library's own sizes: the first that builds and runs is taken. Some sizes depend on each other
# in ways that only the architecture knows (latent attention, rotary widths, convolution stages).
_DELICATE = (
    *_NAMES[16].split(),
    "image_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_DEEP = (*_NAMES[_LAYERS].split(), "vocab_size")
LEFT_ALONE: tuple[tuple[str, ...], ...] = (
    (),
    _DELICATE,
    tuple(name for name in _SIZES if name not in _DEEP),
    tuple(_SIZES),
)


def shrink(config_class: Any, left_alone: tuple[str, ...] = (), **special: Any) -> Any:
    """A small configuration of a class: known sizes cut (except those left alone), token ids inside the vocabulary."""
    default = config_class()
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if isinstance(getattr(default, name, None), int)
        and name not in left_alone
        and not _is_computed(config_class, name)
    }
    for name in _TOKENS:
        value = getattr(default, name, None)
        if isinstance(value, int) and value >= sizes.get("vocab_size", 10**9):
            sizes[name] = 2
    if isinstance(getattr(default, "eos_token_id", None), list):
        sizes["eos_token_id"] = 2
    types = getattr(default, "layer_types", None)
    if sizes.get("num_hidden_layers") and isinstance(types, list) and not _is_computed(config_class, "layer_types"):
        sizes["layer_types"] = types[-_LAYERS:]
    for name in ("text_config", "vision_config", "encoder", "decoder"):
        nested = getattr(default, name, None)
        if hasattr(nested, "to_dict"):
            sizes[name] = shrink(type(nested), left_alone).to_dict()
    config = config_class(**{name: value for name, value in {**sizes, **special}.items() if value is not None})
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (config, text):
        if getattr(owner, "pad_token_id", None) is None:
            owner.pad_token_id = 1
    return config


def _is_computed(config_class: Any, name: str) -> bool:
    return isinstance(getattr(config_class, name, None), property)


# Configuration values that an architecture needs besides small sizes, by model type, each with its reason.
_LATENT = {  # latent attention: its five widths and its groups of experts go together
    "num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "q_lora_rank": 32, "kv_lora_rank": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Two layers of each kind: what hybrid layers share needs two of them.
_HYBRID = {"num_hidden_layers": 4, "layer_types": None, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_EXPLICIT_HEADS = {"head_dim": 16, "num_key_value_heads": 2}  # the defaults are None, and are not derived
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": {**_LATENT, "index_head_dim": 32, "index_n_heads": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "mistral4": {**_LATENT, "head_dim": 32},
    "minicpm3": {**_LATENT, "num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},  # the defaults leave the vocabulary open
    "esmc": {"num_key_value_heads": 4},  # refuses grouped queries
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # spells out every layer
    "gptj": {"rotary_dim": 16},
    "hunyuan_v1_dense": _EXPLICIT_HEADS,
    "hunyuan_v1_moe": _EXPLICIT_HEADS,
    "ministral": _EXPLICIT_HEADS,
    "nemotron": {"num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # one of the two layers must be attention
    "zamba": {**_HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {**_HYBRID, "hybrid_layer_ids": [1, 3]},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "perceiver": {
        "num_latents": 8,
        "d_latents": WIDTH,
        "num_self_attends_per_block": 1,
        "max_position_embeddings": 32,
        "num_cross_attention_heads": 1,
        "num_self_attention_heads": 4,
    },
    # The default is B7, and the width of its last stage follows from the coefficient. With the usual std of 0.02 the
    # signal of a random network vanishes altogether, here and in mobilevitv2.
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 0.1,
        "hidden_dim": 1280,
        "image_size": 64,
        "initializer_range": 0.2,
    },
    "mobilevitv2": {"initializer_range": 0.2},
    "funnel": {"block_sizes": [1, 1]},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "has_spatial_attention_bias": False},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "bloom": {"hidden_size": WIDTH, "n_head": 4},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
}


def text_inputs(model: Any) -> dict[str, Tensor]:
    """Two sentences of one length; the last token is the end token, at which bart and t5 take their feature."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, VOCABULARY - 10, (2, LENGTH), generator=generator)
    end = getattr(config, "eos_token_id", None)
    tokens[:, -1] = end if isinstance(end, int) and 0 <= end < VOCABULARY else 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted and "inputs" in accepted:  # perceiver takes embedded words
        inputs["inputs"] = torch.rand(2, LENGTH, config.d_model, generator=generator)
    if "bbox" in accepted:
        inputs["bbox"] = torch.zeros(2, LENGTH, 4, dtype=torch.long)
    return {name: value for name, value in inputs.items() if name in accepted or "kwargs" in accepted}


def image_inputs(model: Any) -> dict[str, Tensor]:
    """Two pictures of the size that the configuration names."""
    if getattr(model, "main_input_name", "") == "input_ids" and not hasattr(model.config, "vision_config"):
        return text_inputs(model)  # imagegpt reads pixels as words
    config = getattr(model.config, "vision_config", None) or model.config
    if config.model_type == "siglip2_vision_model":  # patches in rows, with their mask and the shape they came from
        width = config.num_channels * config.patch_size**2
        patches = torch.rand(2, config.num_patches, width, generator=torch.Generator().manual_seed(0))
        side = round(config.num_patches**0.5)
        mask = torch.ones(2, config.num_patches, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((2, 2), side)}
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3) or 3
    pixels = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels}


Entry = tuple[str, str, Callable[[], nn.Module], Callable[[Any], Any], str, str]


def candidates() -> Iterator[Entry]:
    """Group, name, builder, inputs, pooling and task of every mapped class and of every base model."""
    from transformers.models.auto import modeling_auto as auto

    groups = (
        ("sequence classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, text_inputs, "single_label"),
        ("image classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, image_inputs, "single_label"),
        ("token classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, text_inputs, "token"),
    )
    for group, mapping, inputs, task in groups:
        for kind, classes in mapping.items():
            for name in classes if isinstance(classes, tuple | list) else (classes,):
                yield group, name, _builder(kind, name, inputs), inputs, "native", task
    classified = set(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) | set(
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )
    for kind, classes in auto.MODEL_MAPPING_NAMES.items():
        if kind in classified:
            name = classes[0] if isinstance(classes, tuple | list) else classes
            reads = kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
            inputs = text_inputs if reads else image_inputs
            yield "base model (AutoModel)", name, _builder(kind, name, inputs), inputs, "mean", "single_label"


def _builder(kind: str, name: str, inputs: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    return lambda: build(kind, name, inputs)


def _try(model: Any, inputs: Callable[[Any], Any]) -> None:
    """Run it once; of a base model only the part that a head can stand on."""
    if hasattr(model, "text_model") and hasattr(model, "vision_model") and not is_made_for_a_task(model):
        return  # two towers: attach_head says so
    if type(model).__name__ == "ShieldGemma2ForImageClassification":
        return  # a language model that answers in words: attach_head says so
    runs = model
    if getattr(model.config, "is_encoder_decoder", False) and not is_made_for_a_task(model):
        runs = model.get_encoder()
    with torch.no_grad():
        runs(**inputs(runs))


_CHOSEN: dict[str, int] = {}
_TOO_LARGE = 400e6


def build(kind: str, name: str, inputs: Callable[[Any], Any]) -> nn.Module:
    """The class of this name with the smallest configuration of this model type that builds and runs."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, name)
    special = {**SPECIAL.get(kind, {}), **SPECIAL.get(name, {})}
    first: Exception | None = None
    levels = range(len(LEFT_ALONE)) if name not in _CHOSEN else (_CHOSEN[name],)
    for level in levels:
        try:
            config = shrink(CONFIG_MAPPING[kind], LEFT_ALONE[level], **special)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > _TOO_LARGE:
                raise ValueError(f"its smallest configuration that might run has {size / 1e6:.0f} million parameters")
            model = cls(config).eval()
            if name not in _CHOSEN:
                _try(model, inputs)
                _CHOSEN[name] = level
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first
