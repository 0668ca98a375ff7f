"""A part with planted faults, one a case: that the fuzzer sees them is a test (tests/files/test_fuzz.py)."""

import os
import time


def cases(folder):
    held = []

    def case(number: int, rng, place):
        if number == 1:
            os.kill(os.getpid(), 11)
        elif number == 2:
            time.sleep(60)
        elif number == 3:
            held.append(b"x" * (1 << 30))
        elif number == 4:
            raise KeyError("planted")
        return "planted words" if number == 5 else None

    return case
