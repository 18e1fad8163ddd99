"""The study's plots. Each function returns a :class:`~llamafactory_sekd.reporting.document.Plot`, or None."""
