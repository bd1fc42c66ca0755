"""Many runs compared: a grid of schemes, learning rates, seeds, sample sizes and freeze policies, with its statistics.

Where the backbone is frozen its features are computed once, for all splits and sample sizes together, and the linear
heads are trained in banks (`headinit.training.head_bank`). All other cells are ordinary runs (`headinit.experiment`).
A cell is finished once its line is on the disk: a comparison that was killed goes on with the cells that are missing.
"""

from headinit.comparison.grid import Cell, Grid, plan_from
from headinit.comparison.outcome import Comparison, compare_runs
from headinit.comparison.study import compare, compare_settings

__all__ = ["Cell", "Comparison", "Grid", "compare", "compare_runs", "compare_settings", "plan_from"]
