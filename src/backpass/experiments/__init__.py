"""The harness of every experiment: arms x seeds are run, compared and judged, and become one page."""
