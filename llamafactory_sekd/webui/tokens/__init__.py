"""The tab "Token difficulty": one sentence before and after training, each target token with its difficulty."""

from __future__ import annotations

from llamafactory_sekd.webui.tokens.tokens_section import build_tokens_section


__all__ = ["build_tokens_section"]
