"""Measures how often the interval of repeated runs covers the true score, in simulated studies.

A study's mean squares are those of a two-way layout of normal scores: independent of each other and of the mean, each a
multiple of a chi-square variable (Scheffé 1959, The Analysis of Variance, section 7.4). So they are drawn without the
rows. The mean is not drawn: given the interval's width, the chance that it covers the truth is exact.
"""

from itertools import product

import numpy as np
from markdown_table import print_markdown
from scipy.special import ndtr

from qlora_recipes.evaluate.intervals import MeanSquares

RUNS = (2, 3, 5, 10)
ROWS = (100, 400, 1319)
RATIOS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)
"""Variances of the mean score due to runs, divided by that due to rows."""
STUDIES = 20_000  # the coverage is then exact to 0.2 points
RESIDUAL = 0.5  # variance of the residual, divided by that of rows


def coverage(runs: int, rows: int, ratio: float, studies: int = STUDIES) -> float:
    """Share of studies whose 95 % interval covers the truth; `ratio` is one of `RATIOS`."""
    chance = np.random.default_rng(70)
    by_run, by_row, rest = runs / rows * ratio, 1.0, RESIDUAL
    of_runs = (rest + rows * by_run) * chance.chisquare(runs - 1, studies) / (runs - 1)
    of_rows = (rest + runs * by_row) * chance.chisquare(rows - 1, studies) / (rows - 1)
    df_rest = (runs - 1) * (rows - 1)
    of_rest = rest * chance.chisquare(df_rest, studies) / df_rest
    error = (by_run / runs + by_row / rows + rest / runs / rows) ** 0.5
    halves = [MeanSquares(*squares, runs, rows).half_width() for squares in zip(of_runs, of_rows, of_rest, strict=True)]
    return float(np.mean(2 * ndtr(np.array(halves) / error) - 1))


def main() -> None:
    table = []
    for runs, rows in product(RUNS, ROWS):
        covered = {f"{ratio:g}": f"{coverage(runs, rows, ratio):.1%}" for ratio in RATIOS}
        table.append({"runs": runs, "rows": rows} | covered)
    print_markdown(table)


if __name__ == "__main__":
    main()
