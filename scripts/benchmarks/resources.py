"""Peak memory of whole processes, and what attaching a head costs.

A process that is measured: ``python scripts/benchmarks/resources.py KIND MODEL SIZE DATA``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, for its memory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.setting import ROOT, SIZES, Bench, all_examples, first_examples, pictures_of, plain_pass


def measure_attach(bench: Bench) -> None:
    """`attach_head` on a model that is there, against building that model."""
    from headinit import attach_head

    for name, build in big_models(bench).items():
        seconds, building = [], []
        for _ in range(bench.size.rounds):
            began = time.perf_counter()
            model = build()
            building.append(time.perf_counter() - began)
            began = time.perf_counter()
            attach_head(model, 10, pretrained=True)
            seconds.append(time.perf_counter() - began)
        note = f"median of {len(seconds)}; building takes {statistics.median(building):.2f} s"
        bench.add(f"attach_head to {name}", 1000 * statistics.median(seconds), "ms", note, limit=50)


def big_models(bench: Bench) -> dict[str, Callable[[], nn.Module]]:
    """ResNet-50 and BERT-base as their libraries build them; for the small size, small ones."""

    def resnet() -> nn.Module:
        import torchvision

        return torchvision.models.resnet50() if bench.size.claims else torchvision.models.resnet18()

    def bert() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        small = BertConfig(num_hidden_layers=1, vocab_size=1000)
        return BertForSequenceClassification(BertConfig() if bench.size.claims else small)

    return {"ResNet-50": resnet, "BERT-base": bert} if bench.size.claims else {"ResNet-18": resnet, "one layer": bert}


def measure_memory(bench: Bench) -> None:
    """Peak memory of four processes: a plain pass, a frozen run, and full fine-tuning by us and by Trainer."""
    if sys.platform == "win32":
        bench.console.print("  left out: this system does not tell the peak memory of a process")
        return
    name, size = bench.size.backbones[0], "full" if bench.size.claims else "small"
    kinds = ("pass", "frozen", "ours", "trainer")
    script = [sys.executable, str(Path(__file__).resolve())]
    peak = {kind: peak_megabytes([*script, kind, name, size], bench.folder) for kind in kinds}
    note = f"{peak['frozen']:.0f} MB and {peak['pass']:.0f} MB, greatest resident size of a process of its own"
    bench.add(f"{name}, frozen run over a plain pass", peak["frozen"] / peak["pass"], "x", note, limit=1.1)
    note = f"{peak['ours']:.0f} MB and {peak['trainer']:.0f} MB"
    bench.add(f"{name}, full fine-tuning over Trainer", peak["ours"] / peak["trainer"], "x", note, limit=1.0)


def peak_megabytes(command: list[str], folder: Path) -> float:
    """Peak resident size of a process in MB, as it says itself at its end.

    What the system tells the parent would not do: on Linux that is at least what the parent had when it forked.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """Peak resident size of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_for_memory(kind: str, name: str, size: str) -> None:
    """What a measured process does."""
    from rich.console import Console

    from headinit.data.loading import Batches

    bench = Bench(SIZES[size], Path.cwd(), Console(quiet=True))
    if kind == "frozen":
        return frozen_run(bench, name)
    if kind in ("ours", "trainer"):
        return tuning_run(bench, name, kind)
    from headinit.backbones.load import load_backbone

    backbone = load_backbone(name, pretrained=False, **bench.size.image_options)
    split = first_examples(all_examples(pictures_of(bench)), bench.size.memory_pictures)
    plain_pass(backbone.model, Batches(split, backbone.require_preprocessing(), 32, workers=2))
    return None


def frozen_run(bench: Bench, name: str) -> None:
    """`finetune.py` with a frozen backbone on as many pictures, in this process."""
    import runpy

    pictures = bench.size.memory_pictures
    sys.argv = [
        str(ROOT / "scripts" / "finetune.py"), f"model={name}", "model.pretrained=false", "freeze=all",
        f"data.train_size={round(0.6 * pictures)}", "trainer.cache=null", "trainer.epochs=3",
        "trainer.progress=false", "hydra.run.dir=frozen",
    ]  # fmt: skip
    sys.argv += [f"model.{key}={value}" for key, value in bench.size.image_options.items()]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def tuning_run(bench: Bench, name: str, kind: str) -> None:
    """A few steps of full fine-tuning by AdamW, whose states both keep (Trainer's SGD has no momentum)."""
    from benchmarks.finetuning import BATCH, our_run, picture_model

    split = first_examples(pictures_of(bench).train, BATCH * bench.size.memory_steps)
    model = picture_model(bench, name)
    if kind == "ours":
        our_run(bench, name, model, split, "fp32", optimizer="adamw")
        return
    from benchmarks.comparisons import trainer_of_pictures

    trainer_of_pictures(bench, name, model, split, optim="adamw_torch").train()


def main(arguments: list[str]) -> Any:
    """Entry of a measured process."""
    torch.manual_seed(0)
    run_for_memory(*arguments)
    print(own_peak())


if __name__ == "__main__":
    main(sys.argv[1:])
