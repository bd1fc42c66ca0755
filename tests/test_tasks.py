"""Every task through the whole run, and what the run reports against scikit-learn and scipy on the saved model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import nn

import headinit
from headinit.analysis.results import RunRecord
from headinit.backbones.load import build_library_model, load_backbone
from headinit.config import Settings, settings_from
from headinit.data.splits import DataSplits, Split
from headinit.data.text import IGNORED_LABEL, Words
from headinit.errors import ConfigError, HeadInitError
from headinit.experiment import load_splits, run
from headinit.persistence import preprocessing_of
from headinit.training.targets import Standardisation

CONF = Path(__file__).resolve().parent.parent / "conf"
WORDS = ["red", "green", "blue", "round", "square", "small", "big", "the", "a", "is", "Anna", "Oslo", "Ber"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in WORDS), "##lin", "##s"]
POLICIES = ("all", "none")  # on features in memory, and through the whole network


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a WordPiece vocabulary, as transformers saves it."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(3)
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=24, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 24, "do_lower_case": True})
    )
    return folder


@pytest.fixture
def settings(model_folder: Path) -> Callable[..., Settings]:
    def make(*overrides: str) -> Settings:
        fixed = (
            "model=transformers",
            f"model.name={model_folder}",
            "trainer.epochs=4",
            "trainer.progress=false",
            "trainer.cache=null",
            "optim.lr=0.01",
        )
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return settings_from(compose("finetune", overrides=[*fixed, *overrides]))

    return make


def sentences(count: int, seed: int = 0) -> list[list[str]]:
    source = random.Random(seed)
    return [source.choices(WORDS, k=source.randint(2, 7)) for _ in range(count)]


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: str) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def saved_outputs(folder: Path, split: Split) -> np.ndarray:
    """What the saved model says about the examples, loaded as a user loads it, one by one."""
    model = headinit.load(folder / "model")
    preprocessing = preprocessing_of(model)
    with torch.no_grad():
        outputs = [model(**preprocessing([item])).logits[0].double().numpy() for item in split.items]
    return np.stack(outputs) if outputs[0].ndim == 1 else outputs  # type: ignore[return-value]


def assert_start(record: RunRecord, chance: float) -> None:
    assert record.init["chance_loss"] == pytest.approx(chance)
    assert math.isfinite(record.init["loss"])
    assert record.init["feature_gradient"] > 0


# --- multi-label ------------------------------------------------------------------------------------------------------


@pytest.fixture
def multi_label(tmp_path: Path) -> tuple[str, ...]:
    labels = ("red", "green", "round")
    rows = [(" ".join(s), "|".join(sorted(set(s) & set(labels)))) for s in sentences(90)]
    write_csv(tmp_path / "train.csv", rows[:60], "text,labels")
    write_csv(tmp_path / "dev.csv", rows[60:], "text,labels")
    return ("data=csv", f"data.root={tmp_path}", "data.task=multi_label", "data.label_separator='|'")


@pytest.mark.parametrize("policy", POLICIES)
def test_multi_label(settings: Callable[..., Settings], multi_label: tuple, tmp_path: Path, policy: str) -> None:
    chosen = settings(*multi_label, f"freeze={policy}")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    logits, labels = saved_outputs(tmp_path / "run", splits.validation), splits.validation.labels.numpy()
    assert splits.class_names == ("green", "red", "round")
    found = logits > 0
    wanted = {
        "map": sklearn_metrics.average_precision_score(labels, logits, average="macro"),
        "micro_f1": sklearn_metrics.f1_score(labels, found, average="micro", zero_division=0),
        "macro_f1": sklearn_metrics.f1_score(labels, found, average="macro", zero_division=0),
        "accuracy": (found == labels).mean(),
    }
    assert record.val == pytest.approx(wanted, rel=1e-6)
    assert record.config["trainer"]["monitor"] == "map"
    assert_start(record, math.log(2))
    assert record.task == "multi_label"


@pytest.mark.parametrize("head", ["attention_pool", "recurrent", "conv"])
def test_heads_over_tokens_on_a_frozen_backbone(
    settings: Callable[..., Settings], multi_label: tuple, tmp_path: Path, head: str
) -> None:
    """They take all tokens, so no one feature vector stands for an example: the backbone runs in every epoch."""
    chosen = settings(*multi_label, f"head={head}")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    outputs, labels = saved_outputs(tmp_path / "run", splits.validation), splits.validation.labels.numpy()
    wanted = sklearn_metrics.f1_score(labels, outputs > 0, average="micro", zero_division=0)
    assert record.val["micro_f1"] == pytest.approx(wanted, abs=1e-6)
    assert record.frozen_digest["before"] == record.frozen_digest["after"]


def test_multi_label_starts_at_the_entropy_of_the_labels_with_a_prior_bias(
    settings: Callable[..., Settings], multi_label: tuple, tmp_path: Path
) -> None:
    chosen = settings(*multi_label, "init=zeros", "init.prior_bias=true", "trainer.epochs=0")
    record = run(chosen, tmp_path / "run")
    shares = load_splits(chosen).train.labels.double().mean(0)
    entropy = -(shares * shares.log() + (1 - shares) * (1 - shares).log()).mean().item()
    assert record.init["loss"] == pytest.approx(entropy, rel=1e-6)
    assert record.init["loss"] == pytest.approx(record.init["prior_entropy"], rel=1e-6)
    assert record.init["loss"] < math.log(2)


@pytest.mark.parametrize("init", ["ridge", "auto"])
def test_multi_label_starts_from_data(
    settings: Callable[..., Settings], multi_label: tuple, tmp_path: Path, init: str
) -> None:
    record = run(settings(*multi_label, f"init={init}", "trainer.epochs=0"), tmp_path / "run")
    assert record.init["loss"] < 0.9 * record.init["prior_entropy"]


# --- regression -------------------------------------------------------------------------------------------------------


@pytest.fixture
def regression(tmp_path: Path) -> tuple[str, ...]:
    """Targets around 5000 with a spread of about 30: none would be learnt in these units at an ordinary rate."""
    value = {"big": 30.0, "small": -30.0, "round": 10.0}
    rows = [(" ".join(s), 5000 + sum(value.get(word, 0.0) for word in s)) for s in sentences(90)]
    write_csv(tmp_path / "train.csv", rows[:60], "text,score")
    write_csv(tmp_path / "dev.csv", rows[60:], "text,score")
    return ("data=csv", f"data.root={tmp_path}", "data.task=regression")


@pytest.mark.parametrize(
    ("policy", "head"), [("all", "linear"), ("none", "linear"), ("all", "mlp"), ("all", "attention_pool")]
)
def test_regression_is_in_the_units_of_the_targets(
    settings: Callable[..., Settings], regression: tuple, tmp_path: Path, policy: str, head: str
) -> None:
    chosen = settings(*regression, f"freeze={policy}", f"head={head}", "trainer.epochs=20")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    outputs, targets = saved_outputs(tmp_path / "run", splits.validation)[:, 0], splits.validation.labels[:, 0].numpy()
    wanted = {
        "mae": sklearn_metrics.mean_absolute_error(targets, outputs),
        "mse": sklearn_metrics.mean_squared_error(targets, outputs),
        "r2": sklearn_metrics.r2_score(targets, outputs),
        "pearson": stats.pearsonr(targets, outputs).statistic,
        "spearman": stats.spearmanr(targets, outputs).statistic,
    }
    assert record.val == pytest.approx(wanted, rel=2e-3, abs=2e-4)
    assert record.val["r2"] > 0.1
    assert record.config["trainer"]["monitor"] == "pearson"
    assert_start(record, float(splits.train.labels.numpy().astype(np.float64).var()))
    assert record.init["accuracy"] is None


def test_a_zero_head_of_a_regression_starts_at_the_mean(
    settings: Callable[..., Settings], regression: tuple, tmp_path: Path
) -> None:
    chosen = settings(*regression, "init=zeros", "trainer.epochs=0")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    mean = splits.train.labels.double().mean().item()
    assert saved_outputs(tmp_path / "run", splits.validation) == pytest.approx(np.full((30, 1), mean), rel=1e-6)
    assert record.init["loss"] == pytest.approx(record.init["chance_loss"], rel=1e-6)


@pytest.mark.parametrize("init", ["ridge", "auto"])
def test_ridge_starts_a_regression_below_the_variance(
    settings: Callable[..., Settings], regression: tuple, tmp_path: Path, init: str
) -> None:
    chosen = settings(*regression, f"init={init}", "trainer.epochs=0")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    outputs = saved_outputs(tmp_path / "run", splits.train)
    loss = ((outputs - splits.train.labels.numpy()) ** 2).mean()
    assert record.init["loss"] == pytest.approx(loss, rel=1e-3)
    assert loss < 0.7 * record.init["chance_loss"]


def test_heads_that_cannot_predict_numbers_are_refused(
    settings: Callable[..., Settings], regression: tuple, tmp_path: Path
) -> None:
    with pytest.raises(HeadInitError, match=r"without bias.*head=linear"):
        run(settings(*regression, "head=cosine"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_two_heads_is_refused() -> None:
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    headinit.attach_head(model, 1, task="regression")
    with pytest.raises(HeadInitError, match="joins the outputs of two heads"):
        Standardisation(torch.zeros(1), torch.ones(1)).fold(model)


@pytest.mark.parametrize(("head", "options"), [("linear", {}), ("mlp", {"hidden": [8], "activation": "gelu"})])
def test_folding_is_exact_for_several_targets(head: str, options: dict[str, Any]) -> None:
    model = headinit.attach_head(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)),
        3,
        head=head,
        head_options=options,
        task="regression",
    ).double()
    inputs, targets = torch.randn(40, 6).double(), torch.randn(40, 3).double() * torch.tensor([1e-3, 1.0, 400.0]) + 9
    scale = Standardisation.of(targets)
    before = model(inputs)
    scale.fold(model)
    torch.testing.assert_close(
        model(inputs), before * targets.std(0, correction=0) + targets.mean(0), rtol=1e-12, atol=0
    )


def test_constant_targets_and_own_fingerprints() -> None:
    split = Split(["a", "b"], torch.tensor([[1.0, 7.0], [3.0, 7.0]]), ["1", "2"], "f00d")
    splits = DataSplits(split, split, split, ("x", "y"), "text", "demo", "regression")
    scaled = Standardisation.of(split.labels).standardised(splits)
    assert scaled.train.labels.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    other = Standardisation.of(split.labels * 2).standardised(splits)
    assert len({split.fingerprint, scaled.validation.fingerprint, other.validation.fingerprint}) == 3


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[str, ...]:
    tags = {"Anna": ["B-PER"], "Oslo": ["B-LOC"], "Ber": ["B-LOC"], "Berlin": ["B-LOC"]}

    def lines(own: list[list[str]]) -> str:
        blocks = []
        for sentence in own:
            words = ["Berlin" if word == "Ber" else word for word in sentence]
            tagged = [(word, *tags.get(word, ["O"])) for word in words]
            for i in range(1, len(tagged)):  # the second of two equal names goes on
                if tagged[i - 1][0] == tagged[i][0] and tagged[i][1] != "O":
                    tagged[i] = (tagged[i][0], tagged[i][1].replace("B-", "I-"))
            blocks.append("\n".join(f"{word} {tag}" for word, tag in tagged))
        return "\n\n".join(blocks)

    (tmp_path / "train.conll").write_text(lines(sentences(200)))
    (tmp_path / "dev.conll").write_text(lines(sentences(60, seed=1)))
    return ("data=conll", f"data.root={tmp_path}")


def word_predictions(folder: Path, split: Split) -> list[list[int]]:
    """The saved model's tag of each word, by the tokenizer's own word numbers."""
    model = headinit.load(folder / "model")
    tokenizer = preprocessing_of(model).tokenizer
    found = []
    for words in split.items:
        encoded = tokenizer([list(words)], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        firsts = [encoded.word_ids(0).index(i) for i in range(len(words))]
        found.append(logits[firsts].argmax(1).tolist())
    return found


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Spans of one sentence; in these data every span starts at a `B-` or an `I-` after something else."""
    spans, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag != "I-" + tags[start][2:]:
            spans.add((start, i, tags[start][2:]))
            start = None
        if start is None and tag != "O":
            start = i
    return spans


