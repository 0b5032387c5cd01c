"""Reports: results, claims with verdicts, statistics, plots and self-contained HTML pages."""
