"""Import time, feature extraction at full speed, and heads in closed form."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from benchmarks.setting import (
    ROOT,
    Bench,
    all_examples,
    backbone_of,
    batches_of,
    pictures_of,
    timed,
)
from headinit import schemes
from headinit.data.catalog import load_data
from headinit.data.splits import Split
from headinit.features.extract import FeatureSet, extract_features, relative_error
from headinit.schemes.scheme import HeadShape

IMPORT = "import time, torch; began = time.perf_counter(); import headinit; print(time.perf_counter() - began)"


def measure_imports(bench: Bench) -> None:
    """What `import headinit` costs where torch is imported, and how long `--help` takes."""

    def printed(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=bench.folder)
        return done.stdout

    rounds = 8 if bench.size.claims else 1
    extra = 1000 * min(float(printed("-c", IMPORT)) for _ in range(rounds))
    help_seconds = []
    for _ in range(rounds):
        with timed() as seconds:
            printed(str(ROOT / "scripts" / "finetune.py"), "--help")
        help_seconds += seconds
    note = f"best of {rounds} processes each"
    bench.add("import headinit over import torch", extra, "ms", limit=50, note=note)
    bench.add("finetune.py --help", min(help_seconds), "s", limit=3, note=note)


def measure_extraction(bench: Bench) -> None:
    """Feature extraction at full speed against the plain eager pass: pictures, then text of mixed length."""
    split = all_examples(pictures_of(bench))
    for name in bench.size.backbones:
        found, before = seconds_of_pass(bench, name, split, "auto")
        expected, plain = seconds_of_pass(bench, name, split, "plain")
        _, after = seconds_of_pass(bench, name, split, "auto")  # the machine's speed drifts
        fast = (before + after) / 2
        note = f"{len(split)} pictures, plain {plain:.1f} s; auto {before:.1f} s before and {after:.1f} s after, "
        note += "its preparation included"
        bench.add(f"{name}: times faster", plain / fast, "x", note, limit=2.0, at_most=False)
        error = relative_error(found.features, expected.features)
        bench.add(f"{name}: relative error", error, limit=1e-4)
        bench.kept[f"features {name}"] = expected
        bench.kept[f"seconds {name}"] = (plain, fast)
    measure_text_extraction(bench)


def seconds_of_pass(bench: Bench, name: str, split: Split, speed: str) -> tuple[FeatureSet, float]:
    """Features of pictures, and how long they took."""
    model, batches = backbone_of(bench, name).model, batches_of(bench, name, split)
    with timed() as seconds:
        features = extract_features(model, batches, speed=speed)
    return features, seconds[0]


def measure_text_extraction(bench: Bench) -> None:
    """MiniLM on texts of mixed length, sorted by length or not."""
    split = mixed_sentences(bench.size.sentences)
    model = backbone_of(bench, "minilm").model
    with timed() as bucketed:
        found = extract_features(model, batches_of(bench, "minilm", split, bucket=True))
    with timed() as dynamic:
        expected = extract_features(model, batches_of(bench, "minilm", split), speed="plain")
    longest = seconds_padded_to_longest(bench, split)
    note = (
        f"{len(split)} texts: sorted by length {bucketed[0]:.1f} s, batches padded to their longest {dynamic[0]:.1f} "
        f"s, all padded to the longest of all, as run_glue does {longest:.1f} s"
    )
    bench.add("text: times faster than padding to a maximum", longest / bucketed[0], "x", note)
    bench.add(
        "text: times faster than padding each batch",
        dynamic[0] / bucketed[0],
        "x",
        limit=1.8,
        at_most=False,
    )
    bench.add("text: relative error", relative_error(found.features, expected.features), limit=1e-4)


def mixed_sentences(count: int) -> Split:
    """Texts of one sentence or, each half as often as the one before, up to six: docstrings of installed libraries."""
    splits = load_data("pydocs", sentences_per_library=max(20, count // 6))
    items = [str(item) for item in all_examples(splits).items][:count]
    drawn = torch.rand(len(items), generator=torch.Generator().manual_seed(0))
    sizes = (1 - drawn.clamp_min(1e-6).log2()).int().clamp(1, 6).tolist()
    texts = [" ".join(items[(i + k) % len(items)] for k in range(size)) for i, size in enumerate(sizes)]
    return Split(texts, torch.arange(len(texts)) % 2, [f"text {i}" for i in range(len(texts))], "mixed")


@torch.inference_mode()
def seconds_padded_to_longest(bench: Bench, split: Split) -> float:
    """A plain pass with every text padded to the length of the longest."""
    model = backbone_of(bench, "minilm").model.eval()
    batches = list(batches_of(bench, "minilm", split))
    width = max(batch.inputs["input_ids"].shape[1] for batch in batches)
    with timed() as seconds:
        for batch in batches:
            missing = width - batch.inputs["input_ids"].shape[1]
            model(**{name: nn.functional.pad(values, (0, missing)) for name, values in batch.inputs.items()})
    return seconds[0]


def measure_closed_forms(bench: Bench) -> None:
    """What a head computed from features costs beside the pass that makes them."""
    name = bench.size.backbones[0]
    features = features_of(bench)
    plain, fast = bench.kept[f"seconds {name}"]
    shape = HeadShape(features.features.shape[1], features.num_classes)
    for init in ("class_mean", "lda", "ridge"):
        with timed() as seconds:
            schemes.build(init)(shape, torch.Generator().manual_seed(0), features)
        note = f"{seconds[0]:.2f} s; {1 + seconds[0] / fast:.3f} x the fast pass"
        bench.add(f"{init}: pass and head over the pass", 1 + seconds[0] / plain, "x", note, limit=1.03)


def features_of(bench: Bench) -> FeatureSet:
    """Features of all pictures by the first backbone."""
    name = bench.size.backbones[0]
    if f"features {name}" not in bench.kept:
        split = all_examples(pictures_of(bench))
        _, fast = seconds_of_pass(bench, name, split, "auto")
        bench.kept[f"features {name}"], plain = seconds_of_pass(bench, name, split, "plain")
        bench.kept[f"seconds {name}"] = (plain, fast)
    return bench.kept[f"features {name}"]
