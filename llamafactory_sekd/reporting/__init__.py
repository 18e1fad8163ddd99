"""One room for everything that is shown to people: documents of tables and figures, their forms, the metrics' labels.

Evaluation, study and demo describe *what* they show as a :class:`~llamafactory_sekd.reporting.document.Document`; this
room knows how it looks as Markdown, HTML, LaTeX and in the terminal.
"""
