"""Print how often networks are found without their names, for each way of renaming.

    PYTHONPATH=. python tests/backbone/structure_table.py      (about ten minutes on one core)

"exact" is to the bit; "named" is refused, with the network among those named; "refused" is without it; "wrong" must not
be.
"""

import sys
from collections import Counter

from test_structure_recognition import CASES, QUICK, SLOW, outcome, random_weights


def main() -> None:
    """Try every network in every case, and print a row for each case."""
    archs = sys.argv[1:] or [*QUICK, *SLOW]
    counts: dict[tuple[str, str], Counter[str]] = {
        (rename.__name__, container): Counter() for rename, container in CASES
    }
    for done, arch in enumerate(archs, 1):
        state = random_weights(arch)
        for rename, container in CASES:
            renamed = rename(state) if container == "torch" else dict(sorted(rename(state).items()))
            result = outcome(arch, state, renamed, container)
            counts[rename.__name__, container][result] += 1
            if result != "exact":
                print(f"{arch}: {rename.__name__}, {container}: {result}", flush=True)
        if done % 10 == 0 or done == len(archs):
            _print_table(counts, done)


def _print_table(counts: dict[tuple[str, str], Counter[str]], done: int) -> None:
    """The share of each result among the networks tried so far."""
    print(f"{done} networks")
    print(f"{'names':<22}{'container':<14}{'exact':>8}{'named':>8}{'refused':>9}{'wrong':>7}")
    for (rename, container), results in counts.items():
        shares = [f"{results[one] / done:.1%}" for one in ("exact", "named", "refused", "wrong")]
        print(f"{rename:<22}{container:<14}{shares[0]:>8}{shares[1]:>8}{shares[2]:>9}{shares[3]:>7}", flush=True)


if __name__ == "__main__":
    main()
