"""What `engine` raises: two classes, each one clear line with the way out."""


class CheckpointError(ValueError):
    """A model folder can't be used as it is: the message names the file, tensor or key, and what was expected."""


class DeviceError(ValueError):
    """A device was asked for that MLX doesn't offer here; the message says why and what to ask for instead."""
