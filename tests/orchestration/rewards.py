from zlib import crc32


def always_one(text, label, metadata) -> float:
    return 1.0


def by_text_where_labelled(text, label, metadata) -> float:
    return crc32(text.encode()) / 2**32 if label else 1.0


def by_length(text, label, metadata) -> float:
    return float(len(text))


def missing_key(text, label, metadata) -> float:
    return metadata["difficulty"]


def exits(text, label, metadata) -> float:
    raise SystemExit("the grader's server is gone")


def share_of_odd_digits(text, label, metadata) -> float:
    digits = [c for c in text if c.isdigit()]
    return sum(int(c) % 2 for c in digits) / max(len(digits), 1)
