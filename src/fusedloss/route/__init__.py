"""Which path a call takes, and why."""
