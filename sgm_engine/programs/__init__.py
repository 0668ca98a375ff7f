"""What the programs of the project have in common: ``sgm``, and those of ``python -m``. Nothing heavy is imported."""
