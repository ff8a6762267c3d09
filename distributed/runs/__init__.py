"""The run folder: status, heartbeat and measurements of the ranks."""
