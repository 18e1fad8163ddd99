"""The only rooms that know LLaMA-Factory's modules."""
