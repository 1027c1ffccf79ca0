"""Training: one loop, objectives by what a batch holds."""
