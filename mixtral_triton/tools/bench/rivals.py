"""Tiles of the expert kernels that other projects measured as the fastest, as candidates of the tuner.

Their kernel takes one tile for both products and counts gate and up rows together, as our tables do.
"""

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...kernels.arch import family, tma
from ...kernels.fp8 import W8A8
from ...kernels.launch import Launch, LaunchConfig

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"  # of the repository; an installed package has none
MEASURED = BENCHMARKS / "tiles" / "measured.csv"
CARDS = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "RTX_4090": "sm_89", "L40S": "sm_89"}
CARDS |= {"MI300X": "gfx942", "MI325X": "gfx942"}
DTYPES = {None: "bf16", W8A8: "fp8_w8a8", "int8": "int8_w8a16"}  # by the format of a weight
_TILE = re.compile(r"(\d+)x(\d+)x(\d+) g(\d+) w(\d+) s(\d+)")
# Of Hopper's prefill: 192 rows were never in the search of others, 128 were the fastest there.
HOPPER_ROWS = (192, 128)


def measured_tiles(arch: str, sizes: Any, card: str = "") -> dict[str, str]:
    """Return the fastest tiles for the sizes nearest to those of an expert layer, by card and sizes; {} where nothing
    near was measured. card: the name of the GPU, whose own files come before those of its architecture."""
    format = getattr(sizes, "gate_up", None)
    if not MEASURED.is_file() or format not in DTYPES or not hasattr(sizes, "I"):
        return {}
    with MEASURED.open() as file:
        rows = [*csv.DictReader(line for line in file if not line.startswith("#"))]
    of_card = {name for name in CARDS if re.sub(r"\W", "_", card).find(name) >= 0}
    known = (
        of_card
        or {name for name, of in CARDS.items() if of == arch}
        or {name for name, of in CARDS.items() if family(of) == family(arch)}
    )
    rows = [row for row in rows if row["dtype"] == DTYPES[format] and any(name in row["device"] for name in known)]

    def distance(row: Mapping[str, str]) -> float:
        return abs(math.log(int(row["E"]) / sizes.E)) + abs(math.log(int(row["N"]) / sizes.I))

    nearest = min(map(distance, rows), default=0.0)
    found = {}
    for row in (row for row in rows if distance(row) == nearest):
        tokens = [int(name) for name, cell in row.items() if name.isdigit() and cell]
        T = min(tokens, key=lambda tokens: abs(math.log(tokens / sizes.T)))
        found[f"{row['device']}, E {row['E']}, N {row['N']}, {T} tokens"] = row[str(T)]
    return found


def rivals(launch: Launch, config: LaunchConfig, arch: str, sizes: Any, card: str = "") -> dict[str, LaunchConfig]:
    """Return the configurations of an expert kernel that others measured, by where they come from."""
    if not re.match("experts_(up|down)_", launch.kernel):
        return {}
    found = {}
    for source, text in measured_tiles(arch, sizes, card).items():
        rows, columns, depth, group, warps, stages = map(int, _TILE.fullmatch(text).groups())  # type: ignore[union-attr]
        found[f"measured: {source}"] = _with_tile(launch, config, rows, columns, depth, warps, stages, group)
    now = config.constexprs
    if tma(arch) and now.get("SHORT_M") and now["BLOCK_M"] in HOPPER_ROWS:
        for rows in HOPPER_ROWS:
            found[f"{rows} rows"] = replace(config, constexprs={**now, "BLOCK_M": rows})
    return found


def _with_tile(
    launch: Launch, config: LaunchConfig, rows: int, columns: int, depth: int, warps: int, stages: int, group: int
) -> LaunchConfig:
    now = config.constexprs
    tiles = {"BLOCK_T" if "BLOCK_T" in now else "BLOCK_M": rows, "GROUP_M": group}
    tiles["BLOCK_N"] = max(16, columns // (2 if "_up_" in launch.kernel else 1))
    format = launch.constexprs["LAYOUT"][0]
    if format in ("dense", W8A8):  # else the layout of the weight fixes the depth
        tiles["BLOCK_K"] = min(depth, 128) if format == W8A8 else depth
    tiles["SHORT_M"] = now.get("SHORT_M", 0) if rows > now.get("SHORT_M", 0) else 0
    return LaunchConfig({**now, **{name: size for name, size in tiles.items() if name in now}}, warps, stages)
