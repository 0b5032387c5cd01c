"""Reports: results, claims and their verdicts, statistics, plots, and one self-contained page."""
