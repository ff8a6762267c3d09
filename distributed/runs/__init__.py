"""The run folder: its files, and the status, heartbeat and measurements of the ranks."""
