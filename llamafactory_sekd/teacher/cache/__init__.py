"""The offline teacher: its answers on disk, by example, read while training."""
