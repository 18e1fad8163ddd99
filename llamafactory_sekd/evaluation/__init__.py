"""From models to translations, scores, significance and a report.

This room knows no training framework: what it needs from one (loading a model, encoding a prompt) is handed in as
plain callables, see :class:`llamafactory_sekd.evaluation.systems.Host`.
"""
