"""The plot of `bench`: what is known without times, times beside floors, and labels that do not cover each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mixtral_triton.tools.bench.cases import TOKENS, cases
from mixtral_triton.tools.bench.measure import Outcome, Row, untimed_row
from mixtral_triton.tools.bench.report import figure_of, plot, series_of
from mixtral_triton.tools.gpus import GPUS

pytest.importorskip("matplotlib")
H100 = GPUS["h100"]


def floors(*names: str, quick: bool = True) -> list[Row]:
    return [untimed_row(case, H100) for case in cases(names, quick=quick)]


def dense(*names: str) -> list[Row]:
    """Over the tokens alone: quantized weights are series of their own."""
    return [
        row for row in floors(*names, quick=False) if row.case.sizes["H"] == 4096 and "down" not in row.case.as_dict()
    ]


def timed(row: Row) -> Row:
    peers = {name: Outcome(row.floor_s * 3, right=True) for name in ("torch", "examples.my_experts:swiglu")}
    peers["mine:off"] = Outcome(note="wrong: an error of 1.0e-01", right=False)
    return replace(row, ours=Outcome(row.floor_s * 2, right=True), peers=peers)


def shown(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.axison]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_without_times_floors_and_what_sets_them_and_no_roofline() -> None:
    figure = figure_of(dense("expert_swiglu", "rms_norm"), H100)
    norm, experts = shown(figure)
    assert (
        "no time was measured" in figure.get_suptitle() and experts.get_title() == "expert_swiglu, H4096 I14336 E8 K2"
    )
    assert labels(experts) == ["floor", "floor set by memory", "floor set by compute"]
    assert labels(norm) == ["floor", "floor set by memory"]
    assert experts.get_xlabel() == "T, tokens" and list(experts.lines[0].get_xdata()) == list(TOKENS)


def test_with_times_the_roofline_and_every_way_over_the_tokens() -> None:
    rows = [timed(row) for row in dense("expert_swiglu")]
    roofline, panel = shown(figure_of(rows, H100))
    assert roofline.get_title() == "roofline: ours" and labels(roofline) == ["floor", "expert_swiglu"]
    ways = ["floor", "ours", "torch", "examples.my_experts:swiglu", "mine:off: wrong"]
    assert labels(panel)[: len(ways)] == ways
    ours = next(line for line in panel.lines if line.get_label() == "ours")
    assert list(ours.get_ydata()) == pytest.approx([row.floor_s * 2e6 for row in rows])


def test_a_series_differs_in_one_size_and_no_row_is_lost() -> None:
    for name in ("expert_swiglu", "attention", "cached_attention", "decode_step", "linear"):
        rows = floors(name, quick=False)
        axis, found = series_of(rows)
        assert sum(map(len, found)) == len(rows)
        for series in found:
            sizes = [row.case.sizes[axis] for row in series]
            assert sizes == sorted(set(sizes))
    axis, found = series_of(floors("attention", quick=False))
    prompts = [series for series in found if len(series) > 3]
    assert prompts and all(len({row.case.sizes["T"] for row in series}) > 1 for series in prompts), (
        "T and S are one size"
    )


@pytest.mark.parametrize("with_times", [False, True])
def test_no_label_covers_another(with_times: bool, tmp_path: Path) -> None:
    rows = floors("expert_swiglu", "attention", "linear", quick=False)
    figure = figure_of([timed(row) for row in rows] if with_times else rows, H100)
    figure.savefig(tmp_path / "a.png")  # which lays it out
    texts = [text for axes in shown(figure) for text in (axes.title, axes.xaxis.label, *axes.get_legend().get_texts())]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    boxes += [("axes", axes.get_window_extent()) for axes in shown(figure)]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for _, box in boxes), "nothing leaves the picture"


def test_a_file_of_every_kind_also_of_nothing(tmp_path: Path) -> None:
    for kind in ("png", "svg", "pdf"):
        plot([], H100, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").stat().st_size
