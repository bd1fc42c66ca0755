"""A model with its head as one ONNX file, checked against the model's own output before it is put in place."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import HeadError
from headinit.heads.locate import evaluating, library_of
from headinit.heads.modules import RecurrentPool
from headinit.heads.record import call_model, has_record, record_of, unwrap
from headinit.seeding import generator_for

TOLERANCE = 1e-4
"""Largest difference of a logit between onnxruntime and torch, absolute or relative to the largest logit."""

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE = 1 << 31  # protobuf holds no more: the weights of larger models go to a file beside
_SECOND_BATCH = 3  # the example batch has 2


def export_onnx(model: nn.Module, path: str | os.PathLike, example_inputs: Any = None) -> Path:
    """Write a model as ONNX: inputs in, logits `(B, K)` out, B left free (of text the length L too).

    The model is exported as it predicts, in evaluation mode, whatever is frozen, and is afterwards as it was. Class
    names go along as metadata (``class_names``, JSON). The file is run by onnxruntime on random inputs, at the batch
    size of the example and at another one; where its logits differ from the model's, nothing is written.

    Args:
        model: a model, best one with a head attached by headinit.
        path: the file to write; it is replaced. Weights of over 2 GiB go to ``path.data`` beside it.
        example_inputs: a tensor `(B, ...)`, or a mapping of tensors by name as transformers models take them, B at
            least 2. None makes them from the preprocessing that the model was loaded with, or from what timm,
            transformers or torchvision say about its input.

    Returns:
        The path.

    Raises:
        HeadError: the extra is not installed, no example can be made, the model cannot be exported, or onnxruntime
            computes something else.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, f"{folder}/model.onnx", torch.randn(2, 8)).name
        'model.onnx'
    """
    _require_extra()
    root, target = unwrap(model), Path(path)
    inputs = _as_mapping(_examples_for(root) if example_inputs is None else example_inputs)
    if "attention_mask" in inputs and any(isinstance(module, RecurrentPool) for module in root.modules()):
        raise HeadError(
            "A recurrent head over text packs its sequences by their lengths, and ONNX has no form for that. Use "
            "head=attention_pool, conv or mlp for a model that is to be exported."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with evaluating(root), _without_freeze_hooks(root):
            _write(root, inputs, staging / target.name)
            for batch in (inputs, _resized(inputs, _SECOND_BATCH)):
                _compare(root, batch, staging / target.name)
        for file in sorted(staging.iterdir()):
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _require_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HeadError(f"ONNX export needs {', '.join(missing)}: pip install 'headinit[onnx]'.")


# --- inputs -----------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """The model with inputs by position and the logits alone as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return call_model(self.model, tensors[0] if self.names == ["input"] else dict(zip(self.names, tensors)))  # noqa: B905


def _as_mapping(inputs: Any) -> dict[str, Tensor]:
    """Inputs by name; a tensor that the model takes by position is called ``input``."""
    found = {"input": inputs} if isinstance(inputs, Tensor) else dict(inputs) if isinstance(inputs, Mapping) else {}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "labels"}
    if not tensors or min(tensor.shape[0] if tensor.ndim else 0 for tensor in tensors.values()) < 2:
        raise HeadError(
            "example_inputs must be a tensor (B, ...) or a mapping of such tensors by name, with B at least 2 (a batch "
            f"of one is taken for a constant); got {type(inputs).__name__} "
            f"{ {name: tuple(tensor.shape) for name, tensor in tensors.items()} }."
        )
    return tensors


