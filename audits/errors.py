"""What stops an audit from judging."""


class CannotJudge(Exception):
    """No judgement is possible; the message says why. The verdict is "could-not-judge", never a pass."""
