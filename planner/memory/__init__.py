"""The memory of a rank: predicted peaks per phase and tier, upper bounds, the timeline of a step."""
