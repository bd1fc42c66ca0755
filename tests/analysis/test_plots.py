"""Pictures: what they show is read back from the axes; they draw with hostile names, gaps and single runs."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from headinit.analysis import plots
from headinit.analysis.diagnostics import logit_histogram
from headinit.analysis.results import RunRow
from headinit.analysis.statistics import analyse, expected_best, rank_schemes

HOSTILE = ("$x^", "_hidden", "<script>alert(1)</script>", "a\nb", "日本語", "x" * 200, "\\frac{", "")


def rows_of(names: tuple[str, ...] = ("he", "ridge"), seeds: int = 3, rates: tuple[float, ...] = (0.01, 0.1), **more):
    return [
        RunRow(
            init=name,
            lr=lr,
            seed=seed,
            val={"accuracy": 0.5 + 0.1 * k - lr + seed / 100},
            test={"accuracy": 0.5 + 0.1 * k + seed / 100},
            history=[(0, 0.1), (10, 0.4 + seed / 100), (20, 0.5 + 0.1 * k + seed / 100)],
            steps=20,
            init_loss=2.3 + k,
            feature_gradient=0.1 * k,
            data="digits",
            **more,
        )
        for k, name in enumerate(names)
        for lr in rates
        for seed in range(seeds)
    ]


def opened(figure) -> Image.Image:
    picture = Image.open(io.BytesIO(plots.png_bytes(figure, dpi=50)))
    picture.load()
    assert min(picture.size) > 40
    assert len(set(picture.convert("L").tobytes())) > 10  # not an empty sheet
    return picture


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("names", [("he",), ("he", "ridge"), tuple(f"scheme {k}" for k in range(12)), HOSTILE])
def test_every_picture_of_a_block_draws(names: tuple[str, ...], seeds: int) -> None:
    rows = rows_of(names, seeds)
    (block,) = analyse(rows)
    figures = [
        plots.learning_curves(rows, block),
        plots.rate_heat_map(rows, block),
        plots.scheme_scores(block),
        plots.expected_best_curves(block),
        plots.start_overview(block, 2.3),
    ]
    for figure in figures:
        opened(figure)
        assert any(axes.get_xlabel() for axes in figure.axes)


@pytest.mark.parametrize("draw", [plots.head_spectra, plots.logit_histograms])
def test_pictures_of_the_heads_draw_with_hostile_names(draw) -> None:
    import torch

    spectrum = draw is plots.head_spectra
    entries = {name: [3.0, 1.0, 0.0] if spectrum else logit_histogram(torch.randn(20, 3)) for name in HOSTILE}
    opened(draw(entries))
    opened(draw({"zeros": [0.0, 0.0] if spectrum else logit_histogram(torch.zeros(4, 2))}))


def test_curves_show_the_mean_and_the_band_of_the_chosen_setting() -> None:
    rows = rows_of()
    (block,) = analyse(rows)
    (axes,) = plots.learning_curves(rows, block).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(lines["ridge"], [10, 41, 61])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.max(), band.min()) == (pytest.approx(62), pytest.approx(10))
    assert axes.get_xlabel() == "optimizer steps"
    assert axes.get_ylabel() == "validation accuracy (%)"


def test_a_run_that_stopped_early_keeps_its_last_value() -> None:
    rows = rows_of(("he",), seeds=1, rates=(0.1,))
    longer = RunRow(init="he", lr=0.1, seed=9, val={"accuracy": 0.5}, data="digits", history=[(0, 0.1), (40, 0.9)])
    (block,) = analyse([*rows, longer])
    (axes,) = plots.learning_curves([*rows, longer], block).axes
    assert axes.get_lines()[0].get_ydata()[-1] == pytest.approx((50 + 90) / 2)


def test_heat_map_holds_the_means_and_frames_the_choice() -> None:
    rows = [row for row in rows_of() if (row.init, row.lr) != ("he", 0.1)]
    (block,) = analyse(rows)
    axes = plots.rate_heat_map(rows, block).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), [[60, 51], [50, np.nan]], atol=1e-9)
    assert [text.get_text() for text in axes.texts] == ["60.0", "51.0", "50.0", "no score"]
    assert [round(patch.get_x() + 0.48) for patch in axes.patches] == [0, 0]


def test_scores_show_every_run_and_the_interval() -> None:
    rows = rows_of(seeds=5)
    (block,) = analyse(rows)
    (axes,) = plots.scheme_scores(block).axes
    np.testing.assert_allclose(sorted(axes.collections[0].get_offsets()[:, 0]), [60, 61, 62, 63, 64])
    best = block.summaries[0].mean
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), [100 * best.low, 100 * best.high])
    assert axes.get_xlabel() == "test accuracy (%)"


def test_expected_best_is_drawn_against_the_budget() -> None:
    (block,) = analyse(rows_of())
    (axes,) = plots.expected_best_curves(block).axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), 100 * np.array(expected_best([0.6, 0.51])))


@pytest.mark.parametrize("size", [1, 2, 10, 60])
def test_confusion_map_of_any_size(size: int) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (size, size))
    counts[0] = 0  # a class without examples
    figure = plots.confusion_map(counts, [f"${k}" for k in range(size)])
    opened(figure)
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown.sum(axis=1), [0] + [1] * (size - 1))
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("count", [2, 3, 10])
def test_critical_difference_diagram_names_every_scheme(count: int) -> None:
    scores = np.random.default_rng(0).normal(size=(6, count)) + np.arange(count)
    ranking = rank_schemes([f"s{k}" for k in range(count)], [str(n) for n in range(6)], scores)
    figure = plots.critical_difference_diagram(ranking)
    opened(figure)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    for name, rank in ranking.mean_ranks.items():
        assert name in words
        assert f"{rank:.2f}" in words


def test_styles_tell_schemes_apart() -> None:
    styles = [tuple(sorted(plots._style(k).items())) for k in range(32)]
    assert len(set(styles)) == 32


def test_pyplot_and_its_settings_are_left_alone(tmp_path) -> None:
    code = (
        "import sys; from headinit.analysis import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.save_figure(plots.head_spectra({{'he': [2.0, 1.0]}}), {str(tmp_path / 'new' / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
