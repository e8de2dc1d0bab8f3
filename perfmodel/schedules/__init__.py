"""Schedules as pure functions: from what was seen and what the machine can do, to what to do."""
