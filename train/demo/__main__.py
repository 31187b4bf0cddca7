"""`python -m train.demo`: build data, train every stage, generate meshes and write one report page."""

from pipeline.core.cli import command
from train.demo.steps import main

if __name__ == "__main__":
    command(main)
