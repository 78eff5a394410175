"""`python -m t5x_like` is the same as `t5x-like`."""

from t5x_like.cli.main import entry

if __name__ == "__main__":
    entry()
