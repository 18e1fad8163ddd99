"""The section "Translation quality": `llamafactory-cli eval` from the page."""

from __future__ import annotations

from llamafactory_sekd.webui.quality.quality_section import QualitySection, build_quality_section


__all__ = ["QualitySection", "build_quality_section"]
