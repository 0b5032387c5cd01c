"""The demo: the rules of four papers at work on real handwritten digits, one page."""
