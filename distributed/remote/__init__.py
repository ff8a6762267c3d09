"""Other hosts: the launch target, hostfiles, ssh, and the command that each remote rank runs."""
