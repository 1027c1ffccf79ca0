"""HTML pages: one self-contained file, no network, all text escaped."""
