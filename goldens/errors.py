"""What `goldens` raises: one class, one clear line with the way out."""


class GoldenError(ValueError):
    """A golden can't be used as it is (unreadable, stale, tampered with, locked); the message says what to do."""
