"""A stand-in for context-parallel ranks in tests on one process."""


class GroupInTurn:
    """Stands for a process group of which one test is every member in turn."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size
