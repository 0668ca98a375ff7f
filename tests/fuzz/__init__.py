"""Fuzzing: ``make fuzz``, or ``python -m tests.fuzz [PART …] --seed N --cases N --seconds S``. See __main__.py."""
