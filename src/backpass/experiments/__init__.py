"""Experiment harness: runs arms x seeds, stores outcomes, compares arms, tests claims and writes the report."""
