"""Attach a head to every classifier of torchvision, timm and transformers, check each, and write docs/models.md.

    python scripts/sweep_models.py                        # everything (about two hours on one core)
    python scripts/sweep_models.py --library torchvision
    python scripts/sweep_models.py --families             # one model per family, as the tests do

For each model: the head is found and proved by its effect (`check_head`); a head for 7 classes is attached; only the
intended tensors change; the logits are (B, 7); the gradient reaches every new weight; the std is the intended one; the
features times the head are the logits; a saved copy gives the same logits; the global generator is left alone. timm
models above `--limit` million parameters are checked with equal blocks cut to one (`short_models.py`): the same
classes, widths and head, and the head must be where it is in the whole model.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from short_models import Shortening, build_short
from torch import Tensor, nn

from headinit.attach import attach_head, load, save
from headinit.errors import HeadError, HeadInitError
from headinit.features.extract import extract_features
from headinit.heads.locate import check_head, find_head
from headinit.heads.modules import output_layer
from headinit.heads.record import HeadRecord, call_model, record_of
from headinit.seeding import global_generators_kept

CLASSES = 7
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """What the sweep found for one model: `status` is attached, refused, failed or unbuilt."""

    library: str
    group: str
    name: str
    status: str
    checked: str = ""
    heads: str = ""
    reason: str = ""
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A model of a library: how it is built, and what it is fed."""

    library: str
    group: str
    name: str
    family: str
    build: Callable[..., nn.Module]
    inputs: Callable[[nn.Module], Any]
    pooling: str = "native"
    task: str = "single_label"


# --- the checks -------------------------------------------------------------------------------------------------------


def check(candidate: Candidate, limit: float) -> Outcome:
    """Build, attach and check one model."""
    outcome = Outcome(candidate.library, candidate.group, candidate.name, "attached")
    start = time.perf_counter()
    build = _builder(candidate, limit)
    try:
        model, cut = build()
    except Exception as error:
        outcome.status, outcome.reason = (
            "unbuilt",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}",
        )
        return outcome
    outcome.checked = "full" if not cut else "cut"
    try:
        _check_values(candidate, model, outcome, build)
    except HeadInitError as error:
        outcome.status, outcome.reason = "refused", str(error)
    except Exception as error:
        outcome.status = "failed"
        outcome.reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


Builder = Callable[[], tuple[nn.Module, int]]


def _builder(candidate: Candidate, limit: float) -> Builder:
    """Builds the model with values, and says how many of its blocks were cut."""

    shortened: list[Shortening] = []

    def runs(model: nn.Module) -> bool:
        try:
            with torch.no_grad():
                call_model(model, candidate.inputs(model))
        except Exception:  # each architecture has its own way to need all of its blocks
            return False
        return True

    def build() -> tuple[nn.Module, int]:
        with global_generators_kept(0):
            if candidate.library == "timm":
                if not shortened:
                    model, plan = build_short(candidate.build, runs, limit * 1e6)
                    shortened.append(plan)
                    return model, plan.cut
                return shortened[0].build(candidate.build), shortened[0].cut
            return candidate.build().eval(), 0

    return build


