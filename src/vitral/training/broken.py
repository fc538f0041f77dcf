"""Training images that cannot be decoded: each is reported once, and too many raise an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vitral.data.fetch import describe
from vitral.data.records import Records
from vitral.errors import UserError, counted
from vitral.training.distributed import World

MAX_REPORTED = 10  # broken images listed in one report
MAX_FRACTION = 0.001  # fraction of the training images that may be broken


class BrokenImages:
    """Broken images found by all processes of a run.

    Args:
        known: index and reason of each image found before the run was resumed.
        message: function that prints a line.
    """

    def __init__(
        self,
        records: Records,
        world: World,
        known: Iterable[tuple[int, str]],
        message: Callable[[str], None],
    ) -> None:
        self.records, self.world, self.message = records, world, message
        self.known = dict(known)
        self.found: dict[int, str] = {}  # by this process, since the last `synchronize`

    def add(self, broken: Iterable[tuple[int, str]]) -> None:
        """Records the broken images of a batch.

        Raises:
            UserError: in a run with one process, if there are too many.
        """
        self.found.update(broken)
        if self.found and self.world.size == 1:
            self.synchronize()

    def synchronize(self) -> None:
        """Gathers the broken images of all processes and reports the new ones.

        Raises:
            UserError: if more than MAX_FRACTION of the training images are broken.
        """
        found = {i: why for part in self.world.gather(self.found) for i, why in part.items()}
        self.found = {}
        new = {i: found[i] for i in sorted(found) if i not in self.known}
        self.known |= new
        for i, why in list(new.items())[:MAX_REPORTED]:
            self.message(f"broken image, replaced by another: {describe(self.records, i)}: {why}")
        if len(new) > MAX_REPORTED:
            self.message(f"and {len(new) - MAX_REPORTED} more")
        if len(self.known) > MAX_FRACTION * len(self.records):
            first = sorted(self.known)[:MAX_REPORTED]
            names = ", ".join(describe(self.records, i) for i in first)
            verb = "is" if len(self.known) == 1 else "are"
            raise UserError(
                f"data: {len(self.known)} of {counted(len(self.records), 'training image')} {verb} "
                f"broken, more than {MAX_FRACTION:.1%}: {names} "
                f"(the first: {self.known[first[0]]}); "
                "fix or remove them and start again; `vitral data check` lists all of them"
            )
