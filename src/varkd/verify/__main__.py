"""Check our modules against golden files: `python -m varkd.verify FILE.safetensors ...` (or schedule-*, shapes-*.json).

A golden file holds the weights of a tiny upstream model and the numbers that the upstream code computed with them; the
JSON beside it describes sizes, sampler runs and tolerances. Every tensor must be used: a key that no check reads is a
failure, so that nothing passes by being ignored. Prints the largest error per tensor; exit code 1 beyond tolerance.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from varkd.errors import VarkdError
from varkd.verify.check import verify


def main(paths: Sequence[str]) -> int:
    """Print one line per tensor and one per file; 1 when anything is beyond tolerance or cannot be checked."""
    failed = not paths
    for path in paths:
        try:
            checks = verify(path)
        except VarkdError as error:
            print(f"FAIL {path}: {error}")
            failed = True
            continue
        for check in checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.error:9.2e}  {check.key}")
        passed = all(check.passed for check in checks)
        failed |= not passed
        print(f"{'ok  ' if passed else 'FAIL'} {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
