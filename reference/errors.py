"""What `reference` raises: ValueErrors of one clear line that names the thing and the way out."""


class CheckpointError(ValueError):
    """A weights folder can't be used as it is (missing, mis-shaped, contradictory); the message says what to do."""


class ArithmeticClaimError(ValueError):
    """A claim about a candidate's arithmetic names something that does not exist; the message lists what does."""
