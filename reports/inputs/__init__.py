"""What reports read: plans, runs, benchmark records."""
