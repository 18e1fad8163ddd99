"""Knowledge distillation for an unmodified LLaMA-Factory, for machine translation first.

The public mathematics is in :mod:`llamafactory_sekd.objectives`; everything else is used through ``llamafactory-cli``.
"""

__version__ = "0.1.0"
