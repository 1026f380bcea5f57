"""Train a latent diffusion model on real images: ``accelerate launch train_ldm.py --dataset tinyimagenet``."""

from __future__ import annotations

import sys

from ddgen.cli import run


def main(argv: list[str] | None = None) -> int:
    """Runs ``ddgen train`` and returns its exit code."""
    return run("train", argv, prog="train_ldm.py")


if __name__ == "__main__":
    sys.exit(main())
