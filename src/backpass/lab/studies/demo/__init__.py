"""Demo: the methods of four papers on handwritten digits, as one report."""
