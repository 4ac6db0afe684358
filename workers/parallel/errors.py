"""What goes wrong with a group of ranks."""


class GroupBroken(RuntimeError):
    """A rank is gone, silent or has given up: nothing can be computed with this group any more. Says who and why."""
