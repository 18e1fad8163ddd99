"""Parallel text: from its sources to instruction records, test sets and the Parrot prompt."""
