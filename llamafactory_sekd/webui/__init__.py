"""Our part of LLaMA Board: training panel, evaluation section, token view. Gradio, and nothing of the host."""
