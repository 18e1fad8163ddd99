"""The study's plots. Each function returns a :class:`~llamafactory_sekd.study.report.document.Plot`, or None."""
