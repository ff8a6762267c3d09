"""Other hosts: hostfiles, ssh, and the command of a rank there."""
