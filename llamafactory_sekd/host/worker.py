"""What torchrun starts for each rank under ``python -m llamafactory_sekd train``."""

from llamafactory_sekd.cli import apply_plugin


if __name__ == "__main__":
    apply_plugin()
    from llamafactory.train.tuner import run_exp

    run_exp()
