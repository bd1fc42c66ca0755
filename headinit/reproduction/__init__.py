"""Published numbers: their recipes, whether they can be run here, the runs, and what to make of them."""
