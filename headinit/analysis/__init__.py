"""What a run's numbers say: scores, records, start diagnostics, statistics, pictures and the report."""