@pytest.mark.parametrize("policy", POLICIES)
def test_token_classification(settings: Callable[..., Settings], tokens: tuple, tmp_path: Path, policy: str) -> None:
    chosen = settings(*tokens, f"freeze={policy}", "trainer.epochs=25", "optim.lr=0.03")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    names, known = splits.class_names, splits.validation.labels != IGNORED_LABEL
    assert names[0] == "O"
    found = word_predictions(tmp_path / "run", splits.validation)
    truth = [row[mask].tolist() for row, mask in zip(splits.validation.labels, known, strict=True)]
    assert record.val["accuracy"] == pytest.approx((np.concatenate(truth) == np.concatenate(found)).mean())
    sets = [
        {(i, *span) for i, own in enumerate(rows) for span in entities([names[k] for k in own])}
        for rows in (truth, found)
    ]
    right = len(sets[0] & sets[1])
    assert record.val["entity_f1"] == pytest.approx(2 * right / (len(sets[0]) + len(sets[1])))
    assert record.val["entity_f1"] > 0.5
    assert record.config["trainer"]["monitor"] == "entity_f1"
    assert_start(record, math.log(len(names)))


@pytest.mark.parametrize("init", ["ridge", "auto"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_start_from_data(
    settings: Callable[..., Settings], tokens: tuple, tmp_path: Path, init: str, policy: str
) -> None:
    record = run(settings(*tokens, f"init={init}", f"freeze={policy}", "trainer.epochs=0"), tmp_path / "run")
    assert record.init["loss"] < 0.9 * record.init["prior_entropy"]
    assert record.val["entity_f1"] > 0.3


def test_tokens_by_features_and_by_the_loop_are_the_same(
    settings: Callable[..., Settings], tokens: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(*tokens, "trainer.epochs=1", "trainer.batch_size=200", "trainer.clip_norm=null", "init=auto")
    by_features = run(chosen, tmp_path / "features")
    monkeypatch.setattr("headinit.experiment.trains_on_features", lambda *_: False)
    by_examples = run(chosen, tmp_path / "examples")
    assert by_examples.init["loss"] == pytest.approx(by_features.init["loss"], rel=1e-4)
    assert by_examples.steps == by_features.steps == 1
    for name, value in by_features.val.items():
        assert by_examples.val[name] == pytest.approx(value, abs=1e-4), name


def test_a_token_classifier_is_built_again_from_its_source(model_folder: Path) -> None:
    backbone = load_backbone(str(model_folder), task="token")
    again = build_library_model(json.loads(json.dumps(backbone.source)), 7)
    assert type(again) is type(backbone.model)
    ids = torch.tensor([[2, 5, 6, 3]])
    assert again(ids).logits.shape == (1, 4, 7)
    again.bert.load_state_dict(backbone.model.bert.state_dict())  # the same names and shapes
    assert load_backbone(str(model_folder)).model(ids).logits.ndim == 2


def test_tokens_need_a_model_and_a_head_for_tokens(
    settings: Callable[..., Settings], tokens: tuple, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="every word has a label"):
        run(settings(*tokens, "head=recurrent"), tmp_path / "run")
    pictures = ("model=timm", "model.name=test_resnet", "model.pretrained=false")
    with pytest.raises(ConfigError, match="reads pictures, and tokens are parts of text"):
        run(settings(*tokens, *pictures), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_saved_token_model_labels_words_as_transformers_does(
    settings: Callable[..., Settings], tokens: tuple, tmp_path: Path
) -> None:
    chosen = settings(*tokens, "trainer.epochs=1")
    run(chosen, tmp_path / "run")
    model = headinit.load(tmp_path / "run" / "model")
    assert type(model).__name__ == "BertForTokenClassification"
    batch = preprocessing_of(model)([Words(["Anna", "is", "big"])])
    assert model(**batch).logits.shape == (1, 5, len(load_splits(chosen).class_names))


# --- pairs, and what is common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_sentence_pairs(settings: Callable[..., Settings], tmp_path: Path, policy: str) -> None:
    first, second = sentences(90), sentences(90, seed=1)
    rows = [
        (" ".join(a), " ".join(b), "same" if set(a) & set(b) else "other") for a, b in zip(first, second, strict=True)
    ]
    write_csv(tmp_path / "train.csv", rows[:60], "premise,hypothesis,label")
    write_csv(tmp_path / "dev.csv", rows[60:], "premise,hypothesis,label")
    chosen = settings("data=csv", f"data.root={tmp_path}", f"freeze={policy}")
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    assert splits.validation.items[0] == rows[60][:2]
    logits, labels = saved_outputs(tmp_path / "run", splits.validation), splits.validation.labels.numpy()
    assert record.val["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, logits.argmax(1)))
    assert record.val["nll"] == pytest.approx(
        sklearn_metrics.log_loss(labels, torch.softmax(torch.tensor(logits), 1).numpy()), rel=1e-4
    )
    assert_start(record, math.log(2))


@pytest.mark.parametrize(
    ("task", "head"),
    [("multi_label", "linear"), ("regression", "linear"), ("regression", "mlp"), ("tokens", "linear")],
)
def test_a_cell_of_a_comparison_is_the_run_alone(
    settings: Callable[..., Settings], request: pytest.FixtureRequest, tmp_path: Path, task: str, head: str
) -> None:
    """Scores in the units of the data, the metric that chooses, and the start, for every task."""
    from headinit.comparison import Grid, compare_settings

    chosen = settings(*request.getfixturevalue(task), f"head={head}", "init=he", "optim.weight_decay=0.01")
    record = run(chosen, tmp_path / "run")
    grid = Grid.of(inits=["he"], lrs=chosen.optim.lr, seeds=[chosen.seed], weight_decays=0.01)
    found = compare_settings(chosen, grid, tmp_path / "comparison")
    (row,) = found.rows
    assert found.metric == record.config["trainer"]["monitor"]
    assert dict(row.val) == pytest.approx(dict(record.val), rel=1e-3, abs=1e-4)
    assert row.init_loss == pytest.approx(record.init["loss"], rel=1e-4)
    assert row.feature_gradient == pytest.approx(record.init["feature_gradient"], rel=1e-4)
    assert (row.steps, row.best_epoch) == (record.steps, record.best_epoch)
    assert "he" in found.table()


def test_a_metric_that_the_task_does_not_have_is_named(
    settings: Callable[..., Settings], regression: tuple, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"regression data 'accuracy'\. Known: mae, mse, pearson, r2, spearman"):
        run(settings(*regression, "trainer.monitor=accuracy"), tmp_path / "run")
    record = run(settings(*regression, "trainer.monitor=mae"), tmp_path / "other")
    best = min(json.loads(line)["mae"] for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines())
    assert record.val["mae"] == pytest.approx(best)
