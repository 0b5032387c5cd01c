"""What an experiment of a paper is, and its finished pieces on disk."""