def _check_values(candidate: Candidate, model: nn.Module, outcome: Outcome, build: Builder) -> None:
    if candidate.pooling == "native":
        try:
            inputs = candidate.inputs(model)
            sites = find_head(model)
            if all(site.kind != "none" for site in sites):
                assert check_head(model, sites, inputs), "the layer found is not what makes the logits"
        except HeadError:
            sites = ()  # a model without a head: attach_head says, or pools
    before = {id(t): (name, t, t.detach().clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    random_state = torch.get_rng_state()
    attached = attach_head(model, CLASSES, init="he", pooling=candidate.pooling, task=candidate.task).eval()
    assert torch.equal(random_state, torch.get_rng_state()), "the global generator was used"
    record = record_of(attached)
    inputs = candidate.inputs(getattr(attached, "backbone", attached))
    outcome.heads = _heads(record.sites)
    _check_kept(attached, record, before)
    _check_std(attached, record)
    logits = _logits(attached, inputs)
    assert logits.shape[-1] == CLASSES, f"logits have shape {tuple(logits.shape)}"
    assert torch.isfinite(logits).all(), "logits are not finite"
    assert check_head(attached, record.sites, inputs), "the new head is not what makes the logits"
    _check_gradient(attached, record, inputs, logits, outcome)
    _check_features(attached, record, inputs, logits, outcome)
    _check_saving(attached, inputs, logits, build, outcome.checked == "cut")


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad(), global_generators_kept(0):
        return call_model(model, inputs)


def _check_kept(model: nn.Module, record: HeadRecord, before: dict[int, Any]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in record.new_parameters or any(name.startswith(f"{s.path}.") for s in record.sites):
            continue
        assert id(tensor) in before, f"{name} is not the tensor that was there"
        assert torch.equal(tensor, before[id(tensor)][2]) or tensor.isnan().any(), f"{name} has changed"


def _check_std(model: nn.Module, record: HeadRecord) -> None:
    for name, intended in record.intended_std.items():
        parameter = model.get_parameter(name).detach().float()
        if intended is None or (parameter.ndim < 2 and intended == 0):
            continue
        measured = parameter.square().mean().sqrt().item()
        slack = 5 * intended / math.sqrt(2 * parameter.numel())
        assert abs(measured - intended) <= slack, f"std of {name} is {measured:.4g}, intended {intended:.4g}"


def _check_gradient(model: nn.Module, record: HeadRecord, inputs: Any, logits: Tensor, outcome: Outcome) -> None:
    # Auxiliary heads act in training alone, and reformer computes gradients in training alone; statistics move there.
    if any(site.role == "auxiliary" for site in record.sites) or "Reformer" in outcome.name:
        model = copy.deepcopy(model).train()
    with torch.enable_grad(), global_generators_kept(0):
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    tensors = [t for t in _tensors(output) if t.requires_grad and t.shape[-1] == CLASSES]
    loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors)
    loss.backward()
    for site in record.sites:
        for name, parameter in output_layer(model.get_submodule(site.path)).named_parameters():
            assert parameter.grad is not None, f"{site.path}.{name} is not part of the loss"
            assert parameter.grad.any(), f"the gradient of {site.path}.{name} is zero"
    model.zero_grad(set_to_none=True)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in _tensors(value)]
    return []


def _check_features(model: nn.Module, record: HeadRecord, inputs: Any, logits: Tensor, outcome: Outcome) -> None:
    if any(site.role == "distilled" for site in record.sites):
        outcome.remarks.append("several heads make the logits together")
        return
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    try:
        with global_generators_kept(0):
            features = extract_features(model, (inputs, labels), speed="plain").features
    except HeadError as error:
        outcome.remarks.append(f"no one feature vector: {error}")
        return
    head = model.get_submodule(record.sites[0].path)
    with torch.no_grad():
        shaped = features[:, :, None, None] if isinstance(head, nn.Conv2d) else features
        again = head(shaped.to(next(head.parameters()).dtype)).view(logits.shape)
    error = (again - logits).abs().max().item() / max(1e-6, logits.abs().max().item())
    assert error < 1e-3, f"features times head differ from the logits by {error:.2g}"


def _check_saving(model: nn.Module, inputs: Any, logits: Tensor, build: Builder, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = save(model, Path(place) / "model")
        needs_model = cut or json.loads((path / "headinit.json").read_text())["architecture"] is None
        with global_generators_kept(1):
            base = build()[0] if needs_model else None
        copy = load(path, model=base)
        again = _logits(copy, inputs)
    assert torch.allclose(again, logits, rtol=1e-4, atol=1e-5), "a saved copy gives other logits"


def _heads(sites: tuple) -> str:
    return ", ".join(f"{s.path} ({s.kind}{'' if s.role == 'main' else ', ' + s.role})" for s in sites)


# --- the models -------------------------------------------------------------------------------------------------------


def torchvision_models() -> Iterator[Candidate]:
    """Every classification model of torchvision."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = {"inception_v3": 299}.get(name, 224)
        yield Candidate(
            "torchvision",
            "image classification",
            name,
            name.rstrip("0123456789_abcdefghijklmnopqrstuvwxyz.") or name.split("_")[0].rstrip("0123456789"),
            lambda name=name, options=options: torchvision.models.get_model(name, **options),
            lambda _, size=size: torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)),
        )


def timm_models(filter: str = "*") -> Iterator[Candidate]:
    """Every name of timm; names with weights of their own share the architecture's name."""
    import timm

    for name in timm.list_models(filter):
        yield Candidate(
            "timm",
            "image classification",
            name,
            timm.model_entrypoint(name).__module__.rpartition(".")[2],
            lambda name=name, **options: timm.create_model(name, **options),
            _timm_input,
            pooling="mean" if name.endswith("_enc") else "native",
        )


def _timm_input(model: Any) -> Tensor:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, channels, height, width, generator=generator)
    known = vars(model).get("_sweep_size")
    for size in (96, 112) if known is None else ():
        try:
            with torch.no_grad():
                model.eval()(pixels[:, :, :size, :size])
            known = size
            break
        except Exception:  # an architecture for other sizes
            continue
    model._sweep_size = known or max(height, width)
    return pixels[:, :, : model._sweep_size, : model._sweep_size]


def transformers_models() -> Iterator[Candidate]:
    """Every mapped classification class of transformers, and every base model, from a small configuration."""
    from small_configs import candidates

    for group, name, build, inputs, pooling, task in candidates():
        yield Candidate("transformers", group, name, re.split("For[A-Z]|Model", name)[0], build, inputs, pooling, task)


LIBRARIES: dict[str, Callable[[], Iterator[Candidate]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(outcomes: list[Outcome], path: Path) -> None:
    """docs/models.md: counts by library and kind, then everything that was refused or not built, and why."""
    import timm
    import torchvision
    import transformers

    lines = [
        "# Models",
        "",
        "Generated by `python scripts/sweep_models.py`; do not edit. Versions: "
        f"torch {torch.__version__.split('+')[0]}, torchvision {torchvision.__version__.split('+')[0]}, timm "
        f"{timm.__version__}, transformers {transformers.__version__}.",
        "",
        "Every model goes through every check of the script, with values: the head is found and proved by its effect,",
        "and replaced; only the intended tensors change; the logits are (B, 7); the gradient reaches every new weight;",
        "the std is the intended one; features times head are the logits; a saved copy gives the same logits.",
        "`whole`: with all of its blocks (a model of transformers: in a small configuration). `cut`: a timm model",
        "larger than `--limit` million parameters, of whose equal blocks one is kept: the classes, widths and head of",
        "the whole model, the head at the same place.",
        "",
        "| library | kind | models | attached | whole | cut | refused | not built | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = dict.fromkeys((o.library, o.group) for o in outcomes)
    for library, group in groups:
        here = [o for o in outcomes if (o.library, o.group) == (library, group)]
        count = {s: sum(o.status == s for o in here) for s in ("attached", "refused", "unbuilt", "failed")}
        full = sum(o.status == "attached" and o.checked == "full" for o in here)
        lines.append(
            f"| {library} | {group} | {len(here)} | {count['attached']} | {full} | {count['attached'] - full} | "
            f"{count['refused']} | {count['unbuilt']} | {count['failed']} |"
        )
    for title, status in (("Refused", "refused"), ("Not built", "unbuilt"), ("Failed", "failed")):
        chosen = [o for o in outcomes if o.status == status]
        if chosen:
            lines += ["", f"## {title}", "", "| library | kind | model | why |", "|---|---|---|---|"]
            lines += [f"| {o.library} | {o.group} | {o.name} | {o.reason.replace('|', '/')} |" for o in chosen]
    lines += ["", "## Heads", "", "| library | layout | models | example |", "|---|---|---|---|"]
    layouts: dict[tuple[str, str], list[str]] = {}
    for o in outcomes:
        if o.status == "attached":
            layouts.setdefault((o.library, o.heads), []).append(o.name)
    for (library, heads), names in sorted(layouts.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"| {library} | {heads} | {len(names)} | {names[0]} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="one library (may be repeated)")
    parser.add_argument("--families", action="store_true", help="one model per family")
    parser.add_argument("--limit", type=float, default=30.0, help="million parameters up to which timm's are run whole")
    parser.add_argument("--filter", default="", help="only names that contain this")
    parser.add_argument("--part", default="1/1", help="2/3 checks the second third: for several processes at a time")
    parser.add_argument(
        "--records",
        type=Path,
        action="append",
        default=[],
        help="keep outcomes here, one JSON line each, and skip those already there; of several files all are read and "
        "the first is written",
    )
    parser.add_argument(
        "--report", type=Path, help="where the report goes (default: docs/models.md, once every model has an outcome)"
    )
    arguments = parser.parse_args()
    done = {key: outcome for path in arguments.records for key, outcome in _read_records(path).items()}
    outcomes = list(done.values())
    for candidate in _candidates(arguments):
        if _key(candidate) in done:
            continue
        outcome = check(candidate, arguments.limit)
        outcomes.append(outcome)
        print(
            f"{outcome.status:9}{outcome.seconds:7.1f} s  {candidate.library}/{candidate.name}  {outcome.reason}",
            flush=True,
        )
        if arguments.records:
            with arguments.records[0].open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    known = {_key(outcome) for outcome in outcomes}
    complete = arguments.report is not None or all(_key(c) in known for lib in LIBRARIES for c in LIBRARIES[lib]())
    if complete:
        write_report(outcomes, arguments.report or ROOT / "docs" / "models.md")
    else:
        print("No report: some models have no outcome yet. Run the others with the same --records.")
    failed = [o for o in outcomes if o.status == "failed"]
    print(f"{len(outcomes)} models, {sum(o.status == 'attached' for o in outcomes)} attached, {len(failed)} failed")
    return 1 if failed else 0


def _key(model: Candidate | Outcome) -> tuple[str, str, str]:
    return model.library, model.group, model.name


def _candidates(arguments: argparse.Namespace) -> Iterator[Candidate]:
    seen = set()
    part, parts = (int(number) for number in arguments.part.split("/"))
    number = 0
    for library in arguments.library or LIBRARIES:
        for candidate in LIBRARIES[library]():
            if arguments.filter not in candidate.name:
                continue
            if arguments.families and (library, candidate.family) in seen:
                continue
            seen.add((library, candidate.family))
            number += 1
            if number % parts == part - 1:
                yield candidate


def _read_records(path: Path) -> dict[tuple[str, str, str], Outcome]:
    if not path.is_file():
        return {}
    outcomes = [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {_key(outcome): outcome for outcome in outcomes}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
