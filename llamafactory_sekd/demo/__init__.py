"""The demo: the whole job on a small scale, through the commands that a user would type."""
