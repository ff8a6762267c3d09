"""Start the ranks of a plan, here or on many hosts, and watch them."""
