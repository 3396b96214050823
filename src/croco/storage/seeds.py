"""Seeds that name a sample, not a position in a batch, so a resumed, resharded or re-batched run draws the same
completions."""

import hashlib


def digest(*parts: object) -> int:
    """A stable 63-bit integer in [0, 2**63) for a tuple of values, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def sample_seed(run_seed: int, prompt_id: str, language: str, sample_id: int) -> int:
    """The seed in [0, 2**63) of one completion; it fits the completions table's int64 column."""
    return digest("sample", run_seed, prompt_id, language, sample_id)
