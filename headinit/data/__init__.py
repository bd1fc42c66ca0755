"""Where examples come from: data sets by name, their splits and subsets, preprocessing and batches."""
