"""Matrices of runs: every cell trained and evaluated by the host's own commands, collected into one table."""
