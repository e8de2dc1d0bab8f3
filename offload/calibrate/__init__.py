"""What the present machine does in a second, measured, for the performance model."""

from offload.calibrate.cached import present_machine
from offload.calibrate.present import calibrate

__all__ = ["calibrate", "present_machine"]