def _examples_for(model: Any) -> Any:
    """Two random pictures or sentences of the kind that the model reads."""
    preprocessing: Any = getattr(model, "headinit_preprocessing", None)
    inner = getattr(model, "backbone", model)
    library = library_of(inner)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if getattr(preprocessing, "modality", None) == "text":
        return {name: tensor.to(device) for name, tensor in preprocessing(["An example.", "Another one."]).items()}
    size: Any = getattr(preprocessing, "size", None)
    name = getattr(inner, "main_input_name", "input") if library == "transformers" else "input"
    if size is None and library == "timm":
        size = tuple(inner.default_cfg["input_size"][1:])
    elif size is None and library == "torchvision":
        size = (getattr(inner, "image_size", 299 if type(inner).__name__ == "Inception3" else 224),) * 2
    elif size is None and library == "transformers" and name == "pixel_values":
        found = getattr(inner.config, "image_size", None) or 224
        size = tuple(found) if isinstance(found, list | tuple) else (found, found)
    elif library == "transformers" and name == "input_ids":
        ids = torch.randint(min(5, _words(inner) - 1), _words(inner), (2, 8), generator=generator_for(0, "export"))
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    if size is None:
        raise HeadError(
            f"Cannot tell what {type(inner).__name__} takes as input: give example_inputs=, a tensor (2, ...)."
        )
    pictures = torch.randn(2, int(getattr(inner, "in_chans", 3)), *size, generator=generator_for(0, "export"))
    pictures = pictures.to(device, next(p.dtype for p in model.parameters()))
    return pictures if name == "input" else {name: pictures}


def _words(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "vocab_size", 100))


def _resized(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Other inputs of the same kind: random values where they are real, shuffled ones where they are integers."""
    generator = generator_for(1, "export")
    changed = {}
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            values = torch.randn((batch, *tensor.shape[1:]), generator=generator)
            changed[name] = values.to(tensor.device, tensor.dtype)
        else:
            rows = torch.randint(len(tensor), (batch,), generator=generator)
            columns = torch.arange(tensor.shape[1] if tensor.ndim > 1 else 0)
            changed[name] = tensor[rows.to(tensor.device)]
            if name == "input_ids":  # the same words in another order, and one more of them
                order = torch.cat([columns, columns[-1:]])
                changed[name] = changed[name][:, order.flip(0).to(tensor.device)]
            elif _is_sequence(name, tensor, inputs):
                changed[name] = torch.cat([changed[name][:, :1], changed[name]], dim=1)
    return changed


def _is_sequence(name: str, tensor: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    ids = inputs.get("input_ids")
    return ids is not None and tensor.ndim == 2 and tensor.shape == ids.shape


# --- file -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_freeze_hooks(model: nn.Module) -> Iterator[None]:
    """The hooks of `freeze` hold modules in evaluation mode, where they are already: nothing that a graph needs."""
    kept = [(module, module._forward_pre_hooks) for module in model.modules()]
    try:
        for module, hooks in kept:
            module._forward_pre_hooks = OrderedDict(
                (key, hook) for key, hook in hooks.items() if getattr(hook, "__module__", "") != _FREEZING
            )
        yield
    finally:
        for module, hooks in kept:
            module._forward_pre_hooks = hooks


_FREEZING = "headinit.training.freezing"


def _write(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    names = list(inputs)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    shapes = tuple(
        {0: batch, 1: length} if _is_sequence(name, tensor, inputs) else {0: batch} for name, tensor in inputs.items()
    )
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(shapes,),
                verbose=False,
            )
            if has_record(model) and record_of(model).class_names:
                program.model.metadata_props["class_names"] = json.dumps(record_of(model).class_names)
            program.save(path, external_data=weights >= _ONE_FILE)
    except Exception as error:  # each layer that ONNX does not know fails in a way of its own
        raise HeadError(f"{type(model).__name__} cannot be exported to ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The innermost cause, which says more than the exporter's own report."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's chatter about operators that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless onnxruntime computes the model's own logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        fed = {node.name for node in session.get_inputs()}
        arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items() if name in fed}
        found = torch.from_numpy(session.run(["logits"], arrays)[0])
    except Exception as error:  # onnxruntime's kinds of error have no common base
        raise HeadError(
            f"onnxruntime cannot run the exported {type(model).__name__} on a batch of "
            f"{len(next(iter(inputs.values())))}: {_reason(error)}"
        ) from error
    expected = call_model(model, inputs["input"] if list(inputs) == ["input"] else inputs).detach().cpu()
    scale = max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= TOLERANCE * scale:
        raise HeadError(
            f"The exported {type(model).__name__} computes something else on a batch of {len(expected)}: logits of "
            f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            + (f", up to {float((found - expected).abs().max()):.2g} off." if found.shape == expected.shape else ".")
        )
