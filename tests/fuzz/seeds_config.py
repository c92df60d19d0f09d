#!/usr/bin/python3
"""Writes the seeds of fuzz_config into a folder: every configuration of the tiny checkpoints.

Usage: tests/fuzz/seeds_config.py FOLDER. Needs Python alone.
"""
import pathlib
import shutil
import sys

CHECKPOINTS = pathlib.Path(__file__).resolve().parent.parent / "golden" / "ckpt"


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in CHECKPOINTS.rglob("*.json"):
        shutil.copy(path, folder / "-".join(path.relative_to(CHECKPOINTS).parts))


if __name__ == "__main__":
    main()
