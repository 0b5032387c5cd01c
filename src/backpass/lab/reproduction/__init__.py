"""Running the experiments of the papers, and one page of all verdicts."""
