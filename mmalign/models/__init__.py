"""Models: load a policy, its family, its reference; the tiny ones that tests build."""
