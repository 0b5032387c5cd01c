"""Experiments: each asks a question, measures it over seeds and answers with a result."""
