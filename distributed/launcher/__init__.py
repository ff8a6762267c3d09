"""Launch a plan: start its ranks on this machine or on the hosts of a hostfile, and watch them until they end."""
