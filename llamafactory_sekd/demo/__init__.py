"""The demo: the complete job on a small scale, through the commands that a user would type."""
