"""How often mean - k std picks another completion than the minimum, by the size of the pool, if scores are Gaussian.

    python bench/small_pools.py

Simulated with the code that selects. With population std no score lies below mean - std * sqrt(N - 1).
"""

from croco.config.rules import parse_chosen, parse_rejected
from croco.stages.pair.select import expected_share

SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
RULES = ("mean-1std", "mean-2std", "mean-3std", "quantile:0.05", "q1")


def main() -> None:
    print(f"{'completions':>11} " + " ".join(f"{rule:>13}" for rule in RULES))
    for size in SIZES:
        shares = [expected_share(parse_chosen("max"), parse_rejected(rule), size) for rule in RULES]
        print(f"{size:>11} " + " ".join(f"{share:>13.0%}" for share in shares))


if __name__ == "__main__":
    main()
