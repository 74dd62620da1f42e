"""What stops an audit from judging."""


class CannotJudge(Exception):
    """No judgement is possible; the message says why. The verdict is "could-not-judge", never a pass."""


class DeviceLost(Exception):
    """The device that the candidate computes on answers nothing any more, as after an illegal access on a GPU."""
