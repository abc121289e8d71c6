"""How often an unfinished epoch or evaluation is saved (`--save-every 5m`, `--save-every 200`); changes no result."""

import re
import time
from dataclasses import dataclass

from blipfit.errors import UserError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class SaveInterval:
    """Time, or steps of training and batches of an evaluation, from one save to the next; one of both is None."""

    seconds: float | None = 300.0
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SaveInterval":
        """Read `90s`, `5m`, `1h` or a number of steps. Raises UserError for anything else."""
        if match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smh])", text.strip()):
            return cls(seconds=float(match[1]) * _UNITS[match[2]])
        if re.fullmatch(r"[1-9]\d{0,8}", text.strip()):
            return cls(seconds=None, steps=int(text))
        raise UserError(f"--save-every {text!r:.40}: expected a time (90s, 5m, 1h) or a number of steps (200)")


class SaveTimer:
    """Counts steps and time since the last save."""

    def __init__(self, interval: SaveInterval):
        self.interval = interval
        self.reset()

    def reset(self) -> None:
        """Start a new interval; call it after every save."""
        self.steps, self.started_at = 0, time.monotonic()

    def count_step(self) -> None:
        """Count one step of training or one batch of an evaluation."""
        self.steps += 1

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed."""
        if self.interval.steps is not None:
            return self.steps >= self.interval.steps
        return time.monotonic() - self.started_at >= (self.interval.seconds or 0.0)
