"""The plot of `bench`: floors, times beside them, and labels that do not overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mixtral_triton.tools.bench.cases import TOKENS, cases
from mixtral_triton.tools.bench.measure import Outcome, Row, untimed_row
from mixtral_triton.tools.bench.report import figure_of
from mixtral_triton.tools.gpus import GPUS

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.compiled
H100 = GPUS["h100"]


def floors(*names: str) -> list[Row]:
    return [untimed_row(case, H100) for case in cases(names)]


def dense(*names: str) -> list[Row]:
    """Return rows that differ in the tokens alone."""
    return [row for row in floors(*names) if row.case.sizes["H"] == 4096 and "down" not in row.case.as_dict()]


def with_times(row: Row) -> Row:
    peers = {name: Outcome(row.floor_s * 3, right=True) for name in ("torch", "examples.my_experts:swiglu")}
    peers["mine:off"] = Outcome(note="wrong: an error of 1.0e-01", right=False)
    return replace(row, ours=Outcome(row.floor_s * 2, right=True), peers=peers)


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_legend().get_texts()]


def test_plot_of_floors_predicted_times_and_times() -> None:
    rows = dense("expert_swiglu", "rms_norm")
    figure = figure_of(rows, H100)
    experts, norm = figure.axes
    assert "these are floors and predicted times" in " ".join(figure.get_suptitle().split())
    assert labels(experts) == labels(norm) == ["floor", "predicted"]
    assert experts.get_title() == "expert_swiglu, bfloat16, H4096 I14336 E8 K2"
    assert [tick.get_text() for tick in experts.get_xticklabels()] == [f"T{T}" for T in TOKENS]
    (bars,) = experts.collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    said = [row.predicted for row in rows if row.case.op.name == "expert_swiglu"]
    assert ends == [pytest.approx([1e6 * one.seconds, 1e6 * one.cautious]) for one in said if one]
    _, panel = figure_of(list(map(with_times, rows)), H100).axes
    assert labels(panel) == ["floor", "ours", "torch", "examples.my_experts:swiglu", "predicted"]
    assert panel.lines[1].get_ydata() == pytest.approx([2 * time for time in panel.lines[0].get_ydata()])
    figure = figure_of([replace(row, predicted=None) for row in rows], GPUS["a10"])
    assert "these are floors" in figure.get_suptitle() and labels(figure.axes[0]) == ["floor"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("timed", [False, True])
def test_no_label_of_the_plot_overlaps_another(timed: bool, tmp_path: Path) -> None:
    rows = floors("expert_swiglu", "attention", "linear")
    figure = figure_of(list(map(with_times, rows)) if timed else rows, H100)
    figure_of([], H100).savefig(tmp_path / "empty.pdf")
    figure.savefig(tmp_path / "a.png")  # computes the layout
    texts = [label for axes in figure.axes for label in (axes.title, *axes.get_legend().get_texts())]
    for axes in figure.axes:  # of many cases the labels stand at horizontal bars
        texts += axes.get_yticklabels() if axes.patches else axes.get_xticklabels()
    boxes = [(label.get_text(), label.get_window_extent()) for label in texts]
    boxes += [("axes", axes.get_window_extent()) for axes in figure.axes]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for _, box in boxes)


def test_more_than_20_cases_are_horizontal_bars_by_their_floors() -> None:
    rows = floors("linear")
    (axes,) = figure_of(list(map(with_times, rows)), H100).axes
    assert len(rows) > 20 and len(axes.patches) == len(rows)
    floors_us = [bar.get_width() for bar in axes.patches]
    assert floors_us == sorted(1e6 * row.floor_s for row in rows)
    (times, *_) = axes.lines
    assert times.get_xdata() == pytest.approx([2 * one for one in floors_us]) and axes.get_xscale() == "log"
    assert len(axes.get_yticklabels()) == len(rows) and axes.get_xlabel() == "time, us"
    assert labels(axes) == ["ours", "torch", "examples.my_experts:swiglu", "predicted", "floor"]
